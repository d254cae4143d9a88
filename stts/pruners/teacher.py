"""What dense steps teach a scorer: by a target made of the answer's gradient or of attention, or by a gate on features.

A signal is a `Watch` (`stts.tokens`): it sees the connector's output of a video on its way into the prompt, together
with the scores, and returns the features the LLM gets. `Teacher.watch` is the one place that makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stts.pruners import ops
from stts.tokens import Objective, Watch, Watched

TeacherSignal = Literal["gradient", "attention", "noise_gate", "scale_gate"]
ChangeWeight = float | Literal["change", "none"]
Importance = Callable[[Tensor, Tensor], Tensor]
"""Features and their gradients, (G, d) each -> (G,) fp32."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Settings of the teacher. Only passes that keep every group of a video are taught.

    With x_i the connector's output of group i and M the objective of the answer, importance and target are

        t_i = ||dM/dx_i|| ||x_i|| (c_i),    y_i = 1 for the `share` of groups with the largest t_i, else 0

    and the scorer gets the gradient of BCE(s_i, y_i), the mean over the groups of a video. The first frame, which is
    always kept, is neither ranked nor taught. Why the product of norms and not |g . x|: an LLM that begins with a norm
    hardly reacts to the length of its input. Gradient times input as a target for pruning: LITE (arXiv 2506.01097),
    SDTP (arXiv 2504.04514). This is the signal `gradient`; the others are its rivals, for comparison."""

    signal: TeacherSignal = "gradient"
    """gradient: as above. attention: t_i is the attention of the row's last token to group i in LLM layer `layer`, mean
    over heads, as in FlexSelect (arXiv 2506.00993), there with a rank loss. noise_gate and scale_gate have no target:
    behind the first frame the LLM sees only a part p_i of each group, sum p_i = `share` of them (`ops.soft_top_k` of
    the logits), and the answer's own gradient moves p. noise_gate: the rest is noise, see `add_noise` (AutoSelect,
    arXiv 2603.07135). scale_gate: p_i x_i (VisionSelector, arXiv 2510.16598, there with a loss that sharpens p)."""
    objective: Objective = "log_odds"
    """log_odds: M = -mean over answer tokens of log p - log(1 - p). log_prob: the answer loss, which no longer changes
    with what is already answered surely, so that its evidence vanishes from the gradient."""
    weight: ChangeWeight = "change"
    """change: t_i is multiplied by c_i, how much the group changed since the frame before; none: by 1; a number w in
    [0, 1]: by 1 - w + w c_i, so that things at rest keep a part of what they matter."""
    share: float = 0.1
    """Of the groups outside the first frame that become targets, or that gates let through, in (0, 1); at least one."""
    layer: int | None = None
    """Of the LLM, from 0, for the signal `attention`."""

    def __post_init__(self) -> None:
        for name, known in (("signal", TeacherSignal), ("objective", Objective)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"teacher: {name}={getattr(self, name)!r} must be one of {get_args(known)}")
        if self.weight not in ("change", "none") and not (
            isinstance(self.weight, int | float) and 0 <= self.weight <= 1
        ):
            raise ValueError(f"teacher: weight={self.weight!r} must be 'change', 'none' or a number in [0, 1]")
        if not 0 < self.share < 1:
            raise ValueError(f"teacher: share={self.share} must be in (0, 1): the fraction of groups that are targets")
        if (self.layer is None) == (self.signal == "attention"):
            raise ValueError(
                f"teacher: layer={self.layer} with signal={self.signal!r}; the signal 'attention' needs a layer of the "
                "LLM, from 0, the others take none"
            )

    @property
    def change_share(self) -> float:
        """`weight` as a number."""
        return {"change": 1.0, "none": 0.0}[self.weight] if isinstance(self.weight, str) else self.weight

    def watch(self, scores_G: Tensor, change_G: Tensor, per_frame: int) -> Watch:
        """For `Kept.watch` of a video that keeps every group. With a target: features unchanged, the loss `teacher`,
        and for the log `teacher_agreement`, the share of targets that are among as many highest scores (random scores:
        `share`). With a gate: features behind it, and no loss of its own.

        scores_G: fp32 in (0, 1), with gradient. change_G: in [0, 1]. per_frame: groups of the first frame."""

        def teach(x_Gd: Tensor, importance: Importance) -> Watched:
            values = {name: scores_G.new_zeros(()) for name in ("teacher", "teacher_agreement")}
            prior_G = 1 - self.change_share * (1 - change_G)
            taught: Any = _Teach.apply  # torch leaves it without types
            features_Gd, loss = taught(x_Gd, scores_G, prior_G, values, per_frame, self.share, importance)
            return Watched(features_Gd, {"teacher": loss}, values, self.objective)

        def by_gradient(x_Gd: Tensor) -> Watched:
            return teach(x_Gd, gradient_importance)

        def by_attention(x_Gd: Tensor) -> Watched:
            assert self.layer is not None
            heard = [torch.zeros_like(change_G)]  # a blank frame is in no prompt and hears nothing
            watched = teach(x_Gd, lambda x_Gd, grad_Gd: heard[-1])
            return replace(watched, attention=(self.layer, heard.append))

        def gated(gate: Callable[[Tensor, Tensor], Tensor]) -> Watch:
            def watch(x_Gd: Tensor) -> Watched:
                return Watched(through(gate, x_Gd, scores_G, per_frame, self.share), {}, {}, self.objective)

            return watch

        ways: dict[TeacherSignal, Watch] = {
            "gradient": by_gradient,
            "attention": by_attention,
            "noise_gate": gated(add_noise),
            "scale_gate": gated(scale),
        }
        return ways[self.signal]


def make_teacher(settings: Mapping[str, Any] | Teacher | None) -> Teacher | None:
    """From the options of a config. ValueError for unknown names."""
    if settings is None or isinstance(settings, Teacher):
        return settings
    if unknown := sorted(set(settings) - set(Teacher.__dataclass_fields__)):
        raise ValueError(f"teacher={dict(settings)}: {unknown} unknown; known: {sorted(Teacher.__dataclass_fields__)}")
    return Teacher(**settings)


def gradient_importance(x_Gd: Tensor, grad_Gd: Tensor) -> Tensor:
    """(G,) fp32 in 16-bit training too, where squares of gradients underflow."""
    importance_G: Tensor = grad_Gd.float().norm(dim=-1) * x_Gd.float().norm(dim=-1)
    return importance_G


def highest(value_G: Tensor, per_frame: int, share: float) -> Tensor:
    """(G,) fp32: 1 for the `share` of groups behind the first frame with the largest values, at least one; else 0."""
    target_G = torch.zeros_like(value_G)
    if len(value_G) > per_frame:
        number = num_targets(len(value_G) - per_frame, share)
        target_G[value_G[per_frame:].topk(number).indices + per_frame] = 1
    return target_G


def num_targets(num_groups: int, share: float) -> int:
    return max(1, round(share * num_groups))


def through(
    gate: Callable[[Tensor, Tensor], Tensor], x_Gd: Tensor, scores_G: Tensor, per_frame: int, share: float
) -> Tensor:
    """(G, d): the first frame as it is, what follows behind a gate that a `share` of it passes."""
    if len(x_Gd) == per_frame:
        return x_Gd + 0 * scores_G.sum().to(x_Gd.dtype)  # the scorer has a gradient on every rank
    logit_G = torch.logit(scores_G[per_frame:], eps=1e-6)
    [p_G], _ = ops.soft_top_k([logit_G], [num_targets(len(logit_G), share)])
    return torch.cat([x_Gd[:per_frame], gate(x_Gd[per_frame:], p_G).to(x_Gd.dtype)])


def scale(x_Gd: Tensor, p_G: Tensor) -> Tensor:
    """p x."""
    return x_Gd * p_G[:, None]


def add_noise(x_Gd: Tensor, p_G: Tensor) -> Tensor:
    """sqrt(p) (x - m) + sqrt(1 - p) sd e + m, with m and sd the mean and spread of every channel over the groups, e
    standard normal: their variance stays as it is for every p, so the LLM cannot read p off the size of a group."""
    x_Gd, p_G1 = x_Gd.float(), p_G.clamp(0.01, 0.99)[:, None]  # a square root has no gradient at 0
    mean_d, spread_d = x_Gd.detach().mean(0), x_Gd.detach().std(0, correction=0)
    return mean_d + p_G1.sqrt() * (x_Gd - mean_d) + (1 - p_G1).sqrt() * spread_d * torch.randn_like(x_Gd)


class _Teach(torch.autograd.Function):
    """Identity on the features, and a loss that has a gradient but no value.

    Both are outputs of one node, so autograd calls its backward once, when it knows the gradient of both: dM/dx, which
    gives the target, and the weight of the loss in the total, in which ranks, accumulation and loss scaling are
    contained. One backward pass serves everything."""

    @staticmethod
    def forward(
        ctx: Any,
        x_Gd: Tensor,
        scores_G: Tensor,
        prior_G: Tensor,
        values: Mapping[str, Tensor],
        per_frame: int,
        share: float,
        importance: Importance,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_Gd, scores_G, prior_G)
        ctx.values, ctx.per_frame, ctx.share, ctx.importance = values, per_frame, share, importance
        return x_Gd.view_as(x_Gd), scores_G.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_Gd, weight = grads
        x_Gd, scores_G, prior_G = ctx.saved_tensors
        target_G = highest(ctx.importance(x_Gd, grad_Gd) * prior_G.float(), ctx.per_frame, ctx.share)
        taught_G = torch.arange(len(scores_G), device=scores_G.device) >= ctx.per_frame
        error_G = torch.where(taught_G, scores_G - target_G, 0.0)  # dBCE/dlogit
        likelihood_G = torch.where(target_G > 0, scores_G, 1 - scores_G).clamp_min(1e-12)
        ctx.values["teacher"].copy_(torch.where(taught_G, -likelihood_G.log(), 0.0).mean())
        chosen_G = highest(scores_G, ctx.per_frame, ctx.share)
        ctx.values["teacher_agreement"].copy_((chosen_G * target_G).sum() / target_G.sum().clamp_min(1))
        # The sigmoid's own backward multiplies by s (1 - s), so that a saturated score stays finite.
        slope_G = (scores_G * (1 - scores_G)).clamp_min(1e-12)
        return grad_Gd, weight * error_G / (slope_G * len(scores_G)), None, None, None, None, None
