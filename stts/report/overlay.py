"""Frames with what was dropped darkened, as one picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from stts.models.pruning.report import Report

_TILE = 128  # pixels per frame in the picture, at least
_COLUMNS, _MOST_FRAMES = 8, 32
_DARK = 0.2
_LINE = 14  # height of a caption


def draw_overlay(frames: NDArray[np.uint8], report: Report, title: str = "", video: int = 0) -> Image.Image:
    """Frames in reading order, each above its scores.

    Dropped groups are darkened. Scores are coloured by rank, purple (the lowest of the video) to yellow (the highest):
    one far above the rest would else leave all others alike. What was gone before the stage that scored is lowest.
    Where the pruner gave none, there are frames alone. Of more than 32 frames evenly spread ones are shown. Several
    frames may share a temporal cell."""
    grid = report.grids[video]
    cells = grid.num_groups
    alive = np.zeros(cells, bool)
    alive[report.index[video].cpu().numpy()] = True
    kept = alive.reshape(grid.t, grid.h, grid.w)
    score_G = report.scores[video]
    scores = None
    if score_G is not None:
        value = score_G.detach().float().cpu().numpy()
        rank = np.unique(np.where(np.isnan(value), -np.inf, value), return_inverse=True)[1]  # equal scores, equal rank
        scores = (rank / max(1, rank.max())).reshape(grid.t, grid.h, grid.w)
    shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _MOST_FRAMES)).round().astype(int))
    side = -(-_TILE // frames.shape[2]) * frames.shape[2], -(-_TILE // frames.shape[2]) * frames.shape[1]
    width, height = side[0] + 4, (side[1] + 2) * (1 if scores is None else 2) + _LINE + 4
    columns = min(_COLUMNS, len(shown))
    picture = Image.new("RGB", (max(columns * width, 320), -(-len(shown) // columns) * height + 2 * _LINE), "white")
    pen = ImageDraw.Draw(picture)
    caption = f"{title}   kept {kept.sum()} of {cells} groups ({kept.mean():.1%})"
    if scores is not None:
        caption += "   below: scores by rank, purple lowest, yellow highest"
    pen.text((2, 2), caption, fill="black")
    for number, frame in enumerate(shown):
        cell = frame * grid.t // len(frames)
        x, y = number % columns * width + 2, number // columns * height + 2 * _LINE
        pen.text((x, y), f"{frame}: {kept[cell].sum()}/{grid.per_frame}", fill="black")
        light = _DARK + (1 - _DARK) * kept[cell]
        image = Image.fromarray(frames[frame]).resize(side, Image.Resampling.NEAREST)
        factor = _spread(light, image.height, image.width)[..., None]
        picture.paste(Image.fromarray((np.asarray(image) * factor).astype(np.uint8)), (x, y + _LINE))
        if scores is not None:
            heat = colormaps["viridis"](_spread(scores[cell], image.height, image.width))[..., :3]
            picture.paste(Image.fromarray((255 * heat).astype(np.uint8)), (x, y + _LINE + side[1] + 2))
    return picture


def _spread(cells: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """(h, w) cells drawn over (height, width) pixels."""
    rows, columns = (np.arange(n) * size // n for n, size in zip((height, width), cells.shape, strict=True))
    return cells[rows[:, None], columns]
