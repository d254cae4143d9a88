"""The block loop of a vision tower in which a stage may drop patches.

Deciding and dropping are two moments: the stage sees the output of block `layer`; blocks up to `drop_after` still run
on everything, with the stage's key bias; afterwards blocks run on survivors only, at exact lengths, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.models.families.base import Block, TowerInput, TowerOutput
from stts.packing.segments import Segments
from stts.tokens import Site


@dataclass(frozen=True)
class Drop:
    """A stage's decision, for the flat patch list of all frames."""

    keep_S: Tensor
    """bool (S,)."""
    bias_S: Tensor | None = None
    """fp32 (S,) key bias until the drop."""
    gate_S: Tensor | None = None
    """(S,) factor at the drop; its value is 1, its gradient reaches the scores."""
    merged_ND: Tensor | None = None
    """What the patches of all videos, which come behind those of images, become at the drop."""
    size_S: Tensor | None = None
    """fp32 (S,) patches that each one stands for; its logarithm is the key bias of all blocks behind the drop."""


Decide = Callable[[Tensor], Drop | None]
"""(S, D) output of the block where a stage decides -> its decision; None: keep everything."""


class Tower(Protocol):
    """How blocks are run: `run_tower`, or what a benchmark puts in its place."""

    def __call__(
        self,
        given: TowerInput,
        blocks: Sequence[Block],
        taps: Sequence[int],
        site: Site | None = None,
        decide: Decide | None = None,
    ) -> TowerOutput: ...


def run_tower(
    given: TowerInput,
    blocks: Sequence[Block],
    taps: Sequence[int],
    site: Site | None = None,
    decide: Decide | None = None,
) -> TowerOutput:
    """Run every block once. With `decide`, patches are dropped as `site` says; `decide` sees (S, D) and may return None
    (keep all).

    One host synchronisation, at the drop (the number of survivors); none in the loop."""
    x, aux, device = given.x_SD, given.aux, given.x_SD.device
    batched = given.batched and len(set(given.frames)) == 1
    shape = (len(given.frames), given.frames[0]) if given.frames else (0, 1)
    segments = {
        inside: Segments.from_lengths(torch.tensor(lengths, dtype=torch.int32, device=device), max(lengths, default=0))
        for inside, lengths in ((False, given.frames), (True, given.windows))
    }
    drop: Drop | None = None
    bias_S: Tensor | None = None
    row_S = lengths_F = None
    out: dict[int, Tensor] = {}
    if site is not None and decide is not None and site.layer == -1:
        drop = decide(x)
        bias_S = drop.bias_S if drop is not None else None
    for number, block in enumerate(blocks):
        if batched and bias_S is None and row_S is None:
            x = block(x.unflatten(0, shape), None, *aux).flatten(0, 1)
        else:
            mask = segments[number in given.windowed]
            x = block(x, mask if bias_S is None else mask.with_bias(bias_S), *aux)
        if site is not None and number == site.layer and decide is not None:
            drop = decide(x)
            bias_S = drop.bias_S if drop is not None and site.drop_after != number else None
        if drop is not None and site is not None and number == site.drop_after:
            if any(tap < number for tap in taps):
                raise ValueError(f"feature blocks {tuple(taps)} must not lie before the drop after block {number}")
            row_S = drop.keep_S.nonzero().squeeze(1)
            bias_S = None if drop.size_S is None else drop.size_S[row_S].log()
            if drop.merged_ND is not None:
                x = torch.cat([x[: len(x) - len(drop.merged_ND)], drop.merged_ND.to(x.dtype)])
            x, aux = x[row_S], tuple(table[row_S] for table in aux)
            if drop.gate_S is not None:
                x = x * drop.gate_S[row_S, None].to(x.dtype)
            segments = {inside: _survivors(whole, drop.keep_S) for inside, whole in segments.items()}
            lengths_F = segments[False].lengths.long()
        if number in taps:
            out[number] = x
    return TowerOutput(tuple(out[tap] for tap in taps), row_S, lengths_F)


def _survivors(whole: Segments, keep_S: Tensor) -> Segments:
    """The same segments with fewer members; empty ones stay. A boundary moves to the number of survivors before it."""
    before = F.pad(keep_S.cumsum(0, dtype=torch.int32), (1, 0))
    return Segments(before[whole.cu_seqlens], whole.max_seqlen)
