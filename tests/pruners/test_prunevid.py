"""`prunevid`: segments and static places by hand, exact budgets, wrong input."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stts.pruners.check import example_video
from stts.pruners.prunevid import PruneVid, PruneVidInner, asked_tokens, pair_similarity, refine
from stts.tokens import Budget, Grid, Kept, VideoTokens


def run(video: VideoTokens, num_kept: int, exact: bool = True, **options: float) -> Kept:
    [kept] = PruneVid(**options)([video], [Budget(num_kept, num_kept / video.num_groups, exact)])  # type: ignore[arg-type]
    return kept


@pytest.mark.parametrize(
    ("labels", "segments"),
    [
        ([2, 2, 5, 5], [0, 0, 1, 1]),
        ([1, 1, 3, 2, 2, 2], [0, 0, 1, 1, 1, 1]),  # the gap goes to the longer neighbour
        ([1, 1, 3, 2, 2], [0, 0, 0, 1, 1]),  # the left one on ties
        ([1, 1, 1, 2, 2, 1, 1], [0, 0, 0, 1, 1, 1, 1]),  # the shorter run of a cluster is given away
        ([1, 1, 2, 1, 1], [0, 0, 0, 0, 0]),  # equally long runs of a cluster stay
        ([0, 1, 2], [0, 0, 0]),  # no run of two frames: one segment
        ([4], [0]),
    ],
)
def test_clusters_become_segments(labels: list[int], segments: list[int]) -> None:
    assert refine(labels) == segments


def test_the_mean_cosine_by_hand() -> None:
    # One place over three frames at 0, 90 and 90 degrees: pairs 0, 0 and 1. Then a segment of one frame.
    x_TSD = torch.tensor([[[2.0, 0]], [[0, 1]], [[0, 3]], [[1, 1]]])
    similarity_WS = pair_similarity(x_TSD, torch.tensor([0, 0, 0, 1]), 2)
    torch.testing.assert_close(similarity_WS, torch.tensor([[1 / 3], [-torch.inf]]))


def test_a_still_video_is_one_frame_of_means() -> None:
    video = example_video(PruneVid(), Grid(6, 2, 5), scene="still")
    kept = run(video, 1, exact=False)
    assert kept.index_K.tolist() == list(range(10)) and kept.x_KD is not None
    torch.testing.assert_close(kept.x_KD, video.x_ND[:10], atol=1e-6, rtol=0)
    assert len(run(video, 1, exact=False, smallest=4).index_K) == 5, "half of them once sets of ten are clustered"


def test_every_exact_budget_is_met_on_videos_that_stand_still_or_move() -> None:
    for scene in ("still", "cuts", "flat"):
        video = example_video(PruneVid(), Grid(5, 4, 4), scene=scene)  # type: ignore[arg-type]
        for num_kept in range(1, 81):
            kept = run(video, num_kept)
            assert len(kept.index_K) == num_kept and (kept.index_K.diff() > 0).all()


def test_its_own_count_does_not_follow_the_ratio() -> None:
    video = example_video(PruneVid(), Grid(8, 4, 4))
    assert len({len(run(video, n, exact=False).index_K) for n in (3, 40, 100)}) == 1


def test_small_sets_vanish_in_stage_2() -> None:
    attention_HQN = torch.tensor([[[0.1, 0.9, 0.2, 0.3, 0.1]], [[0.1, 0, 0.8, 0, 0.1]]])
    assert asked_tokens(attention_HQN, [2, 3], 0.4).tolist() == [2], "int(0.4 * 2) is 0"


def test_wrong_input_is_refused() -> None:
    video = example_video(PruneVid(), Grid(2, 2, 2))
    with pytest.raises(ValueError, match="cluster_share=0"):
        run(video, 2, cluster_share=0)
    with pytest.raises(ValueError, match="num_neighbours=0"):
        run(video, 2, num_neighbours=0)
    with pytest.raises(ValueError, match="whole frames"):
        run(VideoTokens(video.x_ND[:3], video.grid, torch.tensor([0, 1, 3])), 2)


def test_each_frame_keeps_what_the_words_look_at() -> None:
    # Frame 0 has five tokens left, frame 1 none, frame 2 two: int(0.4 n) = 2, 0 and 0 of them stay.
    score_G = torch.tensor([0.1, 0.9, 0.3, 0.9, 0.2, 0.8, 0.7])
    cell_G = torch.tensor([0, 1, 3, 4, 5, 12, 15])
    video = VideoTokens(x_ND=torch.zeros(7, 2), grid=Grid(3, 2, 3), cell_G=cell_G, salience_G=score_G)

    def stage(num_kept: int, exact: bool, **options: float) -> list[int]:
        inner = PruneVidInner(**options)  # type: ignore[arg-type]
        index_K = inner([video], [Budget(num_kept, 0.4, exact)])[0].index_K
        return [int(n) for n in index_K]

    assert stage(3, False) == [1, 3]
    assert stage(3, False) == asked_tokens(score_G.view(1, 1, -1), [5, 0, 2], 0.4).tolist()
    assert stage(3, True) == [1, 3, 5] and stage(1, True) == [1]
    assert stage(3, False, share=0.1) == [1], "one stays where every frame would lose all"
    with pytest.raises(ValueError, match="'asked'"):
        PruneVidInner()([replace(video, salience_G=None)], [Budget(3, 0.4)])
