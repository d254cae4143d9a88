"""The plots of the study: accuracy over the share of tokens kept, over the number of frames, and side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
Seeds = Sequence[tuple[float, Sequence[float]]]
"""x, and y of every seed."""


@dataclass(frozen=True)
class Panel:
    """One of several plots side by side, with the same lines."""

    x_label: str
    y_label: str
    lines: Mapping[str, Seeds]
    """By name; drawn as mean and range."""
    ticks: Sequence[float]
    log: bool = False


def draw_panels(panels: Sequence[Panel], styles: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG. `styles`: of matplotlib, by the name of a line, in the order of the legend."""
    figure = Figure(figsize=(5 * len(panels) + 1, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, 1):
        axes = _clear(figure.add_subplot(1, len(panels), place), panel.x_label, panel.y_label)
        for name in styles:
            points = panel.lines.get(name)
            if points:
                middle = [fmean(values) for _, values in points]
                ends = [[m - min(values) for m, (_, values) in zip(middle, points, strict=True)],
                        [max(values) - m for m, (_, values) in zip(middle, points, strict=True)]]  # fmt: skip
                axes.errorbar(
                    [x for x, _ in points], middle, ends, label=name, capsize=3 * any(map(any, ends)), **styles[name]
                )
        if panel.log:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(panel.ticks, [f"{tick:g}" for tick in panel.ticks])
        axes.set_ylim(0, 102)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)), frameon=False, fontsize=9)
    return _bytes(figure)


def draw_retention(
    elastic: Sequence[tuple[float, Sequence[float]]], lines: Mapping[str, Points], dense: float | None
) -> bytes:
    """PNG. `elastic`: share kept, and percent right of every seed, drawn as mean and range; `lines`: share kept and
    percent right by name, the first one the rule that was fine-tuned likewise; `dense`: percent right of every token.
    """
    figure, axes = _axes("share of visual tokens kept")
    if elastic:
        middle = [fmean(values) for _, values in elastic]
        ends = [[m - min(values) for m, (_, values) in zip(middle, elastic, strict=True)],
                [max(values) - m for m, (_, values) in zip(middle, elastic, strict=True)]]  # fmt: skip
        style: dict[str, Any] = {"color": "crimson", "marker": "o", "linewidth": 2.5, "capsize": 3, "zorder": 5}
        axes.errorbar([kept for kept, _ in elastic], middle, ends, label="stts-elastic", **style)
    for place, (name, points) in enumerate(lines.items()):
        style = {"color": "black", "linewidth": 2.0} if place == 0 else {
            "color": colormaps["tab20"]((place - 1) % 20), "linewidth": 1.3}  # fmt: skip
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=name, **style)
    if dense is not None:
        axes.axhline(dense, color="#555555", linestyle="--", label="dense")
    return _png(figure, axes)


def draw_scaling(frames: Sequence[int], lines: Mapping[str, Points]) -> bytes:
    """PNG. `lines`: number of frames and percent right by name; learned ones stand out."""
    figure, axes = _axes("frames")
    learned = cycle((("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")))
    for name, points in lines.items():
        style: dict[str, Any] = {"linewidth": 1.2, "marker": "."}
        if "learned" in name:
            dashes, marker = next(learned)
            style = {"color": "crimson", "linewidth": 2.2, "linestyle": dashes, "marker": marker}
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(frames, [str(count) for count in frames])
    return _png(figure, axes)


def _axes(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, _clear(figure.subplots(), label, "accuracy (%)")


def _clear(axes: Axes, x_label: str, y_label: str) -> Axes:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _png(figure: Figure, axes: Axes) -> bytes:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return _bytes(figure)


def _bytes(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
