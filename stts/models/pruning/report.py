"""What one pruned forward pass did, per video: counts, kept cells, scores, losses, signals, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stts.budget import plan
from stts.metrics.cost import VideoCost, VlmShape, tokens_per_layer, video_cost
from stts.pruners.base import HostInfo, Pruner
from stts.tokens import Grid, Objective


@dataclass(repr=False)
class Report:
    """What one forward pass with visual input did, per video in batch order."""

    grids: list[Grid]
    index: list[Tensor]
    """int64 cells of each video's grid that are left after the last stage, increasing."""
    scores: list[Tensor | None]
    """fp32, one per cell of the grid, from the last stage that scored: NaN where a cell was gone before it; None where
    none did."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Unweighted, by name."""
    late_values: dict[str, list[Tensor]] = field(default_factory=dict)
    """Per video, once the backward pass is through: values of those of `losses` that are 0 until then, and other
    numbers to be logged."""
    objective: Objective = "log_prob"
    """Form of the answer loss that a stage asked for."""
    kept_patches: list[list[int]] | None = None
    """Survivors per frame in the tower; None: the tower ran on everything."""
    stage_kept: list[list[int]] = field(default_factory=list)
    """Groups each stage returned, [stage][video]."""
    llm_layers: int = 1
    llm_cuts: list[int] = field(default_factory=list)
    """LLM layers before which tokens were dropped, increasing."""
    llm_counts: list[list[int]] = field(default_factory=list)
    """Per video: visual tokens that enter the LLM, then those left after each cut."""
    decode_layer: int | None = None
    """The LLM layer from which on a decode step reads a part of the videos' keys; None: all are read everywhere."""
    decode_keys: list[int] = field(default_factory=list)
    """How many keys of each video those layers read; empty without such a layer. In memory there are as many as entered
    the LLM, whatever is read."""
    signals: dict[str, str] = field(default_factory=dict)
    """Signal -> what it was made from."""
    llm_tokens: int = 0
    """Tokens the language model saw at prefill, text included."""
    llm_padded: int = 0
    """Slots it computed; pad waste = 1 - llm_tokens / llm_padded."""

    def __repr__(self) -> str:
        """A line per video, and what a reader of the counts must know; the tensors are in the fields."""
        if not self.grids:
            return "Report(no video)"
        lines = [
            f"{kept} of {grid.num_groups} tokens kept ({grid.t} x {grid.h} x {grid.w}), retention {retention:.3f}"
            for kept, grid, retention in zip(self.num_kept, self.grids, self.retention_per_video, strict=True)
        ]
        more = [f"cut before LLM layers {', '.join(map(str, self.llm_cuts))}"] if self.llm_cuts else []
        more += [f"{name}: {source}" for name, source in self.signals.items()]
        more += [f"LLM saw {self.llm_tokens} tokens, text included"] if self.llm_tokens else []
        numbered = lines if len(lines) == 1 else [f"video {number}: {line}" for number, line in enumerate(lines)]
        return f"Report({'; '.join([*numbered, *more])})"

    @property
    def num_groups(self) -> list[int]:
        return [grid.num_groups for grid in self.grids]

    @property
    def num_kept(self) -> list[int]:
        """Groups left after the last stage."""
        return [len(index) for index in self.index]

    @property
    def retention_per_video(self) -> list[float]:
        """Equivalent retention: visual tokens present, meaned over the LLM layers, / groups of the video."""
        return [
            self._mean_tokens(counts) / grid.num_groups
            for counts, grid in zip(self.llm_counts, self.grids, strict=True)
        ]

    @property
    def retention_measured(self) -> float:
        """The same over all groups of the batch; 1.0 without video."""
        total = sum(self.num_groups)
        return sum(self._mean_tokens(counts) for counts in self.llm_counts) / total if total else 1.0

    def _mean_tokens(self, counts: Sequence[int]) -> float:
        ends = [*self.llm_cuts, self.llm_layers]
        starts = [0, *self.llm_cuts]
        spans = [end - start for start, end in zip(starts, ends, strict=True)]
        return sum(n * span for n, span in zip(counts, spans, strict=True)) / self.llm_layers


def cost_of(shape: VlmShape, host: HostInfo, pruner: Pruner, report: Report, video: int) -> VideoCost:
    """What one video of the pass that `report` describes cost."""
    grid = report.grids[video]
    own, drop_after, present, connected = 0, None, grid.num_groups, grid.num_groups
    for stage, kept in zip(pruner.stages, report.stage_kept, strict=False):  # empty where nothing was to be pruned
        inside = stage.site.kind == "vit"
        if kept[video] < present:  # else the stage is skipped: it costs nothing to keep everything
            own += stage.flops(grid, host.vit_width if inside else host.llm_width, kept[video])
        present = kept[video]
        drop_after, connected = (stage.site.drop_after, present) if inside else (drop_after, connected)
    entry, *after = report.llm_counts[video]
    return video_cost(
        shape.at(grid),
        num_frames=grid.t,
        llm_tokens=tokens_per_layer(entry, report.llm_cuts, after, shape.llm.layers),
        kept_patches=report.kept_patches[video] if report.kept_patches else None,
        drop_after=drop_after,
        num_cells=connected,
        pruner_flops=own,
    )


def planned_cost(pruner: Pruner, shape: VlmShape, host: HostInfo, grid: Grid, retention_ratio: float) -> VideoCost:
    """What one video of this grid costs at this ratio, before anything is run: the cost of a plan.

    Where a stage drops inside the tower, the first frame is taken to stay whole and the other survivors to lie evenly
    over the rest. ValueError for a ratio that the pruner cannot reach."""
    budgets = plan([stage.site for stage in pruner.stages], retention_ratio, [grid], host.llm_layers)
    kept = [row[0].num_kept for row in budgets]
    entry, after, kept_patches = grid.num_groups, [], None
    for stage, num_kept in zip(pruner.stages, kept, strict=True):
        if stage.site.kind == "llm":
            after.append(num_kept)
            continue
        entry = num_kept
        if stage.site.kind == "vit" and num_kept < grid.num_groups:
            kept_patches = [_spread(num_kept, grid, shape.at(grid).vit.patches)]
    report = Report(
        [grid],
        [torch.arange(0)],
        [None],
        kept_patches=kept_patches,
        stage_kept=[[num_kept] for num_kept in kept],
        llm_layers=host.llm_layers,
        llm_cuts=sorted(stage.site.layer or 0 for stage in pruner.stages if stage.site.kind == "llm"),
        llm_counts=[[entry, *after]],
    )
    return cost_of(shape, host, pruner, report, 0)


def _spread(num_kept: int, grid: Grid, patches: int) -> list[int]:
    """Patches per frame."""
    rest = num_kept - grid.per_frame
    groups = [grid.per_frame, *(rest * (t + 1) // (grid.t - 1) - rest * t // (grid.t - 1) for t in range(grid.t - 1))]
    return [round(patches * count / grid.per_frame) for count in groups]
