"""Which rows of several sources an epoch shows, and how often: a pure function of seed and epoch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
_LIMIT = re.compile(r"(first|random):(\d+(?:\.\d+)?%|\d+)")


@dataclass(frozen=True)
class Source:
    """One data file of a mixture."""

    path: str
    """JSONL, JSON array or Parquet."""
    weight: float | None = None
    """Share of an epoch's samples, relative to the other sources'; null in all of them: as many as each has."""
    limit: str = "all"
    """Rows used at all: 'all', 'first:10%', 'first:1000', 'random:10%' or 'random:1000' (the same in every epoch)."""
    root: str | None = None
    """Folder that media paths are relative to; null: `data.root`, or the file's own."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"{self.path}: weight={self.weight} must be positive; leave the source out instead of 0")
        if self.limit != "all" and not _LIMIT.fullmatch(self.limit):
            raise ValueError(
                f"{self.path}: limit={self.limit!r} must be 'all', 'first:10%', 'first:1000', 'random:10%' or "
                "'random:1000'"
            )


def limited(limit: str, num_rows: int, seed: int) -> Numbers:
    """Numbers of the rows that `limit` (see `Source`) leaves, increasing; a percentage is rounded up."""
    match = _LIMIT.fullmatch(limit)
    if match is None:
        return np.arange(num_rows)
    kind, amount = match.groups()
    share = amount.endswith("%")
    count = min(math.ceil(num_rows * float(amount[:-1]) / 100) if share else int(amount), num_rows)
    if not count:
        raise ValueError(f"limit={limit!r} leaves none of {num_rows} rows; ask for at least one")
    if kind == "first":
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).permutation(num_rows)[:count])


@dataclass(frozen=True)
class Mixture:
    """Shares of the sources that a `ConcatDataset` puts one behind the other."""

    sizes: tuple[int, ...]
    """Rows of each source."""
    weights: tuple[float, ...] | None = None
    """Relative shares; None: by size, every row once per epoch."""

    def __post_init__(self) -> None:
        for size, count in zip(self.sizes, self.counts, strict=True):
            if not count:
                raise ValueError(
                    f"weights {self.weights} leave a source of {size} rows without a sample in epochs of "
                    f"{sum(self.sizes)}; raise its weight or leave it out"
                )

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each source in every epoch; together as many as the sources have rows. Largest remainders."""
        if self.weights is None:
            return self.sizes
        exact = np.array(self.weights) / sum(self.weights) * sum(self.sizes)
        counts = np.floor(exact).astype(np.int64)
        short = sum(self.sizes) - int(counts.sum())
        counts[np.argsort(counts - exact, kind="stable")[:short]] += 1
        return tuple(counts.tolist())

    def draw(self, seed: int, epoch: int) -> Numbers:
        """Sample numbers of one epoch, shuffled. A source repeats no row before it has shown all of them: epochs cut
        one endless row of its shuffles into pieces."""
        firsts = np.cumsum((0, *self.sizes))
        parts = [
            first + _piece(seed, source, size, epoch * count, count)
            for source, (first, size, count) in enumerate(zip(firsts, self.sizes, self.counts, strict=False))
        ]
        order: Numbers = np.random.default_rng([seed, epoch]).permutation(np.concatenate(parts))
        return order


def _piece(seed: int, source: int, size: int, start: int, count: int) -> Numbers:
    """`count` numbers from `start` on, in an endless row of shuffles of range(size)."""
    passes = range(start // size, (start + count - 1) // size + 1)
    # The last 1 sets these streams apart from that of the epoch: trailing zeros do not change a seed.
    shuffles = [np.random.default_rng([seed, source, number, 1]).permutation(size) for number in passes]
    return np.concatenate(shuffles)[start - passes[0] * size :][:count]


def weights_of(sources: Sequence[Source]) -> tuple[float, ...] | None:
    """ValueError when some sources have a weight and others none."""
    weights = tuple(source.weight for source in sources if source.weight is not None)
    if weights and len(weights) < len(sources):
        raise ValueError("data.train: give every source a weight or none of them; without, shares follow their sizes")
    return weights or None
