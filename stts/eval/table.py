"""What a comparison found: per-sample outcomes, the rows made of them, and the rows as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, Self

import numpy as np

from stts.metrics.accuracy import accuracy, paired_difference
from stts.metrics.cost import VideoCost

DENSE = "dense"
BEFORE = "dense (before fine-tuning)"
Kind = Literal["unpruned", "learned", "in the ViT", "before the LLM", "inside the LLM"]
"""Where a method drops tokens, the deepest place if there are several; "learned" wherever it is."""


@dataclass(frozen=True)
class Cell:
    """One method at one ratio."""

    method: str
    retention_configured: float = 1.0
    reason: str | None = None
    """Why it could not be run; None: it was."""
    kind: Kind = "unpruned"
    label: str = ""
    """What a reader must know wherever the name stands ("our reconstruction")."""

    @property
    def title(self) -> str:
        return f"{self.method} ({self.label})" if self.label else self.method

    @property
    def key(self) -> str:
        return self.method if self.method in (DENSE, BEFORE) else f"{self.method}@{self.retention_configured:g}"


@dataclass(frozen=True)
class Outcome:
    """One method on one sample."""

    prediction: str
    parsed: str | None
    correct: bool
    num_frames: int
    num_groups: int
    """Visual tokens of the video before pruning."""
    num_kept: int
    """Visual tokens that the first layer of the LLM sees."""
    retention: float
    """Equivalent retention: visual tokens present, meaned over the layers of the LLM, / num_groups."""
    cost: VideoCost


@dataclass(frozen=True)
class Record:
    uid: str
    video: str
    family: str
    answer: str
    outcomes: Mapping[str, Outcome]
    """By `Cell.key`."""
    question: str = ""
    """What the user asked last, without media markers."""

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        made = {
            key: Outcome(**{**outcome, "cost": VideoCost(**outcome["cost"])})
            for key, outcome in row["outcomes"].items()
        }
        return cls(**{**row, "outcomes": made})


@dataclass(frozen=True)
class Row:
    """A line of the table. FLOPs are means per video; intervals are 95 %; everything is None where `reason` is not."""

    method: str
    """With its label."""
    kind: Kind
    retention_configured: float
    reason: str | None = None
    retention_measured: float | None = None
    """Equivalent retention, mean over samples."""
    retention_p5: float | None = None
    retention_p95: float | None = None
    retention_at_entry: float | None = None
    """Share of visual tokens that the first layer of the LLM sees: more than measured where a method cuts inside."""
    kept_per_frame: float | None = None
    """Equivalent tokens."""
    num_samples: int | None = None
    num_videos: int | None = None
    num_unparsed: int | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    difference: float | None = None
    """To dense on the same samples; None for dense itself."""
    difference_low: float | None = None
    difference_high: float | None = None
    flops_vit: float | None = None
    flops_vit_embed: float | None = None
    flops_connector: float | None = None
    flops_pruner: float | None = None
    flops_llm: float | None = None
    flops_total: float | None = None
    flops_share: float | None = None
    """Total over the total of dense."""
    ms_per_sample: float | None = None
    """Median over timed batches; None when there was none."""
    num_timed_batches: int = 0
    signals: Mapping[str, str] = field(default_factory=dict)
    """Signal the method asked for -> what it was made from."""
    families: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class ComparisonResult:
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    cells: tuple[Cell, ...]
    records: tuple[Record, ...]
    skipped: tuple[Mapping[str, str], ...]
    """`uid` and `reason` of every sample whose video could not be read."""
    batch_ms: Mapping[str, tuple[float, ...]]
    """By `Cell.key`: milliseconds per sample of every timed batch."""
    signals: Mapping[str, Mapping[str, str]]
    """By `Cell.key`: see `Row`."""

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(
            _row(cell, self.records, self.batch_ms.get(cell.key, ()), self.signals.get(cell.key, {}))
            for cell in self.cells
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_json(cls, made: Mapping[str, Any]) -> Self:
        return cls(
            config=made["config"],
            environment=made["environment"],
            cells=tuple(Cell(**cell) for cell in made["cells"]),
            records=tuple(Record.from_json(row) for row in made["records"]),
            skipped=tuple(made["skipped"]),
            batch_ms={key: tuple(values) for key, values in made["batch_ms"].items()},
            signals=made["signals"],
        )


def _row(cell: Cell, records: Sequence[Record], batch_ms: Sequence[float], signals: Mapping[str, str]) -> Row:
    if cell.reason is not None:
        return Row(cell.title, cell.kind, cell.retention_configured, cell.reason)
    outcomes = [record.outcomes[cell.key] for record in records]
    dense = [record.outcomes[DENSE] for record in records]
    videos = [record.video for record in records]
    correct = [outcome.correct for outcome in outcomes]
    share = accuracy(correct, videos)
    change = (
        paired_difference(correct, [outcome.correct for outcome in dense], videos) if cell.method != DENSE else None
    )

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    total = mean([outcome.cost.total for outcome in outcomes])
    low, high = np.percentile([outcome.retention for outcome in outcomes], [5, 95]).tolist()
    return Row(
        method=cell.title,
        kind=cell.kind,
        retention_configured=cell.retention_configured,
        retention_measured=mean([outcome.retention for outcome in outcomes]),
        retention_p5=low,
        retention_p95=high,
        retention_at_entry=mean([outcome.num_kept / outcome.num_groups for outcome in outcomes]),
        kept_per_frame=mean([outcome.retention * outcome.num_groups / outcome.num_frames for outcome in outcomes]),
        num_samples=share.num_samples,
        num_videos=share.num_videos,
        num_unparsed=sum(outcome.parsed is None for outcome in outcomes),
        accuracy=share.value,
        accuracy_low=share.low,
        accuracy_high=share.high,
        difference=change.value if change else None,
        difference_low=change.low if change else None,
        difference_high=change.high if change else None,
        flops_vit=mean([outcome.cost.vit for outcome in outcomes]),
        flops_vit_embed=mean([outcome.cost.vit_embed for outcome in outcomes]),
        flops_connector=mean([outcome.cost.connector for outcome in outcomes]),
        flops_pruner=mean([outcome.cost.pruner for outcome in outcomes]),
        flops_llm=mean([outcome.cost.llm for outcome in outcomes]),
        flops_total=total,
        flops_share=total / mean([outcome.cost.total for outcome in dense]),
        ms_per_sample=statistics.median(batch_ms) if batch_ms else None,
        num_timed_batches=len(batch_ms),
        signals=signals,
        families=_families(cell.key, records),
    )


def _families(key: str, records: Sequence[Record]) -> dict[str, dict[str, float]]:
    found = {}
    for family in sorted({record.family for record in records if record.family}):
        chosen = [record for record in records if record.family == family]
        share = accuracy([record.outcomes[key].correct for record in chosen], [record.video for record in chosen])
        found[family] = {
            "accuracy": share.value,
            "accuracy_low": share.low,
            "accuracy_high": share.high,
            "num_samples": share.num_samples,
        }
    return found


def render_text(result: ComparisonResult) -> str:
    """The table for a terminal, a block per ratio, with what it rests on above and below."""
    head, body = _cells_of(result)
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in [head, *body]]
    rule = "-" * max(len(line.rstrip()) for line in lines)
    shown = [title_of(result), "", lines[0], rule]
    blocks = [list(block) for _, block in groupby(zip(body, lines[1:], strict=True), key=lambda pair: pair[0][1])]
    for place, block in enumerate(blocks):
        shown += [rule] * (place > 0 and len(blocks) > 2) + [line for _, line in block]  # the first block is dense
    return "\n".join(line.rstrip() for line in [*shown, "", *notes_on(result)])


def render_markdown(result: ComparisonResult) -> str:
    """The same table for a README."""
    head, body = _cells_of(result)
    lines = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]]
    return "\n".join([title_of(result), "", *lines, "", *(f"* {note}" for note in notes_on(result))]) + "\n"


def render_csv(result: ComparisonResult) -> str:
    """One line per row, unrounded, without the families (those are in the JSON)."""
    names = [item.name for item in fields(Row) if item.name != "families"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in result.rows:
        line = {name: getattr(row, name) for name in names}
        line["signals"] = "; ".join(f"{signal}: {source}" for signal, source in row.signals.items())
        writer.writerow(line.values())
    return text.getvalue()


def title_of(result: ComparisonResult) -> str:
    """What was asked, in a line."""
    first = next(row for row in result.rows if row.method == DENSE)
    config = result.config
    return (
        f"{config['name']}: {first.num_samples} questions on {first.num_videos} videos, {config['num_frames']} frames "
        f"({config['sampler']})"
    )


def _cells_of(result: ComparisonResult) -> tuple[list[str], list[list[str]]]:
    largest = max(row.flops_total or 0 for row in result.rows)
    size, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if largest >= s), (1.0, ""))
    head = ["method", "kept", "measured", "tokens/frame", "accuracy %", "vs dense"]
    head += [f"{unit}FLOPs: ViT", "LLM", "pruner", "total", "of dense", "ms/sample"]
    body = []
    for row in result.rows:
        line = [row.method, f"{row.retention_configured:g}"]
        if row.reason is not None:
            body.append(line + ["-"] * (len(head) - len(line)))
            continue
        assert row.accuracy is not None and row.flops_vit is not None and row.flops_share is not None
        line += [f"{row.retention_measured:.3f}", f"{row.kept_per_frame:.3g}"]
        line += [_interval(row.accuracy, row.accuracy_low, row.accuracy_high, "")]
        line += [_interval(row.difference, row.difference_low, row.difference_high, "+")]
        parts = (row.flops_vit, row.flops_llm, row.flops_pruner, row.flops_total)
        line += [
            f"{(part or 0) / size:.3g}" if (part or 0) < 1000 * size else f"{(part or 0) / size:.0f}" for part in parts
        ]
        line += [f"{100 * row.flops_share:.1f} %", "-" if row.ms_per_sample is None else f"{row.ms_per_sample:.1f}"]
        body.append(line)
    return head, body


def _interval(value: float | None, low: float | None, high: float | None, sign: str) -> str:
    if value is None or low is None or high is None:
        return "-"
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def notes_on(result: ComparisonResult) -> list[str]:
    """What the numbers rest on, a line each."""
    timed = max((row.num_timed_batches for row in result.rows), default=0)
    where = f"{result.environment['device']}, {result.environment['dtype']}"
    positions = result.config["positions"] or "as each pruner declares"
    notes = [
        f"Positions of surviving tokens: {positions}.",
        "95 % intervals, clustered by video; vs dense is paired, in points.",
        "FLOPs: formula `exact` (2 per multiply-add), mean per video, text tokens not counted; total adds patch "
        "embedding and connector.",
        f"ms/sample: generate, median of {timed} full batches of {result.config['batch_size']} after one to warm up; "
        f"{where}."
        if timed
        else "ms/sample: no full batch after the one to warm up, so nothing was timed.",
        *_notes_on_counts(result),
        *_notes_on_methods(result),
    ]
    unparsed = sorted((row for row in result.rows if row.num_unparsed), key=lambda row: -(row.num_unparsed or 0))
    if unparsed:
        most = _five([f"{row.method} {row.retention_configured:g}: {row.num_unparsed}" for row in unparsed])
        notes.append(f"Answers that could not be parsed (counted as wrong): {most}.")
    if result.skipped:
        names = ", ".join(item["uid"] for item in result.skipped[:5]) + (", ..." if len(result.skipped) > 5 else "")
        notes.append(f"Skipped, video not readable: {len(result.skipped)} ({names}); reasons in comparison.json.")
    refused: dict[tuple[float, str], list[str]] = {}
    for row in result.rows:
        if row.reason is not None:
            refused.setdefault((row.retention_configured, row.reason), []).append(row.method)
    notes += [f"Not run at {ratio:g}: {_names(names)}: {reason}" for (ratio, reason), names in refused.items()]
    return notes


def _notes_on_counts(result: ComparisonResult) -> list[str]:
    run = [row for row in result.rows if row.retention_measured is not None]
    notes = []
    inside = [row.method for row in run if (row.retention_at_entry or 0) - (row.retention_measured or 0) > 1e-9]
    if inside:
        notes.append(
            "measured and tokens/frame are means over the LLM's layers (equivalent retention): "
            f"{_names(inside)} drop tokens inside the LLM, whose first layers see more."
        )
    if not result.config["exact"]:
        notes.append("Counts are each release's own (--exact false): budgets are not equal, compare at `measured`.")
        varying = [row for row in run if f"{row.retention_p5:.3f}" != f"{row.retention_p95:.3f}"]
        varying.sort(key=lambda row: (row.retention_p5 or 0) - (row.retention_p95 or 0))
        if varying:
            ranges = [
                f"{row.method} {row.retention_configured:g}: {row.retention_p5:.3f} to {row.retention_p95:.3f}"
                for row in varying
            ]
            notes.append(f"measured varies by video (5th to 95th percentile): {_five(ranges)}.")
    return notes


def _notes_on_methods(result: ComparisonResult) -> list[str]:
    """Options that were set, and what signals were made from: one line per signal and source."""
    notes = []
    options = [
        f"{name} {', '.join(f'{key}={value}' for key, value in given.items())}"
        for name, given in result.config["pruner_options"].items()
    ]
    if options:
        notes.append(f"Options: {'; '.join(options)}.")
    users: dict[tuple[str, str], list[str]] = {}
    for row in result.rows:
        for signal in row.signals.items():
            users.setdefault(signal, []).append(row.method)
    notes += [f"Signal {signal} of {_names(methods)}: {source}." for (signal, source), methods in users.items()]
    return notes


def _names(methods: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(methods))


def _five(texts: Sequence[str]) -> str:
    rest = f", and {len(texts) - 5} more rows in comparison.csv" if len(texts) > 5 else ""
    return ", ".join(texts[:5]) + rest
