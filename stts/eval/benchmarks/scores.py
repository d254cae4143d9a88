"""Metrics of one task: a parsed answer per question, accuracy over all of them and by group.

An answer that cannot be parsed is wrong, stays in the denominator and is counted. `compat` scorings leave it out or
guess where a public scorer does; a guess is drawn from the sample's uid, so it never depends on the order."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stts.metrics.accuracy import accuracy, effective_number
from stts.metrics.extract import Rule, letters


@dataclass(frozen=True)
class Compat:
    """Someone else's scoring of a task."""

    rule: Rule
    unparsed: Literal["wrong", "dropped", "empty dropped", "guessed"] = "wrong"


@dataclass(frozen=True)
class Scored:
    uid: str
    video: str
    parsed: str | None
    correct: bool
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Group field -> values: one value, or several where labels are many."""
    counted: bool = True
    """False only in a compat scoring that leaves this answer out."""


@dataclass(frozen=True)
class GroupScore:
    acc: float
    n: int
    parse_failures: int


@dataclass(frozen=True)
class Scores:
    """Of one task. Everything of ours is 0 to 1; lmms-eval's metric stands under its own name and scale."""

    task: str
    scoring: str
    headline: float | None
    """What the task is known by and suites average; None where it cannot be stated."""
    metrics: Mapping[str, float | int | None]
    groups: Mapping[str, Mapping[str, GroupScore]]
    scored: tuple[Scored, ...]


def grouped(scored: Sequence[Scored]) -> dict[str, dict[str, GroupScore]]:
    """Field -> value -> score, values sorted; only counted answers."""
    members: dict[str, dict[str, list[Scored]]] = {}
    for item in scored:
        for name, values in item.groups.items():
            for value in values:
                members.setdefault(name, {}).setdefault(value, []).append(item)
    return {name: {v: _group(found[v]) for v in sorted(found)} for name, found in members.items()}


def _group(items: Sequence[Scored]) -> GroupScore:
    correct = sum(item.correct for item in items)
    return GroupScore(correct / len(items), len(items), sum(item.parsed is None for item in items))


def mean_acc(groups: Mapping[str, GroupScore]) -> float | None:
    """Unweighted mean over groups."""
    return sum(group.acc for group in groups.values()) / len(groups) if groups else None


def common_metrics(scored: Sequence[Scored], macro: float | None) -> dict[str, float | int | None]:
    """Of the counted answers: acc, macro, n, parse_failures, and standard errors.

    stderr is sqrt(p (1 - p) / n); stderr_clustered has the effective number of answers in place of n, allowing for
    several questions per video; None, as are the ends of the interval, where there is one video."""
    if not scored:
        return {"acc": None, "macro": None, "stderr": None, "stderr_clustered": None, "n": 0, "parse_failures": 0}
    correct, videos = [item.correct for item in scored], [item.video for item in scored]
    interval = accuracy(correct, videos)
    spread = interval.value * (1 - interval.value)
    num_effective, num_videos = effective_number([float(right) for right in correct], videos)
    return {
        "acc": interval.value,
        "acc_low": interval.low,
        "acc_high": interval.high,
        "macro": macro,
        "stderr": math.sqrt(spread / len(scored)),
        "stderr_clustered": None if num_videos == 1 else math.sqrt(spread / num_effective),
        "n": len(scored),
        "parse_failures": sum(item.parsed is None for item in scored),
    }


def apply_compat(compat: Compat, text: str, options: Sequence[str], uid: str) -> tuple[str | None, bool]:
    """(answer, counted) as that scorer has them."""
    parsed = compat.rule(text, options)
    if not parsed and compat.unparsed == "guessed":
        return random.Random(uid).choice(letters(len(options))), True
    left_out = compat.unparsed == "dropped" or (compat.unparsed == "empty dropped" and not text)
    return parsed or None, bool(parsed) or not left_out
