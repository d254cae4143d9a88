"""Every pruner by name; no decorators, no import side effects: the whole zoo on one screen."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from stts.pruners.base import HostInfo, Pruner
from stts.pruners.novelty import Novelty
from stts.pruners.simple import Dense, Random, Uniform

PRUNERS: dict[str, Callable[..., Pruner]] = {  # called with the host and the options of the method
    "none": lambda host: Dense(),
    "random": lambda host, **options: Random(**options),
    "uniform": lambda host: Uniform(),
    "novelty": lambda host: Novelty(),
}


def make_pruner(name: str, host: HostInfo, **options: Any) -> Pruner:
    """A pruner for this host by registry name, or your own by dotted path `package.module:Class`, called with `options`.

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
