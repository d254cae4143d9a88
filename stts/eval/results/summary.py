"""A row of the table: everything about one method at one ratio, meaned over questions, with intervals.

Accuracy is micro within a task and an unweighted mean over tasks. What a task is known by (its headline: for some the
mean of its parts) stands beside it, and suites are means of headlines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stts.eval.answering.cell import DENSE, Cell, Kind
from stts.eval.answering.evidence import share_kept
from stts.eval.benchmarks.tasks import SUITES, suite_score
from stts.eval.results.grading import Graded, Record, TaskScore
from stts.metrics.accuracy import Estimate, accuracy, mcnemar, paired_difference

PHASES = ("video", "preprocess", "vit", "prune", "connect", "prefill", "decode", "ttft", "ttft_e2e")
"""Phases of one sample in order; `ttft` = vit + prune + connect + prefill, `ttft_e2e` with the two before."""


@dataclass(frozen=True)
class Row:
    """A line of the table. FLOPs are means per video; intervals are 95 %; everything is None where `reason` is not."""

    method: str
    """With its label."""
    kind: Kind
    retention_configured: float
    reason: str | None = None
    num_frames: int | None = None
    """Frames of a video at most; None in files that do not tell."""
    parts: int = 1
    """Parts in which they were shown; counts, FLOPs and times are sums over them."""
    tokens: float | None = None
    """Visual tokens of a video at the first layer of the LLM."""
    retention_measured: float | None = None
    """Equivalent retention, mean over samples."""
    retention_p5: float | None = None
    retention_p95: float | None = None
    retention_at_entry: float | None = None
    """Share of visual tokens that the first layer of the LLM sees: more than measured where a method cuts inside."""
    kept_per_frame: float | None = None
    """Equivalent tokens."""
    evidence_kept: float | None = None
    """Share of the tokens that show evidence, beyond the first frame; None without labels (`evidence.py`)."""
    distractors_kept: float | None = None
    """Likewise of distractors."""
    num_samples: int | None = None
    num_videos: int | None = None
    num_unparsed: int | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    difference: float | None = None
    """To dense on the same samples, at the first number of frames; None for that one itself."""
    difference_low: float | None = None
    difference_high: float | None = None
    ms_per_sample: float | None = None
    """Median over timed batches; None when there was none."""
    num_timed_batches: int = 0
    signals: Mapping[str, str] = field(default_factory=dict)
    """Signal the method asked for -> what it was made from."""
    families: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    equal_flops_to: str = ""
    """Title of the row whose FLOPs this ratio was solved for; "": the ratio is the user's."""
    mean: float | None = None
    """Unweighted mean of the tasks' headlines; None where one cannot be stated."""
    retained: float | None = None
    """`mean` over that of dense in the same run (rel_of_mean)."""
    retained_by_task: float | None = None
    """Mean over tasks of headline / headline of dense (mean_of_rel)."""
    p_value: float | None = None
    """Exact McNemar test against dense on the same samples, never below what the number of videos allows; None for
    dense itself."""
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By task: headline, headline_dense, accuracy and difference with their intervals, p_value, retained, num_samples,
    num_videos, num_unparsed."""
    suites: Mapping[str, float | None] = field(default_factory=dict)
    """Score of every suite all of whose tasks were asked."""
    flops: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By formula: vit, vit_embed, connector, pruner, llm, total and share of dense. One FLOP per multiply-add in all
    but `exact`; `fastv` and `pdrop` differ from `macs` in the LLM only."""
    decode: Mapping[str, float] = field(default_factory=dict)
    """Means per video of `DecodeCost`: flops and cache_bytes, and flops_share and cache_share of dense; empty in files
    that do not tell."""
    time_ms: Mapping[str, float] = field(default_factory=dict)
    """Median per sample of every phase that was timed, see `PHASES`."""
    peak_gib: float | None = None
    """Most memory allocated on the GPU in any batch, weights included."""


def make_row(
    cell: Cell,
    records: Sequence[Record],
    *,
    batch_ms: Sequence[float] = (),
    phase_ms: Mapping[str, Sequence[float]] | None = None,
    signals: Mapping[str, str] | None = None,
    scores: Mapping[str, TaskScore] | None = None,
    dense_scores: Mapping[str, TaskScore] | None = None,
    peak_gib: float | None = None,
) -> Row:
    """`records` hold the outcomes of this cell, and those of dense to compare with where there are any."""
    if cell.reason is not None:
        return Row(
            cell.title, cell.kind, cell.retention_configured, cell.reason, cell.num_frames, cell.parts,
            equal_flops_to=cell.equal_flops_to,
        )  # fmt: skip
    outcomes = [record.outcomes[cell.key] for record in records]
    dense = [record.outcomes[DENSE] for record in records if DENSE in record.outcomes]
    tasks = _tasks(cell, records, scores or {}, dense_scores or {})
    share = _mean_estimate([_estimate(task, "accuracy") for task in tasks.values()])
    paired = [task for task in tasks.values() if task["difference"] is not None]
    change = _mean_estimate([_estimate(task, "difference") for task in paired]) if paired else None
    headlines = {name: task["headline"] for name, task in tasks.items()}
    low, high = np.percentile([outcome.retention for outcome in outcomes], [5, 95]).tolist()
    pairs = [
        (record.outcomes[cell.key].correct, record.outcomes[DENSE].correct, f"{record.task}/{record.video}")
        for record in records
        if dense
    ]
    return Row(
        method=cell.title,
        kind=cell.kind,
        retention_configured=cell.retention_configured,
        num_frames=cell.num_frames,
        parts=cell.parts,
        tokens=_mean(outcome.num_kept for outcome in outcomes),
        retention_measured=_mean(outcome.retention for outcome in outcomes),
        retention_p5=low,
        retention_p95=high,
        retention_at_entry=_mean(outcome.num_kept / outcome.num_groups for outcome in outcomes),
        kept_per_frame=_mean(outcome.retention * outcome.num_groups / outcome.num_frames for outcome in outcomes),
        evidence_kept=share_kept([outcome.cells for outcome in outcomes], "evidence"),
        distractors_kept=share_kept([outcome.cells for outcome in outcomes], "distractors"),
        num_samples=len(records),
        num_videos=sum(task["num_videos"] for task in tasks.values()),
        num_unparsed=sum(outcome.parsed is None for outcome in outcomes),
        **_ends("accuracy", share),
        **_ends("difference", change),
        ms_per_sample=statistics.median(batch_ms) if batch_ms else None,
        num_timed_batches=len(batch_ms),
        signals=signals or {},
        families=_families(cell.key, records),
        equal_flops_to=cell.equal_flops_to,
        **_retained(tasks),
        p_value=mcnemar(*zip(*pairs, strict=True)) if change else None,
        tasks=tasks,
        suites={name: suite_score(name, headlines) for name, names in SUITES.items() if set(names) <= set(tasks)},
        flops=_flops(outcomes, dense),
        decode=_decode(outcomes, dense),
        time_ms={name: statistics.median(values) for name, values in (phase_ms or {}).items() if values},
        peak_gib=peak_gib,
    )


def _ends(name: str, estimate: Estimate | None) -> dict[str, Any]:
    """Value and interval as a row names them; nothing without an estimate."""
    if estimate is None:
        return {}
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _tasks(
    cell: Cell, records: Sequence[Record], scores: Mapping[str, TaskScore], dense_scores: Mapping[str, TaskScore]
) -> dict[str, dict[str, Any]]:
    tasks = {}
    for task in dict.fromkeys(record.task for record in records):
        counted = [record for record in records if record.task == task and record.outcomes[cell.key].counted]
        if not counted:
            continue
        videos = [record.video for record in counted]
        right = [record.outcomes[cell.key].correct for record in counted]
        share = accuracy(right, videos)
        headline = scores[task].headline if task in scores else share.value
        task_row: dict[str, Any] = {
            "headline": headline,
            "accuracy": share.value,
            "accuracy_low": share.low,
            "accuracy_high": share.high,
            "num_samples": share.num_samples,
            "num_videos": share.num_videos,
            "num_unparsed": sum(record.outcomes[cell.key].parsed is None for record in counted),
            **dict.fromkeys(
                ("difference", "difference_low", "difference_high", "p_value", "headline_dense", "retained")
            ),
        }
        if DENSE in counted[0].outcomes:
            dense = [record.outcomes[DENSE].correct for record in counted]
            score = dense_scores[task].headline if task in dense_scores else sum(dense) / len(dense)
            task_row["headline_dense"] = score
            task_row["retained"] = headline / score if headline is not None and score else None
            if cell.key != DENSE:
                change = paired_difference(right, dense, videos)
                task_row |= {"difference": change.value, "difference_low": change.low, "difference_high": change.high}
                task_row["p_value"] = mcnemar(right, dense, videos)
        tasks[task] = task_row
    return tasks


def _estimate(task: Mapping[str, Any], name: str) -> Estimate:
    value, low, high = (task[name + end] for end in ("", "_low", "_high"))
    return Estimate(value, low, high, task["num_samples"], task["num_videos"])


def _mean_estimate(tasks: Sequence[Estimate]) -> Estimate:
    """Of tasks with their own questions: distances to the ends add up as squares (Zou and Donner 2008). No interval
    where one of the tasks has none."""
    if len(tasks) == 1:
        return tasks[0]
    value = sum(task.value for task in tasks) / len(tasks)
    counts = sum(task.num_samples for task in tasks), sum(task.num_videos for task in tasks)
    ends = [(task.value, task.low, task.high) for task in tasks if task.low is not None and task.high is not None]
    if len(ends) < len(tasks):
        return Estimate(value, None, None, *counts)
    below = math.sqrt(sum((middle - low) ** 2 for middle, low, _ in ends)) / len(tasks)
    above = math.sqrt(sum((high - middle) ** 2 for middle, _, high in ends)) / len(tasks)
    return Estimate(value, value - below, value + above, *counts)


def _retained(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean headline, mean / mean of dense, and mean of headline / dense, as far as they can be stated."""
    headlines, dense = ([task[name] for task in tasks.values()] for name in ("headline", "headline_dense"))
    if not headlines or None in headlines:
        return {}
    mean, shares = _mean(headlines), [task["retained"] for task in tasks.values()]
    if None in shares:
        return {"mean": mean}
    return {"mean": mean, "retained": mean / _mean(dense), "retained_by_task": _mean(shares)}


def _flops(outcomes: Sequence[Graded], dense: Sequence[Graded]) -> dict[str, dict[str, float]]:
    by_formula: dict[str, dict[str, float]] = {}
    for formula in ("exact", "macs", "fastv", "pdrop"):
        if formula in ("fastv", "pdrop") and not all(outcome.llm_flops for outcome in outcomes):
            continue
        by_formula[formula] = _parts(outcomes, formula)
        if (dense and all(outcome.llm_flops for outcome in dense)) or (dense and formula in ("exact", "macs")):
            by_formula[formula]["share"] = by_formula[formula]["total"] / _parts(dense, formula)["total"]
    return by_formula


def _decode(outcomes: Sequence[Graded], dense: Sequence[Graded]) -> dict[str, float]:
    costs, all_costs = ([one.decode for one in group if one.decode is not None] for group in (outcomes, dense))
    if len(costs) < len(outcomes):
        return {}
    means = {name: _mean(getattr(cost, name) for cost in costs) for name in ("flops", "cache_bytes")}
    shares = {}
    if dense and len(all_costs) == len(dense):
        for name, value in means.items():
            shares[f"{name.removesuffix('_bytes')}_share"] = value / _mean(getattr(cost, name) for cost in all_costs)
    return means | shares


def _parts(outcomes: Sequence[Graded], formula: str) -> dict[str, float]:
    scale = 1 if formula == "exact" else 2
    parts = {
        name: _mean(getattr(outcome.cost, name) for outcome in outcomes) / scale
        for name in ("vit", "vit_embed", "connector", "pruner", "llm")
    }
    if formula in ("fastv", "pdrop"):
        parts["llm"] = _mean(outcome.llm_flops[formula] for outcome in outcomes)
    return {**parts, "total": sum(parts.values())}


def _families(key: str, records: Sequence[Record]) -> dict[str, dict[str, float | None]]:
    families: dict[str, dict[str, float | None]] = {}
    several = len({record.task for record in records}) > 1
    for task, family in sorted({(record.task, record.family) for record in records if record.family}):
        chosen = [record for record in records if (record.task, record.family) == (task, family)]
        share = accuracy([record.outcomes[key].correct for record in chosen], [record.video for record in chosen])
        families[f"{task}: {family}" if several else family] = {
            "accuracy": share.value,
            "accuracy_low": share.low,
            "accuracy_high": share.high,
            "num_samples": share.num_samples,
        }
    return families
