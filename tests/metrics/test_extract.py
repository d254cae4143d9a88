from __future__ import annotations

import pytest

from stts.metrics import extract

FIVE = ("feed the ducks", "paint a fence", "fold a kite", "tie a boat", "whisk eggs")
FOUR = FIVE[:4]
# The public rules' own answers: ranked, first_capital, loose, standalone, first_of_five, smallest, largest; ours last.
# "" is unparsed; the releases of first_of_five, smallest and largest then guess at random.
VECTORS = [
    ("B", "B", "B", "B", "B", "B", "B", "B", "B"),
    ("B.", "B", "B", "B", "B", "B", "B", "B", "B"),
    ("(B)", "B", "B", "B", "B", "B", "B", "B", "B"),
    ("B) paint a fence", "B", "B", "B", "B", "B", "", "", "B"),
    ("B. paint a fence", "B", "B", "B", "B", "B", "B", "B", "B"),
    ("b", "", "", "B", "", "", "", "", "B"),
    ("Answer: C", "C", "C", "C", "C", "A", "C", "C", "C"),
    ("Best option: (D)", "D", "B", "D", "D", "D", "D", "D", "D"),
    ("The answer is B because A is wrong", "A", "B", "B", "B", "B", "B", "A", "B"),
    ("It must be D, not A", "A", "D", "D", "D", "D", "A", "A", "D"),
    ("a red ball", "", "", "A", "", "", "", "", ""),
    ("Because the kite flies, C", "C", "B", "C", "C", "B", "C", "C", "C"),
    ("The person seems to whisk eggs slowly in the bowl", "", "", "", "", "", "E", "E", "E"),
    ("I am not sure", "", "", "", "", "", "", "", ""),
    ("", "", "", "", "", "", "", "", ""),
    ("E", "", "", "E", "", "E", "E", "E", ""),
]
COLUMNS = ("ranked", "first_capital", "loose", "standalone", "first_of_five", "smallest", "largest", "strict")


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector[0] or "empty")
def test_every_rule_on_the_shared_vectors(vector: tuple[str, ...]) -> None:
    text, *expected = vector
    found = []
    for name in COLUMNS:
        five = name in ("smallest", "largest", "first_of_five", "loose") or ("whisk" in text and name == "strict")
        found.append(getattr(extract, name)(text, FIVE if five else FOUR))
    assert dict(zip(COLUMNS, found, strict=True)) == dict(zip(COLUMNS, expected, strict=True))


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("<think>B or C? The answer is C.</think>\nB", FOUR, "B"),
        ("A is tempting</think> (d).", FOUR, "D"),
        ("<think>one</think><think>C</think> D", FOUR, "D"),
        ("<think>B</think>", FOUR, ""),
        ("「c」。", FOUR, "C"),
        ('"B".', FOUR, "B"),
        ("**B**", FOUR, "B"),
        ("(b) paint", FOUR, "B"),
        ("b: paint", FOUR, "B"),
        ("c.", FOUR, "C"),
        ("(c", FOUR, "C"),
        ("e.g. in the morning", FIVE, ""),
        ("a.m. or p.m.", FOUR, ""),
        ("Answer is: (C)", FOUR, "C"),
        ("ANSWER C", FOUR, "C"),
        ("My choice: C, though the answer is D", FOUR, "C"),
        ("answer is b", FOUR, ""),
        ("The answer is option B", FOUR, "B"),
        ("Answers B", FOUR, "B"),
        ("The answer is I think B", FOUR, "B"),
        ("The answer is E, option B is wrong", FOUR, ""),
        ("答案是B", FOUR, "B"),
        ("我选择C选项", FOUR, "C"),
        ("B2 or C", FOUR, "C"),
        ("B and B again", FOUR, "B"),
        ("B or C", FOUR, ""),
        ("A man with B", FOUR, "B"),
        ("A man walks", FOUR, ""),
        ("It is A", FOUR, "A"),
        ("I think so", ("x",) * 9, ""),
        ("I'd say so", ("x",) * 9, ""),
        ("Paint a  fence!", FOUR, "B"),
        ("they paint a fence today", FOUR, "B"),
        ("they repaint a fence today", FOUR, ""),
        ("fold a kite or tie a boat", FOUR, ""),
        ("someone came", ("one", "two"), ""),
        ("two", ("Two.", "Four."), "A"),
        ("U.S. flag", ("French flag", "U.S. flag"), "B"),
        ("E", ("l", "e", "o"), "B"),  # no option E, and the text is an option
        ("red", ("red", "blue", "red"), "A"),  # equal texts: the first
        ("dark red", ("red", "dark red"), "B"),
        ("a dark red car", ("red", "dark red"), ""),
        ("", ("", "x"), ""),
    ],
)
def test_strict(text: str, options: tuple[str, ...], letter: str) -> None:
    assert extract.strict(text, options) == letter


@pytest.mark.parametrize(
    ("rule", "text", "letter"),
    [
        ("ranked", "Not E. The best answer is C, as said: D no", "D"),  # the later of both after the phrase
        ("ranked", "A: no. The best answer is C. Not D, ", "A"),  # a letter at the start goes before any phrase
        ("ranked", "First (A), then (B) hmm", "B"),
        ("ranked", "xBx", "B"),
        ("ranked", "答案是C, B.5", "B"),  # both after the phrase, the later wins
        ("first_capital", "The best option is C", "C"),
        ("first_capital", "Best answer: C", "B"),  # the script's missing comma: the lead-in stays
        ("first_of_five", "Best answer: C", "C"),
        ("smallest", "(C) is not A.", "C"),
        ("largest", "(A) or (C) ", "C"),
        ("largest", "maybe D or C here", "C"),
        ("largest_spaced", "maybeD or C here", "C"),
        ("largest", "maybeD here", "D"),
        ("largest_spaced", "maybeD here", ""),
        ("largest", "they whisk eggs and then feed the ducks there", "A"),
        ("smallest", "they whisk eggs and then feed the ducks there", "E"),
        ("loose", "It is (c), clearly", "C"),
        ("loose", "e. whisk", "E"),
        ("loose", "1,5 x,b", ""),  # a comma between digits joins what other commas part
        ("standalone", "Not E but C", "C"),
        ("prefix", " c because", "C"),
        ("prefix", "apple", "A"),
        ("prefix", "zebra", ""),
        ("marked", "B", "B"),
        ("marked", "B. counter-clockwise", "B"),
        ("marked", "B) x", "B"),
        ("marked", "B x", ""),
        ("marked", "b.", ""),
        ("bracketed", "B) paint (C)", "B"),
        ("bracketed", "C", "C"),
        ("bracketed", "The answer is C", ""),
        ("bracketed", "", ""),
    ],
)
def test_public_rules(rule: str, text: str, letter: str) -> None:
    assert getattr(extract, rule)(text, FIVE) == letter


CAPTIONS = ("Caption A: a cat runs.", "Caption B: a cat: sleeping.")


@pytest.mark.parametrize(
    ("text", "public", "ours"),
    [
        ("Caption B: a cat: sleeping.", "B", "B"),
        ("a cat: sleeping.", "B", "B"),
        ("Caption A", "A", "A"),
        ("Caption A.", "A", "A"),
        ("B", "B", "B"),
        ("B.", "B", "B"),
        ("A) a cat runs.", "A", "A"),
        ("B) a cat runs.", "A", ""),  # the letter and the sentence disagree
        ("**Caption B**", "", "B"),
        ('"A cat runs"', "", "A"),
        ("The answer is Caption B.", "", "B"),
        ("<think>Caption A</think>Caption B", "", "B"),
        ("<think>Caption A", "", ""),
        ("Caption A or Caption B", "", ""),
        ("a cat", "", ""),
        ("", "", ""),
    ],
)
def test_caption_matching(text: str, public: str, ours: str) -> None:
    assert (extract.exact_caption(text, CAPTIONS), extract.caption(text, CAPTIONS)) == (public, ours)


def test_numbered_captions() -> None:
    assert extract.caption("2", ("Option 1: x", "Option 2: y")) == "B"
    assert extract.exact_caption("2", ("Option 1: x", "Option 2: y")) == "B"


@pytest.mark.parametrize(
    ("text", "public", "ours"),
    [
        (" Yes, it is", "yes", "yes"),
        ("NO.", "no", "no"),
        ("It is so", "", ""),
        ("", "", ""),
        ("not sure", "no", ""),
        ("Nothing of that kind", "no", ""),
        ("Nobody does", "no", ""),
        ("No one does", "no", ""),
        ("No idea", "no", ""),
        ("Noticeably, yes", "no", ""),
        ("Yesterday", "yes", ""),
        ("yes or no", "yes", ""),
        ("No / yes", "no", ""),
        ("**No**, there is not", "", "no"),
        ("“No”。", "", "no"),
        ("Answer: yes", "", "yes"),
        ("The answer is **no**", "", "no"),
        ("<answer>Yes</answer>", "", "yes"),
        ("<thinking>yes? no?</thinking> yes", "", "yes"),
        ("◁think▷no", "", ""),
        ("I think no", "", ""),
    ],
)
def test_yes_no(text: str, public: str, ours: str) -> None:
    assert (extract.starts_yes_no(text), extract.yes_no(text)) == (public, ours)
