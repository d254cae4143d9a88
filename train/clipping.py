"""Gradient norms of the parts of a model and clipping by them, where torch holds the gradients: one device, DDP, FSDP2.

Under DeepSpeed see `zero_engine.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from .step_losses import world_size


def grad_squares(parts: Mapping[str, Sequence[nn.Parameter]]) -> list[Tensor]:
    """Of each part, this rank's share of the squared gradient norm: fp32 scalars whose sum over ranks is the square.

    Where gradients are cut, the square of this rank's piece; where every rank holds all of them, its n-th part."""
    squares = []
    for parameters in parts.values():
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        is_cut = any(isinstance(grad, DTensor) for grad in grads)
        squares.append(get_total_norm(local).float() ** 2 / (1 if is_cut else world_size()))
    return squares


def fill_gradients(parts: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Zeros for parameters without a gradient: AdamW would leave these out, while ZeRO knows no missing ones, and the
    states of both would differ."""
    for parameters in parts.values():
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def scale_grads(
    parts: Mapping[str, Sequence[nn.Parameter]], norms: Mapping[str, float], limit: float, per_part: bool
) -> None:
    """Scale gradients down, in place, to a norm of at most `limit`: each part's own, or the one of all parts."""
    for part, parameters in parts.items():
        norm = norms[part] if per_part else math.hypot(*norms.values())
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if norm > limit and grads:
            torch._foreach_mul_(grads, limit / norm)
