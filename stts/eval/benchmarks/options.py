"""Answer options: without their letters, and the right one as a letter."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stts.metrics.strict import letters, mark_of
from stts.metrics.strict import unmarked as unmarked


def split_inline(text: str) -> tuple[str, tuple[str, ...]]:
    """A question whose last lines are its options, "A. red" or "(A) red": (question, options).

    The options begin at the last line marked A; a line without the next letter goes on with the option before it."""
    lines = text.strip().split("\n")  # not splitlines: a question may hold U+2028
    marks = [found[1] if (found := mark_of(line)) else "" for line in lines]
    names = letters(len(lines))
    if "A" not in marks:
        raise ValueError(f"no options in the question {text!r}, expected lines such as 'A. red' or '(A) red'")
    start = len(marks) - 1 - marks[::-1].index("A")
    options: list[str] = []
    for line, mark in zip(lines[start:], marks[start:], strict=True):
        if mark == names[len(options)] and (found := mark_of(line)):
            options.append(line[found.end() :].strip())
        else:
            options[-1] = f"{options[-1]} {line.strip()}".strip()
    return "\n".join(lines[:start]).strip(), tuple(options)


def letter_at(place: int, options: Sequence[str]) -> str:
    if not 0 <= place < len(options):
        raise ValueError(f"answer {place} names none of the {len(options)} options; expected 0 to {len(options) - 1}")
    return letters(len(options))[place]


def place_of(letter: str, options: Sequence[str]) -> int:
    """Place of the option with this letter, -1 for ""."""
    return letters(len(options)).index(letter) if letter else -1


def letter_of_text(answer: str, options: Sequence[str]) -> str:
    """Of equal options the first."""
    if answer not in options:
        raise ValueError(f"answer {answer!r} is none of the options {list(options)}")
    return letters(len(options))[options.index(answer)]


def checked_letter(answer: str, options: Sequence[str]) -> str:
    """The answer as a letter: "B", "(b)", "B. blue"."""
    mark, names = re.match(r"\(?([A-Za-z]{1,2})(?:[).:\s]|$)", answer.strip()), letters(len(options))
    letter = mark[1].upper() if mark else ""
    if letter not in names:
        raise ValueError(f"answer {answer!r} names none of the {len(options)} options; expected A to {names[-1]}")
    return letter
