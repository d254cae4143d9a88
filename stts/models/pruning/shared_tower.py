"""The tower once per input, for several methods that all begin with the same one.

A method that acts behind the tower changes nothing in it, so on the same frames every such method sees the same
outputs. `SharedTower` stands where `run_tower` stands and keeps what it gave last; the next call with an equal input
gets that again, bit for bit. A stage inside the tower runs its own blocks, and dense the stock code.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from stts.models.families.attention import hand_over, overhear
from stts.models.families.base import Block, TowerInput, TowerOutput
from stts.models.pruning.tower import Decide, run_tower
from stts.tokens import Site


@dataclass(frozen=True)
class _Run:
    """What one call was given and gave."""

    given: TowerInput
    taps: tuple[int, ...]
    output: TowerOutput
    qk: tuple[Tensor, Tensor] | None
    """Of the block that signals come from, as `capture` hands them over."""
    ms: float


class SharedTower:
    """`run_tower` of one model, which runs once where calls with equal inputs follow each other.

    attention: `Adapter.tower_attention()` of the model, whose q and k are handed over again too.

    Inputs are compared by value, so nobody has to say when the video changes. Kept is one call and no more: its input,
    the outputs of the tapped blocks, q and k of one block: about (3 + taps) x S x width numbers for S patches.

    For evaluation with weights that stay as they are, on a CPU and in one thread: with gradients nothing is shared, and
    on a GPU the peak memory of every method is measured, which this would change."""

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention
        self._last: _Run | None = None
        self.spared_ms = 0.0
        """What calls that ran nothing would have taken, added up: the time of the run whose output they got."""

    def __call__(
        self,
        given: TowerInput,
        blocks: Sequence[Block],
        taps: Sequence[int],
        site: Site | None = None,
        decide: Decide | None = None,
    ) -> TowerOutput:
        if decide is not None or torch.is_grad_enabled() or given.x_SD.device.type != "cpu":
            return run_tower(given, blocks, taps, site, decide)
        last = self._last
        if last is not None and last.taps == tuple(taps) and _equal(last.given, given):
            if last.qk is not None:
                hand_over(self._attention, *last.qk)
            self.spared_ms += last.ms
            return last.output
        self._last = None  # not two of them at once
        heard: list[tuple[Tensor, Tensor]] = []
        begin = time.perf_counter()
        with overhear(self._attention, lambda q, k: heard.append((q, k))):
            output = run_tower(given, blocks, taps)
        ms = 1000 * (time.perf_counter() - begin)
        self._last = _Run(given, tuple(taps), output, heard[0] if len(heard) == 1 else None, ms)
        return output


def _equal(one: Any, other: Any) -> bool:
    """Whether the blocks would compute the same: inputs are compared field by field, whatever fields they have."""
    if isinstance(one, TowerInput):
        return all(_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
