"""Answer options: without their letters, and the right one as a letter."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stts.metrics.extract import LETTERS

_MARK = re.compile(r"\s*\(?([A-Z])[).:]\s*")


def unmarked(options: Sequence[str]) -> tuple[str, ...]:
    """Options without "A. ", "B. ", ... if every one has such a mark; ValueError where the letters are out of order."""
    marks = [_MARK.match(option) for option in options]
    found = "".join(mark[1] for mark in marks if mark)
    if len(found) < len(options):
        return tuple(option.strip() for option in options)
    if found != LETTERS[: len(options)]:
        raise ValueError(f"options are lettered {', '.join(found)}, expected A, B, ... in order: {list(options)}")
    return tuple(_MARK.sub("", option, count=1).strip() for option in options)


def split_inline(text: str) -> tuple[str, tuple[str, ...]]:
    """A question whose last lines are its options, "A. red" or "(A) red": (question, options).

    The options begin at the last line marked A; a line without the next letter goes on with the option before it."""
    lines = text.strip().splitlines()
    marks = [found[1] if (found := _MARK.match(line)) else "" for line in lines]
    if "A" not in marks:
        raise ValueError(f"no options in the question {text!r}, expected lines such as 'A. red' or '(A) red'")
    start = len(marks) - 1 - marks[::-1].index("A")
    options: list[str] = []
    for line, mark in zip(lines[start:], marks[start:], strict=True):
        if mark and mark == LETTERS[len(options) :][:1]:
            options.append(_MARK.sub("", line, count=1).strip())
        else:
            options[-1] = f"{options[-1]} {line.strip()}".strip()
    return "\n".join(lines[:start]).strip(), tuple(options)


def letter_at(place: int, options: Sequence[str]) -> str:
    if not 0 <= place < len(options):
        raise ValueError(f"answer {place} names none of the {len(options)} options; expected 0 to {len(options) - 1}")
    return LETTERS[place]


def letter_of_text(answer: str, options: Sequence[str]) -> str:
    """Of equal options the first."""
    if answer not in options:
        raise ValueError(f"answer {answer!r} is none of the options {list(options)}")
    return LETTERS[options.index(answer)]


def checked_letter(answer: str, options: Sequence[str]) -> str:
    """The answer as a letter: "B", "(b)", "B. blue"."""
    mark = re.match(r"\(?([A-Za-z])(?:[).:\s]|$)", answer.strip())
    letter = mark[1].upper() if mark else ""
    if not letter or letter not in LETTERS[: len(options)]:
        raise ValueError(f"answer {answer!r} names none of the {len(options)} options; expected A to "
                         f"{LETTERS[len(options) - 1]}")  # fmt: skip
    return letter
