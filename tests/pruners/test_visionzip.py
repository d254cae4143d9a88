"""VisionZip by hand, at its edges, and against the loop that a reader would write."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stts.pruners.base import HostInfo
from stts.pruners.naive.visionzip import visionzip
from stts.pruners.visionzip import VisionZip
from stts.tokens import Budget, Grid, Kept, SinkPenalty, VideoTokens

HOST = HostInfo(
    family="tiny", vit_width=32, vit_mlp=8, vit_heads=4, vit_depth=6, lowest_tap=5, llm_width=8, llm_layers=8,
    patches_per_group=4,
)  # fmt: skip
# One frame of 2 x 3: places 4 and 1 are dominant; 0, 2, 3, 5 are left.
ATTENTION = [0.1, 0.5, 0.2, 0.05, 0.9, 0.0]
TOKENS = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
ALIKE = [[1.0, 0.0]] * 6


def one_frame(keys: list[list[float]], attention: list[float] = ATTENTION) -> VideoTokens:
    return VideoTokens(
        x_ND=torch.tensor(TOKENS)[:, None],
        grid=Grid(1, 2, 3),
        cell_G=torch.arange(6),
        salience_G=torch.tensor(attention),
        keys_GD=torch.tensor(keys),
    )


def structured_video(grid: Grid, seed: int = 0, dtype: torch.dtype = torch.float32) -> VideoTokens:
    """Frames that drift from a common one, so that keys of neighbouring places are alike but never equal."""
    draw = torch.Generator().manual_seed(seed)

    def drift(width: int) -> Tensor:
        common = torch.randn(1, grid.per_frame, width, generator=draw)
        return (common + 0.5 * torch.randn(grid.t, grid.per_frame, width, generator=draw)).flatten(0, 1)

    return VideoTokens(
        x_ND=drift(8).to(dtype),
        grid=grid,
        cell_G=torch.arange(grid.num_groups),
        salience_G=drift(1).flatten().softmax(0),
        keys_GD=drift(4).to(dtype),
        uid="drift",
    )


def run(stage: VisionZip, video: VideoTokens, ratio: float, *, exact: bool = False) -> Kept:
    [kept] = stage([video], [Budget(max(1, round(ratio * video.num_groups)), ratio, exact)])
    return kept


def test_the_rest_is_added_to_a_target_as_its_mean():
    # K = 3: dominant 4 and 1; the target is the first of the rest, place 0: 1 + (3 + 4 + 6) / 3.
    kept = run(VisionZip(dominant_ratio=2 / 3), one_frame(ALIKE), 0.5)
    assert kept.index_K.tolist() == [0, 1, 4]
    assert_close(kept.x_KD[:, 0], torch.tensor([1 + 13 / 3, 2.0, 5.0]))
    assert_close(kept.scores_G, torch.tensor(ATTENTION))


def test_keys_decide_which_target_takes_a_token():
    # K = 4, two targets: numbers 0 and 2 of the rest, places 0 and 3. Key of 2 points like 3, key of 5 like 0.
    keys = [[2.0, 0.1], [0.0, 0.0], [0.0, 3.0], [0.1, 1.0], [0.0, 0.0], [5.0, 0.0]]
    kept = run(VisionZip(dominant_ratio=1 / 2), one_frame(keys), 0.7)
    assert kept.index_K.tolist() == [0, 1, 3, 4]
    assert_close(kept.x_KD[:, 0], torch.tensor([1 + 6.0, 2.0, 4 + 3.0, 5.0]))


def test_official_order_is_dominant_then_contextual():
    kept = run(VisionZip(dominant_ratio=2 / 3, compat="official"), one_frame(ALIKE), 0.5)
    assert kept.index_K.tolist() == [1, 4, 0]
    assert_close(kept.x_KD[:, 0], torch.tensor([2.0, 5.0, 1 + 13 / 3]))


def test_official_order_in_rows_swaps_dominant_tokens():
    # The token of place 1 comes first in order of place, and 4 is first by attention: 1 goes to 4, and 4 to 1.
    kept = run(VisionZip(dominant_ratio=2 / 3, compat="official", newline_per_row=True), one_frame(ALIKE), 0.5)
    assert kept.index_K.tolist() == [0, 1, 4]
    assert_close(kept.x_KD[:, 0], torch.tensor([1 + 13 / 3, 5.0, 2.0]))


@pytest.mark.parametrize(
    ("side", "ratio", "per_frame"),
    [(14, 0.1, 20), (14, 0.15, 30), (14, 0.2, 40), (14, 0.25, 50), (14, 0.3, 58), (13, 0.1, 16), (10, 0.29, 29)],
)
def test_counts_are_those_of_the_release_at_196_and_floors_elsewhere(side, ratio, per_frame):
    kept = run(VisionZip(), structured_video(Grid(2, side, side)), ratio)
    assert len(kept.index_K) == 2 * per_frame


def test_explicit_counts_do_not_ask_the_ratio():
    video = structured_video(Grid(2, 4, 5))
    kept = run(VisionZip(num_dominant=3, num_contextual=2), video, 0.9)
    assert len(kept.index_K) == 2 * 5
    unchanged = (kept.x_KD == video.x_ND[kept.index_K]).all(1)
    assert unchanged.view(2, 5).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("grid", [Grid(1, 4, 4), Grid(3, 2, 3), Grid(4, 5, 3), Grid(2, 7, 7)], ids=str)
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.5, 0.85, 1.0])
def test_the_loop_of_a_reader_gives_the_same(grid, ratio):
    video = structured_video(grid, seed=grid.num_groups)
    ours, theirs = run(VisionZip(), video, ratio), visionzip(video, Budget(1, ratio))
    assert torch.equal(ours.index_K, theirs.index_K)
    assert_close(ours.x_KD, theirs.x_KD, atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [Grid(1, 2, 3), Grid(5, 2, 3), Grid(3, 1, 1), Grid(4, 5, 4)], ids=str)
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.37, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("compat", [None, "official"])
def test_an_exact_budget_is_met_exactly(grid, ratio, compat):
    video = structured_video(grid)
    kept = run(VisionZip(compat=compat), video, ratio, exact=True)
    assert len(kept.index_K) == len(kept.x_KD) == max(1, round(ratio * grid.num_groups))
    assert (kept.index_K.diff() > 0).all() and kept.x_KD.isfinite().all()


def test_an_exact_budget_takes_from_the_emptiest_contextual_token_and_gives_by_attention():
    # K = 4 as above; of the two contextual tokens, 3 has no member once 2 joins 0.
    keys = [[2.0, 0.1], [0.0, 0.0], [2.0, 0.0], [0.1, 1.0], [0.0, 0.0], [5.0, 0.0]]
    stage = VisionZip(dominant_ratio=1 / 2)
    [fewer] = stage([one_frame(keys)], [Budget(3, 0.7, exact=True)])
    assert fewer.index_K.tolist() == [0, 1, 4]
    assert_close(fewer.x_KD[:, 0], torch.tensor([1 + 4.5, 2.0, 5.0]))
    [more] = stage([one_frame(keys)], [Budget(5, 0.7, exact=True)])
    assert more.index_K.tolist() == [0, 1, 2, 3, 4]
    assert_close(more.x_KD[:, 0], torch.tensor([1 + 4.5, 2.0, 3.0, 4.0, 5.0]))


def test_a_frame_that_may_keep_everything_is_unchanged():
    video = structured_video(Grid(2, 3, 3))
    kept = run(VisionZip(), video, 1.0)
    assert torch.equal(kept.index_K, torch.arange(18)) and torch.equal(kept.x_KD, video.x_ND)


def test_every_frame_keeps_a_token_however_small_the_ratio():
    # 9 x 0.05 is below one token: no dominant one, everything is summed up in the first place of each frame.
    video = structured_video(Grid(3, 3, 3))
    kept = run(VisionZip(), video, 0.05)
    assert kept.index_K.tolist() == [0, 9, 18]
    x_TSD = video.x_ND.view(3, 9, -1)
    assert_close(kept.x_KD, x_TSD[:, 0] + x_TSD[:, 1:].mean(1))


def test_equal_attention_and_equal_keys_take_the_first():
    video = one_frame([[0.0, 0.0]] * 6, attention=[1 / 6] * 6)
    kept = run(VisionZip(dominant_ratio=1 / 2), video, 0.7)  # dominant 0, 1; targets 2, 4; 3 and 5 join 2
    assert kept.index_K.tolist() == [0, 1, 2, 4]
    assert_close(kept.x_KD[:, 0], torch.tensor([1.0, 2.0, 3 + 5.0, 5.0]))


def test_gradient_reaches_kept_and_merged_tokens():
    video = one_frame(ALIKE)
    x_ND = video.x_ND.clone().requires_grad_()
    kept = run(VisionZip(dominant_ratio=2 / 3), replace(video, x_ND=x_ND), 0.5)
    kept.x_KD.sum().backward()
    third = 1 / 3  # each of the three members
    assert_close(x_ND.grad[:, 0], torch.tensor([1.0, 1.0, third, third, 1.0, third]))


def test_half_precision_comes_back_in_kind():
    video = structured_video(Grid(2, 4, 4), dtype=torch.bfloat16)
    kept = run(VisionZip(), video, 0.3)
    wide = replace(video, x_ND=video.x_ND.float(), keys_GD=video.keys_GD.float())
    exactly = run(VisionZip(), wide, 0.3)
    assert kept.x_KD.dtype == torch.bfloat16 and torch.equal(kept.index_K, exactly.index_K)
    assert torch.equal(kept.x_KD, exactly.x_KD.bfloat16())


def test_targets_that_move_to_one_place_stay_two_tokens():
    # Dominant 1, rest 0 2 3 4 5: targets 0 (place 0) and 2 (place 3). Places 0, 2, 3 are sinks: both move to place 4.
    penalty_P = torch.tensor([0.9, 0.0, 0.8, 0.7, 0.2, 0.1])
    video = replace(
        one_frame(ALIKE, attention=[0.1, 0.9, 0.2, 0.05, 0.3, 0.0]), sink=SinkPenalty(penalty_P, num_slots=3)
    )
    kept = run(VisionZip(num_dominant=1, num_contextual=2), video, 0.5)
    assert kept.index_K.tolist() == [1, 4, 5]
    assert_close(kept.x_KD[:, 0], torch.tensor([2.0, 5 + (1 + 3 + 4) / 3, 6.0]))
    # As released: the second one is place 4 once more, without members, and 5 is a member.
    kept = run(VisionZip(num_dominant=1, num_contextual=2, compat="official"), video, 0.5)
    assert kept.index_K.tolist() == [1, 4, 5]
    assert_close(kept.x_KD[:, 0], torch.tensor([2.0, 5 + (1 + 3 + 4 + 6) / 4, 5.0]))


def test_moved_targets_never_run_out_of_the_frame():
    video = replace(one_frame(ALIKE), sink=SinkPenalty(torch.ones(6), num_slots=6))  # every place is a sink
    for compat in (None, "official"):
        kept = run(VisionZip(num_dominant=1, num_contextual=3, compat=compat), video, 0.7)
        assert kept.index_K.sort().values.tolist() == [2, 3, 4, 5], "the last three of the rest 0 1 2 3 5, and 4"


def test_flops_by_hand():
    # 2 frames of 6, 8 kept: 6 dominant, 2 contextual; 6 x 2 / 2 = 6 pairs, each 3 wide to compare and 4 to add.
    assert VisionZip(key_width=3).flops(Grid(2, 2, 3), 4, 8) == 2 * 12 * 3 + 2 * 6 * (3 + 4)


def test_the_host_decides_newlines_and_key_width():
    assert VisionZip.for_host(HOST).newlines == "all"
    rows = VisionZip.for_host(replace(HOST, newline_per_row=True), compat="official")
    assert rows.newlines == "every_row" and rows.key_width == 8 and rows.compat == "official"
    with pytest.raises(TypeError, match="colour"):
        VisionZip.for_host(HOST, colour=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_dominant": 3}, "give both or neither"),
        ({"num_dominant": 3, "num_contextual": 0}, "at least 0 and 1"),
        ({"dominant_ratio": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VisionZip(**options)


def test_what_is_missing_is_named():
    video = one_frame(ALIKE)
    with pytest.raises(ValueError, match="'attn' signal"):
        run(VisionZip(), replace(video, salience_G=None), 0.5)
    with pytest.raises(ValueError, match="'keys' signal"):
        run(VisionZip(), replace(video, keys_GD=None), 0.5)
    with pytest.raises(ValueError, match="whole frames"):
        run(VisionZip(), replace(video, cell_G=torch.arange(5)), 0.5)
    with pytest.raises(ValueError, match="more than the 6 tokens"):
        run(VisionZip(num_dominant=5, num_contextual=2), video, 0.5)
