"""Accuracy over what was kept, and over what it cost: one curve per method, dense as a dashed line and band.

With several numbers of frames: over tokens, FLOPs and time, a curve along the frames per method and ratio.

Colours say where a method drops tokens, markers which method it is. Error bars fade as methods multiply, and stand in
the left panel only: the accuracies on the right are the same.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import BEFORE, DENSE, Kind, Row

# Within a kind colours run along a part of one map.
_MAPS: dict[Kind, tuple[str, float, float]] = {
    "learned": ("Reds", 0.75, 0.5),
    "in the ViT": ("YlOrBr", 0.45, 0.75),
    "before the LLM": ("viridis", 0.25, 0.8),
    "inside the LLM": ("RdPu", 0.55, 0.95),
}
_LINES: dict[Kind, str] = {"learned": "-", "in the ViT": "--", "before the LLM": "-", "inside the LLM": "-."}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*", "d")
_GREY = "#555555"


@dataclass(frozen=True)
class Curve:
    """How one method is drawn."""

    points: tuple[Row, ...]
    """Of one method, increasing in the ratio."""
    colour: tuple[float, float, float, float]
    line: str
    marker: str
    label: str = ""


def draw(result: ComparisonResult) -> bytes:
    """The figure as PNG bytes. Error bars are 95 % intervals."""
    if result.has_points:
        return _draw_points(result)
    rows = [row for row in result.rows if row.accuracy is not None]
    drawn = curves(rows)
    figure = Figure(figsize=(12.5, 5.6), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes in (left, right):
        _references(axes, rows)
    ratios = sorted({row.retention_configured for row in rows if row.kind != "unpruned" and not row.equal_flops_to})
    # Error bars of methods at one budget would cover each other: each is moved a little to the side, all of them
    # together over less than half of the way to the next budget.
    gap = min((math.log(b / a) for a, b in pairwise(ratios)), default=math.inf)
    spread = min(0.25 * gap, 0.011 * len(drawn))
    fade = min(1.0, 5 / max(1, len(drawn)))
    for curve, offset in zip(drawn, np.linspace(-spread, spread, max(2, len(drawn))), strict=False):
        kept = [(row.retention_measured or 0) * math.exp(offset) for row in curve.points]
        _bars(left, kept, curve, fade)
        _line(left, kept, curve)
        _line(right, [100 * row.flops["exact"]["share"] for row in curve.points], curve)
    _axis_of_ratios(left, ratios, [row.retention_measured or 0 for curve in drawn for row in curve.points])
    left.set_ylabel("accuracy (%)")
    right.set_xlabel("FLOPs of ViT, pruner, connector and LLM (% of dense)")
    for axes in (left, right):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, left, drawn)
    return _finished(figure, result, "bars (left) and band are 95 % intervals")


def _finished(figure: Figure, result: ComparisonResult, legend: str) -> bytes:
    first = next((row for row in result.rows if row.accuracy is not None), None)
    asked = "" if first is None else f": {first.num_samples} questions on {first.num_videos} videos"
    figure.suptitle(f"{result.config['name']}{asked}; {legend}", fontsize=12)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _draw_points(result: ComparisonResult) -> bytes:
    rows = [row for row in result.rows if row.accuracy is not None]
    figure = Figure(figsize=(15, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    equal_tokens = result.config.get("budget") is not None
    first = ("frames; pruners at equal tokens, dense at all of them", _frames) if equal_tokens else _COSTS[0]
    for axes, (label, value) in zip(panels, (first, *_COSTS[1:]), strict=True):
        for curve in _along_frames(rows, by_ratio=not equal_tokens):
            shown = [row for row in curve.points if value(row)]
            if not shown:
                continue
            x = [value(row) for row in shown]
            if axes is panels[0]:
                _bars(axes, x, replace(curve, points=tuple(shown)), 0.35)
            _line(axes, x, replace(curve, points=tuple(shown)), curve.label)
            for row, across in zip(shown, x, strict=True):
                axes.annotate(
                    str(row.num_frames), (across, 100 * (row.accuracy or 0)), xytext=(0, 5), fontsize=7, ha="center",
                    textcoords="offset points", color=curve.colour,
                )  # fmt: skip
        axes.set_xlabel(f"{label} (log scale)")
        axes.set_xscale("log")
        narrow = max(axes.get_xlim()) < 10 * min(axes.get_xlim())
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]) if narrow else LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    return _finished(figure, result, "numbers at points are frames, bars (left) 95 % intervals")


def _all_ms(row: Row) -> float:
    """From the file to the answer; 0 where nothing was timed."""
    reading = row.time_ms.get("video", 0.0) + row.time_ms.get("preprocess", 0.0)
    return 0.0 if row.ms_per_sample is None else row.ms_per_sample + reading


def _frames(row: Row) -> float:
    return float(row.num_frames or 0)


_COSTS: tuple[tuple[str, Callable[[Row], float]], ...] = (
    ("visual tokens at the LLM", lambda row: row.tokens or 0.0),
    ("FLOPs of ViT, pruner, connector and LLM", lambda row: row.flops["exact"]["total"]),
    ("ms per question, decoding to answer", _all_ms),
)


def _along_frames(rows: Sequence[Row], *, by_ratio: bool) -> list[Curve]:
    """Dense, then every method, at each of its ratios unless they follow from a budget; lighter as ratios fall."""
    unpruned = dict.fromkeys(row.method for row in rows if row.kind == "unpruned")
    lines = [
        Curve(tuple(row for row in rows if row.method == method), (0.3, 0.3, 0.3, 1.0), "--", "o", method)
        for method in unpruned
    ]
    for curve in curves(rows):
        ratios = sorted({row.retention_configured for row in curve.points}, reverse=True) if by_ratio else [None]
        for number, ratio in enumerate(ratios):
            points = [row for row in curve.points if ratio is None or row.retention_configured == ratio]
            points.sort(key=lambda row: row.num_frames or 0)
            colour = (*curve.colour[:3], 1 - 0.6 * number / len(ratios))
            label = points[0].method + ("" if ratio is None else f" {ratio:g}")
            lines.append(replace(curve, points=tuple(points), colour=colour, label=label))
    return lines


def curves(rows: Sequence[Row]) -> list[Curve]:
    """How each method that was run is drawn: by kind, then in the order of the table."""
    run = [row for row in rows if row.accuracy is not None]
    lines = []
    for kind, (name, low, high) in _MAPS.items():
        methods = list(dict.fromkeys(row.method for row in run if row.kind == kind))
        for number, method in enumerate(methods):
            colour = colormaps[name](low + (high - low) * number / max(1, len(methods) - 1))
            points = sorted((row for row in run if row.method == method), key=lambda row: row.retention_configured)
            lines.append(Curve(tuple(points), colour, _LINES[kind], _MARKERS[number % len(_MARKERS)]))
    return lines


def _references(axes: Axes, rows: list[Row]) -> None:
    for row in rows:
        if row.kind != "unpruned" or row.accuracy is None:
            continue
        style = "--" if row.method == DENSE else ":"
        axes.axhline(100 * row.accuracy, color=_GREY, linestyle=style, linewidth=1.4, label=row.method, zorder=1)
        if row.method == DENSE and row.accuracy_low is not None:
            axes.axhspan(100 * (row.accuracy_low or 0), 100 * (row.accuracy_high or 0), color=_GREY, alpha=0.12, lw=0)


def _bars(axes: Axes, x: list[float], curve: Curve, fade: float) -> None:
    low, middle, high = (
        np.array([100 * (value or 0) for value in values])
        for values in zip(*((r.accuracy_low, r.accuracy, r.accuracy_high) for r in curve.points), strict=True)
    )
    if any(row.accuracy_low is None for row in curve.points):  # one video: no interval
        return
    colour = (*curve.colour[:3], fade)
    axes.errorbar(x, middle, (middle - low, high - middle), fmt="none", ecolor=colour, elinewidth=1, zorder=2)


def _line(axes: Axes, x: list[float], curve: Curve, label: str = "") -> None:
    axes.plot(
        x, [100 * (row.accuracy or 0) for row in curve.points], label=label or curve.points[0].method,
        color=curve.colour, marker=curve.marker, linestyle=curve.line, markersize=7,
        markeredgecolor="white", markeredgewidth=0.6, linewidth=1.6, zorder=3,
    )  # fmt: skip


def _legend(figure: Figure, axes: Axes, drawn: list[Curve]) -> None:
    """To the right, under a heading per kind."""
    lines = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    handles = [line for method, line in lines.items() if method in (DENSE, BEFORE)]
    labels = [method for method in lines if method in (DENSE, BEFORE)]
    for kind in _MAPS:
        methods = [curve.points[0].method for curve in drawn if curve.points[0].kind == kind]
        if methods:
            handles += [Line2D([], [], linestyle="none"), *(lines[method] for method in methods)]
            labels += [f"$\\bf{{{kind.replace(' ', '~')}}}$", *methods]
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9, handlelength=3)


def _axis_of_ratios(axes: Axes, ratios: list[float], measured: list[float]) -> None:
    axes.set_xlabel("visual tokens kept (%, log scale; methods at one budget side by side)")
    if not ratios:
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ratios))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.set_xlim(min(*ratios, *measured) / 1.25, max(*ratios, *measured) * 1.25)
