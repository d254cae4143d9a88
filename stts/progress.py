"""How far a long job is: a bar on a terminal; in a file a line now and then, the first and the last always."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

WORTH_A_BAR = 2**30
"""Bytes of weights; a bar of fewer is gone before it is read."""
_LINES = "{desc}  {n_fmt}/{total_fmt}  {rate_fmt}  {remaining} left"


class _Lines:
    """What stands for a file, where a bar cannot be drawn over the one before it: a line each, no line twice."""

    def __init__(self) -> None:
        self._last = ""

    def write(self, text: str) -> None:
        text = text.strip()
        if text and text != self._last:
            print(text, file=sys.stderr, flush=True)
        self._last = text or self._last

    def flush(self) -> None:
        """Every line is out already."""


def progress_bar(total: int, name: str, unit: str, *, done: int = 0, shown: bool = True) -> tqdm[Any]:
    """A tqdm bar for `total` items, of which `done` were there before; the time left is by the speed since then.

    unit: of the items, in the plural. In a file a line comes every ten seconds at most."""
    same: dict[str, Any] = {"total": total, "initial": done, "desc": name, "unit": f" {unit}", "disable": not shown}
    if sys.stderr.isatty():
        return tqdm(**same)
    return tqdm(**same, file=_Lines(), mininterval=10, bar_format=_LINES)


@contextmanager
def no_bars(num_bytes: int) -> Iterator[None]:
    """Around reading or writing weights: no bars of transformers for fewer bytes than `WORTH_A_BAR`."""
    # Late: whoever wants a bar alone need not wait a second for transformers.
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    if num_bytes > WORTH_A_BAR or not is_progress_bar_enabled():
        yield
        return
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()
