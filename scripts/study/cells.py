"""Cells of the study's tables: what a finished comparison says of one method at one ratio, as text with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
from steps import Study

from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import BEFORE, DENSE, Row
from stts.metrics.accuracy import paired_difference

NOT_RUN = "not run"
Results = Mapping[str, ComparisonResult | None]
"""Step -> its comparison, None where it has not been run."""


def read_comparison(path: Path) -> ComparisonResult | None:
    return ComparisonResult.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def find_row(result: ComparisonResult | None, method: str, ratio: float = 1.0) -> Row | None:
    """`method` stands without its label ("our reconstruction")."""
    for row in result.rows if result else ():
        if (
            row.method != BEFORE
            and row.method.split(" (")[0] == method
            and abs(row.retention_configured - ratio) < 1e-6
        ):
            return row
    return None


def percent(row: Row | None) -> str:
    if row is None:
        return NOT_RUN
    if row.accuracy is None or row.accuracy_low is None or row.accuracy_high is None:
        return "-"
    return f"{100 * row.accuracy:.1f} [{100 * row.accuracy_low:.1f}, {100 * row.accuracy_high:.1f}]"


def spread(rows: Sequence[Row]) -> str:
    """Mean and range over seeds; of a single one, its interval."""
    if len(rows) < 2:
        return percent(rows[0]) if rows else NOT_RUN
    values = [100 * (row.accuracy or 0.0) for row in rows]
    return f"{fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def share_right(result: ComparisonResult | None, family: str) -> str:
    right = [record.outcomes[DENSE].correct for record in result.records if record.family == family] if result else []
    return f"{100 * fmean(right):.1f}" if right else NOT_RUN


def learned_rows(study: Study, results: Results, name: str, ratio: float) -> list[Row]:
    rows = [find_row(results[f"{name}-s{seed}"], "stts", ratio) for seed in study.scale.seeds]
    return [row for row in rows if row is not None and row.accuracy is not None]


def best_frozen(study: Study, results: Results, ratio: float) -> Row | None:
    """The row of the frozen pruner with the most right answers at this ratio."""
    rows = [find_row(results["frozen"], name, ratio) for name in study.scale.pruners]
    reached = [row for row in rows if row and row.accuracy is not None]
    return max(reached, key=lambda row: row.accuracy or 0.0, default=None)


def lead_over_frozen(study: Study, results: Results, ratio: float) -> str:
    """Mean over seeds of the paired difference, with the outermost ends of their intervals."""
    frozen = results["frozen"]
    best = best_frozen(study, results, ratio)
    if frozen is None or best is None:
        return NOT_RUN
    name = best.method.split(" (")[0]
    runs = [results[f"stts-elastic-s{seed}"] for seed in study.scale.seeds]
    return f"{paired_points(runs, f'stts@{ratio:g}', frozen, f'{name}@{ratio:g}')} ({name})"


def paired_points(
    runs: Sequence[ComparisonResult | None], cell: str, other: ComparisonResult | None, their_cell: str
) -> str:
    """In points, on the same questions: a run's `cell` minus `their_cell` of `other`. Mean over the runs, with the
    outermost ends of their intervals."""
    theirs = {record.uid: record.outcomes[their_cell].correct for record in other.records} if other else {}
    found = []
    for run in runs:
        records = [record for record in run.records if record.uid in theirs] if run else []
        if records:
            ours = [record.outcomes[cell].correct for record in records]
            rival = [theirs[record.uid] for record in records]
            found.append(paired_difference(ours, rival, [record.video for record in records]))
    if not found:
        return NOT_RUN
    value = f"{100 * fmean(one.value for one in found):+.1f}"
    ends = [(one.low, one.high) for one in found if one.low is not None and one.high is not None]
    if not ends:  # too few videos for an interval
        return f"{value} [-]"
    return f"{value} [{100 * min(low for low, _ in ends):+.1f}, {100 * max(high for _, high in ends):+.1f}]"


def by_families(runs: Sequence[ComparisonResult | None], cell: str) -> str:
    """Percent right of every family, in the order of their names; mean over the runs."""
    right: dict[str, list[bool]] = {}
    for record in (record for run in runs if run for record in run.records):
        outcome = record.outcomes.get(cell)
        if outcome is not None:
            right.setdefault(record.family, []).append(outcome.correct)
    if not right:
        return "-" if any(runs) else NOT_RUN
    return " / ".join(f"{100 * fmean(answers):.0f}" for _, answers in sorted(right.items()))


def flops_curves(study: Study, results: Results) -> dict[str, list[tuple[float, float]]]:
    """(share of the dense FLOPs, share right) over the ratios: the elastic STTS as the mean of its seeds, the rule that
    was fine-tuned likewise, every frozen pruner."""
    ratios = study.scale.ratios
    seeds = [flops_curve(results[f"stts-elastic-s{seed}"], "stts", ratios) for seed in study.scale.seeds]
    seeds = [curve for curve in seeds if curve]
    curves = {}
    if seeds:
        mean = [(fmean(p[0] for p in points), fmean(p[1] for p in points)) for points in zip(*seeds, strict=True)]
        curves["stts-elastic (learned)"] = mean
    curves[f"{study.rival} (a rule, likewise)"] = flops_curve(results[study.rival], "novelty", ratios)
    return curves | {name: flops_curve(results["frozen"], name, ratios) for name in study.scale.pruners}


def flops_curve(result: ComparisonResult | None, method: str, ratios: Sequence[float]) -> list[tuple[float, float]]:
    rows = [find_row(result, method, ratio) for ratio in ratios]
    return sorted((row.flops["exact"]["share"], row.accuracy) for row in rows if row and row.accuracy is not None)


def at_share(curve: Sequence[tuple[float, float]], share: float) -> str:
    if not curve:
        return NOT_RUN
    x, y = zip(*curve, strict=True)
    return f"{100 * float(np.interp(share, x, y)):.1f}" if x[0] <= share <= x[-1] else "-"


def only_row(result: ComparisonResult | None, method: str) -> Row | None:
    return next((row for row in result.rows if row.method == method), None) if result else None
