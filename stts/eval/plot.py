"""Accuracy over what was kept, and over what it cost: one curve per method, dense as a dashed line and band."""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from stts.eval.table import BEFORE, DENSE, ComparisonResult, Row

# Okabe and Ito's colours: told apart with any colour vision; markers differ too.
_STYLES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"))
_GREY = "#555555"


def draw(result: ComparisonResult) -> bytes:
    """The figure as PNG bytes. Error bars are 95 % intervals."""
    figure = Figure(figsize=(10, 4.8), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    rows = [row for row in result.rows if row.accuracy is not None]
    pruned = [row for row in rows if row.method not in (DENSE, BEFORE)]
    methods = list(dict.fromkeys(row.method for row in pruned))
    for axes in (left, right):
        _references(axes, rows)
    ratios = sorted({row.retention_configured for row in pruned})
    for number, method in enumerate(methods):
        points = sorted((row for row in pruned if row.method == method), key=lambda row: row.retention_configured)
        # Error bars of methods at one budget would cover each other: each is moved a little to the side.
        place = number - (len(methods) - 1) / 2
        _curve(left, [row.retention_configured * 1.022**place for row in points], points, number)
        _curve(right, [100 * (row.flops_share or 0) + 0.3 * place for row in points], points, number)
    _axis_of_ratios(left, ratios)
    left.set_ylabel("accuracy (%)")
    right.set_xlabel("FLOPs of ViT, pruner, connector and LLM (% of dense)")
    for axes in (left, right):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    first = next(row for row in rows if row.method == DENSE)
    title = f"{result.config['name']}: {first.num_samples} questions on {first.num_videos} videos"
    figure.suptitle(f"{title}; bars and band are 95 % intervals", fontsize=12)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def _references(axes: Axes, rows: list[Row]) -> None:
    for row in rows:
        if row.method not in (DENSE, BEFORE) or row.accuracy is None:
            continue
        style = "--" if row.method == DENSE else ":"
        axes.axhline(100 * row.accuracy, color=_GREY, linestyle=style, linewidth=1.4, label=row.method, zorder=1)
        if row.method == DENSE:
            axes.axhspan(100 * (row.accuracy_low or 0), 100 * (row.accuracy_high or 0), color=_GREY, alpha=0.12, lw=0)


def _curve(axes: Axes, x: list[float], points: list[Row], number: int) -> None:
    turn, place = divmod(number, len(_STYLES))
    colour, marker = _STYLES[place][0], _STYLES[(place + turn) % len(_STYLES)][1]
    line = ("-", "--", "-.")[turn % 3]
    y = [100 * (row.accuracy or 0) for row in points]
    below = [100 * ((row.accuracy or 0) - (row.accuracy_low or 0)) for row in points]
    above = [100 * ((row.accuracy_high or 0) - (row.accuracy or 0)) for row in points]
    axes.errorbar(
        x, y, yerr=(below, above), label=points[0].method, color=colour, marker=marker, linestyle=line, markersize=6,
        linewidth=1.8,
        elinewidth=1, capsize=2.5, zorder=3,
    )  # fmt: skip


def _axis_of_ratios(axes: Axes, ratios: list[float]) -> None:
    axes.set_xlabel("visual tokens kept (%, log scale)")
    if not ratios:
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ratios))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.set_xlim(ratios[0] / 1.25, ratios[-1] * 1.25)
