"""Equal FLOPs: the ratio at which a method costs what another one costs, tower and its own work included.

Equal tokens flatter methods that run the whole tower: a pruner before the LLM pays for every patch, one inside the
tower does not. Costs are those of one planned video (`planned_cost`), before anything is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stts.eval.answering.cell import DENSE
from stts.eval.answering.method import Runner
from stts.metrics.cost import VideoCost
from stts.models.families.base import vlm_shape
from stts.models.pruning.context import Pruning
from stts.models.pruning.report import planned_cost
from stts.tokens import Grid

_STEP = 10_000
"""Ratios are tried in steps of 1 / _STEP."""


def cost_at(pruning: Pruning, grid: Grid, retention_ratio: float) -> VideoCost:
    """Of one video, before anything is run. ValueError for a ratio that the pruner cannot reach."""
    shape = vlm_shape(pruning.model.config)
    return planned_cost(pruning.pruner, shape, pruning.adapter.host, grid, retention_ratio)


def equal_flops_ratio(pruning: Pruning, grid: Grid, target: int) -> float:
    """The largest ratio, in steps of 0.0001, at which one video of this grid costs at most `target` FLOPs.

    ValueError when the method costs more than that however little it keeps."""
    low, high = 0, _STEP  # `low` costs too much or is out of reach, unless it has been tried
    lowest: VideoCost | None = None
    best = 0
    while low < high:
        middle = (low + high + 1) // 2
        try:
            cost = cost_at(pruning, grid, middle / _STEP)
        except ValueError:  # under what the method can reach
            low = middle
            continue
        lowest = cost if lowest is None or cost.total < lowest.total else lowest
        if cost.total <= target:
            best = low = middle
        else:
            high = middle - 1
    if not best:
        dense = cost_at(pruning, grid, 1.0).total
        least = "no ratio is in reach" if lowest is None else f"{100 * lowest.total / dense:.1f} % of dense"
        raise ValueError(
            f"costs more however little it keeps: at least about {least} (tower {100 * _tower(lowest) / dense:.1f} %), "
            f"and {100 * target / dense:.1f} % are asked for"
        )
    return best / _STEP


def _tower(cost: VideoCost | None) -> int:
    return 0 if cost is None else cost.vit + cost.vit_embed + cost.connector


def match_flops(runners: Sequence[Runner], grid: Grid, reference: str, *, tokens_too: bool) -> list[Runner]:
    """`runners` with one more per method and ratio, at the ratio that costs what `reference` costs at its own.

    tokens_too: keep the rows at equal tokens; without it only dense and the reference's own rows stay beside the new
    ones. ValueError when the reference is not among them or cannot be run."""
    attached = {runner.cell.method: runner.pruning for runner in runners if runner.pruning is not None}
    if reference not in attached or reference == DENSE:
        raise ValueError(f"--match_to {reference!r} is not among the methods that run here: {sorted(attached)}")
    rows: list[Runner] = []
    matched: list[Runner] = []
    for runner in runners:
        cell = runner.cell
        if cell.kind == "unpruned" or cell.method == reference or tokens_too:
            rows.append(runner)
        if cell.kind == "unpruned" or cell.method == reference:
            continue
        like = next(
            one
            for one in runners
            if one.cell.method == reference and one.cell.retention_configured == cell.retention_configured
        )
        cell = replace(cell, equal_flops_to=like.cell.key, reason=None)
        base = attached.get(cell.method)
        if like.pruning is None or base is None:
            reason = like.cell.reason if like.pruning is None else runner.cell.reason
            matched.append(Runner(replace(cell, reason=reason), None))
            continue
        try:
            target = cost_at(like.pruning, grid, like.cell.retention_configured).total
            ratio = equal_flops_ratio(base, grid, target)
        except ValueError as error:
            matched.append(Runner(replace(cell, reason=str(error)), None))
            continue
        own = Pruning(
            base.model,
            base.pruner,
            retention_ratio=ratio,
            exact=base.exact,
            positions=base.positions,
            siglip=base.siglip,
            tower=base.tower,
        )
        matched.append(Runner(replace(cell, retention_configured=ratio), own))
    return [*rows, *matched]
