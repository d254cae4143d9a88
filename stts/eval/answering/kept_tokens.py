"""Which tokens every method kept of a sample, with their scores: written batch by batch, read for the report.

`kept/NNNNNN.safetensors` beside `comparison.json` is one batch, with the tensors

    grid/UID       int32 (3,), t h w            index/CELL/UID   int32, cells left after the last stage, increasing
    times/UID      float64, seconds per frame   scores/CELL/UID  fp32, one per cell of the grid; higher = kept,
                                                     NaN = gone before the stage that scored
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from stts.tokens import Grid

if TYPE_CHECKING:
    from stts.models.pruning.report import Report

FOLDER = "kept"


@dataclass
class KeptCells:
    """One sample; the dictionaries are by `Cell.key`."""

    grid: Grid
    times_s: list[float]
    """Of the sampled frames; empty where they are not known."""
    index: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    """Only methods that score."""


def kept_tensors(
    cell_key: str, report: Report, uids: Sequence[str], times_s: Sequence[Tensor | None], wanted: Collection[str]
) -> dict[str, Tensor]:
    """What one method kept of the `wanted` samples of a batch, ready for the file."""
    tensors = {}
    for row, uid in enumerate(uids):
        if uid not in wanted:
            continue
        grid, scores, time_F = report.grids[row], report.scores[row], times_s[row]
        tensors[f"grid/{uid}"] = torch.tensor([grid.t, grid.h, grid.w], dtype=torch.int32)
        if time_F is not None:
            tensors[f"times/{uid}"] = time_F.double().cpu().clone()  # several questions may share one video's
        tensors[f"index/{cell_key}/{uid}"] = report.index[row].int().cpu()
        if scores is not None:
            tensors[f"scores/{cell_key}/{uid}"] = scores.float().cpu().contiguous()
    return tensors


def read_kept(out: str | Path, uids: Collection[str]) -> dict[str, KeptCells]:
    """What was kept of the samples `uids`, as far as the comparison in `out` wrote it."""
    cells: dict[str, KeptCells] = {}
    for path in sorted((Path(out) / FOLDER).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for uid in (name.removeprefix("grid/") for name in names if name.startswith("grid/")):
                if uid in uids:
                    t, h, w = file.get_tensor(f"grid/{uid}").tolist()
                    times = file.get_tensor(f"times/{uid}").tolist() if f"times/{uid}" in names else []
                    cells[uid] = KeptCells(Grid(t, h, w), times)
            for name in names:
                kind, _, rest = name.partition("/")
                cell_key, _, uid = rest.partition("/")  # a uid may hold a slash, a cell does not
                if kind in ("index", "scores") and uid in cells:
                    getattr(cells[uid], kind)[cell_key] = file.get_tensor(name)
    return cells
