"""ToMe against vectors of the release: one step of matching, a small tower, schedules; a step through the stage.

Indices and sizes are exact, values to 1e-5 (one step) and 2e-4 (tower).
"""

from __future__ import annotations

import ast
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners.tome import Match, ToMe, match, merge, schedule, schedule_for_total
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden import conftest
from tests.golden.conftest import Case, cases

STEPS = cases("tome", containing="merged_pos")
TOWERS = cases("tome", containing="r_per_block")


def sources(step: Match, before_BNO: Tensor) -> Tensor:
    """Original tokens in each token behind a step: (B, M, O) bool."""
    out_BMO, _ = merge(before_BNO.float(), torch.ones(before_BNO.shape[:2]), step)
    return out_BMO > 0


def step_of(case: Case) -> tuple[Match, Tensor]:
    x_BND = case["x"]
    size_BN = case["size"] if "size" in case else torch.ones(x_BND.shape[:2])
    assert case.meta["distill_token"] == "False"
    return match(case["metric"], int(case.meta["r"]), class_token=case.meta["class_token"] == "True"), size_BN


@pytest.mark.parametrize("case", STEPS, ids=str)
def test_one_step_is_that_of_the_release(case: Case) -> None:
    step, size_BN = step_of(case)
    assert torch.equal(step.unmerged_BX, case["unmerged_pos"])
    assert torch.equal(step.source_BR, case["merged_pos"]) and torch.equal(step.target_BR, case["target_pos"])
    out_BMD, size_BM = merge(case["x"], size_BN, step)
    torch.testing.assert_close(out_BMD, case["out"], atol=1e-5, rtol=0)
    assert torch.equal(size_BM, case["out_size"])
    whole_BNN = torch.eye(size_BN.shape[1]).expand(len(size_BN), -1, -1)
    source_BMN = sources(step, whole_BNN)
    assert torch.equal(source_BMN, case["source"].bool())
    torch.testing.assert_close(source_BMN.float().transpose(1, 2) @ out_BMD, case["unmerge"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", [c for c in STEPS if "size" not in c and c.meta["class_token"] == "False"], ids=str)
def test_the_stage_takes_the_same_step(case: Case) -> None:
    num_frames, num_places, _ = case["x"].shape
    side = round(num_places**0.5)
    cell_G = torch.arange(num_frames * num_places)
    video = VideoTokens(
        x_ND=case["x"].flatten(0, 1), grid=Grid(num_frames, side, side), cell_G=cell_G, group_GW=cell_G[:, None],
        keys_GD=case["metric"].flatten(0, 1),
    )  # fmt: skip
    left = case["out"].shape[1]
    [kept] = ToMe()([video], [Budget(num_frames * left, left / num_places)])
    odd = torch.arange(1, num_places, 2).expand(num_frames, -1)
    order_TM = torch.cat([case["unmerged_pos"], odd], 1)
    place_TM, order_TM = order_TM.sort(1)
    expected_K = (place_TM + num_places * torch.arange(num_frames)[:, None]).flatten()
    assert torch.equal(kept.index_K, expected_K)
    assert kept.x_ND is not None and kept.size_N is not None
    expected = case["out"].gather(1, order_TM[..., None].expand_as(case["out"])).flatten(0, 1)
    torch.testing.assert_close(kept.x_ND[expected_K], expected, atol=1e-5, rtol=0)
    assert torch.equal(kept.size_N[expected_K], case["out_size"].gather(1, order_TM).flatten())


@pytest.mark.parametrize("case", TOWERS, ids=str)
def test_a_tower_with_merging_and_proportional_attention(case: Case) -> None:
    x, heads, meta = case["x"], int(case.meta["heads"]), case.meta
    size_BN, source_BMN = torch.ones(x.shape[:2]), torch.eye(x.shape[1]).expand(len(x), -1, -1) > 0
    removed = schedule(ast.literal_eval(meta["r"]), len(case["r_per_block"]))
    assert removed == case["r_per_block"].tolist()
    for block, number in enumerate(removed):
        w: dict[str, Any] = case.group(f"w.blocks.{block}")

        def linear(y: Tensor, name: str, w: dict[str, Any] = w) -> Tensor:
            return F.linear(y, w[f"{name}.weight"], w[f"{name}.bias"])

        def norm(y: Tensor, name: str, w: dict[str, Any] = w) -> Tensor:
            return F.layer_norm(y, y.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

        q, k, v = linear(norm(x, "norm1"), "attn.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        bias = size_BN.log()[:, None, None] if meta["prop_attn"] == "True" else 0.0
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(-1)
        x = x + linear((weights @ v).transpose(1, 2).flatten(2), "attn.proj")
        step = match(k.mean(1), number, class_token=meta["class_token"] == "True")
        if number > 0 and step.source_BR.shape[1]:
            source_BMN = sources(step, source_BMN)
            x, size_BN = merge(x, size_BN, step)
        x = x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.0"), approximate="tanh"), "mlp.2")
        torch.testing.assert_close(x, case[f"hidden.{block}"], atol=2e-4, rtol=0)
        assert torch.equal(size_BN, case[f"size.{block}"])
    assert torch.equal(source_BMN, case["source"].bool())


def test_schedules_are_those_of_the_release() -> None:
    text = conftest.read_text("tome", "schedules.json")
    if text is None:
        pytest.skip("no schedules in this folder")
    for name, expected in json.loads(text).items():
        if name.startswith("total"):
            total, blocks = (int(part) for part in name.removeprefix("total").split("_layers"))
            assert schedule_for_total(total, blocks) == (expected["r"], expected["list"])
        else:
            blocks_text, rate = name.split("|")
            assert schedule(ast.literal_eval(rate), int(blocks_text)) == expected, name
