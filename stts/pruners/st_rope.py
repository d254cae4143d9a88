"""ST-RoPE: features that know their second, row and column, by whose distances Tango chooses. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from stts.pruners import ops
from stts.tokens import Grid


def sections(width: int) -> tuple[int, int, int]:
    """Even numbers of channels for time, row and column: 2 floor(D / 6) for each of the last two, the rest for time."""
    if width % 2:
        raise ValueError(f"width {width} is odd, and rotation needs pairs of channels; this model cannot use Tango")
    side = 2 * (width // 6)
    return width - 2 * side, side, side


def st_rope(
    x_GD: Tensor,
    grid: Grid,
    second_T: Tensor,
    section: tuple[int, int, int] | None = None,
    base_time: float = 1e4,
    base_space: float = 1e3,
) -> Tensor:
    """(G, D) fp32 unit features, turned by second, row and column in one block of channels each (Eq. 8).

        z_m = u_m cos(p theta_m) - u_m' sin(p theta_m),   z_m' = u_m' cos(p theta_m) + u_m sin(p theta_m)
        m' = m + d/2,   theta_m = base^(-2m/d)

    Pairs are halves of a block, as in the release; the paper prints neighbours."""
    section = sections(x_GD.shape[1]) if section is None else section
    if sum(section) != x_GD.shape[1] or any(size < 0 or size % 2 for size in section):
        raise ValueError(f"section={section} must be three even numbers that sum to the width {x_GD.shape[1]}")
    x_THWD = x_GD.detach().view(grid.t, grid.h, grid.w, -1)
    z_THWD = torch.empty(x_THWD.shape, dtype=torch.float32, device=x_GD.device)
    place_H, place_W = (torch.arange(size, device=x_GD.device) for size in (grid.h, grid.w))
    positions = (second_T[:, None, None, None], place_H[:, None, None], place_W[:, None])
    turns, start = [], 0  # first channel, middle, end; cosine and sine of the second (T, 1, 1, .), row or column
    for size, position, base in zip(section, positions, (base_time, base_space, base_space), strict=True):
        half = size // 2
        theta = base ** (-torch.arange(half, dtype=torch.float64, device=x_GD.device) / max(half, 1))
        angle = position.double() * theta
        turns.append((start, start + half, start + size, angle.cos().float(), angle.sin().float()))
        start += size
    block = ops.frame_block(x_THWD)
    for t in range(0, grid.t, block):
        x, z = x_THWD[t : t + block].float(), z_THWD[t : t + block]
        for start, middle, end, cos, sin in turns:
            if cos.dim() == 4:
                cos, sin = cos[t : t + block], sin[t : t + block]
            first, second = x[..., start:middle], x[..., middle:end]
            torch.mul(first, cos, out=z[..., start:middle]).addcmul_(second, sin, value=-1)
            torch.mul(second, cos, out=z[..., middle:end]).addcmul_(first, sin)
        z.div_(torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min_(1e-12))  # turning keeps lengths
    return z_THWD.flatten(0, 2)
