"""A gradient teacher: on a dense step, the gradient of the answer says which groups a scorer should have kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stts.tokens import Objective, Watch, Watched

ChangeWeight = Literal["change", "none"]


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """Settings of the teacher. Only passes that keep every group of a video are taught.

    With x_i the connector's output of group i and M the objective of the answer, importance and target are

        t_i = ||dM/dx_i|| ||x_i|| (c_i),    y_i = 1 for the `share` of groups with the largest t_i, else 0

    and the scorer gets the gradient of BCE(s_i, y_i), the mean over the groups of a video. The first frame, which is
    always kept, is neither ranked nor taught. Why the product of norms and not |g . x|: an LLM that begins with a norm
    hardly reacts to the length of its input. Gradient times input as a target for pruning: LITE (arXiv 2506.01097),
    SDTP (arXiv 2504.04514)."""

    objective: Objective = "log_odds"
    """log_odds: M = -mean over answer tokens of log p - log(1 - p). log_prob: the answer loss, which no longer changes
    with what is already answered surely, so that its evidence vanishes from the gradient."""
    weight: ChangeWeight = "change"
    """change: t_i is multiplied by c_i, how much the group changed since the frame before; none: by 1."""
    share: float = 0.1
    """Of the groups outside the first frame that become targets, in (0, 1); at least one."""

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective) or self.weight not in get_args(ChangeWeight):
            raise ValueError(
                f"teacher: objective={self.objective!r} must be one of {get_args(Objective)} and weight="
                f"{self.weight!r} one of {get_args(ChangeWeight)}"
            )
        if not 0 < self.share < 1:
            raise ValueError(f"teacher: share={self.share} must be in (0, 1): the fraction of groups that are targets")

    def watch(self, scores_G: Tensor, change_G: Tensor, per_frame: int) -> Watch:
        """For `Kept.watch` of a video that keeps every group: features unchanged, the loss `teacher`, and for the log
        `teacher_agreement`, the share of targets that are among as many highest scores (random scores: `share`).

        scores_G: fp32 in (0, 1), with gradient. change_G: in [0, 1]. per_frame: groups of the first frame."""
        change_G = change_G if self.weight == "change" else torch.ones_like(change_G)

        def watch(x_Gd: Tensor) -> Watched:
            values = {name: scores_G.new_zeros(()) for name in ("teacher", "teacher_agreement")}
            taught: Any = _Teach.apply  # torch leaves it without types
            features_Gd, loss = taught(x_Gd, scores_G, change_G, values, per_frame, self.share)
            return Watched(features_Gd, {"teacher": loss}, values, self.objective)

        return watch


def make_teacher(settings: Mapping[str, Any] | Teacher | None) -> Teacher | None:
    """From the options of a config. ValueError for unknown names."""
    if settings is None or isinstance(settings, Teacher):
        return settings
    if unknown := sorted(set(settings) - set(Teacher.__dataclass_fields__)):
        raise ValueError(f"teacher={dict(settings)}: {unknown} unknown; known: {sorted(Teacher.__dataclass_fields__)}")
    return Teacher(**settings)


def importance(x_Gd: Tensor, grad_Gd: Tensor) -> Tensor:
    """(G,) fp32 in 16-bit training too, where squares of gradients underflow."""
    return grad_Gd.float().norm(dim=-1) * x_Gd.float().norm(dim=-1)


def highest(value_G: Tensor, per_frame: int, share: float) -> Tensor:
    """(G,) fp32: 1 for the `share` of groups behind the first frame with the largest values, at least one; else 0."""
    number = max(1, round(share * (len(value_G) - per_frame)))
    target_G = torch.zeros_like(value_G)
    if len(value_G) > per_frame:
        target_G[value_G[per_frame:].topk(number).indices + per_frame] = 1
    return target_G


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
        change_G: Tensor,
        values: Mapping[str, Tensor],
        per_frame: int,
        share: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x_Gd, scores_G, change_G)
        ctx.values, ctx.per_frame, ctx.share = values, per_frame, share
        return x_Gd.view_as(x_Gd), scores_G.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_Gd, weight = grads
        x_Gd, scores_G, change_G = ctx.saved_tensors
        target_G = highest(importance(x_Gd, grad_Gd) * change_G.float(), ctx.per_frame, ctx.share)
        taught_G = torch.arange(len(scores_G), device=scores_G.device) >= ctx.per_frame
        error_G = torch.where(taught_G, scores_G - target_G, 0.0)  # dBCE/dlogit
        likelihood_G = torch.where(target_G > 0, scores_G, 1 - scores_G).clamp_min(1e-12)
        ctx.values["teacher"].copy_(torch.where(taught_G, -likelihood_G.log(), 0.0).mean())
        chosen_G = highest(scores_G, ctx.per_frame, ctx.share)
        ctx.values["teacher_agreement"].copy_((chosen_G * target_G).sum() / target_G.sum().clamp_min(1))
        # The sigmoid's own backward multiplies by s (1 - s), so that a saturated score stays finite.
        slope_G = (scores_G * (1 - scores_G)).clamp_min(1e-12)
        return grad_Gd, weight * error_G / (slope_G * len(scores_G)), None, None, None, None
