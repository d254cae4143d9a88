"""How much of the evidence, and of what only distracts, a method kept of a ShapesQA clip.

Accuracy says whether an answer is right; this says whether what it rests on was there to be seen. The labels are those
that `stts data shapes` writes beside the clips, so there are none for other data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stts.data.shapes.world import DISTRACTOR, EVIDENCE
from stts.tokens import Grid

Counts = Mapping[str, Sequence[int]]
"""`evidence` and `distractors` -> tokens kept, tokens there were."""


def count_kept(index_K: Tensor, grid: Grid, label_TYX: NDArray[np.uint8]) -> Counts:
    """Tokens that show evidence and tokens that show distractors: kept, and all there were.

    The first frame is left out: nothing that comes and goes is on it, and some methods keep it whole by rule. A token
    of several cells, or of several frames, shows evidence where one of them does. Nothing where tokens are no whole
    parts or multiples of cells.

    index_K: int64 numbers of the tokens kept, in a grid of tokens `grid`. label_TYX: as `stts.data.shapes.world`
    numbers what cells show."""
    shapes = list(zip((grid.t, grid.h, grid.w), label_TYX.shape, strict=True))
    if any(max(pair) % min(pair) for pair in shapes):
        return {}
    kept = np.zeros(grid.num_groups, bool)
    kept[index_K.cpu().numpy()] = True
    evidence = _on_tokens(np.isin(label_TYX, EVIDENCE), grid)
    distractors = _on_tokens(label_TYX == DISTRACTOR, grid) & ~evidence
    later = np.arange(grid.num_groups) >= grid.per_frame
    return {
        name: [int((kept & shown & later).sum()), int((shown & later).sum())]
        for name, shown in (("evidence", evidence), ("distractors", distractors))
    }


def _on_tokens(shown: NDArray[np.bool_], grid: Grid) -> NDArray[np.bool_]:
    """(tokens,) whether any cell that a token covers, or the cell that it lies in, is one of `shown` (T, Y, X)."""
    for axis, size in enumerate((grid.t, grid.h, grid.w)):
        if size >= shown.shape[axis]:
            shown = shown.repeat(size // shown.shape[axis], axis)
        else:
            parts = [*shown.shape[:axis], size, shown.shape[axis] // size, *shown.shape[axis + 1 :]]
            shown = shown.reshape(parts).max(axis + 1)
    return shown.reshape(-1)


def share_kept(counts: Sequence[Counts], name: str) -> float | None:
    """Share of the tokens of all clips together; None where there were none."""
    pairs = [one[name] for one in counts if name in one]
    total = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / total if total else None
