"""Chain: several pruners as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from stts.pruners.base import Pruner, Stage
from stts.tokens import Site

_TURN = {"vit": 0, "pre_llm": 1, "llm": 2}


@dataclass(frozen=True)
class Chain:
    """Prune with one method after another: each sees what the one before it left.

    HoliTom and Tango are published this way, a part before the LLM and a part inside it. `budget.plan` makes the whole
    chain cost one retention ratio. Stages must come in the order in which a forward pass reaches their sites."""

    pruners: Sequence[Pruner]

    def __post_init__(self) -> None:
        sites = [stage.site for stage in self.stages]
        for before, after in pairwise(sites):
            if _turn(after) < _turn(before):
                raise ValueError(
                    f"a chain has a stage at {_name(before)} in front of one at {_name(after)}; a forward pass reaches "
                    "them the other way round (vit, then pre_llm, then llm by layer): swap them"
                )

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(stage for pruner in self.pruners for stage in pruner.stages)


def _turn(site: Site) -> tuple[int, int]:
    return _TURN[site.kind], 0 if site.layer is None else site.layer


def _name(site: Site) -> str:
    return site.kind if site.layer is None else f"{site.kind} {site.layer}"
