"""The strict reading of an answer: which option it names, whether it says yes or no, which caption it repeats.

A reading takes no side between letters: what names B when B is written names A when A is written. An answer that names
two options, or none, or only says which one is wrong, is no answer.

`answer_text` comes before every reading. It drops reasoning (`<think>`, `<thinking>`, `◁think▷`, ...; a block that was
cut off before its end leaves no answer), keeps only what is marked as the answer (`<answer>`, `\\boxed{}`) where
something is, and takes markup off: bold, italics, back-ticks, quotes, LaTeX, HTML, full-width forms.

The rule for letters follows X11 of 2026-11-30, in this order: the text is one letter; the text is one option; a letter
stands right after "the answer is", "I choose" and the like; the text starts with a letter and one of ) . : or the end
of its first line; one letter is named in the text; one option's text is in it. A letter that names no option ends the
search.

**Differs** from X11, each to keep an answer from being read as an option that it does not choose:

* The text of an option goes before the letters in it, so that "Team B wins" is the option "Team B wins".
* "Option A shows a ball, option B a cube" mentions two options. Only "answer", "choice", "best option", "I choose" and
  so on say which one is chosen; the first of those counts.
* A text that goes through the options ("A. red B. blue ... The answer is B") does not choose the first it lists.
* Negation also follows a letter ("A is wrong", "B and C are incorrect") and holds for every letter joined to it.
* "A" before a word is an article unless that word can follow a name ("A is", "A seems", "A best describes", "A in my
  opinion"), whatever verb the sentence holds: "A man is walking" names nothing. In "(A)" and "option A" it
  is never an article. "I" is the pronoun unless a verb of the third person follows.
* Letters of abbreviations ("U.S.", "5 P.M.") and in front of a hyphen ("T-shirt") name nothing.
* Options beyond the 26th are AA, AB, ...
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import count, islice, product

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# --- the answer without what surrounds it ---------------------------------------------------------------------------

_THOUGHT = r"\s*(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?)\s*"
_OPENS, _CLOSES = (re.compile(rf"[<◁\[]{slash}{_THOUGHT}[>▷\]]", re.IGNORECASE) for slash in ("", "/"))
_BLOCK = re.compile(_OPENS.pattern + ".*?" + _CLOSES.pattern, re.DOTALL | re.IGNORECASE)
_MARKED = (
    re.compile(r"<\s*(?:final_?)?(?:answer|conclusion)\s*>(.*?)(?:<\s*/|\Z)", re.DOTALL | re.IGNORECASE),
    re.compile(r"\\f?box(?:ed)?\s*\{((?:[^{}]|\{[^{}]*\})*)\}?"),
)
_INVISIBLE = re.compile("[\u200b-\u200f\u2060\ufeff\u00ad]")
_LATEX = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|math(?:bf|rm|it|sf)?|emph|underline|bm)\s*\{([^{}]*)\}")
_MATHS = re.compile(r"\\[()\[\]]|\$(?=[A-Za-z(\\][^$]*\$)|(?<=[A-Za-z)}])\$")
_HTML = re.compile(r"<(b|i|u|em|strong|p|span|code|mark|h[1-6]|li)\b[^<>]*>([^<>]*)</\1\s*>", re.DOTALL | re.IGNORECASE)
_TOKENS = re.compile(r"<\|[^<>|]*\|>|</?s>|<br\s*/?>", re.IGNORECASE)
_EMPHASIS = re.compile(r"(?<![A-Za-z0-9])[*_`]+|[*_`]+(?![A-Za-z0-9])")
_SINGLE_QUOTE = re.compile(r"(?<![A-Za-z0-9])'|'(?![A-Za-z0-9])")
_LINE_MARK = re.compile(r"^[^\S\n]*(?:#{1,6}|[-+•>])[^\S\n]+", re.MULTILINE)
_FORMS = str.maketrans(
    {mark: '"' for mark in "“”„‟«»「」『』"} | {mark: "'" for mark in "‘’‚‛´"}
    | {mark: "(" for mark in "[{【〔〈《"} | {mark: ")" for mark in "]}】〕〉》"} | {"。": ".", "、": ","}
)  # fmt: skip
_ENDS = " \t\r\n.,;:!?)"


def answer_text(text: str) -> str:
    """The answer without reasoning and markup; "" where reasoning was cut off. See the module."""
    text = unicodedata.normalize("NFKC", text)
    if _CLOSES.search(text):
        text = _CLOSES.split(_BLOCK.sub(" ", text))[-1]  # the prompt may hold the opening tag
    if _OPENS.search(text):
        return ""
    for marked in _MARKED:
        if parts := marked.findall(text):
            text = " ; ".join(dict.fromkeys(part.strip() for part in parts))
    for _ in range(2):  # one may stand inside another
        text = _HTML.sub(r"\2", _LATEX.sub(r"\1", text))
    text = _TOKENS.sub(" ", _MATHS.sub("", _INVISIBLE.sub("", text)))
    text = re.sub(r"<([A-Za-z])>", r"(\1)", text.translate(_FORMS).replace('"', ""))
    return _LINE_MARK.sub("", _SINGLE_QUOTE.sub("", _EMPHASIS.sub("", text))).strip()


def normalise(text: str) -> str:
    """`answer_text` in lower case with single spaces, without brackets around it and punctuation behind it."""
    return " ".join(answer_text(text).casefold().split()).lstrip(" (").rstrip(_ENDS)


# --- letters --------------------------------------------------------------------------------------------------------


def letters(number: int) -> tuple[str, ...]:
    """Names of the first `number` options: A ... Z, AA, AB, ..."""
    names: Iterator[str] = ("".join(name) for size in count(1) for name in product(LETTERS, repeat=size))
    return tuple(islice(names, number))


def mark_of(line: str) -> re.Match[str] | None:
    """The letter in front of an option, "A. red" or "(A) red", as group 1."""
    return re.match(r"\s*\(?([A-Z]{1,2})[).:]\s*", line)


def unmarked(options: Sequence[str]) -> tuple[str, ...]:
    """Options without "A. ", "B. ", ... if every one has such a mark; ValueError where the letters are out of order."""
    marks, names = [mark_of(option) for option in options], letters(len(options))
    found = tuple(mark[1] for mark in marks if mark)
    if not options or len(found) < len(options) or found[0] not in names:  # "TV: on", "PC: off" are no letters
        return tuple(option.strip() for option in options)
    if found != names:
        raise ValueError(f"options are lettered {', '.join(found)}, expected A, B, ... in order: {list(options)}")
    return tuple(option[mark.end() :].strip() for option, mark in zip(options, marks, strict=True) if mark)


_HIDDEN = "\ue000"
"""Stands for an option's text while letters are looked for: a word in lower case that holds none."""
_LABEL = r"(?:option|answer|choice|letter|caption)s?\W{0,3}"
_VERB = (
    r"(?:(?:also|best|most|clearly|correctly|accurately|certainly|definitely|likely|only|probably)\s+)*"
    r"(?:is|isn't|seems|appears|looks|sounds|describes|shows|matches|fits|suits|depicts|represents|explains|captures|"
    r"reflects|corresponds|identifies|states|says|applies|makes|agrees|aligns|answers|contains|follows|gives|happens|"
    r"includes|indicates|means|mentions|occurs|provides|refers|suggests|wins|works|because|since)(?![a-z])"
)
_AFTER_NAME = (
    rf"(?:{_VERB}|(?:was|wasn't|were|are|has|does|doesn't|did|didn't|would|could|should|cannot|can't|won't|"
    r"(?:can|may|might|must|will)\s+(?:also\s+)?(?:be|not)|as|and|or|nor|but|if|though|although|while|when|whereas|which|"
    r"not|rather|instead|versus|than|then|so|in|on|at|by|from|with|to|for|over|after|before|due|based|it|this|that|there)(?![a-z]))"
)
_LOWER = rf"[a-z{_HIDDEN}]"
_BEFORE = re.compile(
    r"(?:(?<![a-z])(?:not|never|neither|nor|cannot|than|rather than|instead of|except|unlike|without|versus|vs\.?|over|"
    r"eliminat\w+|exclud\w+|rul(?:e|es|ed|ing) out|discard\w*|reject\w*)|n't|不是|并非|而非|不选)\s*"
    rf"(?:(?:it|this|that|is|be|was|the|think|believe|say|choose|pick|select|either|both|{_LABEL})(?![a-z])\W*)*\(?\Z",
    re.IGNORECASE,
)
_AFTER = re.compile(
    r"\)?(?:\s*:|\s+(?:is|are|was|were|seems?|looks?|appears?|would|does|do|did|can|could|must|should))"
    r"(?:\s+(?:also|an?|all|be|both|clearly|definitely|just|likely|obviously|probably|simply|the|to))*"
    r"\s+(?:(?<!:\s)not|never|wrong|incorrect|false|inaccurate|impossible|excluded|eliminated|ruled out)(?![a-z])"
    r"|\)?\s+(?:(?:is|are|was|were|does|do|did|would|could|ca|should|wo)n't|cannot|不对|错)",
    re.IGNORECASE,
)
_JOINED = re.compile(
    rf"\W*(?:[,/&;(]|and|or|nor|或|和)(?:\W+|(?:or|and|nor|maybe|possibly|perhaps|both|either|{_LABEL})(?![a-z]))*\Z",
    re.IGNORECASE,
)
_CHOSEN = re.compile(
    r"(?<![a-z])(?:(?:answer|choice)s?|(?:correct|right|best|final|chosen|likely|suitable) "
    r"(?:option|letter|one)|(?:choose|select|pick|go(?:ing)? with|opt for))(?![a-z])"
    r"(?:\W|(?:is|be|must|should|would|will|here|therefore|thus|then|clearly|option|choice|letter|the)(?![a-z]))*\Z",
    re.IGNORECASE,
)


def strict(text: str, options: Sequence[str]) -> str:
    """The letter of the option that the answer names, "" where it names none or several. See the module."""
    text, names = answer_text(text), letters(len(options))
    if not text or not names:
        return ""
    texts = [normalise(option) for option in options]
    places = {option: texts.index(option) for option in reversed(texts) if option}
    bare = normalise(text)
    if len(bare) == 1 and bare.isascii() and bare.isalpha() and bare.upper() in names:
        return bare.upper()
    if bare in places:
        return names[places[bare]]
    if len(bare) == 1 and bare.isascii() and bare.isalpha():
        return ""
    named = _named(_hide(text, places), names)
    if named is not None:
        return named
    held = [spot for option in places if (spot := _spot(option, bare)) is not None]
    return names[places[held[0]]] if len(held) == 1 else ""


def _hide(text: str, options: Sequence[str] | dict[str, int]) -> str:
    """`text` with every option of more than a letter replaced by one placeholder, the longest first."""
    for option in sorted(options, key=len, reverse=True):
        if len(option) > 2:
            words = r"\s+".join(map(re.escape, option.split()))
            text = re.sub(rf"(?<![A-Za-z0-9]){words}(?![A-Za-z0-9])", _HIDDEN, text, flags=re.IGNORECASE)
    return text


def _spot(option: str, text: str) -> str | None:
    """`option` where it stands in `text` as whole words, and not only behind a "not"."""
    spots = re.finditer(rf"(?<![a-z0-9]){re.escape(option)}(?![a-z0-9])", text)
    affirmed = any(not _BEFORE.search(re.sub(r"\b(?:an?|the) \Z", "", _before(text, spot.start()))) for spot in spots)
    return option if affirmed else None


def _named(text: str, names: Sequence[str]) -> str | None:
    """The letter that `text` names, "" where it names several or one that is no option, None where it names none."""
    size = len(names[-1])
    runs = _runs(text, size)
    affirmed = [run for run in runs if not _negated(text, run)]
    for run in affirmed:
        if _CHOSEN.search(_before(text, run[0].start())):
            return _only({mention[1] for mention in run}, names)
    name = "[A-Za-z]" if size == 1 else f"(?:[A-Za-z]|[A-Z]{{2,{size}}})"
    first = re.match(rf"\(?({name})(?:[).:](?![A-Za-z]\.)|$)", text, re.MULTILINE)
    if first:
        listed = re.findall(rf"(?:^|[\n.,;!?]\s*)\(?({name})(?:[).:](?:\s|$)|$)", text, re.MULTILINE)
        joined = re.match(r"\W*(?:(?:or|and|nor)\W+|[/&,(]\W*)[A-Za-z](?![A-Za-z])", text[first.end() :])
        if not joined and {letter.upper() for letter in listed} <= {first[1].upper()}:
            return first[1].upper() if first[1].upper() in names else ""
    # "N/A" and "A or E" of four options name none of them.
    named = [{mention[1] for mention in run} for run in affirmed]
    named_letters = {letter for run in named if run <= set(names) for letter in run}
    return _only(named_letters, names) if named_letters else None


def _only(found: set[str], names: Sequence[str]) -> str:
    """The one letter, if there is one and it names an option."""
    return found.pop() if len(found) == 1 and found <= set(names) else ""


def _runs(text: str, size: int) -> list[list[re.Match[str]]]:
    """Capitals that stand alone as names, those joined by "or", "and", a comma, ... together."""
    alone = rf"(?<![A-Za-z0-9])(?<![A-Za-z]\.)([A-Z]{{1,{size}}})(?![A-Za-z0-9'])(?!\.[A-Za-z](?![A-Za-z]))(?!-[a-z])"
    runs: list[list[re.Match[str]]] = []
    for mention in re.finditer(alone, text):
        if _is_word(text, mention):
            continue
        if runs and _JOINED.match(text[runs[-1][-1].end() : mention.start()]):
            runs[-1].append(mention)
        else:
            runs.append([mention])
    return runs


def _is_word(text: str, mention: re.Match[str]) -> bool:
    """Whether this "A" is an article, or this "I" the pronoun."""
    before, after = _before(text, mention.start()), text[mention.end() :]
    if re.search(rf"(?:\(|(?<![a-z]){_LABEL})\Z", before, re.IGNORECASE):
        return False
    follows = _AFTER_NAME if mention[1] == "A" else _VERB
    return mention[1] in "AI" and bool(re.match(rf"[^\S\n]+(?!{follows}){_LOWER}", after))


def _before(text: str, place: int) -> str:
    """What stands close before `place`, so that a long answer costs no more per letter than a short one."""
    return text[max(0, place - 120) : place]


def _negated(text: str, run: Sequence[re.Match[str]]) -> bool:
    return bool(_BEFORE.search(_before(text, run[0].start())) or _AFTER.match(text[run[-1].end() :]))


# --- yes, no and captions -------------------------------------------------------------------------------------------

_ANSWER_IS = r"(?:(?:so|therefore|thus)\W+)?(?:(?:the|my|final|correct)\s+)*answer(?:\W|is(?![a-z]))*"
_YES_NO = re.compile(
    rf"\W*(?:{_ANSWER_IS})?(yes|no)(?![\w'-])(?!\s*(?:/|or\b|and\b)\s*(?:yes|no)\b)"
    r"(?!\s+(?:answer|clue|comment|idea|information|one|opinion|way)\b)",
    re.IGNORECASE,
)


def yes_no(text: str, options: Sequence[str] = ()) -> str:
    """ "yes" or "no" where that is the first word, also behind "answer:" or "the answer is"; "" otherwise.

    "Not sure", "nobody", "no idea" and "yes or no" are neither."""
    match = _YES_NO.match(answer_text(text))
    return match[1].lower() if match else ""


def caption(text: str, options: Sequence[str]) -> str:
    """Letter of the option line that the whole answer repeats: "Caption A: a cat runs", its sentence, its label
    "Caption A" or "A", or "A) " and its sentence; also behind "the answer is". `options` are whole lines.

    "" where that holds for two lines."""
    said = re.sub(rf"\A{_ANSWER_IS}", "", normalise(text))
    matches = []
    for letter, line in zip(letters(len(options)), options, strict=True):
        label, _, sentence = (normalise(part) for part in line.partition(": "))
        short = label.split(" ")[-1]
        ways = {normalise(line), sentence, label, short, f"{short}) {sentence}", f"{short}. {sentence}"}
        matches += [letter] * (bool(said) and said in ways)
    return matches[0] if len(matches) == 1 else ""
