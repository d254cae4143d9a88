"""Accuracy over tokens, FLOPs and seconds: a curve per method and ratio along the number of frames."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from stts.eval.answering.cell import Kind
from stts.eval.results.scale_result import ScaleResult, ScaleRow, flops_unit, title_of

_MAPS: dict[Kind, str] = {
    "learned": "Reds",
    "in the ViT": "YlOrBr",
    "before the LLM": "Blues",
    "inside the LLM": "Purples",
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_PANELS = (
    ("llm_tokens", "visual tokens at the LLM"),
    ("tflops", "ViT, pruner, connector and LLM"),
    ("seconds", "seconds per question, decoding to answer"),
)


def draw(result: ScaleResult) -> bytes:
    """The figure as PNG bytes. Numbers at points are frames; bars, in the left panel, are 95 % intervals."""
    run = [row for row in result.rows if row.accuracy is not None]
    figure = Figure(figsize=(15, 5.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    equal_tokens = result.config["mode"] == "budget"
    curves = _curves(run, by_ratio=not equal_tokens)
    shown = [("num_frames", "frames; pruners at equal tokens, dense at all of them"), *_PANELS[1:]]
    panels = figure.subplots(1, len(_PANELS), sharey=True)
    for axes, (name, label) in zip(panels, shown if equal_tokens else _PANELS, strict=True):
        for curve in curves:
            _draw_curve(axes, curve, name, bars=axes is panels[0], style=_style(curve, run))
        size, unit = flops_unit(run) if name == "tflops" else (1.0, "")
        axes.set_xlabel(f"{unit}: {label} (log scale)" if unit else f"{label} (log scale)")
        axes.set_xscale("log")
        narrow = MaxNLocator(6, steps=[1, 2, 5, 10])
        axes.xaxis.set_major_locator(narrow if _narrow(run, name) else LogLocator(subs=(1, 2, 5)))
        if name == "num_frames":
            axes.xaxis.set_major_locator(FixedLocator(sorted({row.num_frames for row in run})))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, size=size: f"{value * size:.3g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)
    figure.suptitle(f"{title_of(result)}; numbers at points are frames, bars 95 % intervals", fontsize=12)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _curves(rows: Sequence[ScaleRow], *, by_ratio: bool) -> list[list[ScaleRow]]:
    """Rows of one method (and ratio), along the number of frames."""

    def group(row: ScaleRow) -> tuple[bool, str, float]:
        return row.kind != "unpruned", row.method, -row.retention_configured if by_ratio else 0.0

    ordered = sorted(rows, key=lambda row: (group(row), row.num_frames))
    return [list(found) for _, found in groupby(ordered, key=group)]


def _draw_curve(axes: Axes, curve: Sequence[ScaleRow], name: str, *, bars: bool, style: tuple[Any, str]) -> None:
    shown = [row for row in curve if getattr(row, name)]
    if not shown:
        return
    first = curve[0]
    x, y = [getattr(row, name) for row in shown], [100 * (row.accuracy or 0) for row in shown]
    several = len({row.retention_configured for row in curve}) > 1
    label = first.method if first.kind == "unpruned" or several else f"{first.method} {first.retention_configured:g}"
    colour, marker = style
    axes.plot(
        x, y, label=label, color=colour, marker=marker, markersize=6, linewidth=1.6, markeredgecolor="white",
        markeredgewidth=0.6, linestyle="--" if first.kind == "unpruned" else "-",
    )  # fmt: skip
    if bars:
        low, high = ([100 * (getattr(row, f"accuracy_{end}") or 0) for row in shown] for end in ("low", "high"))
        error = ([a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)])
        axes.errorbar(x, y, error, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.35)
    for row, across, up in zip(shown, x, y, strict=True):
        axes.annotate(
            str(row.num_frames), (across, up), xytext=(0, 5), textcoords="offset points", fontsize=7, color=colour,
            ha="center",
        )  # fmt: skip


def _style(curve: Sequence[ScaleRow], rows: Sequence[ScaleRow]) -> tuple[Any, str]:
    """Colour by where a method drops tokens, lighter with the ratio, or with the method where ratios vary along the
    curve; a marker per method."""
    first = curve[0]
    if first.kind == "unpruned":
        return "#444444", "o"
    methods = list(dict.fromkeys(row.method for row in rows if row.kind != "unpruned"))
    ratios = sorted({row.retention_configured for row in rows if row.kind != "unpruned"}, reverse=True)
    alike = list(dict.fromkeys(row.method for row in rows if row.kind == first.kind))
    several = len({row.retention_configured for row in curve}) > 1
    place, steps = (alike.index(first.method), alike) if several else (ratios.index(first.retention_configured), ratios)
    shade = 0.9 - 0.5 * place / max(1, len(steps) - 1)
    return colormaps[_MAPS[first.kind]](shade), _MARKERS[methods.index(first.method) % len(_MARKERS)]


def _narrow(rows: Sequence[ScaleRow], name: str) -> bool:
    values = [getattr(row, name) for row in rows if getattr(row, name)]
    return not values or math.log10(max(values) / min(values)) < 1
