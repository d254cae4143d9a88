"""Every pruner by name; no decorators, no import side effects: the whole zoo on one screen."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from stts.pruners.base import HostInfo, Pruner
from stts.pruners.in_vit import Easy, Heuristic, RandomVit
from stts.pruners.novelty import Novelty
from stts.pruners.simple import Dense, Random, Uniform
from stts.pruners.stts import STTS

PRUNERS: dict[str, Callable[..., Pruner]] = {  # called with the host and the options of the method
    "none": lambda host: Dense(),
    "random": lambda host, **options: Random(**options),
    "uniform": lambda host: Uniform(),
    "novelty": lambda host: Novelty(),
    "stts": STTS.for_host,
    "random-vit": RandomVit.for_host,
    "easy": Easy.for_host,
    "heuristic": Heuristic.for_host,
}


def make_pruner(name: str, host: HostInfo, **options: Any) -> Pruner:
    """A pruner for this host by registry name, or your own by dotted path `package.module:Class`; `options` go to it.

    ValueError for a name that is neither, and for an option the method does not have."""
    if name in PRUNERS:
        try:
            return PRUNERS[name](host, **options)
        except TypeError as error:
            raise ValueError(f"pruner {name!r} does not take the options {sorted(options)}: {error}") from error
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"unknown pruner {name!r}; known: {', '.join(PRUNERS)}; your own: 'package.module:Class'")
    try:
        made = getattr(importlib.import_module(module_name), attribute)(**options)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"pruner {name!r} could not be loaded ({error}); expected an importable 'module:Class'"
        ) from error
    if not isinstance(made, Pruner):
        raise ValueError(f"{name!r} made a {type(made).__name__} without `stages`; see stts.pruners.base.Pruner")
    return made


def describe_pruners() -> str:
    """A plain-text table: name, sites, learned or frozen, positions, and what the method keeps."""
    host = HostInfo(
        family="-", vit_width=8, vit_mlp=8, vit_heads=1, vit_depth=27, lowest_tap=26, llm_width=8, llm_layers=28,
        patches_per_group=4,
    )  # fmt: skip
    rows = [("name", "site", "learns", "positions", "keeps")]
    for name in PRUNERS:
        pruner = make_pruner(name, host)
        sites = " + ".join(stage.site.kind for stage in pruner.stages) or "-"
        positions = pruner.stages[0].positions if pruner.stages else "-"
        learns = "yes" if isinstance(pruner, nn.Module) else "no"
        rows.append((name, sites, learns, positions, (type(pruner).__doc__ or "").split("\n")[0]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join([*map(str.ljust, row[:4], widths), row[4]]) for row in rows)
