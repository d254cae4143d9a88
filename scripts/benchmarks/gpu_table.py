"""Cells of `benchmarks/gpu.py` beside their dense rival, as rows and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gpu_models import QWEN3
from measure import table

DENSE, OOM = "dense", "out of memory"
BROKEN = "broke the device"
"""Of a cell after which nothing runs on the GPU any more in the same process."""
TITLES = {
    "inference": "Inference: prefill and {new_tokens} tokens, {model}",
    "training": "Training step, {model}",
    "pruners": "Pruners: {pruner_frames} frames, {pruners_model}",
}


def derive(cells: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every cell with its ratios to dense, the FLOPs ceiling, and its share of that; None where one side failed."""
    rivals = {(cell["part"], cell["frames"]): cell for cell in cells.values() if cell["way"] == DENSE}
    return [dict(cell) | _beside(cell, rivals.get((cell["part"], cell["frames"]), {})) for cell in cells.values()]


def _beside(cell: Mapping[str, Any], rival: Mapping[str, Any]) -> dict[str, Any]:
    def over(name: str) -> float | None:
        return rival[name] / cell[name] if rival.get(name) and cell.get(name) else None

    ceiling = None
    if "flops" in cell and "flops" in rival:
        ceiling = sum(rival["flops"].values()) / sum(cell["flops"].values())
    row = {"ratio": over("total_ms"), "ttft_ratio": over("ttft_ms"), "ceiling": ceiling}
    gained = row["ratio"] if cell["part"] == "training" else row["ttft_ratio"]
    row["share"] = gained / ceiling if gained and ceiling else None
    prefill = rival.get("prefill_ms")
    row["choice_of_dense_prefill"] = cell["choice_ms"] / prefill if prefill and "choice_ms" in cell else None
    return row


def report(rows: Sequence[Mapping[str, Any]], setting: Mapping[str, Any], optimizer: str) -> str:
    """A table per part, and what the numbers depend on."""
    lines = []
    for part, title in TITLES.items():
        mine = sorted((row for row in rows if row["part"] == part), key=_order)
        if mine:
            suffix = f"; {optimizer}" if part == "training" and optimizer else ""
            lines += [title.format(**setting) + suffix, "", _table(part, mine), ""]
    failed = [row for row in rows if row.get("failed", OOM) != OOM]
    lines += [f"{row['part']}, {row['way']}: {row['message']}" for row in failed]
    lines.append(
        f"{setting['device']}, {setting['dtype']}, attention {setting['attention']}, packed rows "
        f"{setting['packed_kernel']}, torch {setting['torch']}, transformers {setting['transformers']}; medians of "
        f"{setting['repeats']}. release: the scheme of the STTS release; stts: ours."
    )
    if setting["model"] == QWEN3:
        lines.append("Qwen3-VL-4B stands in for Molmo2-4B: other widths and frames of 84.5 tokens, see gpu_models.py.")
    if setting["tiny"]:
        lines.append("Tiny models: times mean nothing, only that every path runs.")
    return "\n".join(lines)


def _order(row: Mapping[str, Any]) -> tuple[int, float]:
    return row["frames"], -row["retention_ratio"]


COLUMNS: dict[str, list[tuple[str, str, str]]] = {
    "training": [
        ("ms", "total_ms", ".1f"), ("spread", "spread", ".0%"), ("ratio", "ratio", ".2fx"),
        ("ceiling", "ceiling", ".2fx"), ("share", "share", ".2f"), ("peak GiB", "peak_alloc_gib", ".1f"),
    ],
    "inference": [
        ("ms", "total_ms", ".1f"), ("spread", "spread", ".0%"), ("ratio", "ratio", ".2fx"),
        ("TTFT ms", "ttft_ms", ".1f"), ("ratio", "ttft_ratio", ".2fx"), ("ceiling", "ceiling", ".2fx"),
        ("share", "share", ".2f"), ("vit ms", "vit_ms", ".1f"), ("prune ms", "prune_ms", ".1f"),
        ("connect ms", "connect_ms", ".1f"), ("prefill ms", "prefill_ms", ".1f"),
        ("tok/s", "decode_tokens_per_s", ".1f"), ("peak GiB", "peak_alloc_gib", ".1f"),
    ],
}  # fmt: skip
COLUMNS["pruners"] = [
    *COLUMNS["inference"][2:],
    ("choice ms", "choice_ms", ".2f"),
    ("of prefill", "choice_of_dense_prefill", ".1%"),
]
"""Heading, name, format; a final x is printed."""


def _table(part: str, rows: Sequence[Mapping[str, Any]]) -> str:
    columns = COLUMNS[part]
    lines = [["way", "frames", "kept", *(heading for heading, _, _ in columns)]]
    if part == "pruners":
        lines[0].append("calls")
    for row in rows:
        line = [row["way"], str(row["frames"]), f"{row['retention_ratio']:g}"]
        line += [_shown(row.get(name), form) for _, name, form in columns]
        if "failed" in row:
            line[3] = OOM if row["failed"] == OOM else "failed"
        lines.append([*line, str(sum(row["calls"].values())) if "calls" in row else "-"] if part == "pruners" else line)
    return table(lines, 1)


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form.rstrip("x")) + "x" * form.endswith("x")
