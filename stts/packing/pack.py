"""Which samples share a row of the LLM, by first-fit: a sample goes to the lowest-numbered row with room for all of it.

Towers need no rows (see `segments.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def pack_samples(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Sample numbers per LLM row, first-fit in the given order.

    `lengths` are tokens per sample, `max_tokens` the tokens a row may hold. Rows are ordered by their first sample and
    samples within a row keep their order, so equal inputs give equal batches on every rank. Raises ValueError when a
    sample is empty or alone exceeds the row."""
    for number, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"sample {number} has {length} tokens, expected at least 1; drop it before packing")
        if length > max_tokens:
            raise ValueError(
                f"sample {number} alone has {length} tokens, but a row holds max_tokens={max_tokens}; "
                "raise max_tokens, or use fewer frames or a lower retention_ratio"
            )
    return first_fit(range(len(lengths)), lengths, max_tokens)


def first_fit(order: Iterable[int], sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Item numbers per row, in the given order."""
    rows: list[list[int]] = []
    free: list[int] = []
    for item in order:
        row = next((r for r, room in enumerate(free) if room >= sizes[item]), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(item)
        free[row] -= sizes[item]
    return rows
