"""`random-vit`, `easy`, `heuristic`: cases small enough to follow by hand (one patch per group)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stts.pruners.in_vit import Easy, Heuristic, InVit, RandomVit
from stts.tokens import Budget, Grid, VideoTokens


def unit(cosine: float) -> list[float]:
    """A 2-D unit vector with this cosine to (1, 0)."""
    return [cosine, (1 - cosine**2) ** 0.5]


def video(cosines_TP: list[list[float]]) -> VideoTokens:
    """Frames of places that turn away from (1, 0)."""
    x_TPD: Tensor = torch.tensor([[unit(cosine) for cosine in row] for row in cosines_TP])
    num_frames, num_places, _ = x_TPD.shape
    number_G = torch.arange(num_frames * num_places)
    return VideoTokens(x_TPD.flatten(0, 1), Grid(num_frames, 1, num_places), number_G, number_G[:, None], uid="a")


def kept(method: InVit, tokens: VideoTokens, num_kept: int) -> list[int]:
    [result] = method([tokens], [Budget(num_kept, num_kept / tokens.num_groups, exact=True)])
    return result.index_K.tolist()


@pytest.mark.parametrize("method", [RandomVit(), Easy(), Heuristic()])
def test_all_decide_before_block_0_and_drop_where_stts_drops(method):
    assert (method.site.layer, method.site.drop_after) == (-1, 4)
    assert type(method)(prune_block=2).site.drop_after == 3


def test_random_does_not_favour_the_first_frame():
    tokens = video([[1.0] * 4] * 4)
    drawn = [kept(RandomVit(seed=seed), tokens, 8) for seed in range(20)]
    assert any(0 not in index for index in drawn) and any(0 in index for index in drawn)


def test_easy_drops_the_most_similar():
    # Similarities 1.0 and 0.95 in frame 1, 0.9 and cos(0.451 - 0.318) = 0.991 in frame 2; both means are above 0.85.
    tokens = video([[1.0, 1.0], [1.0, 0.95], [0.9, 0.9]])
    assert kept(Easy(), tokens, 5) == [0, 1, 3, 4, 5]
    assert kept(Easy(), tokens, 4) == [0, 1, 3, 4]
    assert kept(Easy(), tokens, 3) == [0, 1, 4]
    assert kept(Easy(), tokens, 2) == [0, 1]


def test_ties_are_kept_early():
    assert kept(Easy(), video([[1.0, 1.0]] * 4), 5) == [0, 1, 2, 3, 4]


def test_a_changed_frame_is_exempt_while_the_budget_allows():
    # Similarities 1.0 and 0.5 in frame 1 (mean 0.75: exempt at 0.85), 0.9 and 0.866 in frame 2 (mean 0.883).
    tokens = video([[1.0, 1.0], [1.0, 0.5], [0.9, 0.0]])
    assert kept(Easy(), tokens, 5) == [0, 1, 2, 3, 5]
    assert kept(Easy(), tokens, 4) == [0, 1, 2, 3]


def test_a_lower_tau_starts_all_over():
    # Similarities 1, 1, 0.3 in frame 1 (mean 0.767: exempt at 0.85), 0.9, 0.9, 0.8 in frame 2 (mean 0.867).
    tokens = video([[1.0, 1.0, 1.0], [1.0, 1.0, 0.3], [0.9, 0.9, -0.3328]])
    assert kept(Easy(), tokens, 6) == [0, 1, 2, 3, 4, 5]  # frame 2 goes whole
    # Four drops are more than frame 2 has. At 0.75 nothing is exempt: 0.3 and 0.8 stay.
    assert kept(Easy(), tokens, 5) == [0, 1, 2, 5, 8]
    # Without another try frame 2 goes whole, and then one of the two repeats.
    assert kept(Easy(num_tries=1), tokens, 5) in ([0, 1, 2, 3, 5], [0, 1, 2, 4, 5])


def test_when_no_tau_is_low_enough_exempt_frames_fill_up_and_frame_0_goes_last():
    # Everything changes: 0.1 and 0.3 in frame 1, cos(2.691 - 1.471) = 0.344 and 0.3 in frame 2.
    tokens = video([[1.0, 1.0], [0.1, 0.3], [-0.9, 1.0]])
    assert kept(Easy(), tokens, 5) == [0, 1, 2, 3, 5]
    assert kept(Easy(), tokens, 3)[:2] == kept(Easy(), tokens, 2) == [0, 1]
    assert kept(Easy(), tokens, 1) == [0]


def test_slow_drift_is_new_to_heuristic_but_not_to_easy():
    # Place 0 drifts by small steps, place 1 stands still. Angles: 0, 0.3, 0.6, 0.9 rad.
    drift = torch.arange(4) * 0.3
    tokens = video([[torch.cos(angle).item(), 1.0] for angle in drift])
    easy, heuristic = Easy(), Heuristic()
    [by_easy] = easy([tokens], [Budget(5, 0.6, True)])
    [by_heuristic] = heuristic([tokens], [Budget(5, 0.6, True)])
    step = torch.cos(torch.tensor([0.3, 0.3, 0.3]))
    torch.testing.assert_close(-by_easy.scores_G.view(4, 2)[1:, 0], step)
    # cos 0.3 = 0.955 stays with frame 0; cos 0.6 = 0.825 < 0.85 moves the reference to frame 2; then cos 0.3 again.
    expected = torch.cos(torch.tensor([0.3, 0.6, 0.3]))
    torch.testing.assert_close(-by_heuristic.scores_G.view(4, 2)[1:, 0], expected)
    assert by_heuristic.index_K.tolist()[:2] == [0, 1] and 4 in by_heuristic.index_K.tolist()


def test_heuristic_moves_everything_at_a_scene_change():
    # Frame 1 is a new scene in the mean (0.5), though place 1 keeps still; frame 2 then repeats frame 1.
    tokens = video([[1.0, 1.0], [0.0, 1.0], [0.0, 0.9]])
    [result] = Heuristic()([tokens], [Budget(4, 0.6, True)])
    torch.testing.assert_close(-result.scores_G.view(3, 2)[1:], torch.tensor([[0.0, 1.0], [1.0, 0.9]]))
    assert result.index_K.tolist() == [0, 1, 2, 3]


def test_windows_are_needed():
    tokens = video([[1.0, 1.0], [1.0, 0.9]])
    bare = VideoTokens(tokens.x_ND, tokens.grid, tokens.cell_G)
    for method in (Easy(), Heuristic()):
        with pytest.raises(ValueError, match="group_GW"):
            kept(method, bare, 3)


def test_flops():
    assert Easy(patches_per_group=9).flops(Grid(2, 3, 3), 10, 9) == 4 * 18 * 9 * 10
    assert Heuristic(patches_per_group=9).flops(Grid(2, 3, 3), 10, 9) == 2 * 6 * 18 * 9 * 10
    assert RandomVit().flops(Grid(2, 3, 3), 10, 9) == 0
