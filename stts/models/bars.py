"""Progress bars of transformers, for models that are large enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

WORTH_A_BAR = 2**30
"""Bytes of weights; a bar of fewer is gone before it is read."""


@contextmanager
def no_bars(num_bytes: int) -> Iterator[None]:
    """Around reading or writing weights: no bars for fewer bytes than `WORTH_A_BAR`."""
    if num_bytes > WORTH_A_BAR or not is_progress_bar_enabled():
        yield
        return
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()
