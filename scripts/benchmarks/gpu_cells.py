"""What `benchmarks/gpu.py` measures, cell by cell, and the file that keeps the cells."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gpu_models
from gpu_table import BROKEN, OOM, derive
from measure import write_json

from stts.pruners.registry import PRUNERS

DENSE, RELEASE, OURS = "dense", "release", "stts"
OPTIONS: dict[str, dict[str, Any]] = {"holitom": {"tau": 0.8}, "holitom+inner": {"tau": 0.8}}


@dataclass(frozen=True)
class Plan:
    frames: tuple[int, ...] = (128, 256, 64)
    """The most telling first: time may run out."""
    ratios: tuple[float, ...] = (0.5, 0.7, 0.2)
    pruner_frames: int = 32
    pruner_ratios: tuple[float, ...] = (0.1, 0.2)
    repeats: int = 5
    warm_up: int = 2
    new_tokens: int = 64
    tiny: bool = False
    model: str = gpu_models.MOLMO2
    attention: str = "sdpa"
    dtype: str = "bfloat16"


PLANS = {
    "full": Plan(),
    "quick": Plan(ratios=(0.5,), pruner_ratios=(0.1,), repeats=3, warm_up=1),
    "tiny": Plan((4,), (0.5,), 4, (0.25,), repeats=1, warm_up=0, new_tokens=3, tiny=True),
}


@dataclass(frozen=True)
class Cell:
    part: str
    """training, inference or pruners."""
    frames: int
    retention_ratio: float
    """1 for dense."""
    way: str

    @property
    def key(self) -> str:
        return f"{self.part} {self.frames} {self.way} {self.retention_ratio:g}"


def cells_of(plan: Plan, part: str) -> list[Cell]:
    if part == "pruners":
        names = [OURS, *(name for name in PRUNERS if name not in ("none", OURS))]
        pruned = [
            Cell(part, plan.pruner_frames, ratio, name)
            for number, ratio in enumerate(plan.pruner_ratios)
            for name in names[0 if number == 0 else 1 :]
        ]
        return [Cell(part, plan.pruner_frames, 1.0, DENSE), *pruned]
    cells = []
    for frames in plan.frames:
        cells.append(Cell(part, frames, 1.0, DENSE))
        cells += [Cell(part, frames, ratio, way) for ratio in plan.ratios for way in (RELEASE, OURS)]
    return cells


# --- one model -------------------------------------------------------------------------------------------------------


class Store:
    """Cells by key, in a file that is written whole after each of them.

    until: on `time.monotonic`; no cell is begun later. ValueError when the file was measured under other conditions."""

    def __init__(
        self, path: Path | None, setting: dict[str, Any], info: dict[str, Any], until: float = float("inf")
    ) -> None:
        self.path, self.setting, self.info, self.until = path, setting, info, until
        self.cells: dict[str, dict[str, Any]] = {}
        if path is not None and path.is_file():
            old = json.loads(path.read_text(encoding="utf-8"))
            if old.get("setting") != json.loads(json.dumps(setting)):
                raise ValueError(
                    f"{path} was measured with {old.get('setting')}, this run is {setting}; remove it or name another"
                )
            self.cells = old["cells"]
            if "optimizer" in old:
                info["optimizer"] = old["optimizer"]

    @property
    def late(self) -> bool:
        return time.monotonic() > self.until

    def has(self, cell: Cell) -> bool:
        """Whether it need not run again: it has numbers, there was no memory for it, or it would stop the run again."""
        return self.cells.get(cell.key, {"failed": ""}).get("failed", OOM) in (OOM, BROKEN)

    def add(self, cell: Cell, row: dict[str, Any]) -> None:
        self.cells[cell.key] = asdict(cell) | row
        write_json(self.path, {**self.info, "setting": self.setting, "cells": self.cells, "rows": derive(self.cells)})
