"""Strict answer scoring, and intervals that know that several questions share a video.

Questions about one clip succeed and fail together, so n answers carry less information than n. With r_c the sum over
video c of (y - mean y), C videos and n answers, the variance of the mean allowing for that is

    V = C / (C - 1) * sum_c r_c^2 / n^2

and the design effect is V over the variance (mean y^2 - (mean y)^2) / (n - 1) that independent answers would have. Both
intervals below use n_eff = n / design effect, limited to [1, n]: with one question per video it is n; where the answers
do not vary at all the effect cannot be estimated and n_eff = C. All but `paired_bootstrap` is closed-form.

Nothing here claims more than C videos can carry:

* One video gives no interval: nothing is known of how videos differ.
* Up to 30 videos with several questions each, z is Student's t for C - 1 degrees of freedom, as V is itself estimated.
* Under the null hypothesis the sign of a video's change is a coin toss, so k videos that changed give no p-value below
  2 / 2^k. Both tests keep to that, whatever the number of questions or draws.
* Resampling fewer than 6 videos gives no 95 % interval: their range misses the truth with a chance of 2 / 2^C > 5 %.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stts.metrics.strict import letters, strict, unmarked
from stts.metrics.strict import normalise as normalise

Z95 = 1.959963984540054
MIN_RESAMPLED = 6
"""Videos from which resampling can make a 95 % interval: 2 / 2^6 is the first under 5 %."""


@dataclass(frozen=True)
class Graded:
    parsed: str | None
    """The normalised answer; None where the text holds none, which counts as wrong."""
    correct: bool


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float | None
    """95 % interval; None where all answers are about one video."""
    high: float | None
    num_samples: int
    num_videos: int


def grade(prediction: str, answer: str, options: Sequence[str] = ()) -> Graded:
    """Is the whole prediction, normalised, the answer? No guessing: a sentence that contains the word is unparsed.

    With `options` a prediction must be one of them, else it is unparsed. Letters are read instead, by `strict`, where
    the answer is a letter that is not itself an option, where the options are just A, B, ..., and where every option
    begins with its letter ("A. red"): there the answer may be the letter, the text, or both.
    ValueError for an answer that is empty or none of the options, as that row could never be right, and for options
    whose letters are out of order."""
    wanted, choices = normalise(answer), [normalise(option) for option in options]
    names, texts = [name.lower() for name in letters(len(choices))], unmarked(options)
    are_letters, are_marked = choices == names, texts != tuple(option.strip() for option in options)
    if choices and (are_letters or are_marked or wanted not in choices):
        by_text = [] if are_letters else [*choices, *map(normalise, texts)]
        if wanted in by_text and wanted not in names:
            wanted = names[by_text.index(wanted) % len(names)]
        # Options that are letters are no texts to find in a sentence.
        parsed = strict(prediction, [""] * len(choices) if are_letters else texts).lower()
        choices = names
    else:
        parsed = normalise(prediction)
    if not wanted or (choices and wanted not in choices):
        raise ValueError(f"answer {answer!r} is empty or none of the options {list(options)}; correct the row")
    if not parsed or (choices and parsed not in choices):
        return Graded(None, False)
    return Graded(parsed, parsed == wanted)


def accuracy(correct: Sequence[bool], videos: Sequence[str]) -> Estimate:
    """Share of right answers with the Wilson interval at n_eff (module docstring); `videos` names each answer's clip.

    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n),  n = n_eff"""
    values = [float(right) for right in correct]
    num_eff, num_videos = effective_number(values, videos)
    share, z = sum(values) / len(values), _critical(values, num_videos)
    if z is None:
        return Estimate(share, None, None, len(values), num_videos)
    middle = (share + z**2 / (2 * num_eff)) / (1 + z**2 / num_eff)
    half = z * math.sqrt(share * (1 - share) / num_eff + z**2 / (4 * num_eff**2)) / (1 + z**2 / num_eff)
    low, high = min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))  # rounding aside, p is inside
    return Estimate(share, low, high, len(values), num_videos)


def paired_difference(correct: Sequence[bool], dense: Sequence[bool], videos: Sequence[str]) -> Estimate:
    """Accuracy minus that of dense on the same samples, with a paired interval (Agresti and Min 2005) at n_eff.

    With g gains (right only here) and l losses (right only in dense), both scaled by n_eff / n, and n = n_eff:

        (g - l)/(n + 2) +- z sqrt(g + l + 1 - (g - l)^2/(n + 2)) / (n + 2)

    The added half in each cell keeps the width above zero when not one answer changed."""
    _check_pairs(correct, dense)
    change = [float(here) - float(there) for here, there in zip(correct, dense, strict=True)]
    num_eff, num_videos = effective_number(change, videos)
    num_samples, z = len(change), _critical(change, num_videos)
    value, scale = sum(change) / num_samples, num_eff / num_samples
    if z is None:
        return Estimate(value, None, None, num_samples, num_videos)
    gained, lost = scale * change.count(1.0), scale * change.count(-1.0)
    middle = (gained - lost) / (num_eff + 2)
    half = z * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (num_eff + 2)) / (num_eff + 2)
    return Estimate(value, max(-1.0, middle - half), min(1.0, middle + half), num_samples, num_videos)


def mcnemar(correct: Sequence[bool], dense: Sequence[bool], videos: Sequence[str] | None = None) -> float:
    """Exact two-sided McNemar test that answers turned right as often as wrong.

    With g gains and l losses among n = g + l answers that changed, p = 2 P(X <= min(g, l)) for X ~ Binomial(n, 1/2), at
    most 1. It takes answers as independent; with `videos`, it is at least 2 / 2^k for the k videos that changed (module
    docstring). None: every answer is about a video of its own."""
    _check_pairs(correct, dense)
    gained = sum(here and not there for here, there in zip(correct, dense, strict=True))
    lost = sum(there and not here for here, there in zip(correct, dense, strict=True))
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    exact = 2 * tail / 2**changed
    return min(1.0, exact if videos is None else max(exact, _least_p(_changes(correct, dense, videos))))


def _changes(correct: Sequence[bool], dense: Sequence[bool], videos: Sequence[str]) -> dict[str, list[int]]:
    """By video, the change of every answer: 1, 0 or -1."""
    changes: dict[str, list[int]] = defaultdict(list)
    for here, there, video in zip(correct, dense, videos, strict=True):
        changes[video].append(int(here) - int(there))
    return changes


def _least_p(changes: Mapping[str, Sequence[int]]) -> float:
    return min(1.0, 2 / 2 ** sum(sum(change) != 0 for change in changes.values()))


@dataclass(frozen=True)
class Bootstrap:
    p_value: float
    """Two-sided."""
    low: float | None
    """95 % percentile interval of the difference; None where the videos carry none."""
    high: float | None
    reason: str = ""
    """Why there is no interval."""


def paired_bootstrap(
    correct: Sequence[bool], dense: Sequence[bool], videos: Sequence[str], num_draws: int = 10_000, seed: int = 0
) -> Bootstrap:
    """The difference to dense when whole videos are drawn again with replacement.

    p = 2 min(P(d* <= 0), P(d* >= 0)), at most 1, at least 1 / num_draws and at least what the videos that changed allow
    (module docstring). No interval for fewer than 6 videos, nor where all changed alike: every draw is then the same.
    Deterministic for a seed."""
    _check_pairs(correct, dense)
    changes = _changes(correct, dense, videos)
    sum_V = np.array([sum(change) for change in changes.values()], dtype=float)
    size_V = np.array([len(change) for change in changes.values()], dtype=float)
    rng, draws = np.random.default_rng(seed), []
    for start in range(0, num_draws, 500):  # a thousand videos take 4 MB at a time
        drawn = rng.integers(len(sum_V), size=(min(500, num_draws - start), len(sum_V)))
        draws.append(sum_V[drawn].sum(1) / size_V[drawn].sum(1))
    difference = np.concatenate(draws)
    tail = min(int((difference <= 0).sum()), int((difference >= 0).sum()))
    p_value = min(1.0, max(2 * tail / num_draws, 1 / num_draws, _least_p(changes)))
    reason = ""
    if len(changes) < MIN_RESAMPLED:
        reason = f"{len(changes)} videos carry no 95 % interval by resampling, at least {MIN_RESAMPLED} do"
    elif len(set((sum_V / size_V).tolist())) == 1:
        reason = "all videos changed alike, so every draw is the same"
    if reason:
        return Bootstrap(p_value, None, None, reason)
    low, high = np.percentile(difference, [2.5, 97.5]).tolist()
    return Bootstrap(p_value, low, high)


def _check_pairs(correct: Sequence[bool], dense: Sequence[bool]) -> None:
    if len(correct) != len(dense) or not correct:
        raise ValueError(f"got {len(correct)} answers and {len(dense)} of dense; pair them by sample, at least one")


def effective_number(values: Sequence[float], videos: Sequence[str]) -> tuple[float, int]:
    """(n_eff, C) of the module docstring. ValueError for no values, or names that are not one per value."""
    num_samples = len(values)
    if not num_samples or len(videos) != num_samples:
        raise ValueError(f"got {num_samples} values and {len(videos)} video names; need one name per value, at least 1")
    mean = math.fsum(values) / num_samples
    residual: dict[str, float] = defaultdict(float)
    for value, video in zip(values, videos, strict=True):
        residual[video] += value - mean
    num_videos = len(residual)
    if num_videos == 1:
        return 1.0, 1
    if len(set(values)) == 1:
        return float(num_videos), num_videos
    clustered = num_videos / (num_videos - 1) * math.fsum(r * r for r in residual.values()) / num_samples**2
    independent = math.fsum((value - mean) ** 2 for value in values) / (num_samples * (num_samples - 1))
    if clustered <= independent:  # answers of one video differ more than chance: claim no more than n
        return float(num_samples), num_videos
    return max(1.0, num_samples * independent / clustered), num_videos


def note_on_videos(num_videos: int) -> str:
    """What a reader of a table must know where the videos are few; "" where they are not."""
    if num_videos == 1:
        return "[-]: no interval, as all questions are about one video and nothing is known of how videos differ."
    if num_videos < MIN_RESAMPLED:
        return f"{num_videos} videos: no p-value is below {2 / 2**num_videos:g}, whatever the number of questions."
    return ""


def _critical(values: Sequence[float], num_videos: int) -> float | None:
    """Half a 95 % interval in standard errors; None for one video. See the module."""
    if num_videos == 1:
        return None
    estimated = num_videos < len(values) and len(set(values)) > 1
    return student_95(num_videos - 1) if estimated and num_videos <= 30 else Z95


def student_95(degrees: int) -> float:
    """97.5 % quantile of Student's t, to 0.005: closed for 1 and 2 degrees of freedom, else the series in 1 / degrees
    (Abramowitz and Stegun 26.7.5)."""
    if degrees == 1:
        return math.tan(0.475 * math.pi)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = Z95
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / degrees**power for power, term in enumerate(terms, start=1))
