"""A comparison that nobody ran, for tests of what is made of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import BEFORE, DENSE, Cell, Graded, Kind, Record
from stts.metrics.cost import VideoCost

METHODS: dict[Kind, tuple[str, ...]] = {
    "learned": ("stts",),
    "in the ViT": ("random-vit", "easy", "heuristic"),
    "before the LLM": (
        "random",
        "uniform",
        "novelty",
        "visionzip",
        "fastvid",
        "holitom",
        "stop-visionzip",
        "stop-fastvid",
        "stop-holitom",
        "tango",
        "vidcom2",
    ),
    "inside the LLM": ("holitom+inner", "tango+inner", "adatp", "fastv", "dart", "mine:Mine"),
}
FULL = [
    Cell(BEFORE),
    Cell(DENSE),
    Cell("stts", 0.5, kind="learned"),
    Cell("random", 0.5, kind="before the LLM"),
    Cell("fastv", 0.1, "too low for layer 2", "inside the LLM"),
]


def zoo(ratios: tuple[float, ...]) -> list[Cell]:
    """Dense and 21 methods."""
    pruned = [Cell(name, ratio, None, kind) for ratio in ratios for kind, names in METHODS.items() for name in names]
    return [Cell(DENSE), *pruned]


def result_with(
    cells: list[Cell],
    *,
    skipped: int = 0,
    config: Mapping[str, Any] | None = None,
    signals: Mapping[str, Mapping[str, str]] | None = None,
) -> ComparisonResult:
    """Twelve questions on four videos; the n-th cell gets the last n answers wrong.

    Methods inside the LLM keep all 64 tokens in its first layers; with `exact` false the retention of the n-th question
    is n thousandths off."""
    settings = {
        "name": "made up",
        "num_frames": 4,
        "sampler": "interior",
        "batch_size": 3,
        "positions": None,
        "exact": True,
        "pruner_options": {},
        **(config or {}),
    }
    records = []
    for number in range(12):
        outcomes = {}
        for place, cell in enumerate(cells):
            if cell.reason is None:
                kept = 64 if cell.kind == "inside the LLM" else int(64 * cell.retention_configured)
                retention = cell.retention_configured + (0 if settings["exact"] else number / 1000)
                cost = VideoCost(10**12, 0, 0, 0, int(10**12 * cell.retention_configured))
                outcomes[cell.key] = Graded("x", 4, 64, kept, retention, cost, parsed="x", correct=number < 12 - place)
        records.append(Record(f"q{number}", f"v{number // 3}.mp4", "", "x", outcomes))
    return ComparisonResult(
        settings,
        {"device": "CPU", "dtype": "float32"},
        tuple(cells),
        tuple(records),
        tuple({"uid": f"s{number}", "reason": "broken"} for number in range(skipped)),
        {cell.key: (2.0, 3.0, 9.0) for cell in cells},
        signals or {},
    )
