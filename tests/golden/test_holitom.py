"""HoliTom against the authors' code (arXiv 2505.21334), outer and inner stage.

Known differences, both from the adapter's side: the release ranks newline tokens inside the LLM with the rest, so the
inner cases feed the whole image span as one video of one row; attention arrives as the mean over heads.
Tolerances: 2e-5 for tokens, 1e-5 for what leads to them; indices, counts and windows are exact.

Shape suffixes: T = frames, S = places of a frame, W = windows, P = static places, D = width.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from stts.pruners import density, ops
from stts.pruners.base import with_newlines
from stts.pruners.holitom import HoliTom, HoliTomInner, published_tau
from stts.tokens import Budget, Grid, Kept, VideoTokens
from tests.golden.conftest import Case, cases

OUTER = cases("holitom", containing="mid.window_gain")
INNER = cases("holitom", containing="mid.merge_dst")


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert_close(actual, expected, atol=tolerance, rtol=0)


def outer_video(case: Case) -> VideoTokens:
    feat_TSD = case["mid.feat"]
    num_frames, num_places, _ = feat_TSD.shape
    side = round(num_places**0.5)
    return VideoTokens(
        feat_TSD.flatten(0, 1),
        Grid(num_frames, side, side),
        torch.arange(num_frames * num_places),
        salience_G=case["mid.attn"].flatten(),
    )


def outer_stage(case: Case, **options: Any) -> HoliTom:
    return HoliTom(
        tau=float(case.meta["tau"]),
        beta=float(case.meta["beta"]),
        num_neighbours=int(case.meta["K"]),
        max_window=int(case.meta["max_window"]),
        newline_per_row=case.meta["newline"] == "grid",
        **options,
    )


def run_outer(case: Case, **options: Any) -> Kept:
    ratio = float(case.meta["retention"])
    video = outer_video(case)
    [kept] = outer_stage(case, **options)([video], [Budget(round(video.num_groups * ratio), ratio)])
    return kept


@pytest.mark.parametrize("case", OUTER, ids=str)
def test_outer_tokens_are_the_authors(case: Case):
    # Official: the order of the release as well.
    kept, video = run_outer(case, compat="official"), outer_video(case)
    assert kept.x_KD is not None
    frame, place, kind = case["out.index"].T
    newline_D, tokens = case["in.newline"], case["out.tokens"]
    assert torch.equal(kept.index_K, (frame * video.grid.per_frame + place)[kind < 2])
    close(kept.x_KD, tokens[kind < 2], 2e-5)
    assert torch.equal(tokens[kind == 2], newline_D.expand(int((kind == 2).sum()), -1))
    if case.meta["newline"] == "grid":
        places = with_newlines(kept.index_K, video.grid, outer_stage(case).newlines)
        is_newline = places % (video.grid.w + 1) == video.grid.w
        assert torch.equal(is_newline, kind == 2), "a newline behind every row that keeps a token"
        assert torch.equal(places[is_newline] // (video.grid.w + 1), (frame * video.grid.h + place)[kind == 2])
    else:
        assert (kind == 2).nonzero().tolist() == [[len(kind) - 1]], "one newline at the end"


@pytest.mark.parametrize("case", OUTER, ids=str)
def test_outer_default_is_the_authors_in_the_order_of_the_video(case: Case):
    ours, theirs = run_outer(case), run_outer(case, compat="official")
    index, order = theirs.index_K.sort()
    assert torch.equal(ours.index_K, index)
    assert ours.x_KD is not None and theirs.x_KD is not None
    assert torch.equal(ours.x_KD, theirs.x_KD[order])
    assert published_tau(float(case.meta["retention"])) == float(case.meta["tau"])


@pytest.mark.parametrize("case", OUTER, ids=str)
def test_pooling_of_the_cases_is_as_described(case: Case):
    for name in ("feat", "attn"):
        full_TSD = case[f"in.{name}_full"]
        full_TSD = full_TSD.view(*full_TSD.shape[:2], -1)
        side = int(case.meta["grid_full"])
        full_TDHW = full_TSD.transpose(1, 2).unflatten(2, (side, side))
        if case.meta["pool"] == "average":
            pooled_TDHW = F.avg_pool2d(full_TDHW, 2)
        else:
            pooled_TDHW = F.interpolate(full_TDHW, size=(-(-side // 2),) * 2, mode="bilinear")
        pooled_TSD = pooled_TDHW.flatten(2).transpose(1, 2)
        close(pooled_TSD.reshape(case[f"mid.{name}"].shape), case[f"mid.{name}"], 1e-5)


@pytest.mark.parametrize("case", OUTER, ids=str)
def test_windows_and_their_gain_are_the_authors(case: Case):
    video, tau = outer_video(case), float(case.meta["tau"])
    num_frames, num_places = video.grid.t, video.grid.per_frame
    similarity_TS = ops.neighbour_similarity(video.x_ND, video.grid).view(num_frames, num_places)[1:]
    close(similarity_TS, case["mid.feature_sim"], 1e-5)
    static_TS = ops.is_static(video, similarity_TS, tau)
    gain = case["mid.window_gain"]
    for start in range(num_frames):
        for last in range(start + 1, num_frames):
            assert gain[start, last] == static_TS[start:last].all(0).sum() * (last - start)
    for last in range(num_frames):  # the first frames alone give every stage of the dynamic programme
        windows, saved = ops.temporal_windows(static_TS[:last])
        assert saved == case["mid.dp"][last] and windows[-1][0] == case["mid.dp_prev"][last]
    assert [[start, end - 1] for start, end in windows] == case["mid.segments"].tolist()
    assert saved == case["mid.total_reduced"].item()
    num_groups = video.num_groups
    ratio = float(case.meta["retention"]) / ((num_groups - saved) / num_groups)
    assert ratio == case["mid.adjusted_ratio"].item()


@pytest.mark.parametrize("case", OUTER, ids=str)
def test_what_stands_still_and_what_moves_is_the_authors(case: Case):
    video, kept = outer_video(case), run_outer(case)
    kept_TS = torch.zeros(video.num_groups, dtype=torch.bool).index_fill(0, kept.index_K, True).view(video.grid.t, -1)
    static_TS = torch.zeros_like(kept_TS)
    ratio = case["mid.adjusted_ratio"].item()
    for number, (start, last) in enumerate(case["mid.segments"].tolist()):
        static_S = case["mid.static_mask"][number].bool()
        static_TS[start : last + 1] = static_S
        centre_S = case["mid.static_centre"][number].bool()
        assert torch.equal(kept_TS[start] & static_S, centre_S), "centres lie in the first frame of their window"
        assert not (kept_TS[start + 1 : last + 1] & static_S).any()
        if not static_S.any():
            assert not case["mid.static_score"][number].any() and (case["mid.static_assign"][number] == -1).all()
            continue
        y_PD = case["mid.feat"][start : last + 1, static_S].mean(0)
        distance_PP = density.distances(y_PD[None])[0] / y_PD.shape[1] ** 0.5
        num_near = min(int(case.meta["K"]), int(centre_S.sum()))
        density_P = torch.exp(-distance_PP.sort(1).values[:, :num_near].square().mean(1))
        close(density_P, case["mid.static_density"][number][static_S], 1e-5)
        score_P = density.density_peaks(distance_PP[None], num_near, count_self=True)[0]
        close(score_P, case["mid.static_score"][number][static_S], 1e-5)
        assert centre_S.sum() == round(int(static_S.sum()) * ratio)
        nearest_P = distance_PP[:, centre_S[static_S]].argmin(1)
        assert torch.equal(nearest_P, case["mid.static_assign"][number][static_S])
    assert torch.equal(kept_TS & ~static_TS, case["mid.dynamic_keep"].bool())


@pytest.mark.parametrize("case", INNER, ids=str)
def test_inner_tokens_are_the_authors(case: Case):
    prefix, length, suffix = case["in.meta"].tolist()
    hidden_ND = case["in.hidden"][0]
    attn_N = case["in.attn_last_query"][0].mean(0)
    close(attn_N[prefix : prefix + length], case["mid.attn_mean_image"], 1e-6)
    video = VideoTokens(
        hidden_ND[prefix : prefix + length],
        Grid(1, 1, length),
        torch.arange(length),
        salience_G=case["mid.attn_mean_image"],
    )
    share = 1 - float(case.meta["r"])
    [kept] = HoliTomInner(share=share)([video], [Budget(round(length * share), share)])
    assert kept.x_KD is not None and kept.scores_G is not None
    position = torch.cat([torch.arange(prefix), prefix + kept.index_K, prefix + length + torch.arange(suffix)])
    assert torch.equal(position, case["out.position_ids"][0])
    assert torch.equal(prefix + kept.index_K, case["mid.topk_order"].sort().values)
    assert torch.equal(prefix + ops.top(kept.scores_G, len(kept.index_K)), case["mid.topk_order"])
    tokens = torch.cat([hidden_ND[:prefix], kept.x_KD, hidden_ND[prefix + length :]])
    close(tokens, case["out.hidden"][0], 1e-5)

    # The sequence of halvings that the closed form stands for, from the authors' own pairs.
    halved_ND = hidden_ND.clone()
    for source, target in zip(case["mid.merge_src"].tolist(), case["mid.merge_dst"].tolist(), strict=True):
        halved_ND[target] = (halved_ND[target] + halved_ND[source]) / 2
    close(kept.x_KD, halved_ND[prefix + kept.index_K], 1e-5)
