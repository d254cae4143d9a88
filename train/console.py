"""Lines for people who watch a run."""

from __future__ import annotations

import os
import re
from textwrap import fill

from lightning.pytorch.utilities import rank_zero_only

WIDTH = 100
"""Columns, as of the tables."""
TIE = "\u00a0"
"""Between a name and its value."""


@rank_zero_only
def print_rank_zero(text: str) -> None:
    """Print one line on rank 0, at once: a log that is read while the run goes on must not wait in a buffer."""
    print(text, flush=True)


def print_wrapped(text: str, indent: int = 2) -> None:
    """The same in `WIDTH` columns, what goes on below it indented; a word that is longer, such as a path, stays whole.

    No line ends at a `TIE`, which is printed as a space."""
    lines = fill(text, WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    print_rank_zero(lines.replace(TIE, " "))


@rank_zero_only
def print_from_handler(text: str) -> None:
    """The same from a signal handler, which may come in the middle of a print: Python refuses one inside another."""
    os.write(1, f"{text}\n".encode())


def one_line(error: BaseException) -> str:
    """What is wrong, without what loader workers and jsonargparse write around it: a traceback; kinds of values, and
    every reason why another kind does not fit either."""
    text = str(error)
    if text.startswith("Caught "):
        return re.split(r"\n[\w.]+: ", text)[-1].strip()
    if text.startswith("Does not validate against any of the Union"):
        reasons = re.findall(r"\n  - (.*?)(?=\n  - |\nGiven value type|\Z)", text, re.DOTALL)
        text = "; ".join(reason for reason in reasons if not reason.startswith("Expected a <class")) or text
    return " ".join(text.split())
