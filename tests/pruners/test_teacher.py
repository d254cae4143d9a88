"""The gradient teacher against plain autograd, on numbers small enough to write out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners.teacher import Teacher, add_noise, gradient_importance, highest, make_teacher
from stts.tokens import Budget
from tests.pruners.test_stts import make, make_video

PER_FRAME = 3


def answer(x_Gd: Tensor) -> Tensor:
    """Any function of the features in which groups matter unequally."""
    return (x_Gd @ torch.arange(1.0, 1 + x_Gd.shape[1])).cos().mul(torch.arange(1.0, 1 + len(x_Gd))).sum()


@pytest.fixture
def parts() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": torch.randn(12, 4, requires_grad=True),
        "logit": torch.randn(12, requires_grad=True),
        "change": torch.rand(12),
    }


@pytest.mark.parametrize("weight", ["change", "none", 0.25])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_the_gradient_is_that_of_bce_on_a_fixed_target(parts: dict[str, Tensor], weight: Any, scale: float) -> None:
    teacher = Teacher(weight=weight, share=0.3)
    x, logit, change = parts["x"], parts["logit"], parts["change"]
    watched = teacher.watch(logit.sigmoid(), change, PER_FRAME)(x)
    assert torch.equal(watched.x_Kd, x) and watched.losses["teacher"] == 0 and watched.values["teacher"] == 0
    ((answer(watched.x_Kd) + 0.5 * watched.losses["teacher"]) * scale).backward()
    [grad] = torch.autograd.grad(answer(x), x)
    assert x.grad is not None and logit.grad is not None
    torch.testing.assert_close(x.grad, scale * grad)

    importance = grad.norm(dim=1) * x.detach().norm(dim=1)
    importance *= {"change": change, "none": 1, 0.25: 0.75 + 0.25 * change}[weight]
    target = torch.zeros(12)
    target[PER_FRAME + importance[PER_FRAME:].topk(3).indices] = 1
    again = logit.detach().requires_grad_()
    loss = F.binary_cross_entropy_with_logits(again, target, reduction="none")[PER_FRAME:].sum() / 12
    (0.5 * scale * loss).backward()
    assert again.grad is not None
    torch.testing.assert_close(logit.grad, again.grad, rtol=1e-6, atol=1e-6 * scale)
    torch.testing.assert_close(watched.values["teacher"], loss.detach())
    chosen = (logit[PER_FRAME:].topk(3).indices + PER_FRAME).tolist()
    shared = set(chosen) & set(target.nonzero().flatten().tolist())
    assert watched.values["teacher_agreement"].item() == pytest.approx(len(shared) / 3)


def test_the_importance_is_the_finite_difference_of_the_answer(parts: dict[str, Tensor]) -> None:
    x = parts["x"].detach().double()
    [grad] = torch.autograd.grad(answer(given := x.clone().float().requires_grad_()), given)
    numeric = torch.zeros_like(x)
    for place in range(x.numel()):
        step = torch.zeros(x.numel(), dtype=torch.double)
        step[place] = 1e-5
        step = step.view_as(x)
        up, down = ((x + sign * step) @ torch.arange(1.0, 5.0, dtype=torch.double) for sign in (1, -1))
        weight = torch.arange(1.0, 13.0, dtype=torch.double)
        numeric.view(-1)[place] = ((up.cos() - down.cos()) * weight).sum() / 2e-5
    torch.testing.assert_close(grad.double(), numeric, rtol=1e-3, atol=1e-3)
    ours, theirs = (highest(gradient_importance(x, one), PER_FRAME, 0.3) for one in (grad, numeric))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [-40.0, 40.0])
def test_saturated_scores_stay_finite(parts: dict[str, Tensor], value: float) -> None:
    logit = torch.full((12,), value, requires_grad=True)
    watched = Teacher().watch(logit.sigmoid(), parts["change"], PER_FRAME)(parts["x"])
    (answer(watched.x_Kd) + watched.losses["teacher"]).backward()
    assert logit.grad is not None and logit.grad.isfinite().all() and watched.values["teacher"].isfinite()


def test_attention_makes_the_target_where_that_is_the_signal(parts: dict[str, Tensor]) -> None:
    x, logit, change = parts["x"], parts["logit"], parts["change"]
    teacher = Teacher(signal="attention", layer=2, share=0.3)
    watched = teacher.watch(logit.sigmoid(), change, PER_FRAME)(x)
    assert watched.attention is not None and watched.attention[0] == 2
    attention = torch.rand(12)
    watched.attention[1](attention)
    (answer(watched.x_Kd) + watched.losses["teacher"]).backward()
    target = highest(attention * change, PER_FRAME, 0.3)
    again = logit.detach().requires_grad_()
    loss = F.binary_cross_entropy_with_logits(again, target, reduction="none")[PER_FRAME:].sum() / 12
    loss.backward()
    assert target.sum() == 3 and logit.grad is not None and again.grad is not None
    torch.testing.assert_close(logit.grad, again.grad, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(watched.values["teacher"], loss.detach())


@pytest.mark.parametrize("signal", ["noise_gate", "scale_gate"])
def test_a_gate_lets_its_share_through_and_the_answer_moves_it(parts: dict[str, Tensor], signal: Any) -> None:
    """The gradient is that of finite differences on the logits; what the gate may let through in all stays the same."""
    x, logit = parts["x"].detach().double(), parts["logit"].detach().double()

    def through(logit: Tensor) -> Tensor:
        torch.manual_seed(1)
        return Teacher(signal=signal, share=0.4).watch(logit.sigmoid(), parts["change"], PER_FRAME)(x).x_Kd

    def told(logit: Tensor) -> Tensor:
        return (through(logit)[:, 0].cos() * torch.arange(1.0, 13.0)).sum()

    assert torch.equal(through(logit)[:PER_FRAME], x[:PER_FRAME]), "the first frame passes whole"
    asked = logit.clone().requires_grad_()
    [grad] = torch.autograd.grad(told(asked), asked)
    step = 1e-6 * torch.eye(12, dtype=torch.double)
    numeric = torch.stack([(told(logit + one) - told(logit - one)) / 2e-6 for one in step])
    torch.testing.assert_close(grad, numeric, rtol=1e-4, atol=1e-4)
    assert grad[PER_FRAME:].abs().min() > 0 and grad[PER_FRAME:].sum().abs() < 1e-3 * grad.abs().sum()
    if signal == "scale_gate":
        share = through(logit)[PER_FRAME:, 0] / x[PER_FRAME:, 0]
        assert share.sum().item() == pytest.approx(round(0.4 * 9))


def test_noise_leaves_mean_and_variance_as_they_are() -> None:
    torch.manual_seed(0)
    x = 3 + 2 * torch.randn(4000, 3)
    for p in (0.02, 0.5, 0.98):
        noised = add_noise(x, torch.full((4000,), p))
        torch.testing.assert_close(noised.mean(0), x.mean(0), rtol=0, atol=0.15)
        torch.testing.assert_close(noised.var(0), x.var(0), rtol=0.1, atol=0)
        shared = ((noised - noised.mean(0)) * (x - x.mean(0))).mean(0) / (noised.std(0) * x.std(0))
        torch.testing.assert_close(shared, torch.full((3,), p).sqrt(), rtol=0, atol=0.05)


@pytest.mark.parametrize("signal", ["gradient", "noise_gate", "scale_gate"])
def test_a_video_of_one_frame_teaches_nothing(parts: dict[str, Tensor], signal: Any) -> None:
    watched = Teacher(signal=signal).watch(parts["logit"].sigmoid(), parts["change"], 12)(parts["x"])
    (answer(watched.x_Kd) + sum(watched.losses.values())).backward()
    assert parts["logit"].grad is not None and not parts["logit"].grad.any()


def test_only_passes_that_keep_everything_are_watched() -> None:
    torch.manual_seed(0)
    video, stage = make_video(), make(teacher={"share": 0.2})
    full, half = Budget(24, 1.0, True), Budget(12, 0.5, True)
    assert stage.train()([video], [full])[0].watch is not None
    assert stage.train()([video], [half])[0].watch is None
    assert stage.eval()([video], [full])[0].watch is None
    assert make().train()([video], [full])[0].watch is None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"share": 1.0}, "share=1.0"),
        ({"objective": "loss"}, "objective='loss'"),
        ({"shares": 0.1}, "unknown"),
        ({"weight": 1.5}, "weight=1.5"),
        ({"weight": "novelty"}, "weight='novelty'"),
        ({"signal": "attention"}, "layer=None"),
        ({"signal": "noise_gate", "layer": 1}, "layer=1"),
        ({"signal": "gate"}, "signal='gate'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_teacher(settings)
