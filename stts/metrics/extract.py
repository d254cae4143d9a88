"""The public scorers' rules for reading an answer, where published numbers depend on them, beside our strict one.

A rule takes the answer and the texts of the options (lettered A, B, ... in order) and returns a capital letter, or ""
where it finds none. Nothing here guesses: scorers that guess at random do so in the caller, seeded by sample.

    strict         ours, the default (`stts.metrics.strict`, as are `yes_no` and `caption`)
    ranked         lmms-eval's shared utility before 2026: Video-MME, MLVU, LVBench
    first_capital  Video-MME's own script, VLMEvalKit, Molmo2;  first_of_five is LongVideoBench's
    smallest       lmms-eval EgoSchema;  largest: lmms-eval and Molmo2 NExT-QA
    loose          lmms-eval MVBench: the article "a" is option A
    standalone     PerceptionTest
    prefix         Molmo2: the first character
    marked         TempCompass multiple choice;  exact_caption: its caption matching
    starts_yes_no  EventHallusion and TempCompass: the text begins with yes or no, also "nothing" and "not sure"
    bracketed      MLVU's own script: the character before the first ")"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from stts.metrics.strict import LETTERS, caption, letters, strict, yes_no

__all__ = [
    "LETTERS", "Rule", "bracketed", "caption", "exact_caption", "first_capital", "first_of_five", "largest",
    "largest_spaced", "letters", "loose", "marked", "prefix", "ranked", "smallest", "standalone", "starts_yes_no",
    "strict", "yes_no",
]  # fmt: skip

Rule = Callable[[str, Sequence[str]], str]


_NOUNS = ("answer", "correct answer", "best answer", "correct option", "best option", "choice", "correct choice")
_PHRASES = (
    *(f"{article}{noun} is" for noun in _NOUNS for article in ("the ", "")),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def ranked(text: str, options: Sequence[str]) -> str:
    """Best of many formats by rank, then by the later position. Capitals only; lowest rank is any capital at all."""
    core = text.strip()
    if not core:
        return ""
    for mark in ",.!?;:'\"":
        core = core.strip(mark)
    text, core = f" {core} ", core.strip()
    hits: list[tuple[int, int, str]] = []
    for letter in LETTERS[: len(options)]:
        formats = ((6, f"({letter})"), (5, f"{letter}."), (4, f"{letter}:"), (3, f"{letter})"), (2, f"{letter} "))
        hits += [(rank, text.rfind(form), letter) for rank, form in formats if form in text]
        for phrase in _PHRASES:
            start = text.lower().find(phrase)
            after = text.find(letter, start + len(phrase)) if start >= 0 else -1
            hits += [(7, after, letter)] * (after >= 0)
        if core.startswith(letter) and not core[1:2].isalpha():
            hits.append((10, 0, letter))
        if core.endswith(letter) and not core[-2:-1].isalpha():
            hits.append((9, len(text) - 1, letter))
    hits = hits or [(0, text.rfind(letter), letter) for letter in LETTERS[: len(options)] if letter in text]
    return max(hits, key=lambda item: item[:2])[2] if hits else ""


_LEAD_INS = ("The best answer is", "The correct answer is", "The answer is", "The answer")
# The list lacks two commas, so these entries are looked for joined. The last two are VLMEvalKit's and Molmo2's only.
_JOINED = ("The best option isThe correct option is", "Best answer:Best option:", "Answer:", "Option:")
_APART = ("The best option is", "The correct option is", "Best answer:", "Best option:")


def first_capital(text: str, options: Sequence[str]) -> str:
    """First A to D anywhere, also inside a word, after deleting lead-ins (but not those that the script misses)."""
    return _first(text, (*_LEAD_INS, *_JOINED), "ABCD")


def first_of_five(text: str, options: Sequence[str]) -> str:
    """First A to E anywhere after deleting lead-ins. The release guesses where there is none."""
    return _first(text, (*_LEAD_INS, *_APART), "ABCDE")


def _first(text: str, lead_ins: Sequence[str], letters: str) -> str:
    text = text.strip()
    for lead_in in lead_ins:
        text = text.replace(lead_in, "")
    return next((letter for letter in text if letter in letters), "")


def smallest(text: str, options: Sequence[str]) -> str:
    """Formats (X), X and space, X and period together; of several hits the one whose last occurrence comes first."""
    text = _padded(text)
    formats = _formatted(text, options, ("({})", "{} ", "{}."))
    spots = [(text.rfind(form), letter) for form, letter in formats] or _by_text(text, options)
    return min(spots, key=lambda spot: spot[0])[1] if spots else ""


def largest(text: str, options: Sequence[str]) -> str:
    """Stops at the first format that hits; of several letters the one that occurs last."""
    return _largest(text, options, "{} ")


def largest_spaced(text: str, options: Sequence[str]) -> str:
    """`largest` as Molmo2 has it, whose second format needs a space on both sides."""
    return _largest(text, options, " {} ")


def _largest(text: str, options: Sequence[str], spaced: str) -> str:
    text = _padded(text)
    for form in ("({})", spaced, "{}."):
        formats = _formatted(text, options, (form,))
        if formats:
            located = "({})" if form == "({})" else " {} "
            spots = [(text.rfind(located.format(letter)), letter) for _, letter in formats]
            return max(spots, key=lambda spot: spot[0])[1]
    spots = _by_text(text, options)
    return max(spots, key=lambda spot: spot[0])[1] if spots else ""


def _padded(text: str) -> str:
    for mark in ",.!?;:'":
        text = text.strip(mark)
    return f" {text} "


def _formatted(text: str, options: Sequence[str], forms: Sequence[str]) -> list[tuple[str, str]]:
    letters = LETTERS[: len(options)]
    return [(form.format(letter), letter) for form in forms for letter in letters if form.format(letter) in text]


def _by_text(text: str, options: Sequence[str]) -> list[tuple[int, str]]:
    """(last position, letter) of options whose text occurs, in answers of more than five words."""
    if len(text.split()) <= 5:
        return []
    places = [(text.lower().rfind(option.lower()), letter) for option, letter in zip(options, LETTERS, strict=False)]
    return [spot for spot in places if spot[0] >= 0]


def loose(text: str, options: Sequence[str]) -> str:
    """Letter, period, text; else punctuation removed and the first a to e that stands alone, of either case."""
    lettered = re.match(r"([A-E])\.\s*.+$", text.strip(), re.IGNORECASE)
    if lettered:
        return lettered[1].upper()
    given = cleaned = " ".join(re.split(r"[\n\t]", text)).strip()
    between_digits = re.search(r"\d,\d", given)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = f"{mark} " in given or f" {mark}" in given
        cleaned = cleaned.replace(mark, "" if beside_space or between_digits else " ")
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    match = re.search(r"\b([A-E])\b", cleaned, re.IGNORECASE)
    return match[1].upper() if match else ""


def standalone(text: str, options: Sequence[str]) -> str:
    """First capital A to D between word boundaries."""
    match = re.search(r"\b([A-D])\b", text)
    return match[1] if match else ""


def prefix(text: str, options: Sequence[str]) -> str:
    """The first character, of either case: "correct if the answer starts with the letter"."""
    first = text.strip()[:1].upper()
    return first if first and first in LETTERS[: len(options)] else ""


def marked(text: str, options: Sequence[str]) -> str:
    """The letter alone, or at the start with a period or bracket."""
    return text[0] if text[:1] and text[0] in LETTERS[: len(options)] and text[1:2] in ("", ".", ")") else ""


def exact_caption(text: str, options: Sequence[str]) -> str:
    """An option line such as "Caption A: a cat runs", its sentence, its label "Caption A", or "A" of the label.

    Here `options` are whole lines."""
    text = text.strip()
    for letter, line in zip(LETTERS, options, strict=False):
        label, _, sentence = line.partition(": ")
        if text in (line, sentence) or text.removesuffix(".") in (label, label.split(" ")[-1]):
            return letter
        if ") " in text and text.split(") ")[1] == sentence:
            return letter
    return ""


def starts_yes_no(text: str, options: Sequence[str] = ()) -> str:
    """ "yes" or "no" where the answer starts with these letters."""
    start = text.strip().lower()
    return next((word for word in ("yes", "no") if start.startswith(word)), "")


def bracketed(text: str, options: Sequence[str]) -> str:
    """The character before the first closing bracket; without one, the whole text must be the letter."""
    before, bracket, _ = text.strip().partition(")")
    letter = before[-1:] if bracket else before
    return letter if letter and letter in tuple(LETTERS[: len(options)]) else ""
