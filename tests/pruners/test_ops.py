"""Shared arithmetic of the methods, against numbers worked out by hand and against plain loops."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stts.pruners import density, ops
from stts.tokens import Grid, Kept, SinkPenalty, VideoTokens


def video(num_groups: int, grid: Grid | None = None, **parts) -> VideoTokens:
    grid = grid or Grid(1, 1, num_groups)
    parts.setdefault("cell_G", torch.arange(num_groups))
    parts.setdefault("x_ND", torch.arange(2.0 * num_groups).view(-1, 2))
    return VideoTokens(grid=grid, uid="clip", **parts)


def sink(*penalty: float, **strengths) -> SinkPenalty:
    return SinkPenalty(torch.tensor(penalty), **strengths)


def close(found: torch.Tensor, expected: list, **tolerance) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), **tolerance)


# --- similarity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_rows_are_the_same_at_any_size(dtype: torch.dtype) -> None:
    x_TPD = torch.randn(12, 40, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert x_TPD.numel() > ops.CACHED
    x_TPD[7] = x_TPD[5]
    later, earlier = x_TPD[2::2], x_TPD[:-2:2]  # views that are not contiguous
    found_TP = ops.row_dots(later, earlier)
    torch.testing.assert_close(found_TP, torch.linalg.vecdot(later.float(), earlier.float()), atol=2e-4, rtol=1e-5)
    assert found_TP.dtype == torch.float32
    odd_TP = ops.row_dots(x_TPD, x_TPD)
    assert torch.equal(odd_TP[7], odd_TP[5]), "equal rows have equal products, so ties stay ties"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_highest_are_those_of_a_stable_sort(dtype: torch.dtype) -> None:
    score_N = torch.randint(0, 9, (64,), generator=torch.Generator().manual_seed(1)).to(dtype)
    score_N[5], score_N[6] = torch.inf, -torch.inf
    for number in (1, 2, 17, 40, 63, 64):
        expected = torch.sort(score_N, descending=True, stable=True).indices[:number].sort().values
        assert torch.equal(ops.highest(score_N, number), expected)


def test_neighbour_similarity_compares_a_place_with_itself_one_frame_earlier():
    # The first token repeats at twice the length, the second turns by 90 degrees; before frame 0 came nothing.
    x_ND = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    close(ops.neighbour_similarity(x_ND, Grid(2, 1, 2)), [0.0, 0.0, 1.0, 0.0])
    assert ops.neighbour_similarity(x_ND.bfloat16(), Grid(2, 1, 2)).dtype == torch.float32
    with pytest.raises(ValueError, match="needs the full grid"):
        ops.neighbour_similarity(x_ND, Grid(3, 1, 2))


# --- what a method may expect ------------------------------------------------------------------------------------


def test_need_names_the_video_and_the_signal():
    salience_G = torch.ones(2)
    assert ops.need(salience_G, "attn", video(2)) is salience_G
    with pytest.raises(ValueError, match=r"'clip' carries no 'keys'"):
        ops.need(None, "keys", video(2))


def test_need_full_grid():
    ops.need_full_grid(video(4, Grid(2, 1, 2)))
    with pytest.raises(ValueError, match="3 of 4 groups left"):
        ops.need_full_grid(video(3, Grid(2, 1, 2)))


# --- ranking -----------------------------------------------------------------------------------------------------


def test_top_is_best_first_and_ties_go_to_the_earlier():
    assert ops.top(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0]), 4).tolist() == [1, 2, 4, 3]
    assert ops.top(torch.tensor([[0, 1, 0], [1, 1, 0]]), 2).tolist() == [[1, 0], [0, 1]]


def test_rank_salience_takes_the_penalty_of_the_place():
    salience_G = torch.tensor([0.5, 0.4, 0.3])
    parts = {"grid": Grid(2, 1, 2), "cell_G": torch.tensor([0, 1, 3]), "salience_G": salience_G}
    close(ops.rank_salience(video(3, **parts)), [0.5, 0.4, 0.3])
    # places 0, 1 and 1 of their frames: less 0.2 times 0.5, 1 and 1
    close(ops.rank_salience(video(3, sink=sink(0.5, 1.0, salience=0.2), **parts)), [0.4, 0.2, 0.1])
    with pytest.raises(ValueError, match="'attn'"):
        ops.rank_salience(video(2))
    half = ops.rank_salience(video(3, **(parts | {"salience_G": salience_G.half()})))
    assert half.dtype == torch.float32


def test_rank_density_takes_the_penalty_of_the_place():
    score_BN = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    place_N = torch.tensor([2, 0])
    assert ops.rank_density(video(1), score_BN, place_N) is score_BN
    penalised = ops.rank_density(video(1, sink=sink(0.5, 0.0, 1.0, density=0.5)), score_BN, place_N)
    close(penalised, [[0.5, 1.75], [2.5, 3.75]])


def test_is_static_adds_the_penalty_to_the_similarity():
    similarity_TS = torch.tensor([[0.9, 0.8, 0.7]])
    assert ops.is_static(video(1), similarity_TS, 0.8).tolist() == [[True, False, False]]  # equal is not above
    clip = video(1, sink=sink(0.0, 0.5, 1.0, temporal=0.15))
    assert ops.is_static(clip, similarity_TS, 0.8).tolist() == [[True, True, True]]


def test_free_slots_without_a_penalty_are_the_wanted_ones():
    rest_TL = torch.tensor([[0, 1, 3], [1, 2, 3]])
    for clip in (video(1), video(1, sink=sink(1.0, 0.0, 0.0, 0.0))):
        assert ops.free_slots(clip, torch.tensor([0, 2]), rest_TL).tolist() == [[0, 2], [0, 2]]


def test_free_slots_move_off_the_worst_places():
    # The two worst of five places are 1 and 3; the rest lists leave out one place each.
    rest_TL = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    slot_C = torch.tensor([0, 1, 3])
    penalty = sink(0.1, 0.9, 0.2, 0.8, 0.3, num_slots=2)
    # frame 0: number 0 is place 0, free; 1 is place 1 -> number 2; 3 is place 3 -> nothing free behind: the last, 3.
    # frame 1: number 0 is place 1 -> number 1; 1 is place 2, free; 3 is place 4, free.
    assert ops.free_slots(video(1, sink=penalty), slot_C, rest_TL).tolist() == [[0, 2, 3], [1, 1, 3]]


def test_free_slots_official_compares_numbers_with_places():
    rest_TL = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    penalty = sink(0.1, 0.9, 0.2, 0.8, 0.3, num_slots=2, official=True)
    # Numbers 1 and 3 are taken for places 1 and 3 in both frames: 1 -> 2, and 3 -> the last number, which is 3.
    assert ops.free_slots(video(1, sink=penalty), torch.tensor([0, 1, 3]), rest_TL).tolist() == [[0, 2, 3]] * 2


def test_free_slots_with_more_slots_than_places():
    rest_TL = torch.tensor([[0, 1, 2]])
    clip = video(1, sink=sink(1.0, 1.0, 1.0, num_slots=20))
    assert ops.free_slots(clip, torch.tensor([0, 1]), rest_TL).tolist() == [[2, 2]]


# --- segments ----------------------------------------------------------------------------------------------------


def gain_of(static_TS: torch.Tensor, cuts: tuple[int, ...]) -> int:
    bounds = [0, *cuts, len(static_TS) + 1]
    windows = itertools.pairwise(bounds)
    return sum(int(static_TS[a : b - 1].all(0).sum()) * (b - a - 1) for a, b in windows if b - a > 1)


def test_temporal_windows_of_a_small_video():
    # 4 frames, 3 places. Steps 0-1 and 1-2: places 0 and 1 stand still; step 2-3: place 2 only.
    static_TS = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    # [0..2] saves 2 places x 2 steps = 4, then frame 3 alone; [0..1] [2..3] would save 2 + 1.
    assert ops.temporal_windows(static_TS) == ([(0, 3), (3, 4)], 4)
    assert ops.temporal_windows(static_TS, max_window=2) == ([(0, 2), (2, 4)], 3)
    assert ops.temporal_windows(static_TS, max_window=1) == ([(0, 1), (1, 2), (2, 3), (3, 4)], 0)


def test_temporal_windows_of_one_frame_and_of_stillness():
    assert ops.temporal_windows(torch.zeros(0, 5, dtype=torch.bool)) == ([(0, 1)], 0)
    assert ops.temporal_windows(torch.ones(4, 3, dtype=torch.bool)) == ([(0, 5)], 12)
    assert ops.temporal_windows(torch.zeros(2, 3, dtype=torch.bool)) == ([(0, 1), (1, 2), (2, 3)], 0)


@settings(max_examples=100, deadline=None)
@given(
    steps=st.integers(1, 6),
    places=st.integers(1, 5),
    density=st.sampled_from([0.2, 0.5, 0.8]),
    seed=st.integers(0, 10**6),
    max_window=st.sampled_from([1, 2, 3, 1024]),
)
def test_temporal_windows_are_the_best_of_all_cuts(steps, places, density, seed, max_window):
    static_TS = torch.rand(steps, places, generator=torch.Generator().manual_seed(seed)) < density
    windows, gain = ops.temporal_windows(static_TS, max_window)
    every = [c for n in range(steps + 1) for c in itertools.combinations(range(1, steps + 1), n)]
    fitting = [c for c in every if max(b - a for a, b in itertools.pairwise([0, *c, steps + 1])) <= max_window]
    assert gain == max(gain_of(static_TS, cuts) for cuts in fitting)
    assert [end for _, end in windows[:-1]] == [start for start, _ in windows[1:]]
    assert (windows[0][0], windows[-1][1]) == (0, steps + 1)
    assert max(end - start for start, end in windows) <= max_window
    assert gain_of(static_TS, tuple(start for start, _ in windows[1:])) == gain


# --- clusters ----------------------------------------------------------------------------------------------------


def test_distances_are_euclidean_with_an_exact_zero_diagonal():
    close(density.distances(torch.tensor([[[0.0, 0.0], [3.0, 4.0]]])), [[[0.0, 5.0], [5.0, 0.0]]])
    far_BND = 1000 + torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    found = density.distances(far_BND)
    torch.testing.assert_close(found.double(), torch.cdist(far_BND.double(), far_BND.double()), atol=2e-3, rtol=0)
    assert (found.diagonal(dim1=1, dim2=2) == 0).all()
    assert density.distances(far_BND.bfloat16()).dtype == torch.float32


def test_density_peaks_of_four_points_on_a_line():
    # Points 0, 1, 2 and 10. Mean squares of the two nearest, itself among them: 0.5, 0.5, 0.5 and 32.
    distance_BNN = (torch.tensor([0.0, 1.0, 2.0, 10.0])[:, None] - torch.tensor([0.0, 1.0, 2.0, 10.0])).abs()[None]
    # The first of the three equally dense counts as densest: its delta is the widest distance, 10; then 1, 1 and 8.
    dense, thin = math.exp(-0.5), math.exp(-32)
    close(density.density_peaks(distance_BNN, 2, count_self=True), [[10 * dense, dense, dense, 8 * thin]])
    # Without itself: (1 + 4) / 2, (1 + 1) / 2, (1 + 4) / 2, (64 + 81) / 2: point 1 is densest.
    rho = [math.exp(-2.5), math.exp(-1), math.exp(-2.5), math.exp(-72.5)]
    expected = [[rho[0] * 1, rho[1] * 10, rho[2] * 1, rho[3] * 8]]
    close(density.density_peaks(distance_BNN, 2, count_self=False), expected)


def test_density_peaks_leave_padding_out():
    points = torch.tensor([0.0, 1.0, 2.0, 10.0, 0.5])
    distance_BNN = (points[:, None] - points).abs()[None]
    valid_BN = torch.tensor([[True, True, True, True, False]])
    found = density.density_peaks(distance_BNN, 2, count_self=True, valid_BN=valid_BN)
    torch.testing.assert_close(
        found[:, :4], density.density_peaks(distance_BNN[:, :4, :4], 2, count_self=True), atol=0, rtol=0
    )
    assert found[0, 4] == -torch.inf


def peaks_by_loops(points: list[list[float]], num_neighbours: int, count_self: bool) -> list[float]:
    far = [[math.dist(a, b) for b in points] for a in points]
    everyone = range(len(points))
    rho = []
    for i in everyone:
        near = sorted(far[i][j] for j in everyone if count_self or j != i)[:num_neighbours]
        rho.append(math.exp(-sum(d * d for d in near) / max(1, len(near))))
    widest = max(max(row) for row in far)
    delta = [min((far[i][j] for j in everyone if (rho[j], -j) > (rho[i], -i)), default=widest) for i in everyone]
    return [r * d for r, d in zip(rho, delta, strict=True)]


@pytest.mark.parametrize("count_self", [True, False])
@pytest.mark.parametrize(("num_points", "num_neighbours"), [(1, 3), (2, 1), (5, 2), (8, 4), (6, 20)])
def test_density_peaks_equal_plain_loops(num_points, num_neighbours, count_self):
    points = torch.randn(num_points, 3, generator=torch.Generator().manual_seed(num_points), dtype=torch.float64)
    distance_BNN = torch.cdist(points[None], points[None]).float()
    found = density.density_peaks(distance_BNN, num_neighbours, count_self=count_self)
    close(found[0], peaks_by_loops(points.tolist(), num_neighbours, count_self), atol=1e-5, rtol=1e-4)


def test_density_peaks_of_equal_points_are_zero():
    # All at one spot: nobody is far from anybody.
    assert density.density_peaks(torch.zeros(1, 4, 4), 2, count_self=True).tolist() == [[0.0] * 4]


def test_cluster_mean_leaves_out_minus_one_and_empty_clusters_are_zero():
    x_ND = torch.tensor([[1.0, 2.0], [3.0, 4.0], [100.0, 100.0], [5.0, 6.0]])
    mean_CD, count_C = ops.cluster_mean(x_ND, torch.tensor([2, 0, -1, 2]), 3)
    close(mean_CD, [[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])
    assert count_C.tolist() == [1, 0, 2]
    mean_CD, count_C = ops.cluster_mean(x_ND[:0], torch.zeros(0, dtype=torch.long), 2)
    assert mean_CD.tolist() == [[0.0, 0.0]] * 2 and count_C.tolist() == [0, 0]


def test_cluster_mean_has_the_gradient_of_a_mean():
    x_ND = torch.tensor([[1.0], [3.0], [100.0], [5.0]], requires_grad=True)
    mean_CD, _ = ops.cluster_mean(x_ND, torch.tensor([1, 0, -1, 1]), 2)
    (mean_CD * torch.tensor([[1.0], [4.0]])).sum().backward()
    close(x_ND.grad, [[2.0], [1.0], [0.0], [2.0]])


def test_cluster_mean_is_summed_in_fp32():
    x_ND = torch.full((512, 1), 1.0, dtype=torch.bfloat16)  # a bf16 sum of ones stops at 256
    mean_CD, _ = ops.cluster_mean(x_ND, torch.zeros(512, dtype=torch.long), 1)
    assert mean_CD.dtype == torch.float32 and mean_CD.item() == 1.0


# --- counts ------------------------------------------------------------------------------------------------------

SALIENCE = torch.tensor([0.5, 0.1, 0.4, 0.3, 0.2, 0.6])


def fit(index: list[int], num_kept: int, x_KD=None, merged=None, salience_G=SALIENCE) -> Kept:
    kept = Kept(torch.tensor(index, dtype=torch.long), x_KD)
    return ops.fit_count(video(6), kept, num_kept, salience_G, None if merged is None else torch.tensor(merged))


def test_fit_count_drops_the_least_salient():
    assert fit([0, 1, 3, 4], 2).index_K.tolist() == [0, 3]
    assert fit([0, 1, 3], 1, salience_G=torch.zeros(6)).index_K.tolist() == [0]  # a tie: the earlier stays


def test_fit_count_drops_merged_tokens_first_and_the_lowest_score_before_the_others():
    merged = [math.inf, 0.7, math.inf, 0.2]  # 1 and 4 are merged
    assert fit([0, 1, 3, 4], 3, merged=merged).index_K.tolist() == [0, 1, 3]
    assert fit([0, 1, 3, 4], 2, merged=merged).index_K.tolist() == [0, 3]
    assert fit([0, 1, 3, 4], 1, merged=merged).index_K.tolist() == [0]
    # equal scores of merged tokens: the more salient one, 4, stays
    assert fit([0, 1, 3, 4], 3, merged=[math.inf, 0.7, math.inf, 0.7]).index_K.tolist() == [0, 3, 4]


def test_fit_count_fills_by_salience_with_a_groups_own_features():
    assert fit([1, 3], 4).index_K.tolist() == [0, 1, 3, 5]
    found = fit([1, 3], 3, x_KD=torch.tensor([[-1.0, -1.0], [-3.0, -3.0]]))
    assert found.index_K.tolist() == [1, 3, 5]
    close(found.x_KD, [[-1.0, -1.0], [-3.0, -3.0], [10.0, 11.0]])
    assert fit([], 2).index_K.tolist() == [0, 5]


def test_fit_count_sorts_what_has_the_right_number_and_its_features_with_it():
    found = fit([4, 1, 2], 3, x_KD=torch.tensor([[4.0, 4.0], [1.0, 1.0], [2.0, 2.0]]))
    assert found.index_K.tolist() == [1, 2, 4]
    close(found.x_KD, [[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])


def test_fit_count_trims_features_with_their_groups_and_keeps_the_rest_of_what_was_decided():
    x_KD, scores_G = torch.tensor([[5.0, 5.0], [0.0, 0.0], [1.0, 1.0]]), torch.arange(6.0)
    kept = ops.fit_count(video(6), Kept(torch.tensor([5, 0, 1]), x_KD, scores_G=scores_G), 2, SALIENCE)
    assert kept.index_K.tolist() == [0, 5] and kept.scores_G is scores_G
    close(kept.x_KD, [[0.0, 0.0], [5.0, 5.0]])


def test_fit_count_keeps_the_dtype_of_merged_features():
    found = fit([1], 2, x_KD=torch.ones(1, 2, dtype=torch.bfloat16))
    assert found.x_KD is not None and found.x_KD.dtype == torch.bfloat16


@pytest.mark.parametrize("num_kept", [0, 7])
def test_fit_count_refuses_what_the_video_does_not_have(num_kept):
    with pytest.raises(ValueError, match=r"outside \[1, 6\]"):
        fit([0, 1], num_kept)


def test_fit_count_passes_gradient_to_what_stays_and_to_what_comes_in():
    x_ND = torch.zeros(6, 2, requires_grad=True)
    clip = video(6, x_ND=x_ND)
    ops.fit_count(clip, Kept(torch.tensor([1, 3]), x_ND[[1, 3]] * 2), 3, SALIENCE).x_KD.sum().backward()
    close(x_ND.grad[:, 0], [0.0, 2.0, 0.0, 2.0, 0.0, 1.0])
