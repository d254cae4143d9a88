"""The learned part of STTS (arXiv 2603.18004): one score per group of patches from this and the previous frame.

Shape suffixes beside those of `stts.tokens`: W = patches per window, H = heads, M = hidden width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stts.pruners.temporal import gather_windows


class WindowPooling(nn.Module):
    """One vector per window: its mean patch asks, its patches answer (multi-head attention, no norm, no residual).

    With `attend_missing` slots outside the grid take part as zero vectors, in the mean and as keys, as in the release;
    otherwise only the patches that exist do."""

    def __init__(self, dim: int, num_heads: int, *, in_dim: int | None = None, attend_missing: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} cannot be split into num_heads={num_heads} equal heads; change one of them")
        self.num_heads = num_heads
        self.attend_missing = attend_missing
        self.query = nn.Linear(in_dim or dim, dim)
        self.key = nn.Linear(in_dim or dim, dim)
        self.value = nn.Linear(in_dim or dim, dim)
        self.out = nn.Linear(dim, dim)
        # The release draws with std 0.02 at width 1152. At width 64 that would shrink patches to a fortieth, and the
        # scorer would see nothing but its own biases for hundreds of steps; the gain per layer is kept instead.
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.normal_(layer.weight, std=0.02 * math.sqrt(1152 / layer.in_features))
            nn.init.zeros_(layer.bias)

    def forward(self, x_ND: Tensor, group_GW: Tensor) -> Tensor:
        """(G, D) from patches and their windows (int64 rows of `x_ND`, -1 = outside the grid)."""
        valid_GW = group_GW >= 0
        if self.attend_missing:
            valid_GW = torch.ones_like(valid_GW)
        x_GWD = gather_windows(x_ND, group_GW)
        mean_GD = x_GWD.float().sum(1) / valid_GW.sum(1, keepdim=True).clamp_min(1)

        q_GHE = self.query(mean_GD.to(x_ND.dtype)).unflatten(-1, (self.num_heads, -1))
        k_GWHE = self.key(x_GWD).unflatten(-1, (self.num_heads, -1))
        v_GWHE = self.value(x_GWD).unflatten(-1, (self.num_heads, -1))
        with torch.autocast(x_ND.device.type, enabled=False):  # logits and softmax in fp32, as in the release
            # Not by einsum, which would copy all keys into another order.
            logits_GWH = torch.linalg.vecdot(q_GHE.float()[:, None], k_GWHE.float()) / math.sqrt(q_GHE.shape[-1])
            logits_GHW = logits_GWH.transpose(1, 2)
            weight_GHW = logits_GHW.masked_fill(~valid_GW[:, None], float("-inf")).softmax(-1)
            pooled_GD = torch.einsum("ghw,gwhe->ghe", weight_GHW, v_GWHE.float()).flatten(1)
        out: Tensor = self.out(pooled_GD.to(v_GWHE.dtype))
        return out


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever the autocast state and the dtype of its weights.

    A bf16 score has 8 bits: hundreds of groups would tie and their order, not the scorer, would choose."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class Scorer(nn.Module):
    """score = sigmoid(W3 silu(W2 silu(W1 [previous ; current]))) on pooled windows; (0, 1), high = keep.

    Layers work in the dtype of their weights (or of autocast); the softmax and the score itself are fp32."""

    def __init__(self, dim: int, mlp_dim: int, num_heads: int, *, attend_missing: bool = False) -> None:
        super().__init__()
        self.pooling = WindowPooling(dim, num_heads, attend_missing=attend_missing)
        self.mlp = nn.ModuleList([nn.Linear(2 * dim, mlp_dim), nn.Linear(mlp_dim, mlp_dim), Fp32Linear(mlp_dim, 1)])
        for layer in self.mlp:
            assert isinstance(layer, nn.Linear)
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5, a=-2.0, b=2.0)
            nn.init.zeros_(layer.bias)

    def forward(self, x_ND: Tensor, group_GW: Tensor, previous_G: Tensor) -> Tensor:
        """(G,) fp32. `previous_G` int64: number of the group at this place one frame earlier, -1 = none (zeros)."""
        dtype = next(self.parameters()).dtype  # not a weight by name: under ZeRO-3 that would gather it
        pooled_GD = self.pooling(x_ND.to(dtype), group_GW)
        before_GD = gather_windows(pooled_GD, previous_G[:, None]).squeeze(1)
        hidden = torch.cat([before_GD, pooled_GD], -1)
        for layer in self.mlp[:-1]:
            hidden = F.silu(layer(hidden))
        logit_G1: Tensor = self.mlp[-1](hidden)
        return logit_G1.squeeze(1).sigmoid()
