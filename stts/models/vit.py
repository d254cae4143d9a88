"""The block loop of a vision tower in which a stage may drop patches.

Deciding and dropping are two moments: the stage sees the output of block `layer`; blocks up to `drop_after` still run
on everything, with the stage's key bias; afterwards blocks run on survivors only, at exact lengths, without padding.

Shape suffixes: F = frames, N = patches of one frame, D = width, S = patches that are left, all frames together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stts.packing.segments import Segments
from stts.tokens import Site

Block = Callable[[Tensor, Any], Tensor]
"""`block(x, attention_mask) -> x` on (batch, tokens, D); the mask is None or `Segments`."""


@dataclass(frozen=True)
class Drop:
    """A stage's decision, for the flat patch list of all frames."""

    keep_S: Tensor
    """bool (F * N,)."""
    bias_S: Tensor | None = None
    """fp32 (F * N,) key bias until the drop."""
    gate_S: Tensor | None = None
    """(F * N,) factor at the drop; its value is 1, its gradient reaches the scores."""


@dataclass(frozen=True)
class TowerOutput:
    taps: tuple[Tensor, ...]
    """Per tapped block (S, D), survivors of all frames in order."""
    row_S: Tensor | None
    """int64 place of each survivor in the flat (F * N) list; None: nothing was dropped."""
    lengths_F: Tensor | None
    """int64 survivors per frame; None: nothing was dropped."""


def run_tower(
    x_FND: Tensor,
    blocks: Sequence[Block],
    taps: Sequence[int],
    site: Site | None = None,
    decide: Callable[[Tensor], Drop | None] | None = None,
) -> TowerOutput:
    """Run every block once. With `decide`, patches are dropped as `site` says; `decide` may return None (keep all).

    One host synchronisation, at the drop (the number of survivors); none in the loop."""
    num_frames, num_patches, _ = x_FND.shape
    whole = Segments.from_lengths(
        torch.full((num_frames,), num_patches, dtype=torch.int32, device=x_FND.device), num_patches
    )
    drop: Drop | None = None
    mask: Segments | None = None
    row_S = lengths_F = None
    out: dict[int, Tensor] = {}
    x = x_FND
    if site is not None and decide is not None and site.layer == -1:
        drop = decide(x_FND)
    for number, block in enumerate(blocks):
        x = block(x, mask)
        if site is not None and number == site.layer and decide is not None:
            drop = decide(x)
            if drop is not None and drop.bias_S is not None and site.drop_after != number:
                x, mask = x.flatten(0, 1)[None], whole.with_bias(drop.bias_S)
        if drop is not None and site is not None and number == site.drop_after:
            if any(tap < number for tap in taps):
                raise ValueError(f"feature blocks {tuple(taps)} must not lie before the drop after block {number}")
            x = x.flatten(0, 1)[None] if mask is None else x
            row_S = drop.keep_S.nonzero().squeeze(1)
            x = x[:, row_S]
            if drop.gate_S is not None:
                x = x * drop.gate_S[row_S, None].to(x.dtype)
            lengths_F = drop.keep_S.view(num_frames, num_patches).sum(1)
            mask = Segments.from_lengths(lengths_F, num_patches)
        if number in taps:
            out[number] = x.flatten(0, 1)
    return TowerOutput(tuple(out[tap] for tap in taps), row_S, lengths_F)
