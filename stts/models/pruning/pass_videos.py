"""The videos of one forward pass: what stages see of them, and what was decided about them so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stts.models.families.base import Adapter, Visual
from stts.models.pruning.llm_layers import Listeners
from stts.models.pruning.report import Report
from stts.models.pruning.siglip import SiglipSource
from stts.models.pruning.stages import Names, Sites, ask, cell_times, numerics
from stts.models.pruning.tower import Tower
from stts.pruners.base import Positions, Stage
from stts.tokens import Budget, Grid, Kept, VideoTokens, Watch


@dataclass(frozen=True)
class Setup:
    """What all passes of one `Pruning` share."""

    adapter: Adapter
    sites: Sites
    positions: Positions
    siglip: SiglipSource | None
    tower: Tower
    around_stage: Callable[[], AbstractContextManager[Any]]


class PassVideos:
    """The videos of one forward pass, in batch order."""

    def __init__(self, setup: Setup, visual: Visual, budgets: list[list[Budget]], names: Names) -> None:
        """budgets: [stage][video]. names: one per video. ValueError for times that do not fit a video."""
        self.setup, self.visual = setup, visual
        self.grids = list(visual.grids)
        self.budgets = budgets
        self.uids, self.questions = names.uids, names.questions
        self.times = [cell_times(time_F, grid) for time_F, grid in zip(names.times, self.grids, strict=True)]
        self.cells: list[Tensor | None] = [None] * len(self.grids)
        """int64 cells left of each video, in the order of the last stage; None: all."""
        self._before: list[int | None] = [None] * len(self.grids)
        """Groups of each video before the last stage."""
        self._watches: list[Watch | None] = [None] * len(self.grids)
        self.listeners: Listeners = {}
        self.report = make_report(self.grids, [torch.arange(0)] * len(self.grids), setup)

    def video(self, number: int, x_ND: Tensor, *, grid: Grid | None = None, **fields: Any) -> VideoTokens:
        """One video as a stage sees it, with the groups that are still there unless `cell_G` says which.

        grid: of a piece of the video, all of whose groups are there; None: of the whole video."""
        cell_G = self.cells[number] if grid is None else None
        time_T, before = (self.times[number], self._before[number]) if grid is None else (None, None)
        grid = grid or self.grids[number]
        if cell_G is None and "cell_G" not in fields:
            cell_G = torch.arange(grid.num_groups, device=x_ND.device)
        own = {"timestamps_T": time_T, "uid": self.uids[number], "num_before": before}
        return VideoTokens(**{"x_ND": x_ND, "grid": grid, "cell_G": cell_G, **own, **fields})

    def ask(self, stage: Stage, videos: list[VideoTokens], budgets: Sequence[Budget]) -> list[Kept]:
        """Call a stage once."""
        with self.calling(stage, videos[0].x_ND if videos else torch.empty(0)):
            return ask(stage, videos, budgets)

    @contextmanager
    def calling(self, stage: Stage, x_ND: Tensor) -> Iterator[None]:
        """Around every call of a stage; x_ND: features that it sees. A learned one follows them to their device."""
        if isinstance(stage, nn.Module):
            parameter = next(stage.parameters(), None)
            if (
                parameter is not None
                and parameter.device != x_ND.device
                and "meta"
                not in (
                    parameter.device.type,
                    x_ND.device.type,
                )
            ):
                stage.to(x_ND.device)
        with self.setup.around_stage(), numerics(stage, x_ND):
            yield

    def note(self, row: Sequence[Kept]) -> None:
        """Take down what a stage decided for every video."""
        for number, kept in enumerate(row):
            before = self.cells[number]
            self._before[number] = self.grids[number].num_groups if before is None else len(before)
            self.cells[number] = kept.index_K if before is None else before[kept.index_K]
            if kept.scores_G is not None:
                self.report.scores[number] = self._on_grid(kept.scores_G, number, before)
            for name, loss in kept.losses.items():
                losses = self.report.losses
                losses[name] = losses[name] + loss if name in losses else loss
            self._watches[number] = kept.watch or self._watches[number]
        self.report.stage_kept.append([len(kept.index_K) for kept in row])

    def watch(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Connector outputs of every video on their way into the prompt, seen by the stages that asked for it."""
        watched = [None if look is None else look(x) for look, x in zip(self._watches, features, strict=True)]
        report, count = self.report, len(watched)
        for one in (one for one in watched if one is not None):
            for name, loss in one.losses.items():
                report.losses[name] = report.losses.get(name, 0) + loss / count
            for name, value in one.values.items():
                report.late_values.setdefault(name, []).append(value)
            report.objective = one.objective
        told = {number: one.attention for number, one in enumerate(watched) if one is not None}
        self.listeners = {number: attention for number, attention in told.items() if attention is not None}
        return [x if one is None else one.x_Kd for x, one in zip(features, watched, strict=True)]

    def _on_grid(self, scores_G: Tensor, number: int, present: Tensor | None) -> Tensor:
        """Scores of the cells present, as one per cell of the grid."""
        if present is None:
            return scores_G
        all_cells = scores_G.new_full((self.grids[number].num_groups,), torch.nan)
        return all_cells.index_copy(0, present.to(scores_G.device), scores_G)


def make_report(grids: list[Grid], index: list[Tensor], setup: Setup) -> Report:
    """The report of a pass that has these cells of its videos."""
    cuts = [stage.site.layer or 0 for stage in setup.sites.llm]
    counts = [[len(one)] * (1 + len(cuts)) for one in index]
    layers = setup.adapter.host.llm_layers
    return Report(grids, index, [None] * len(grids), llm_layers=layers, llm_cuts=cuts, llm_counts=counts)
