"""What a comparison found: per-sample outcomes, the rows made of them, and the rows as text, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from dataclasses import fields
from itertools import groupby

from stts.eval.answering.cell import BEFORE, DENSE, Cell, Kind
from stts.eval.results.footnotes import interval, notes_on, title_of
from stts.eval.results.grading import Graded, Record, TaskScore
from stts.eval.results.result import ComparisonResult
from stts.eval.results.summary import PHASES, Row

__all__ = [
    "BEFORE", "DENSE", "Cell", "ComparisonResult", "Graded", "Kind", "Record", "Row", "TaskScore", "notes_on",
    "render_csv", "render_markdown", "render_text", "title_of",
]  # fmt: skip


_JUDGED = ("evidence", "distractors")
Lines = tuple[list[str], list[list[str]]]
"""Head and body of a table."""


def render_text(result: ComparisonResult, *, wide: bool = False) -> str:
    """The table for a terminal, a block per ratio, with what it rests on above and below.

    wide: with tokens, FLOPs by part, every task, and times by phase; else at most 100 columns."""
    head, body = _cells_of(result) if wide else _narrow(*_cells_of(result))
    lines = aligned(head, body)
    rule = "-" * max(map(len, lines))
    shown = [title_of(result), "", lines[0], rule]
    budgets = [
        row.num_frames if result.has_points else row.equal_flops_to or row.retention_configured for row in result.rows
    ]
    blocks = [list(block) for _, block in groupby(zip(budgets, lines[1:], strict=True), key=lambda pair: pair[0])]
    for place, block in enumerate(blocks):
        shown += [rule] * (place > 0 and len(blocks) > 2) + [line for _, line in block]  # the first block is dense
    for further in (_times_of(result), _decode_of(result)) if wide else ():
        if further is not None:
            lines = aligned(*further)
            shown += ["", lines[0], "-" * max(map(len, lines)), *lines[1:]]
    more = [] if wide else ["Tokens, FLOPs by part, tasks and times by phase: --wide true, or comparison.md."]
    return "\n".join([*shown, "", *notes_on(result), *more])


def _narrow(head: list[str], body: list[list[str]]) -> Lines:
    """The columns that fit a terminal."""
    same = ("method", "frames", "equal", "kept", "measured", "accuracy %", "vs dense", "vs first dense", "mean %")
    titles = {**dict.fromkeys(same), "retained": None, "of dense": "FLOPs", "ms/sample": "ms"}
    places = [place for place, name in enumerate(head) if name in titles]
    short = {"dense (before fine-tuning)": "dense, before tuning"}
    lines = [[short.get(line[place], line[place]) for place in places] for line in body]
    return [titles[head[place]] or head[place] for place in places], lines


def aligned(head: list[str], body: list[list[str]]) -> list[str]:
    """Lines of a table whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in [head, *body]
    ]


def render_markdown(result: ComparisonResult) -> str:
    """The same tables for a README, and FLOPs in every convention."""
    text = [title_of(result), "", *_markdown(*_cells_of(result)), "", *(f"* {note}" for note in notes_on(result))]
    if times := _times_of(result):
        text += ["", "Milliseconds per sample and memory:", "", *_markdown(*times)]
    if decode := _decode_of(result):
        text += [
            "",
            "While an answer is decoded, per video and new token, and what stays in memory:",
            "",
            *_markdown(*decode),
        ]
    text += ["", "FLOPs per video in every convention of the field:", "", *_markdown(*_flops_of(result))]
    return "\n".join(text) + "\n"


def _markdown(head: list[str], body: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]]


def render_csv(result: ComparisonResult) -> str:
    """One line per row, unrounded, without the families (those are in the JSON).

    Tasks, suites, phases and formulas have columns of their own: `task/NAME`, `suite/NAME`, `ms/PHASE`,
    `flops/FORMULA/PART`, `decode/PART`."""
    nested = ("families", "tasks", "suites", "flops", "decode", "time_ms")
    names = [item.name for item in fields(Row) if item.name not in nested]
    further = list(dict.fromkeys(name for row in result.rows for name in _further(row)))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, *further])
    for row in result.rows:
        line = {name: getattr(row, name) for name in names}
        line["signals"] = "; ".join(f"{signal}: {source}" for signal, source in row.signals.items())
        writer.writerow([*line.values(), *map(_further(row).get, further)])
    return text.getvalue()


def _further(row: Row) -> dict[str, float | None]:
    return {
        **{f"task/{name}": task["headline"] for name, task in row.tasks.items()},
        **{f"suite/{name}": score for name, score in row.suites.items()},
        **{f"ms/{name}": value for name, value in row.time_ms.items()},
        **{f"decode/{part}": n for part, n in row.decode.items()},
        **{f"flops/{formula}/{part}": n for formula, parts in row.flops.items() for part, n in parts.items()},
    }


def _cells_of(result: ComparisonResult) -> Lines:
    size, unit = _unit(result)
    tasks, suites = result.tasks, list(dict.fromkeys(name for row in result.rows for name in row.suites))
    matched, several = any(row.equal_flops_to for row in result.rows), len(tasks) > 1
    known = result.scores.get(DENSE, {})
    # A task that is known by another number than its micro accuracy shows that one too.
    shown = [
        task for task in tasks if several or (task in known and known[task].headline != known[task].metrics["acc"])
    ]
    head = [*_head_of(result, "method"), *(["equal"] if matched else []), "measured", "tokens/frame"]
    head += ["tokens"] if result.has_points else []
    judged = [name for name in _JUDGED if any(getattr(row, f"{name}_kept") is not None for row in result.rows)]
    head += [f"{name} %" for name in judged]
    head += [f"{task} %" for task in shown] + (
        [*(f"{suite} %" for suite in suites), "mean %", "retained"] if several else []
    )
    head += ["accuracy %", "vs first dense" if result.has_points else "vs dense"]
    head += [f"{unit}FLOPs: ViT", "LLM", "pruner", "total", "of dense", "ms/sample"]
    body = []
    for row in result.rows:
        line = _name_of(result, row)
        if matched:
            line.append(f"FLOPs, {row.equal_flops_to}" if row.equal_flops_to else "tokens")
        if row.reason is not None:
            body.append(line + ["-"] * (len(head) - len(line)))
            continue
        flops = row.flops["exact"]
        line += [f"{row.retention_measured:.3f}", f"{row.kept_per_frame:.3g}"]
        line += [f"{row.tokens:.0f}"] if result.has_points else []
        line += [_percent(getattr(row, f"{name}_kept")) for name in judged]
        line += [_percent(row.tasks[task]["headline"] if task in row.tasks else None) for task in shown]
        if several:
            line += [*(_percent(row.suites.get(suite)) for suite in suites), _percent(row.mean), _percent(row.retained)]
        line += [interval(row.accuracy, row.accuracy_low, row.accuracy_high, "")]
        line += [interval(row.difference, row.difference_low, row.difference_high, "+")]
        line += [_scaled(flops[part], size) for part in ("vit", "llm", "pruner", "total")]
        line += [f"{100 * flops['share']:.1f} %", "-" if row.ms_per_sample is None else f"{row.ms_per_sample:.1f}"]
        body.append(line)
    return head, body


def _head_of(result: ComparisonResult, method: str) -> list[str]:
    return [method, *(["frames"] if result.has_points else []), "kept"]


def _name_of(result: ComparisonResult, row: Row) -> list[str]:
    """What tells a row from the others."""
    frames = f"{row.parts} x {(row.num_frames or 0) // row.parts}" if row.parts > 1 else str(row.num_frames)
    return [row.method, *([frames] if result.has_points else []), f"{row.retention_configured:.4g}"]


def _times_of(result: ComparisonResult) -> Lines | None:
    """None where no phase was timed and no memory measured."""
    phases = [phase for phase in PHASES if any(phase in row.time_ms for row in result.rows)]
    measured = any(row.peak_gib is not None for row in result.rows)
    if not phases and not measured:
        return None
    head = [*_head_of(result, "ms/sample"), *phases, *(["peak GiB", "without weights"] if measured else [])]
    body = []
    for row in result.rows:
        line = _name_of(result, row)
        line += [f"{row.time_ms[phase]:.1f}" if phase in row.time_ms else "-" for phase in phases]
        if measured:
            own = None if row.peak_gib is None or result.weights_gib is None else row.peak_gib - result.weights_gib
            line += ["-" if value is None else f"{value:.2f}" for value in (row.peak_gib, own)]
        body.append(line)
    return head, body


def _decode_of(result: ComparisonResult) -> Lines | None:
    """None for files that do not tell."""
    if not any(row.decode for row in result.rows):
        return None
    head = [*_head_of(result, "decoding"), "attention, MFLOPs", "of dense", "cache, MiB", "of dense"]
    body = []
    for row in result.rows:
        line = _name_of(result, row)
        for name, part, size in (("flops", "flops_share", 1e6), ("cache_bytes", "cache_share", 2**20)):
            share = f"{100 * row.decode[part]:.1f} %" if part in row.decode else "-"
            line += [_scaled(row.decode[name], size), share] if name in row.decode else ["-", "-"]
        body.append(line)
    return head, body


def _flops_of(result: ComparisonResult) -> Lines:
    size, unit = _unit(result)
    formulas = list(dict.fromkeys(formula for row in result.rows for formula in row.flops))
    head = [*_head_of(result, "method"), f"ViT ({unit}, exact)", "patches", "connector", "pruner"]
    head += [text for formula in formulas for text in (f"LLM `{formula}`", f"total `{formula}`", "of dense")]
    body = []
    for row in result.rows:
        line = _name_of(result, row)
        if not row.flops:
            body.append(line + ["-"] * (len(head) - len(line)))
            continue
        line += [_scaled(row.flops["exact"][part], size) for part in ("vit", "vit_embed", "connector", "pruner")]
        for formula in formulas:
            parts = row.flops.get(formula)
            line += ["-"] * 3 if parts is None else [
                _scaled(parts["llm"], size), _scaled(parts["total"], size),
                f"{100 * parts['share']:.1f} %" if "share" in parts else "-",
            ]  # fmt: skip
        body.append(line)
    return head, body


def _unit(result: ComparisonResult) -> tuple[float, str]:
    largest = max(row.flops["exact"]["total"] for row in result.rows if row.flops)
    return next(((s, u) for s, u in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if largest >= s), (1.0, ""))


def _scaled(value: float | None, size: float) -> str:
    scaled = (value or 0) / size
    return f"{scaled:.3g}" if scaled < 1000 else f"{scaled:.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
