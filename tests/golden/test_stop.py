"""SToP against vectors of the authors' release: on VisionZip, FastVID and HoliTom, and the function for Qwen2.5-VL.

Tolerances: 2e-5 for tokens, 1e-5 for what leads to them; indices, counts and windows are exact.

Shape suffixes: T = frames, S = places of a frame, D = width, K = kept tokens, C = contextual tokens of a frame,
L = the rest of a frame, W = windows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from stts.pruners import density, ops
from stts.pruners.base import HostInfo, with_newlines
from stts.pruners.fastvid import FastVID
from stts.pruners.holitom import HoliTom
from stts.pruners.stop import SToP, sink_score
from stts.pruners.visionzip import VisionZip
from stts.tokens import Budget, Grid, Kept, VideoTokens
from tests.golden.conftest import Case, cases
from tests.golden.stop_feature_norm import FeatureNormSToP, feature_importance

VISIONZIP = cases("stop", containing="mid.sink_top20")
FASTVID = cases("stop", containing="mid.segment_sizes")
HOLITOM = cases("stop", containing="mid.window_gain")
FEATURE_NORM = cases("stop", containing="mid.importance")
HOST = HostInfo(
    family="siglip", vit_width=1152, vit_mlp=4304, vit_heads=16, vit_depth=26, lowest_tap=25, llm_width=3584,
    llm_layers=28, patches_per_group=4,
)  # fmt: skip


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    assert_close(actual, expected, atol=tolerance, rtol=0)


def host_of(case: Case) -> HostInfo:
    return replace(HOST, newline_per_row=case.meta.get("newline") == "grid")


def video_of(case: Case) -> VideoTokens:
    x_TSD = case["mid.feat" if "mid.feat" in case else "in.feat"]
    num_frames, num_places, _ = x_TSD.shape
    side = round(num_places**0.5)
    frame_TC = case["in.frame_global"] if case in FASTVID else None
    return VideoTokens(
        x_ND=x_TSD.flatten(0, 1),
        grid=Grid(num_frames, side, side),
        cell_G=torch.arange(num_frames * num_places),
        salience_G=case["mid.attn"].flatten() if "mid.attn" in case else None,
        keys_GD=case["mid.key"].flatten(0, 1) if "mid.key" in case else None,
        frame_TC=frame_TC,
    )


def stage_of(case: Case, compat: Any) -> SToP:
    """The published values of the preset, checked against those the case was made with."""
    host, options = host_of(case), {"salience": float(case.meta["mu_s"]), "compat": compat}
    if case in VISIONZIP:
        stage = SToP.for_visionzip(host, VisionZip.for_host(host, compat=compat), **options)
    elif case in FASTVID:
        fastvid = FastVID.for_host(host, variant="ov", min_segments=int(case.meta["c"]))
        assert (fastvid.context, fastvid.stride, fastvid.beta) == (0.4, 4, float(case.meta["alpha"]))
        stage = SToP.for_fastvid(host, fastvid, **options)
        assert stage.density == float(case.meta["context_weight"])
    else:
        holitom = HoliTom.for_host(host, tau=0.8, static_tau=0.8, compat=compat)
        assert (holitom.beta, holitom.num_neighbours) == (float(case.meta["beta"]), int(case.meta["K"]))
        stage = SToP.for_holitom(host, holitom, temporal=float(case.meta["mu_t"]), **options)
        assert stage.density == float(case.meta["static_centre_weight"])
    assert stage.power == float(case.meta["gamma"]) and not stage.rescale
    return stage


def seen_by_base(case: Case) -> VideoTokens:
    """The video as the stage hands it on."""
    video = video_of(case)
    return replace(video, sink=stage_of(case, "official").penalty(video))


def run(case: Case, compat: Any) -> Kept:
    video, ratio = video_of(case), float(case.meta["retention"])
    [kept] = stage_of(case, compat)([video], [Budget(round(ratio * video.num_groups), ratio)])
    return kept


# --- what all have in common -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*VISIONZIP, *FASTVID, *HOLITOM], ids=str)
def test_features_and_signals_are_pooled_alike(case):
    for name in ("feat", "attn", "key"):
        if f"in.{name}_full" in case:
            full_TND, pooled_TSD = case[f"in.{name}_full"], case[f"mid.{name}"]
            side, full = round(pooled_TSD.shape[1] ** 0.5), int(case.meta["grid_full"])
            full_TDYX = full_TND.reshape(len(full_TND), full, full, -1).permute(0, 3, 1, 2)
            made_TDS = F.interpolate(full_TDYX, (side, side), mode="bilinear").flatten(2)
            close(made_TDS.transpose(1, 2).reshape(pooled_TSD.shape), pooled_TSD)


@pytest.mark.parametrize("case", [*VISIONZIP, *FASTVID, *HOLITOM], ids=str)
def test_sink_score_is_the_authors(case):
    seen = seen_by_base(case)
    close(seen.sink.penalty_P[None], case["mid.sink_score"], 1e-5)
    if "mid.attn_adjusted" in case:
        close(ops.rank_salience(seen).view_as(case["mid.attn_adjusted"]), case["mid.attn_adjusted"], 1e-6)


# --- VisionZip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", VISIONZIP, ids=str)
def test_official_visionzip_gives_the_sequence_of_the_release(case):
    kept, seen = run(case, "official"), seen_by_base(case)
    num_frames, num_places = seen.grid.t, seen.grid.per_frame
    assert len(kept.index_K) == num_frames * int(case.meta["spatial_tokens"])
    tokens = case["out.tokens"]
    if case.meta["newline"] == "one_token":
        close(torch.cat([kept.x_KD, case["in.newline"][None]]), tokens)
        place_TP = kept.index_K.view(num_frames, -1) % num_places
        assert torch.equal(place_TP, torch.cat([case["mid.dominant_pos"], case["mid.context_pos"]], 1))
    else:
        filled = case["in.newline"].repeat(num_frames * seen.grid.h * (seen.grid.w + 1), 1)
        filled[with_newlines(kept.index_K, seen.grid, "none")] = kept.x_KD
        close(filled[with_newlines(kept.index_K, seen.grid, "every_row")], tokens)
    assert torch.equal(case["mid.topk_order"].sort().values, case["mid.dominant_pos"])
    assert torch.equal(ops.top(seen.sink.penalty_P, 20).sort().values, case["mid.sink_top20"].sort().values)


@pytest.mark.parametrize("case", VISIONZIP, ids=str)
def test_slots_of_visionzip_move_as_released(case):
    kept, seen = run(case, "official"), seen_by_base(case)
    num_places, slot_C = seen.grid.per_frame, case["mid.target_in_rest"]
    for frame, dominant_K in enumerate(case["mid.dominant_pos"]):
        rest_L = torch.tensor([place for place in range(num_places) if place not in dominant_K])
        context_C = case["mid.context_pos"][frame]
        plain_C = torch.arange(len(slot_C)) * (len(rest_L) // len(slot_C))
        assert torch.equal(ops.free_slots(seen, plain_C, rest_L[None])[0], slot_C)
        assert torch.equal(rest_L[slot_C], context_C)
        for number, target in enumerate(context_C.tolist()):
            members = case["mid.merge_src_pos"][frame][case["mid.merge_assign"][frame] == number]
            x_SD = case["mid.feat"][frame]
            token_D = x_SD[target] + x_SD[members].sum(0) / max(1, len(members))
            close(case["mid.context_tokens"][frame, number], token_D)
            close(kept.x_KD[kept.index_K == frame * num_places + target][0], token_D)


@pytest.mark.parametrize("case", VISIONZIP, ids=str)
def test_corrected_visionzip_keeps_the_same_dominant_tokens_in_order_of_place(case):
    kept, num_places = run(case, None), case["mid.feat"].shape[1]
    assert (kept.index_K.diff() > 0).all() and len(kept.index_K) == len(run(case, "official").index_K)
    for frame, dominant_K in enumerate(case["mid.dominant_pos"]):
        index_K = frame * num_places + dominant_K
        close(kept.x_KD[torch.isin(kept.index_K, index_K)], case["mid.feat"][frame, dominant_K], 0)
    if num_places > 2 * 20:  # else some slots find no free place
        first_T1 = torch.arange(len(case["mid.feat"]))[:, None] * num_places
        context_K = kept.index_K[~torch.isin(kept.index_K, first_T1 + case["mid.dominant_pos"])]
        assert not torch.isin(context_K % num_places, case["mid.sink_top20"]).any(), "no target is one of the worst"


# --- FastVID -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compat", [None, "official"])
@pytest.mark.parametrize("case", FASTVID, ids=str)
def test_fastvid_gives_the_sequence_of_the_release(case, compat):
    kept = run(case, compat)
    assert torch.equal(kept.index_K, case["out.keep_index"])
    close(torch.cat([kept.x_KD, case["in.newline"][None]]), case["out.tokens"])


@pytest.mark.parametrize("case", FASTVID, ids=str)
def test_what_leads_to_the_choice_of_fastvid_is_the_authors(case):
    seen, kept, base = seen_by_base(case), run(case, None), stage_of(case, None).base
    num_frames, num_places = seen.grid.t, seen.grid.per_frame
    similarity_T = F.cosine_similarity(seen.frame_TC[:-1], seen.frame_TC[1:])
    close(similarity_T, case["mid.frame_similarity"], 1e-5)
    cut_T = (similarity_T < float(case.meta["tau"])).index_fill(0, ops.top(-similarity_T, base.min_segments - 1), True)
    ends = [*(cut_T.nonzero()[:, 0] + 1).tolist(), num_frames]
    assert [end - start for start, end in zip([0, *ends], ends, strict=False)] == case["mid.segment_sizes"].tolist()

    salient_TK, rest_TL = case["mid.salient_topk_order"].sort().values, case["mid.rest_pos"]
    adjusted_TS = ops.rank_salience(seen).view(num_frames, num_places)
    assert torch.equal(ops.top(adjusted_TS, salient_TK.shape[1]).sort().values, salient_TK)
    kept_TS = torch.zeros(seen.num_groups, dtype=torch.bool).index_fill(0, kept.index_K, True).view(num_frames, -1)
    assert kept_TS.gather(1, salient_TK).all()
    assert torch.equal(kept_TS.sum(1) - salient_TK.shape[1], case["mid.context_per_frame"])
    assert torch.equal(torch.cat([salient_TK, rest_TL], 1).sort().values, torch.arange(num_places).expand_as(kept_TS))

    x_TLD = case["mid.feat"].gather(1, rest_TL[..., None].expand(-1, -1, case["mid.feat"].shape[2]))
    distance_TLL = density.distances(x_TLD) / x_TLD.shape[2] ** 0.5
    nearest_TLK = distance_TLL.sort(-1).values[..., : base.num_neighbours]
    close(torch.exp(-nearest_TLK.square().mean(-1)), case["mid.density"], 1e-5)
    score_TL = density.density_peaks(distance_TLL, base.num_neighbours, count_self=True)
    close(ops.rank_density(seen, score_TL, rest_TL), case["mid.density_score_adjusted"], 1e-5)


# --- HoliTom -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", HOLITOM, ids=str)
def test_holitom_gives_the_sequence_of_the_release(case):
    kept, corrected, grid = run(case, "official"), run(case, None), video_of(case).grid
    frame, place, kind = case["out.index"].T
    index_K, tokens = frame * grid.per_frame + place, case["out.tokens"]
    assert torch.equal(kept.index_K, index_K[kind < 2])
    close(kept.x_KD, tokens[kind < 2])
    newlines = tokens[kind == 2]
    assert torch.equal(newlines, case["in.newline"].expand_as(newlines))
    if case.meta["newline"] == "grid":
        places = with_newlines(kept.index_K, grid, stage_of(case, None).newlines)
        assert torch.equal(places % (grid.w + 1) == grid.w, kind == 2), "a newline behind every row that keeps a token"
    else:
        assert (kind == 2).nonzero().tolist() == [[len(kind) - 1]], "one newline at the end"
    order_K = kept.index_K.argsort()
    assert torch.equal(corrected.index_K, kept.index_K[order_K])
    assert torch.equal(corrected.x_KD, kept.x_KD[order_K])


@pytest.mark.parametrize("case", HOLITOM, ids=str)
def test_windows_of_holitom_do_not_feel_the_penalty(case):
    video, tau = video_of(case), float(case.meta["tau_segment"])
    num_frames, num_places = video.grid.t, video.grid.per_frame
    similarity_TS = ops.neighbour_similarity(video.x_ND, video.grid).view(num_frames, num_places)[1:]
    close(similarity_TS, case["mid.feature_sim"], 1e-5)
    static_TS = similarity_TS > tau
    for start in range(num_frames):
        for last in range(start + 1, num_frames):
            gain = static_TS[start:last].all(0).sum() * (last - start)
            assert gain == case["mid.window_gain"][start, last]
    for last in range(num_frames):
        windows, saved = ops.temporal_windows(static_TS[:last])
        assert saved == case["mid.dp"][last] and windows[-1][0] == case["mid.dp_prev"][last]
    assert [[start, end - 1] for start, end in windows] == case["mid.segments"].tolist()
    assert saved == case["mid.total_reduced"].item()
    ratio = float(case.meta["retention"]) / ((video.num_groups - saved) / video.num_groups)
    assert ratio == case["mid.adjusted_ratio"].item()


@pytest.mark.parametrize("case", HOLITOM, ids=str)
def test_what_stands_still_for_holitom_and_its_centres_are_the_authors(case):
    seen, kept, ratio = seen_by_base(case), run(case, None), case["mid.adjusted_ratio"].item()
    kept_TS = torch.zeros(seen.num_groups, dtype=torch.bool).index_fill(0, kept.index_K, True).view(seen.grid.t, -1)
    stays_TS = ops.is_static(seen, case["mid.feature_sim"], float(case.meta["tau_mask"]))
    moves_TS = torch.ones_like(kept_TS)
    for number, (start, last) in enumerate(case["mid.segments"].tolist()):
        static_S = case["mid.static_mask"][number].bool()
        centre_S = case["mid.static_centre"][number].bool()
        assert torch.equal(stays_TS[start:last].all(0) & (last > start), static_S)
        assert torch.equal(kept_TS[start] & static_S, centre_S)
        moves_TS[start : last + 1] = ~static_S
        if not static_S.any():
            assert not case["mid.static_score"][number].any() and not case["mid.static_density"][number].any()
            assert (case["mid.static_assign"][number] == -1).all()
            continue
        y_PD, place_P = case["mid.feat"][start : last + 1, static_S].mean(0), static_S.nonzero()[:, 0]
        distance_PP = density.distances(y_PD[None])[0] / y_PD.shape[1] ** 0.5
        assert centre_S.sum() == round(len(place_P) * ratio)
        num_near = min(int(case.meta["K"]), int(centre_S.sum()))
        density_P = torch.exp(-distance_PP.sort(1).values[:, :num_near].square().mean(1))
        close(density_P, case["mid.static_density"][number][static_S], 1e-5)
        score_P = ops.rank_density(
            seen, density.density_peaks(distance_PP[None], num_near, count_self=True)[0], place_P
        )
        close(score_P, case["mid.static_score"][number][static_S], 1e-5)
        assert torch.equal(distance_PP[:, centre_S[static_S]].argmin(1), case["mid.static_assign"][number][static_S])
    assert torch.equal(kept_TS & moves_TS, case["mid.dynamic_keep"].bool())


# --- the function for Qwen2.5-VL ---------------------------------------------------------------------------------


def run_feature_norm(case: Case, compat: Any) -> Kept:
    video, ratio = video_of(case), float(case.meta["retention"])
    stage = FeatureNormSToP(
        salience=float(case.meta["mu_s"]),
        temporal=float(case.meta["mu_t"]),
        power=float(case.meta["gamma"]),
        tau=float(case.meta["tau"]),
        compat=compat,
    )
    [kept] = stage([video], [Budget(round(ratio * video.num_groups), ratio)])
    return kept


@pytest.mark.parametrize("case", FEATURE_NORM, ids=str)
def test_feature_norm_gives_the_tokens_of_the_release(case):
    kept, corrected = run_feature_norm(case, "official"), run_feature_norm(case, None)
    close(kept.x_KD, case["out.tokens"])
    order_K = kept.index_K.argsort()
    assert torch.equal(corrected.index_K, kept.index_K[order_K])
    assert torch.equal(corrected.x_KD, kept.x_KD[order_K])


@pytest.mark.parametrize("case", FEATURE_NORM, ids=str)
def test_what_leads_to_the_choice_by_feature_norm_is_the_authors(case):
    video, tau = video_of(case), float(case.meta["tau"])
    importance_TS = feature_importance(case["in.feat"])
    close(importance_TS, case["mid.importance"], 1e-5)
    penalty_P = sink_score(importance_TS.mean(0), float(case.meta["gamma"]))
    close(penalty_P[None], case["mid.sink_score"], 1e-5)
    similarity_TS = ops.neighbour_similarity(video.x_ND, video.grid).view_as(importance_TS)[1:]
    windows, _ = ops.temporal_windows(similarity_TS > tau)
    assert [[start, end - 1] for start, end in windows] == case["mid.segments"].tolist()
    static_TS = similarity_TS + float(case.meta["mu_t"]) * penalty_P > tau
    removed = sum(int(static_TS[s : e - 1].all(0).sum()) * (e - 1 - s) for s, e in windows if e - s > 1)
    assert removed == case["mid.total_reduced"].item()
    left = (video.num_groups - removed) / video.num_groups
    assert min(float(case.meta["retention"]) / max(left, 0.1), 1) == pytest.approx(case["mid.adjusted_ratio"].item())
