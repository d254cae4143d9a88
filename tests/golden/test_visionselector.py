"""VisionSelector against vectors of the release: scores, choice, soft top-k, the loss and every gradient.

Tolerances as the vectors' own: scores 2e-5 of their range, soft top-k and losses 1e-4, gradients 1e-3 of their size.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stts.pruners.ops import soft_top_k
from stts.pruners.visionselector import VisionSelector
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import Case, cases

CASES = cases("visionselector", containing="features")
TRAINING = cases("visionselector", containing="train.bce")
PREFIX = "visual."


def stage_of(case: Case, **options: str) -> VisionSelector:
    stage = VisionSelector(case["features"].shape[1], **options)  # type: ignore[arg-type]
    stage.load_state_dict({name[len(PREFIX) :]: case[name] for name in stage_names(case)})
    return stage


def stage_names(case: Case) -> list[str]:
    return [n for kind in ("weight", "bias") for n in case.names(f"proj.{kind}") if n.startswith(PREFIX)]


def video_of(x_ND: Tensor) -> VideoTokens:
    return VideoTokens(x_ND=x_ND, grid=Grid(1, 1, len(x_ND)), cell_G=torch.arange(len(x_ND)))


def near(actual: Tensor, expected: Tensor, tolerance: float, relative: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected.view_as(actual), atol=tolerance, rtol=relative)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores_and_choice_are_those_of_the_release(case: Case) -> None:
    x_ND, stage = case["features"], stage_of(case).eval()
    low, high = case.meta["score_range"]
    grid_or_sizes = case["grid"].tolist()
    for name in case.names(".index"):
        ratio, expected = name[1:-6], case[name]
        [kept] = stage([video_of(x_ND)], [Budget(len(expected), float(ratio))])
        assert torch.equal(kept.index_K, expected) and kept.x_KD is None
        assert kept.scores_G is not None
        near(kept.scores_G, case["scores"], 2e-5 * max(1, high - low))
        assert len(expected) == max(1, int(len(x_ND) * float(ratio)))
        [weight_N], _ = soft_top_k([case["scores"]], [len(expected)])
        near(weight_N, case[f"r{ratio}.soft_topk"], 1e-4)
        near(weight_N, (case["scores"] + case[f"r{ratio}.shift"]).sigmoid(), 1e-4)
    assert len(grid_or_sizes) == 3


@pytest.mark.parametrize("case", [case for case in CASES if "pooled" in case.name], ids=str)
def test_official_pools_the_images_of_a_call(case: Case) -> None:
    first = 48
    parts = [video_of(part) for part in case["features"].split([first, len(case["features"]) - first])]
    stage = stage_of(case, compat="official").eval()
    for name in case.names(".index"):
        row = stage(parts, [Budget(1, float(name[1:-6]))] * 2)
        found = torch.cat([row[0].index_K, row[1].index_K + first])
        assert torch.equal(found, case[name])
    alone = stage_of(case).eval()(parts, [Budget(9, 0.2), Budget(7, 0.2)])
    near(alone[0].scores_G, stage_of(case).eval()(parts[:1], [Budget(9, 0.2)])[0].scores_G, 1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_training_is_that_of_the_release(case: Case) -> None:
    stage, x_ND, k = stage_of(case), case["features"], int(case["train.k"])
    [kept] = stage([video_of(x_ND)], [Budget(k, float(case["train.budget"]))])
    assert kept.index_K.tolist() == list(range(len(x_ND))) and kept.x_KD is not None
    near(kept.x_KD, case["train.output"], 1e-4)
    near(kept.x_KD, case["train.soft_mask"][:, None] * x_ND, 1e-4)
    loss = kept.losses["sharpen"]
    near(loss, case["train.bce"], 1e-4)
    plan = case.meta["train"]
    ramp = plan["reg_weight_end"] - plan["reg_weight_start"]
    weight = plan["reg_weight_start"] + ramp * min(plan["step"] / plan["max_steps"], 1)
    assert weight == pytest.approx(float(case["train.weight"]), abs=1e-6)
    near(weight * loss, case["train.bce_weighted"], 1e-4)
    probe = (kept.x_KD * case["train.probe"]).sum()
    near(probe, case["train.probe_loss"], 1e-3, 1e-4)
    for name, value in (("bce_weighted", weight * loss), ("probe", probe)):
        stage.zero_grad()
        value.backward(retain_graph=True)
        for ours, parameter in stage.named_parameters():
            expected, gradient = case[f"grad.{name}.{PREFIX}{ours}"], parameter.grad
            assert gradient is not None
            if ours == "importance_scorer.q_proj.bias":  # truly 0
                assert gradient.abs().max() < 1e-5
            else:
                near(gradient, expected, 1e-3 * float(expected.abs().max()))

    score_N = case["scores"].requires_grad_()
    [weight_N], bce = soft_top_k([score_N], [k])
    target_N = torch.zeros(len(x_ND)).index_fill_(0, torch.sort(score_N, descending=True).indices[:k], 1.0)
    assert torch.equal(target_N, case["train.target"])
    for name, value in (
        ("bce_weighted", weight * bce),
        ("probe", (weight_N[:, None] * x_ND * case["train.probe"]).sum()),
    ):
        [gradient] = torch.autograd.grad(value, score_N, retain_graph=True)
        near(gradient, case[f"grad.{name}.scores"], 1e-3 * float(case[f"grad.{name}.scores"].abs().max()))
