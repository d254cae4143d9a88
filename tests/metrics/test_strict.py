"""The strict reading: no side between letters, no answer where none is given, markup and reasoning never count."""

from __future__ import annotations

import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stts.metrics.strict import answer_text, letters, normalise, strict

FOUR = ("seven plums", "a wet road", "the tall clerk", "paint")

ONE = [
    "{x}",
    "{x}.",
    "({x})",
    "**{x}**",
    "*{x}*",
    "_{x}_",
    "`{x}`",
    '"{x}"',
    "“{x}”",
    "「{x}」",
    "【{x}】",
    "[{x}]",
    "# {x}",
    "- {x}",
    "{x}\n\nThe clip shows a road.",
    "{x}: because of the road",
    "{x}) as shown",
    "{x}, I think",
    "\\boxed{{{x}}}",
    "Both are seen, so $\\boxed{{\\text{{{x}}}}}$.",
    "<answer>{x}</answer>",
    "<ANSWER> {x}\n",
    "<b>{x}</b>",
    "{x}<|im_end|>",
    "{x} is correct.",
    "{x} is right",
    "{x} was shown first",
    "{x} because it is wet",
    "{x} since it rains",
    "{x} seems right",
    "{x} would be the best fit",
    "{x} looks right",
    "{x} best describes the video",
    "{x} clearly fits",
    "{x} in my opinion",
    "{x} matches the video",
    "{x} instead of the others",
    "{x} rather than the rest",
    "{x} over all others",
    "{x} as seen at the end",
    "It is {x}",
    "It must be {x}!",
    "I think {x}",
    "I choose {x}.",
    "I would go with **{x}**",
    "Answer: {x}",
    "Answer:\n{x}",
    "answer is {x}",
    "The correct answer is **{x}**.",
    "The answer is option ({x})",
    'Final answer: "{x}"',
    "The best option is {x}",
    "My choice would be {x}",
    "Option {x}",
    "option {x} identifies it",
    "({x}) identifies it",
    "答案是{x}",
    "答案：{x}。",
    "我选择{x}选项",
    "Definitely {x}; nothing else fits",
    "<think>{y} or {z}? The answer is {y}.</think>\n{x}",
    "<thinking>{y}</thinking>{x}",
    "◁think▷{y}◁/think▷ {x}",
    "[THINK]{y}[/THINK]{x}",
    "{y} is tempting</think> {x}",
    "<think>{y}</think><think>{z}</think> {x}",
]
CHOSEN = [
    "The answer is {x} because {y} is wrong",
    "The correct answer is **{x}**. Option {y} shows another road, {z} none.",
    "Answer: {x}\n{y} shows a road. {z} shows plums.",
    "{x}\n{y} shows a road. {z} shows plums.",
    "It must be {x}, not {y}",
    "{x} rather than {y}",
    "{x}, since neither {y} nor {z} is seen",
    "{x} fits better than {y}",
    "{y} is wrong, so {x}",
    "{y} is not shown. {x} is.",
    "{y} isn't right; {x}",
    "{y} and {z} are incorrect, {x} is correct",
    "Not {y} but {x}",
    "Not {y} or {z}: I pick {x}",
    "I rule out {y}, so {x}",
    "I do not think it is {y}. The answer is {x}.",
    "答案是{x}，不是{y}",
    "{x}. This is not {y}. road",
    "{y}. one\n{z}. two\nThe answer is {x}",
    "Option {y} is a road. The answer is {x}.",
]
NONE = [
    "{x} or {y}",
    "{x} and {y}",
    "Both {x} and {y}",
    "both {x} & {y}",
    "{x}/{y}",
    "{x}, {y}",
    "({x}) or ({y})",
    "{x}. or {y}.",
    "{x}) or {y})",
    "({x})({y})",
    "Answer: {x} or {y}",
    "The answer is {x} and {y}.",
    "The answer is either {x} or {y}",
    "**{x}** or **{y}**",
    "\\boxed{{{x}}} \\boxed{{{y}}}",
    "<answer>{x}, {y}</answer>",
    "not {x}",
    "It is not {x}.",
    "It isn't {x}",
    "neither {x} nor {y}",
    "{x} is wrong",
    "{x} is incorrect.",
    "{x} is not correct",
    "Option {x} is false",
    "{x} can't be right",
    "I don't think it is {x}",
    "anything but not {x} or {y}",
    "Option {x} shows a road, option {y} shows plums",
    "{x}. one\n{y}. two\n{z}. three",
    "{x}\n{y}\n{z}",
    "<think>{x}",
    "<think>It is {x}. The answer is {x}",
    "{x} <thinking>hm",
    "◁think▷{x}",
    "<think>{y}</think><think>{x}",
    "<think>{x}</think>",
    "The {x}-road",
    "{x}ab",
    "2{x}",
]


@pytest.mark.parametrize(
    ("texts", "named"), [(ONE, True), (CHOSEN, True), (NONE, False)], ids=["one", "chosen", "none"]
)
def test_every_letter_is_read_alike(texts: list[str], named: bool) -> None:
    wrong = []
    for text in texts:
        for x in "ABCD":
            for y, z in ((y, z) for y in "ABCD" for z in "ABCD" if len({x, y, z}) == 3):
                said = text.format(x=x, y=y, z=z)
                if (found := strict(said, FOUR)) != (x if named else ""):
                    wrong.append((said, found))
    assert not wrong


@given(st.text(alphabet="ABCDEI abc.,:;()*_'\"\n-or notis", max_size=40))
def test_renaming_the_letters_renames_the_answer(text: str) -> None:
    # "A" and "I" are words too, so only the others can be exchanged in any text.
    swap = str.maketrans("BCDbcd", "CDBcdb")
    letter = strict(text, FOUR)
    assert strict(text.translate(swap), FOUR) == letter.translate(swap)


@given(st.text(max_size=60), st.lists(st.text(max_size=12), max_size=30))
def test_any_text_gives_an_option_or_nothing(text: str, options: list[str]) -> None:
    assert strict(text, options) in ("", *letters(len(options)))
    assert answer_text(answer_text(text)) is not None


@given(st.sampled_from(["<think>", "<thinking>", "<THINK>", "◁think▷", "[THINK]", "<reasoning>"]), st.text(max_size=40))
def test_reasoning_that_was_cut_off_is_no_answer(tag: str, text: str) -> None:
    text = text.replace("/", "")  # no closing tag
    assert strict(f"{tag}{text}", FOUR) == ""
    assert strict(f"{tag}{text}{tag[0]}/{tag[1:]}B", FOUR) in ("B", "")


@pytest.mark.parametrize(
    ("text", "options", "letter"),
    [
        ("A man is walking", FOUR, ""),
        ("A man was seen because it rained", FOUR, ""),
        ("A large dog seems right", FOUR, ""),
        ("The answer is A man", FOUR, ""),
        ("A wet road is shown", FOUR, "B"),  # the article, and the text of B
        ("A Wet Road", FOUR, "B"),
        ("I is right", ("x",) * 9, "I"),
        ("I would say so", ("x",) * 9, ""),
        ("Team B wins", ("Team B wins", "Team A wins"), "A"),
        ("I think that team B wins", ("Team B wins", "Team A wins"), "A"),
        ("Both A and B", ("red", "blue", "Both A and B", "Neither"), "C"),
        ("Neither", ("red", "blue", "Both A and B", "Neither"), "D"),
        ("A. Lincoln", ("G. Washington", "A. Lincoln"), "B"),
        ("It is not red but blue", ("red", "blue"), "B"),
        ("It is not red", ("red", "blue"), ""),
        ("not a red car", ("red car", "blue car"), ""),
        ("N/A", FOUR, ""),
        ("A or E", FOUR, ""),
        ("at 5 P.M.", ("x",) * 20, ""),
        ("a T-shirt", ("x",) * 20, ""),
        ("2*3", ("23", "2*3"), "B"),
        (".5", ("5", ".5"), "B"),
        ("cafe\u0301", ("bar", "caf\u00e9"), "B"),
        ("１２", ("11", "12"), "B"),
        ("（Ｂ）", FOUR, "B"),
        ("27", tuple(str(number) for number in range(28)), "AB"),
        ("The answer is AB", ("x",) * 28, "AB"),
        ("AB. x", ("x",) * 28, "AB"),
        ("AC", ("x",) * 28, ""),
        ("ok: B", ("x",) * 28, "B"),
        ("B", (), ""),
    ],
)
def test_words_and_texts(text: str, options: tuple[str, ...], letter: str) -> None:
    assert strict(text, options) == letter


@pytest.mark.parametrize(
    "part", ["A, ", "A or B. C is wrong, ", "the answer is ", "<b>", "<think>", "(", "*", "not ", "{"]
)
def test_a_long_answer_takes_no_long_time(part: str) -> None:
    begin = time.perf_counter()
    strict(part * (12_000 // len(part)), FOUR)
    assert time.perf_counter() - begin < 5, "a second where the time grows with the length, minutes with its square"


def test_names_of_options() -> None:
    assert letters(26) == tuple(string.ascii_uppercase) and letters(0) == ()
    assert letters(28)[26:] == ("AA", "AB") and letters(703)[-1] == "AAA"


@given(st.text(alphabet=string.ascii_letters + string.digits + " .-", min_size=1, max_size=12).map(str.strip))
def test_markup_never_changes_a_word(word: str) -> None:
    for wrapped in (
        f"**{word}**",
        f"“{word}”",
        f"`{word}`",
        f"\\boxed{{{word}}}",
        f"<answer>{word}</answer>",
        f" {word}。",
    ):
        assert normalise(wrapped) == normalise(word), wrapped
