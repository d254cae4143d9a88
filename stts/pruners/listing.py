"""The pruners as text: `stts pruners`, `stts pruners NAME` and the table of families."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from stts.pruners.base import HostInfo, Pruner, Stage
from stts.pruners.chain import Chain
from stts.pruners.check import HOST, check_pruner
from stts.pruners.own import write_template
from stts.pruners.registry import PRUNERS, make_pruner
from stts.pruners.stop import SToP

MATRIX = Path(__file__).parents[1] / "assets" / "support" / "matrix.md"
"""Which pruner runs on which family, written by the test that runs them (`stts pruners --matrix`)."""


EXAMPLE_HOST = HostInfo(
    family="example", vit_width=1152, vit_mlp=4304, vit_heads=16, vit_depth=26, lowest_tap=25, llm_width=3584,
    llm_layers=28, patches_per_group=4,
)  # fmt: skip
"""The listings show layers as in an LLM of 28 layers, for which most are published."""

_LEGEND = """vit 3>4: decides on the output of block 3, drops behind block 4; llm 2-16: drops before LLM layers 2 to 16.
Papers are arXiv numbers. One method and its options: stts pruners NAME; its promises: stts pruners --check NAME;
a first method of your own: stts pruners --new my_pruner.py."""


@dataclass(frozen=True)
class PrunerLine:
    """One pruner as every list shows it; words are joined by spaces, "-" where there are none."""

    name: str
    sites: str
    """`vit 3>4`, `pre_llm`, `llm 2-16`, joined by commas."""
    signals: str
    learned: bool
    positions: str
    newlines: str
    papers: tuple[str, ...]
    """arXiv numbers."""
    keeps: tuple[str, ...]
    """The first line of every part's docstring, behind its label if it has one."""
    modules: tuple[str, ...]
    """Where the parts are defined."""


def pruner_lines() -> list[PrunerLine]:
    """Every registered pruner, in the order of the registry."""
    return [_line(name) for name in PRUNERS]


def _line(name: str) -> PrunerLine:
    pruner = make_pruner(name, EXAMPLE_HOST)
    stages, parts = pruner.stages, _parts(pruner)
    before = [stage.newlines for stage in stages if stage.site.kind != "llm"]  # the last of them rules
    label = _joined(label for part in parts if (label := getattr(part, "label", None)))
    keeps = [_doc(part).partition("\n")[0] for part in parts]
    keeps[0] = f"{label}: " * (label != "-") + keeps[0]
    return PrunerLine(
        name=name,
        sites=_sites(stages),
        signals=_joined(sorted({signal for stage in stages for signal in stage.signals})),
        learned=any(isinstance(stage, nn.Module) for stage in stages),
        positions=_joined(stage.positions for stage in stages),
        newlines=_joined(before[-1:] or (stage.newlines for stage in stages)),
        papers=tuple(dict.fromkeys(paper for part in parts if (paper := getattr(part, "paper", None)))),
        keeps=tuple(keeps),
        modules=tuple(dict.fromkeys(type(part).__module__ for part in parts)),
    )


def pruners(
    name: str | None = None,
    /,
    *,
    check: str | None = None,
    options: dict[str, Any] | None = None,
    new: Path | None = None,
    matrix: bool = False,
) -> str | int:
    """List the pruners, show one of them, start one of your own, or check it.

    Args:
        name: show this pruner: a name as listed, file.py:Class or module:Class.
        check: try the promises of this pruner: a name as listed, file.py:Class or module:Class.
        options: options of the pruner that is shown or checked, as in '{compat: official}'.
        new: write a commented method to start from to this file, such as my_pruner.py.
        matrix: which pruner runs on which family.
    """
    if (name is not None) + (check is not None) + (new is not None) + matrix > 1:
        raise ValueError("stts pruners takes one of NAME, --check NAME, --new FILE.py and --matrix")
    if options and name is None and check is None:
        raise ValueError(f"--options {options} need a pruner: give its NAME or --check NAME")
    if new is not None:
        own = write_template(new)
        return f"wrote {new}; try it: stts pruners --check {own}, and under --pruner {own} wherever a name is taken"
    if matrix:
        return (
            f"{MATRIX.read_text(encoding='utf-8')}\nall: fit, forward and generate, as run by the tests on tiny models"
        )
    if check is None:
        return describe_pruners() if name is None else describe_pruner(name, options)
    make_pruner(check, HOST, **(options or {}))  # a name or an option that is not there is no broken promise
    promises = check_pruner(lambda host: make_pruner(check, host, **(options or {})))
    for promise in promises:
        print(f"{'ok    ' if promise.ok else 'FAILED'}  {promise.name} ({promise.found})")
    return 0 if all(promise.ok for promise in promises) else 1


def describe_pruners() -> str:
    """Lines per pruner: where it acts and what it needs, and what it keeps."""
    rows = [("name", "site", "signals", "learned", "positions", "newlines", "paper")]
    keeps = ["what it keeps"]
    for line in pruner_lines():
        learned = "yes" if line.learned else "no"
        rows.append((line.name, line.sites, line.signals, learned, line.positions, line.newlines, _joined(line.papers)))
        keeps.append("\n    ".join(line.keeps))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        f"{'  '.join(map(str.ljust, row, widths)).rstrip()}\n    {text}" for row, text in zip(rows, keeps, strict=True)
    ]
    return "\n".join([*lines, "", _LEGEND])


def describe_pruner(name: str, options: Mapping[str, Any] | None = None) -> str:
    """What one method does, from its docstring, and its options as they are where the LLM has 28 layers."""
    blocks = []
    for part in _parts(make_pruner(name, EXAMPLE_HOST, **(options or {}))):
        sources = filter(None, (type(part), getattr(type(part), "for_host", None)))
        parameters = {k: v for source in sources for k, v in inspect.signature(source).parameters.items()}
        shown = [
            f"  {k} = {getattr(part, k, v.default)!r}"
            for k, v in parameters.items()
            if v.kind is not v.VAR_KEYWORD and k != "host" and v.default is not v.empty
        ]
        blocks.append("\n".join([f"{type(part).__name__}: {_doc(part)}", "", "Options:", *(shown or ["  none"])]))
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
