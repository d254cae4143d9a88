"""What a scaling run found: a row per point and method, and the rows as text and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from stts.eval.answering.cell import DENSE, Cell, Kind
from stts.eval.answering.loop import Answers
from stts.eval.results.grading import Record
from stts.eval.results.summary import make_row
from stts.metrics.accuracy import paired_difference

RESULT = "scaling.json"
FILES = (RESULT, "scaling.csv", "scaling.png")


@dataclass(frozen=True)
class ScaleRow:
    """One method at one point. Numbers are means per question, parts of a video added up; intervals are 95 %, clustered
    by video; everything is None where `reason` is not."""

    num_frames: int
    """That the model was shown, all parts together, at most."""
    num_looks: int
    """Parts of the video that were answered one by one."""
    method: str
    kind: Kind
    retention_configured: float
    reason: str | None = None
    retention_measured: float | None = None
    num_samples: int | None = None
    num_videos: int | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    difference: float | None = None
    """To dense at the first point, on the same questions; None for that itself, and where it was not run."""
    difference_low: float | None = None
    difference_high: float | None = None
    llm_tokens: float | None = None
    """Visual tokens that the first layer of the LLM sees."""
    tflops: float | None = None
    """Of tower, pruner, connector and LLM prefill of the visual tokens, by the formula `exact`."""
    tflops_vit: float | None = None
    seconds: float | None = None
    """Video to answer, decoding shared by the questions on one video; None where no batch was timed."""


def make_point(
    num_frames: int,
    looks: int,
    cells: Sequence[Cell],
    records: Sequence[Record],
    answers: Answers,
    reference: Mapping[str, bool] | None = None,
) -> list[ScaleRow]:
    """`records` by question, `answers` as they came, by part; `reference`: what dense got right at the first point, by
    `plain_key`; None: this is the first point."""
    rows = []
    for cell in cells:
        key = cell.key
        if cell.reason is not None:
            rows.append(
                ScaleRow(num_frames, looks, cell.title, cell.kind, cell.retention_configured, reason=cell.reason)
            )
            continue
        row = make_row(cell, records)
        right = {plain_key(record.uid): record.outcomes[key].correct for record in records}
        base = reference
        if reference is None and key != DENSE and records and DENSE in records[0].outcomes:
            base = right_of_dense(records)
        both = [record for record in records if base and plain_key(record.uid) in base]
        change = None
        if base and both:
            names = [plain_key(record.uid) for record in both]
            change = paired_difference(
                [right[name] for name in names], [base[name] for name in names], [record.video for record in both]
            )
        phases = answers.ms.get(key, {})
        timed = [statistics.fmean(phases[name]) for name in ("video", "preprocess", "generate") if phases.get(name)]
        rows.append(
            ScaleRow(
                num_frames=num_frames,
                num_looks=looks,
                method=cell.title,
                kind=cell.kind,
                retention_configured=cell.retention_configured,
                retention_measured=row.retention_measured,
                num_samples=row.num_samples,
                num_videos=row.num_videos,
                accuracy=row.accuracy,
                accuracy_low=row.accuracy_low,
                accuracy_high=row.accuracy_high,
                difference=change.value if change else None,
                difference_low=change.low if change else None,
                difference_high=change.high if change else None,
                llm_tokens=statistics.fmean(record.outcomes[key].num_kept for record in records),
                tflops=row.flops["exact"]["total"] / 1e12,
                tflops_vit=row.flops["exact"]["vit"] / 1e12,
                seconds=looks * sum(timed) / 1000 if timed else None,
            )
        )
    return rows


def plain_key(key: str) -> str:
    """The question of a point's key."""
    return key.partition("/")[2]


def right_of_dense(records: Sequence[Record]) -> dict[str, bool]:
    """What dense got right, by `plain_key`; empty where it was not run."""
    return {plain_key(record.uid): record.outcomes[DENSE].correct for record in records if DENSE in record.outcomes}


@dataclass(frozen=True)
class ScaleResult:
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    rows: tuple[ScaleRow, ...]
    notes: tuple[str, ...] = ()
    """What a reader must know, about the run and about the tasks' files."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, made: Mapping[str, Any]) -> Self:
        rows = tuple(ScaleRow(**row) for row in made["rows"])
        return cls(made["config"], made["environment"], rows, tuple(made["notes"]))


def render_csv(result: ScaleResult) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [item.name for item in fields(ScaleRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in result.rows)
    return text.getvalue()


def title_of(result: ScaleResult) -> str:
    first = next((row for row in result.rows if row.num_samples), None)
    asked = f": {first.num_samples} questions on {first.num_videos} videos" if first else ""
    return f"{result.config['name']}{asked}, mode {result.config['mode']}"


def render_text(result: ScaleResult) -> str:
    """The table for a terminal: a block per number of frames."""
    size, unit = flops_unit(result.rows)
    head = ["frames", "method", "kept", "tokens", "accuracy %", "vs first dense", unit, "ViT", "s/question"]
    body = [_line(row, size) for row in result.rows]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]

    def aligned(line: Sequence[str]) -> str:
        return "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    lines, before = [title_of(result), "", aligned(head)], 0
    for row, line in zip(result.rows, body, strict=True):
        lines += [rule] * (row.num_frames != before) + [aligned(line)]
        before = row.num_frames
    left_out = dict.fromkeys(f"{row.method} {row.num_frames} frames: {row.reason}" for row in result.rows if row.reason)
    return "\n".join([*lines, "", *result.notes, *left_out])


def notes_on(config: Mapping[str, Any], where: Mapping[str, Any], rows: Sequence[ScaleRow]) -> list[str]:
    """What a reader of the rows must know."""
    first = f"{rows[0].num_frames} frames" if rows else "the first point"
    notes = [
        f"vs first dense: paired with dense at {first} on the same questions, in points; intervals are 95 %, clustered "
        "by video.",
        "tokens: visual tokens at the first layer of the LLM. FLOPs: formula `exact`, tower, "
        "pruner, connector and LLM prefill of visual tokens; equal tokens are not equal FLOPs, the tower sees every "
        "frame.",
        f"s/question: decoding to answer; {where['device']}, {where['dtype']}, batches of {config['batch_size']}.",
        "A prompt longer than the context of the LLM is never cut: "
        + ("the run stops before it starts." if config["on_overflow"] == "raise" else "that method is left out."),
    ]
    if config["mode"] in ("parallel", "packed"):
        notes.append(f"Parts are put together by {config['vote']}; costs and tokens of a question are sums over them.")
    if config["chunk_frames"]:
        notes.append(
            f"The tower ran on {config['chunk_frames']} frames at a time; the blocks before the choice of a learned "
            "pruner ran twice, which the FLOPs leave out."
        )
    return notes


def flops_unit(rows: Sequence[ScaleRow]) -> tuple[float, str]:
    """How many of the unit that suits the largest make a TFLOP, and its name."""
    largest = max((row.tflops or 0 for row in rows), default=0)
    sizes = ((1, "TFLOPs"), (1e3, "GFLOPs"), (1e6, "MFLOPs"))
    return next(((size, name) for size, name in sizes if largest * size >= 1), (1e12, "FLOPs"))


def _line(row: ScaleRow, size: float) -> list[str]:
    frames = str(row.num_frames) if row.num_looks == 1 else f"{row.num_looks} x {row.num_frames // row.num_looks}"
    kept = "1" if row.kind == "unpruned" else f"{row.retention_configured:.3g}"
    if row.reason is not None or row.accuracy is None:
        return [frames, row.method, kept, *["-"] * 6]
    change = "-"
    if row.difference is not None:
        change = (
            f"{100 * row.difference:+.1f} [{100 * (row.difference_low or 0):+.1f}, "
            f"{100 * (row.difference_high or 0):+.1f}]"
        )
    return [
        frames,
        row.method,
        kept,
        f"{row.llm_tokens:.0f}",
        f"{100 * row.accuracy:.1f} [{100 * (row.accuracy_low or 0):.1f}, {100 * (row.accuracy_high or 0):.1f}]",
        change,
        f"{(row.tflops or 0) * size:.3g}",
        f"{(row.tflops_vit or 0) * size:.3g}",
        "-" if row.seconds is None else f"{row.seconds:.3g}",
    ]
