from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stts.metrics.accuracy import (
    Z95,
    accuracy,
    effective_number,
    grade,
    mcnemar,
    note_on_videos,
    paired_bootstrap,
    paired_difference,
    student_95,
)


@pytest.mark.parametrize(
    ("prediction", "answer", "options", "parsed", "correct"),
    [
        (" Red. ", "red", ("red", "blue"), "red", True),
        ("blue", "red", ("red", "blue"), "blue", False),
        ("red blue", "red", ("red", "blue"), None, False),  # not an option: no guessing
        ("it is red", "red", ("red", "blue"), None, False),
        ("", "red", ("red", "blue"), None, False),
        ("!", "red", (), None, False),
        ("Two!", "two", (), "two", True),
        ("two dogs", "two", (), "two dogs", False),
        ("3", "3", ("1", "2", "3"), "3", True),
        ("b", "B", ("A", "B"), "b", True),
        ("(B) paint a fence", "B", ("feed the ducks", "paint a fence"), "b", True),
        ("A. paint a fence", "B", ("feed the ducks", "paint a fence"), "a", False),
        ("a red ball", "A", ("feed the ducks", "paint a fence"), None, False),  # the article is not an option
        ("E", "A", ("feed the ducks", "paint a fence"), None, False),
        ("The answer is B because A is wrong", "B", ("feed the ducks", "paint a fence"), "b", True),
        ("they paint a fence", "B", ("feed the ducks", "paint a fence"), "b", True),  # holds one option's text
        ("It must be B, not A", "B", ("feed the ducks", "paint a fence"), "b", True),
        ("A or B", "B", ("feed the ducks", "paint a fence"), None, False),
        ('"red"', "red", ("red", "blue"), "red", True),
        ("**Red**。", "red", (), "red", True),
        ("‘red’", '"red"', (), "red", True),
        ("\\boxed{red}", "red", ("red", "blue"), "red", True),
        ("<think>blue?</think>\nred", "red", ("red", "blue"), "red", True),
        ("<think>red", "red", (), None, False),
        ("cafe\u0301", "caf\u00e9", (), "caf\u00e9", True),
        ("１２", "12", (), "12", True),
        ("A", "A. red", ("A. red", "B. blue"), "a", True),
        ("red", "A. red", ("A. red", "B. blue"), "a", True),
        ("A. red", "A. red", ("A. red", "B. blue"), "a", True),
        ("B. blue", "A", ("A. red", "B. blue"), "b", False),
        ("(A)", "red", ("(A) red", "(B) blue"), "a", True),
        ("B: 2", "B", ("A: 1", "B: 2"), "b", True),
        ("Y: 2", "Y: 2", ("X: 1", "Y: 2"), "y: 2", True),  # no letters of options
        ("27", "27", tuple(str(number) for number in range(28)), "27", True),
        ("AB", "AB", tuple(f"word {number}" for number in range(28)), "ab", True),
        ("word 27", "AB", tuple(f"word {number}" for number in range(28)), "ab", True),
        ("a red ball", "A", ("A", "B"), None, False),  # options that are the letters have no texts
        ("Answer: B", "B", ("A", "B"), "b", True),
        ("B. paint", "paint", ("feed", "paint"), None, False),  # the options are words here, not letters
        ("b. x", "b. x", (), "b. x", True),  # without options nothing is a letter
    ],
)
def test_grading(prediction: str, answer: str, options: tuple[str, ...], parsed: str | None, correct: bool) -> None:
    graded = grade(prediction, answer, options)
    assert (graded.parsed, graded.correct) == (parsed, correct)


@pytest.mark.parametrize(("answer", "options"), [("", ()), ("...", ()), ("green", ("red", "blue")), ("c", ("x", "y"))])
def test_a_row_that_can_never_be_right_is_refused(answer: str, options: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="none of the options"):
        grade("red", answer, options)


def test_options_lettered_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="lettered B, A, expected A, B"):
        grade("B", "B. red", ("B. red", "A. blue"))


def test_one_question_per_video_gives_the_wilson_interval() -> None:
    # 7 of 10: the textbook values of Wilson's interval
    found = accuracy([True] * 7 + [False] * 3, [str(number) for number in range(10)])
    assert (found.value, found.num_samples, found.num_videos) == (0.7, 10, 10)
    assert found.low == pytest.approx(0.3968, abs=5e-5) and found.high == pytest.approx(0.8922, abs=5e-5)


def test_wilson_ends_solve_its_equation() -> None:
    found = accuracy([True] * 7 + [False] * 3, [str(number) for number in range(10)])
    for end in (found.low, found.high):
        assert abs(0.7 - end) == pytest.approx(Z95 * math.sqrt(end * (1 - end) / 10))


def test_copies_of_one_answer_add_nothing() -> None:
    # Four videos, each asked three times with the same outcome: worth the four videos, not twelve answers.
    # By hand: C = 4, n = 12, mean 3/4; r_c = 3/4 (three times), -9/4; V = 4/3 * (27/16 + 81/16) / 144 = 1/16,
    # independent: 12 * 3/16 / (12 * 11) = 3/176; n_eff = 12 * (3/176) * 16 = 36/11.
    outcomes, videos = [True] * 9 + [False] * 3, [str(number // 3) for number in range(12)]
    assert effective_number([float(o) for o in outcomes], videos) == (pytest.approx(36 / 11), 4)


def test_clustered_variance_matches_resampling_videos() -> None:
    # All C^C ways to draw C videos with replacement: their variance is the sandwich without its C / (C - 1).
    outcomes = {"a": (1, 1, 1), "b": (0, 0, 1), "c": (0, 0, 0), "d": (1, 0, 1), "e": (1, 1, 0)}
    draws = [sum(sum(outcomes[v]) for v in draw) / 15 for draw in itertools.product(outcomes, repeat=5)]
    mean = sum(draws) / len(draws)
    resampled = sum((draw - mean) ** 2 for draw in draws) / len(draws)
    values = [float(y) for answers in outcomes.values() for y in answers]
    videos = [video for video in outcomes for _ in range(3)]
    num_eff, _ = effective_number(values, videos)
    share = sum(values) / 15
    independent = share * (1 - share) / 14
    assert 5 / 4 * resampled == pytest.approx(independent * 15 / num_eff)


def test_nothing_varies() -> None:
    found = accuracy([True] * 6, ["a", "a", "a", "b", "b", "b"])
    assert found.high == 1 and found.low == pytest.approx(2 / (2 + Z95**2)), "two videos, not six answers"
    assert accuracy([False, False], ["a", "b"]).high == pytest.approx(Z95**2 / (2 + Z95**2))


def test_one_video_gives_no_interval_and_no_evidence() -> None:
    right, wrong, one = [True] * 20, [False] * 20, ["only.mp4"] * 20
    share, change = accuracy([True, False] * 10, one), paired_difference(right, wrong, one)
    assert (share.value, share.low, share.high) == (0.5, None, None)
    assert (change.value, change.low, change.high) == (1.0, None, None)
    drawn = paired_bootstrap(right, wrong, one)
    assert (drawn.p_value, drawn.low, drawn.high) == (1.0, None, None) and "1 videos" in drawn.reason
    assert mcnemar(right, wrong, one) == 1.0 and mcnemar(right, wrong) == 2 / 2**20
    assert "no interval" in note_on_videos(1) and note_on_videos(6) == ""


@pytest.mark.parametrize(("changed", "least"), [(1, 1.0), (2, 0.5), (3, 0.25), (5, 1 / 16), (6, 1 / 32)])
def test_p_values_keep_to_the_videos_that_changed(changed: int, least: float) -> None:
    # Ten questions a video, all of them gained; ten further videos without a change carry nothing.
    videos = [str(number // 10) for number in range(10 * (changed + 10))]
    right, dense = [True] * len(videos), [False] * 10 * changed + [True] * 100
    assert mcnemar(right, dense, videos) == least
    assert paired_bootstrap(right, dense, videos).p_value >= least


def test_resampling_makes_no_interval_of_nothing() -> None:
    def ends(gains: list[int]) -> tuple[float | None, float | None]:
        videos = [str(number // 2) for number in range(2 * len(gains))]
        right = [gain > place for gain in gains for place in range(2)]
        drawn = paired_bootstrap(right, [False] * len(right), videos)
        assert bool(drawn.reason) == (drawn.low is None)
        return drawn.low, drawn.high

    assert ends([2, 1, 0, 2, 1]) == (None, None), "five videos: their range misses the truth in 1 of 16"
    assert ends([2, 2, 2, 2, 2, 2, 2]) == (None, None), "every draw is the same"
    low, high = ends([2, 1, 0, 2, 1, 0])
    assert low is not None and high is not None and 0 <= low < 0.5 < high <= 1


def test_few_videos_widen_the_interval() -> None:
    # Two videos that agree by chance: n_eff is all 20 answers, but one degree of freedom says how videos differ.
    right, videos = ([True] * 5 + [False] * 5) * 2, ["a"] * 10 + ["b"] * 10
    found, z = accuracy(right, videos), student_95(1)
    assert found.low == pytest.approx(0.5 - z * math.sqrt(1 / 80 + z**2 / 1600) / (1 + z**2 / 20))
    assert found.low is not None and found.low < 0.03
    many = accuracy([True, False] * 50, [str(number // 2) for number in range(100)])
    assert many.low == pytest.approx(accuracy([True, False] * 50, [str(n) for n in range(100)]).low), "more than 30: z"


def test_students_quantiles() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 29: 2.0452}
    for degrees, quantile in table.items():
        assert student_95(degrees) == pytest.approx(quantile, abs=0.005)


def test_paired_difference_by_hand() -> None:
    # 3 gains, 1 loss, 6 ties on ten videos: (3 - 1)/12 +- z sqrt(4 + 1 - 4/12)/12
    here = [True] * 3 + [False] + [True] * 6
    dense = [False] * 3 + [True] + [True] * 6
    found = paired_difference(here, dense, [str(number) for number in range(10)])
    assert found.value == pytest.approx(0.2)
    assert found.low == pytest.approx(2 / 12 - Z95 * math.sqrt(5 - 4 / 12) / 12)
    assert found.high == pytest.approx(2 / 12 + Z95 * math.sqrt(5 - 4 / 12) / 12)


def test_no_change_is_not_certainty() -> None:
    found = paired_difference([True, False] * 50, [True, False] * 50, [str(number) for number in range(100)])
    assert found.value == 0 and found.low == pytest.approx(-Z95 / 102) and found.high == -found.low


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 4)), min_size=1, max_size=40))
def test_intervals_hold_their_value_and_stay_in_range(rows: list[tuple[bool, bool, int]]) -> None:
    here, dense, videos = [row[0] for row in rows], [row[1] for row in rows], [str(row[2]) for row in rows]
    share, change = accuracy(here, videos), paired_difference(here, dense, videos)
    assert change.value == pytest.approx(share.value - accuracy(dense, videos).value)
    drawn, num_videos = paired_bootstrap(here, dense, videos, num_draws=200), len(set(videos))
    assert min(drawn.p_value, mcnemar(here, dense, videos)) >= 2 / 2**num_videos
    if share.low is None or share.high is None or change.low is None or change.high is None:
        assert num_videos == 1 and drawn.low is None
        return
    assert 0 <= share.low <= share.value + 1e-12 and share.value <= share.high + 1e-12 and share.high <= 1
    assert -1 <= change.low <= change.high <= 1
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    again = accuracy([here[i] for i in order], [videos[i] for i in order])
    assert again.low == pytest.approx(share.low), "the order of samples does not matter"


@pytest.mark.slow
@pytest.mark.parametrize(("num_videos", "questions"), [(60, 3), (5, 20), (3, 10)])
def test_intervals_cover_what_they_promise(num_videos: int, questions: int) -> None:
    # Answers to one video agree most of the time; 95 % intervals must hold the truth at least about as often.
    rng = random.Random(1)
    hits = changes = 0
    videos = [str(number // questions) for number in range(num_videos * questions)]
    for _ in range(1000):
        here, dense = [], []
        for _ in range(num_videos):
            video = rng.random()  # how hard this video is: uniform, so the truth is 1/2 for both
            here += [rng.random() < video for _ in range(questions)]
            dense += [rng.random() < video for _ in range(questions)]
        found, change = accuracy(here, videos), paired_difference(here, dense, videos)
        assert found.low is not None and found.high is not None and change.low is not None and change.high is not None
        hits += found.low <= 0.5 <= found.high
        changes += change.low <= 0 <= change.high
    assert hits >= 930 and changes >= 930
    assert num_videos < 60 or (hits <= 975 and changes <= 980), "and not much more often where videos are many"


def test_errors() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        accuracy([], [])
    with pytest.raises(ValueError, match="1 video names"):
        accuracy([True, False], ["a"])
    with pytest.raises(ValueError, match="pair them by sample"):
        paired_difference([True], [True, False], ["a"])
