"""Every pruner by name; no decorators, no import side effects: the whole zoo on one screen."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from stts.pruners.adatp import AdaTP
from stts.pruners.base import HostInfo, Pruner, Stage
from stts.pruners.chain import Chain
from stts.pruners.dart import DART
from stts.pruners.divprune import DivPrune
from stts.pruners.evs import EVS
from stts.pruners.fastv import FastV
from stts.pruners.fastvid import FastVID
from stts.pruners.holitom import HoliTom, HoliTomInner
from stts.pruners.in_vit import Easy, Heuristic, RandomVit
from stts.pruners.novelty import Novelty
from stts.pruners.simple import Dense, Random, Uniform
from stts.pruners.stop import SToP
from stts.pruners.stts import STTS
from stts.pruners.tango import Tango, TangoInner
from stts.pruners.vidcom2 import VidCom2
from stts.pruners.visionzip import VisionZip


def _chain(*methods: Any) -> Callable[..., Pruner]:
    """One method after another; an option goes to every one of them that has it."""

    def make(host: HostInfo, **options: Any) -> Pruner:
        parts = [method.for_host(host, **_known(method, options)) for method in methods]
        if unknown := {name for name in options if not any(_known(method, {name: 0}) for method in methods)}:
            raise TypeError(f"none of {[method.__name__ for method in methods]} has {sorted(unknown)}")
        return Chain(parts)

    return make


def _stop(preset: Callable[..., Pruner], method: Any, **values: Any) -> Callable[..., Pruner]:
    """SToP on a method with these values; options of the method go to it, the others and shared ones to SToP."""

    def make(host: HostInfo, **options: Any) -> Pruner:
        for_method = _known(method, options)
        rest = {name: value for name, value in options.items() if name not in for_method} | _known(SToP, options)
        return preset(host, method.for_host(host, **values | for_method), **rest)

    return make


def _known(method: Any, options: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(method)}
    return {name: value for name, value in options.items() if name in names}


MATRIX = Path(__file__).parents[1] / "assets" / "support" / "matrix.md"
"""Which pruner runs on which family, written by the test that runs them (`stts pruners --matrix`)."""

PRUNERS: dict[str, Callable[..., Pruner]] = {  # called with the host and the options of the method
    "none": lambda host: Dense(),
    "random": lambda host, **options: Random(**options),
    "uniform": lambda host: Uniform(),
    "novelty": lambda host: Novelty(),
    "random-vit": RandomVit.for_host,
    "easy": Easy.for_host,
    "heuristic": Heuristic.for_host,
    "stts": STTS.for_host,
    "visionzip": VisionZip.for_host,
    "fastvid": FastVID.for_host,
    "holitom": HoliTom.for_host,
    "holitom+inner": _chain(HoliTom, HoliTomInner),
    "stop-visionzip": _stop(SToP.for_visionzip, VisionZip),
    "stop-fastvid": _stop(SToP.for_fastvid, FastVID, variant="ov"),
    "stop-holitom": _stop(SToP.for_holitom, HoliTom, tau=0.8, static_tau=0.8),
    "tango": Tango.for_host,
    "tango+inner": _chain(Tango, TangoInner),
    "adatp": AdaTP.for_host,
    "fastv": FastV.for_host,
    "dart": DART.for_host,
    "vidcom2": VidCom2.for_host,
    "evs": EVS.for_host,
    "divprune": DivPrune.for_host,
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
        method = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"pruner {name!r} could not be loaded ({error}); expected an importable 'module:Class'"
        ) from error
    try:
        made = method.for_host(host, **options) if hasattr(method, "for_host") else method(**options)
    except TypeError as error:
        raise ValueError(f"pruner {name!r} does not take the options {sorted(options)}: {error}") from error
    if not isinstance(made, Pruner):
        raise ValueError(f"{name!r} made a {type(made).__name__} without `stages`; see stts.pruners.base.Pruner")
    return made


# --- listings ------------------------------------------------------------------------------------------------------

EXAMPLE_HOST = HostInfo(
    family="example", vit_width=1152, vit_mlp=4304, vit_heads=16, vit_depth=26, lowest_tap=25, llm_width=3584,
    llm_layers=28, patches_per_group=4,
)  # fmt: skip
"""The listings show layers as in an LLM of 28 layers, for which most are published."""

_LEGEND = """vit 3>4: decides on the output of block 3, drops behind block 4; llm 2-16: drops before LLM layers 2 to 16.
Papers are arXiv numbers. One method and its options: stts pruners NAME; its promises: stts pruners --check NAME."""


def describe_pruners() -> str:
    """Lines per pruner: where it acts and what it needs, and what it keeps."""
    rows = [("name", "site", "signals", "learned", "positions", "newlines", "paper")]
    keeps = ["what it keeps"]
    for name in PRUNERS:
        pruner = make_pruner(name, EXAMPLE_HOST)
        stages, parts = pruner.stages, _parts(pruner)
        rows.append(
            (
                name,
                _sites(stages),
                _joined(sorted({signal for stage in stages for signal in stage.signals})),
                "yes" if any(isinstance(stage, nn.Module) for stage in stages) else "no",
                _joined(stage.positions for stage in stages),
                _joined(stage.newlines for stage in stages),
                _joined(paper for part in parts if (paper := getattr(part, "paper", None))),
            )
        )
        label = _joined(label for part in parts if (label := getattr(part, "label", None)))
        keeps.append(f"{label}: " * (label != "-") + "\n    ".join(_doc(part).partition("\n")[0] for part in parts))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{'  '.join(map(str.ljust, row, widths)).rstrip()}\n    {text}" for row, text in zip(rows, keeps, strict=True)
    ]
    return "\n".join([*lines, "", _LEGEND])


def describe_pruner(name: str) -> str:
    """What one method does, from its docstring, and its options as they are where the LLM has 28 layers."""
    blocks = []
    for part in _parts(make_pruner(name, EXAMPLE_HOST)):
        sources = filter(None, (type(part), getattr(type(part), "for_host", None)))
        parameters = {k: v for source in sources for k, v in inspect.signature(source).parameters.items()}
        options = [
            f"  {k} = {getattr(part, k, v.default)!r}"
            for k, v in parameters.items()
            if v.kind is not v.VAR_KEYWORD and k != "host" and v.default is not v.empty
        ]
        blocks.append("\n".join([f"{type(part).__name__}: {_doc(part)}", "", "Options:", *(options or ["  none"])]))
    return "\n\n".join(blocks)


def _parts(pruner: Pruner) -> Sequence[object]:
    """What there is to tell: every method of a chain, a wrapper and what it wraps."""
    if isinstance(pruner, Chain):
        return pruner.pruners
    return (pruner, pruner.base) if isinstance(pruner, SToP) else (pruner,)


def _doc(part: object) -> str:
    return inspect.cleandoc(type(part).__doc__ or "")


def _joined(words: Iterable[str]) -> str:
    return " ".join(dict.fromkeys(words)) or "-"


def _sites(stages: Sequence[Stage]) -> str:
    layers = [stage.site.layer for stage in stages if stage.site.kind == "llm"]
    names = dict.fromkeys(
        f"vit {site.layer}>{site.drop_after}" if site.kind == "vit" else site.kind
        for site in (stage.site for stage in stages)
        if site.kind != "llm"
    )
    if layers:
        names[f"llm {layers[0]}" if len(layers) == 1 else f"llm {layers[0]}-{layers[-1]}"] = None
    return ", ".join(names) or "-"
