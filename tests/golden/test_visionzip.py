"""VisionZip against vectors of the authors' releases: the video port, and the step in the CLIP tower."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners.base import with_newlines
from stts.pruners.visionzip import VisionZip
from stts.tokens import Budget, Grid, Kept, VideoTokens
from tests.golden.conftest import Case, cases

VIDEO = cases("visionzip", containing="mid.dominant_pos")
CLIP = cases("visionzip", containing="in.attn_cls_row")


def grid_of(case: Case) -> Grid:
    num_frames, num_places = case["mid.feat"].shape[:2]
    side = round(num_places**0.5)
    return Grid(num_frames, side, side)


def run(case: Case, compat: Any) -> Kept:
    """The stage on the pooled features, attention and keys of a case, with the release's own count."""
    grid = grid_of(case)
    video = VideoTokens(
        x_ND=case["mid.feat"].flatten(0, 1),
        grid=grid,
        cell_G=torch.arange(grid.num_groups),
        salience_G=case["mid.attn"].flatten(),
        keys_GD=case["mid.key"].flatten(0, 1),
    )
    ratio = float(case.meta["retention"])
    stage = VisionZip(newline_per_row=case.meta["newline"] == "grid", compat=compat)
    [kept] = stage([video], [Budget(round(ratio * grid.num_groups), ratio)])
    assert len(kept.index_K) == grid.t * int(case.meta["spatial_tokens"])
    return kept


def with_newline_rows(case: Case, kept: Kept, grid: Grid) -> Tensor:
    """What the LLM reads: kept rows and newlines in the order of the host's layout."""
    assert kept.x_KD is not None
    if case.meta["newline"] == "one_token":
        return torch.cat([kept.x_KD, case["in.newline"][None]])
    filled = case["in.newline"].repeat(grid.t * grid.h * (grid.w + 1), 1)
    filled[with_newlines(kept.index_K, grid, "none")] = kept.x_KD
    return filled[with_newlines(kept.index_K, grid, "every_row")]


@pytest.mark.parametrize("case", VIDEO, ids=str)
def test_official_gives_the_sequence_of_the_release(case):
    kept = run(case, "official")
    torch.testing.assert_close(with_newline_rows(case, kept, grid_of(case)), case["out.tokens"], atol=2e-5, rtol=0)
    first_T1 = torch.arange(len(case["mid.feat"]))[:, None] * case["mid.feat"].shape[1]
    place_TP = torch.cat([case["mid.dominant_pos"], case["mid.context_pos"]], 1)
    index_K = (first_T1 + place_TP).flatten()
    assert torch.equal(kept.index_K, index_K if case.meta["newline"] == "one_token" else index_K.sort().values)


@pytest.mark.parametrize("case", VIDEO, ids=str)
def test_corrected_gives_the_same_tokens_in_order_of_place(case):
    kept = run(case, None)
    x_TSD = case["mid.feat"]
    first_T1 = torch.arange(len(x_TSD))[:, None] * x_TSD.shape[1]
    dominant_TK = case["mid.dominant_pos"]
    index_K, order = (first_T1 + torch.cat([dominant_TK, case["mid.context_pos"]], 1)).flatten().sort()
    x_TKD = x_TSD.gather(1, dominant_TK[..., None].expand(-1, -1, x_TSD.shape[2]))
    x_KD = torch.cat([x_TKD, case["mid.context_tokens"]], 1).flatten(0, 1)[order]
    assert torch.equal(kept.index_K, index_K)
    torch.testing.assert_close(kept.x_KD, x_KD, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", VIDEO, ids=str)
def test_members_go_to_the_target_that_the_release_names(case):
    kept = run(case, None)
    x_TSD, (num_frames, num_places) = case["mid.feat"], case["mid.attn"].shape
    assert torch.equal(case["mid.topk_order"].sort().values, case["mid.dominant_pos"])
    for frame in range(num_frames):
        here = kept.index_K // num_places == frame
        context_C = case["mid.context_pos"][frame]
        rest_L = torch.tensor([p for p in range(num_places) if p not in case["mid.dominant_pos"][frame]])
        assert torch.equal(rest_L[case["mid.target_in_rest"]], context_C)
        for number, target in enumerate(context_C.tolist()):
            members = case["mid.merge_src_pos"][frame][case["mid.merge_assign"][frame] == number]
            token_D = x_TSD[frame, target] + x_TSD[frame, members].sum(0) / max(1, len(members))
            row_D = kept.x_KD[here][kept.index_K[here] % num_places == target][0]
            torch.testing.assert_close(row_D, token_D, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", VIDEO, ids=str)
def test_signals_are_pooled_like_features(case):
    for name in ("feat", "attn", "key"):
        full_TND, pooled_TSD = case[f"in.{name}_full"], case[f"mid.{name}"]
        full_TDYX = full_TND.reshape(len(full_TND), int(case.meta["grid_full"]), int(case.meta["grid_full"]), -1)
        full_TDYX, side = full_TDYX.permute(0, 3, 1, 2), round(pooled_TSD.shape[1] ** 0.5)
        average = case.meta["pool"] == "average"
        made = F.avg_pool2d(full_TDYX, 2) if average else F.interpolate(full_TDYX, (side, side), mode="bilinear")
        torch.testing.assert_close(made.flatten(2).mT.reshape(pooled_TSD.shape), pooled_TSD, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", CLIP, ids=str)
def test_counts_per_frame_give_the_step_of_the_clip_tower(case):
    """Images take the place of frames. The release keeps [CLS], which is no token of the grid, in front."""
    attention_BHN, x_BND, side = case["in.attn_cls_row"], case["in.hidden"], int(case.meta["grid"])
    num_images, num_dominant, num_contextual = len(x_BND), int(case.meta["dominant"]) - 1, int(case.meta["contextual"])
    salience_BS = attention_BHN[..., 1:].sum(1)
    torch.testing.assert_close(salience_BS, case["mid.cls_attention_sum"], atol=1e-6, rtol=0)
    grid = Grid(num_images, side, side)
    video = VideoTokens(
        x_ND=x_BND[:, 1:].flatten(0, 1),
        grid=grid,
        cell_G=torch.arange(grid.num_groups),
        salience_G=salience_BS.flatten(),
        keys_GD=case["in.key"][:, 1:].flatten(0, 1),
    )
    num_kept = num_dominant + num_contextual
    stage = VisionZip(num_dominant=num_dominant, num_contextual=num_contextual, compat="official")
    [kept] = stage([video], [Budget(num_images * num_kept, num_kept / grid.per_frame)])
    x_BKD = torch.cat([x_BND[:, :1], kept.x_KD.view(num_images, num_kept, -1)], 1)
    torch.testing.assert_close(x_BKD, case["out.tokens"], atol=2e-5, rtol=0)

    # The release counts places from [CLS], so ours are one less.
    place_BP = kept.index_K.view(num_images, -1) % grid.per_frame + 1
    keep_BK = case["mid.keep_sorted"]
    assert torch.equal(case["mid.all_indices"].sort().values, keep_BK)
    assert torch.equal(place_BP[:, :num_dominant], keep_BK[:, 1:])
    assert torch.equal(place_BP[:, num_dominant:], case["mid.context_pos"])
    for image in range(num_images):
        rest_L = torch.tensor([place for place in range(grid.per_frame + 1) if place not in keep_BK[image]])
        context_C = case["mid.context_pos"][image]
        assert torch.equal(rest_L[case["mid.target_in_rest"]], context_C)
        for number, target in enumerate(context_C.tolist()):
            members = case["mid.merge_src_pos"][image][case["mid.merge_assign"][image] == number]
            token_D = x_BND[image, target] + x_BND[image, members].sum(0) / max(1, len(members))
            torch.testing.assert_close(x_BKD[image, 1 + num_dominant + number], token_D, atol=2e-5, rtol=0)
