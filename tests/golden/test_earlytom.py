"""EarlyTom against vectors of the release: merging of frames, selection, and both around a small SigLIP tower.

Decisions are exact, values to 2e-4.
"""

from __future__ import annotations

import ast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners.earlytom import EarlyTom, Span, frame_cosines, select
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import Case, cases

MERGE = cases("earlytom", containing="groups_after_last")
SELECT = cases("earlytom", containing="features")
TOWER = cases("earlytom", containing="inputs_embeds")


def stage_of(case: Case, compat: str | None = "official") -> EarlyTom:
    meta = case.meta
    return EarlyTom(tau=float(meta["tau"]), limit=int(meta["M"]), smoothing=float(meta["ema"]), compat=compat)  # type: ignore[arg-type]


def spans(rows: Tensor) -> list[Span]:
    return [(int(a), int(b)) for a, b in rows]


@pytest.mark.parametrize("case", MERGE, ids=str)
def test_frames_are_merged_as_in_the_release(case: Case) -> None:
    x_TSD, stage = case["hidden"], stage_of(case)
    assert stage.segments(frame_cosines(x_TSD)) == spans(case["segments"])
    mix = stage.merge(x_TSD)
    torch.testing.assert_close(mix.weight_MT, case["mix"], atol=1e-5, rtol=0)
    merged_MSD = (mix.weight_MT @ x_TSD.flatten(1)).view(-1, *x_TSD.shape[1:])
    torch.testing.assert_close(merged_MSD, case["merged"], atol=2e-4, rtol=0)
    assert stage.segments(frame_cosines(merged_MSD)) == spans(case["groups_after_last"])

    # The same through the stage, where every patch is a group and all of what is left is kept.
    num_frames, num_places, _ = x_TSD.shape
    cell_G = torch.arange(num_frames * num_places)
    video = VideoTokens(
        x_ND=x_TSD.flatten(0, 1), grid=Grid(num_frames, 1, num_places), cell_G=cell_G, group_GW=cell_G[:, None],
        salience_G=torch.rand(len(cell_G)),
    )  # fmt: skip
    [kept] = stage([video], [Budget(num_frames * num_places, 1.0)])
    assert kept.x_ND is not None and torch.equal(kept.index_K[::num_places] // num_places, mix.place_M)
    torch.testing.assert_close(kept.x_ND[kept.index_K], case["merged"].flatten(0, 1), atol=2e-4, rtol=0)

    whole = stage_of(case, None).merge(x_TSD)
    assert (whole.weight_MT.sum(1) - 1).abs().max() < 1e-6 and (whole.weight_MT.sum(0) > 0).all(), "no frame is lost"


def pooled(case: Case, x_MSC: Tensor) -> Tensor:
    """Features or attention of a frame after the pooling of the family, (M, P, C)."""
    side = round(x_MSC.shape[1] ** 0.5)
    x_MCHW = x_MSC.transpose(1, 2).unflatten(-1, (side, side))
    if case.meta["pool"] == "average":
        return F.avg_pool2d(x_MCHW, 2).flatten(2).transpose(1, 2)
    return F.interpolate(x_MCHW, size=[-(-side // 2)] * 2, mode="bilinear").flatten(2).transpose(1, 2)


def check_selection(case: Case, groups: list[Span], num_frames: int, attention_MP: Tensor, x_MPD: Tensor) -> None:
    for name in case.names(".index"):
        ratio, expected = float(name[1:-6]), case[name]
        keep_MP, _ = select(attention_MP, groups, num_frames, ratio)
        tokens = expected[:, 0] >= 0
        assert torch.equal(keep_MP.nonzero(), expected[tokens])
        rows = case[name.replace("index", "tokens")]
        torch.testing.assert_close(x_MPD[keep_MP], rows[tokens], atol=2e-4, rtol=0)
        # LLaVA-Video's layout there puts a newline behind every token; otherwise one ends the sequence.
        assert int((~tokens).sum()) == (int(tokens.sum()) if case.meta["newline"] == "grid" else 1)
        assert torch.equal(rows[~tokens], case["image_newline"].expand(int((~tokens).sum()), -1))


@pytest.mark.parametrize("case", SELECT, ids=str)
def test_tokens_are_selected_as_in_the_release(case: Case) -> None:
    x_MPD, attention_MP = pooled(case, case["features"]), pooled(case, case["attn"][..., None])[..., 0]
    torch.testing.assert_close(x_MPD, case["pooled"], atol=1e-5, rtol=0)
    torch.testing.assert_close(attention_MP, case["pooled_attn"], atol=1e-6, rtol=0)
    num_frames = int(case.meta["initial_frames"])
    check_selection(case, spans(case["groups"]), num_frames, case["pooled_attn"], case["pooled"])


@pytest.mark.parametrize("case", TOWER, ids=str)
def test_a_tower_that_merges_behind_two_blocks(case: Case) -> None:
    x, stage, heads = case["inputs_embeds"], stage_of(case), int(case.meta["heads"])
    num_frames, layers = len(x), ast.literal_eval(case.meta["prune_layers"])
    attention = x.new_zeros(0)
    for block in range(5):
        w = case.group(f"w.layers.{block}")

        def linear(y: Tensor, name: str, w: dict[str, Tensor] = w) -> Tensor:
            return F.linear(y, w[f"{name}.weight"], w[f"{name}.bias"])

        def norm(y: Tensor, name: str, w: dict[str, Tensor] = w) -> Tensor:
            return F.layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

        y = norm(x, "layer_norm1")
        q, k, v = (
            linear(y, f"self_attn.{name}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for name in ("q", "k", "v")
        )
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), "self_attn.out_proj")
        x = x + linear(F.gelu(linear(norm(x, "layer_norm2"), "mlp.fc1"), approximate="tanh"), "mlp.fc2")
        if block in layers:
            assert stage.segments(frame_cosines(x)) == spans(case[f"block{block}.segments"])
            mix = stage.merge(x)
            torch.testing.assert_close(mix.weight_MT, case[f"block{block}.mix"], atol=1e-4, rtol=0)
            x = (mix.weight_MT @ x.flatten(1)).view(-1, *x.shape[1:])
            attention = mix.weight_MT @ weights.mean((1, 2))
            groups = stage.segments(frame_cosines(x))
    torch.testing.assert_close(x, case["hidden"], atol=2e-4, rtol=0)
    torch.testing.assert_close(attention, case["attn_last_prune"], atol=2e-4, rtol=0)
    assert groups == spans(case["groups"])
    x_MPD, attention_MP = pooled(case, x), pooled(case, attention[..., None])[..., 0]
    torch.testing.assert_close(x_MPD, case["pooled"], atol=2e-4, rtol=0)
    torch.testing.assert_close(attention_MP, case["pooled_attn"], atol=2e-4, rtol=0)
    check_selection(case, groups, num_frames, attention_MP, x_MPD)
