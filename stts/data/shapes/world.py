"""What changes in a ShapesQA clip without being asked about: distractor cells, a moving camera, uneven exposure.

Where only evidence changes, a rule that keeps what changes is as good as a scorer can get. `ShapesConfig.distractors`
paints other cells anew on every sampled frame, and `cell_labels` says for each cell what it shows, so that a
pruner can be judged by what it keeps: evidence or distractors.

Shape suffixes beside those of `stts.tokens`: Y, X = rows and columns of cells, H, W = pixels, of a cell too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from stts.data.shapes.draw import COLOURS, Thing
from stts.data.shapes.scene import DISTRACTOR_KINDS, ShapesConfig, sampled_indices

_SHARES: Mapping[str, float] = MappingProxyType(dict(zip(DISTRACTOR_KINDS, (0.35, 0.3, 0.35), strict=True)))
BACKGROUND, RESTING, DISTRACTOR, FLASH, PAIR, MOVING = range(6)
"""What a cell shows: nothing; a thing that is there all the time; a distractor; a flash; a thing that comes and goes,
such as those of `order`; a thing on its way. The order is that of the letters in `LETTERS`."""
LETTERS = ".rdfpm"
EVIDENCE = (FLASH, PAIR, MOVING)
"""What is shown for a while and asked about. Resting things are asked about as well, but the first frame shows them."""
_PALETTE = np.array(list(COLOURS.values()), float)
_Patch = tuple[int, NDArray[np.int16], NDArray[np.bool_]]
"""Cell number, picture (H, W, 3), and where it covers the background (H, W, 1)."""


def cell_labels(things: Sequence[Thing], num_frames: int, config: ShapesConfig) -> NDArray[np.uint8]:
    """(T, Y, X): what every cell shows on every sampled frame, distractors apart."""
    tick_T = sampled_indices(num_frames, config.num_sampled)
    label_TYX = np.zeros((len(tick_T), config.grid, config.grid), np.uint8)
    for thing in things:
        for place, tick in enumerate(tick_T.tolist()):
            if thing.start <= tick < thing.stop:
                label_TYX[place][_covered(thing, tick, config)] = _label(thing, num_frames)
    return label_TYX


def _label(thing: Thing, num_frames: int) -> int:
    if thing.shape == "flash":
        return FLASH
    if any(thing.velocity):
        return MOVING
    return RESTING if thing.start == 0 and thing.stop == num_frames else PAIR


def _covered(thing: Thing, frame: int, config: ShapesConfig) -> NDArray[np.bool_]:
    """(Y, X): the cells that a thing touches; one, unless it moves."""
    side = config.frame_size / config.grid
    near_YX = np.ones((config.grid, config.grid), bool)
    for axis, (centre, velocity) in enumerate(((thing.y, thing.velocity[0]), (thing.x, thing.velocity[1]))):
        if not velocity:
            near = np.arange(config.grid) == int(centre / side)
        else:  # re-enters at the edge, as `draw` has it
            reach = thing.radius + 1
            at = (centre + velocity * frame + reach) % (config.frame_size + 2 * reach) - reach
            middle = (np.arange(config.grid) + 0.5) * side
            near = np.abs(middle - at) < side / 2 + thing.radius
        near_YX &= near[:, None] if axis == 0 else near[None, :]
    return near_YX


class World:
    """Distractors, camera and exposure of one clip, drawn once for every sampled frame.

    A native frame shows what the nearest sampled frame shows. Where a thing is on such a frame, it covers the
    distractor whole: the two are never seen in one cell."""

    def __init__(
        self, things: Sequence[Thing], num_frames: int, config: ShapesConfig, rng: np.random.Generator
    ) -> None:
        self.config, self.things, self.num_frames = config, things, num_frames
        self.tick_T = sampled_indices(num_frames, config.num_sampled)
        shake, size = config.camera_shake, len(self.tick_T)
        self._shake_T2 = rng.integers(-shake, shake + 1, (size, 2))
        angle, per_tick = rng.uniform(0, 2 * np.pi), config.camera_drift
        self._drift_T2 = np.arange(size)[:, None] * per_tick * np.array([np.sin(angle), np.cos(angle)])
        self._gain_T = rng.uniform(1 - config.flicker, 1 + config.flicker, size)
        distracted = config.distractors[1] and rng.random() < config.distracted_share
        self._patches = [self._place(label_YX, rng) for label_YX in self.label_TYX] if distracted else []

    @cached_property
    def label_TYX(self) -> NDArray[np.uint8]:
        return cell_labels(self.things, self.num_frames, self.config)

    def _place(self, label_YX: NDArray[np.uint8], rng: np.random.Generator) -> list[_Patch]:
        """Distractors in free cells of one sampled frame; `label_YX` is told of them."""
        least, most = self.config.distractors
        free = rng.permutation(np.flatnonzero(label_YX == BACKGROUND))[: int(rng.integers(least, most + 1))]
        label_YX.flat[free] = DISTRACTOR
        kinds = self.config.distractor_kinds
        shares = np.array([_SHARES[kind] for kind in kinds])
        side = self.config.frame_size // self.config.grid
        drawn = rng.choice(len(kinds), len(free), p=shares / shares.sum())
        return [(int(cell), *distractor(kinds[kind], side, rng)) for cell, kind in zip(free, drawn, strict=True)]

    def slot(self, index_T: NDArray[np.int64]) -> NDArray[np.int64]:
        """The nearest sampled frame of native ones, the later of two."""
        return np.searchsorted((self.tick_T[1:] + self.tick_T[:-1]) / 2, index_T, side="right")

    def still(self, still: NDArray[np.int16], index_T: NDArray[np.int64]) -> NDArray[np.int16]:
        """(T, H, W, 3): the background (H, W, 3) as the camera sees it; what leaves at one edge enters at the other."""
        if not self.config.camera_moves:
            return np.repeat(still[None], len(index_T), axis=0)
        slot_T = self.slot(index_T)
        offset_T2 = self._shake_T2[slot_T] + np.round(self._drift_T2[slot_T]).astype(np.int64)
        y_TH, x_TW = ((np.arange(len(still)) + offset_T2[:, axis, None]) % len(still) for axis in (0, 1))
        moved: NDArray[np.int16] = still[y_TH[:, :, None], x_TW[:, None, :]]
        return moved

    def distract(self, frames: NDArray[np.int16], index_T: NDArray[np.int64]) -> None:
        """Paints distractors into the frames (T, H, W, 3) of native numbers `index_T`."""
        if not self._patches:
            return
        grid, side = self.config.grid, self.config.frame_size / self.config.grid
        for picture, frame, slot in zip(frames, index_T.tolist(), self.slot(index_T).tolist(), strict=True):
            here = [thing for thing in self.things if thing.start <= frame < thing.stop]
            taken = {int(thing.y / side) * grid + int(thing.x / side) for thing in here}
            for cell, patch, covers in self._patches[slot]:
                if cell not in taken:
                    y, x = (int(place * side) for place in divmod(cell, grid))
                    view = picture[y : y + len(patch), x : x + len(patch)]
                    np.copyto(view, patch, where=covers)

    def expose(self, frames: NDArray[np.int16], index_T: NDArray[np.int64]) -> NDArray[np.int16]:
        """The frames as bright as their exposure makes them."""
        if not self.config.flicker:
            return frames
        return np.round(frames * self._gain_T[self.slot(index_T), None, None, None]).astype(np.int16)


def distractor(kind: str, side: int, rng: np.random.Generator) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """A picture for one cell (H, W, 3), and where it covers the background (H, W, 1): whole, or as large as a thing.

    grey: checkers, bars, noise or one tone. confetti: small blocks of all answer colours. answer: checkers or bars of
    one answer colour and of black or white."""
    y, x = np.mgrid[:side, :side]
    unit = side / 16
    period = max(1, round(unit * int(rng.choice((2, 4, 8) if kind == "grey" else (2, 4)))))
    shift_y, shift_x = rng.integers(0, 8, 2)
    rows, columns = (y + shift_y) // period, (x + shift_x) // period
    if kind == "confetti":
        blocks = _PALETTE[rng.integers(len(_PALETTE), size=(rows.max() + 1, columns.max() + 1))]
        picture = blocks[rows, columns]
    else:
        masks = [(rows + columns) % 2, rows % 2, columns % 2]
        if kind == "grey":
            masks += [rng.integers(0, 2, (side, side)), np.ones((side, side), int), np.zeros((side, side), int)]
            light, dark = np.full(3, rng.uniform(195, 255)), np.full(3, rng.uniform(0, 60))
        else:
            light, dark = _PALETTE[rng.integers(len(_PALETTE))], np.full(3, rng.choice((0.0, 255.0)))
        picture = np.where(masks[rng.integers(len(masks))][..., None] > 0, light, dark)
    picture = picture + rng.uniform(-6, 6, (side, side, 1 if kind != "confetti" else 3))
    covers = np.ones((side, side, 1), bool)
    if rng.random() < 0.4:
        centre = (side - 1) / 2
        covers = (np.maximum(abs(y - centre), abs(x - centre)) < unit * rng.uniform(5, 8))[..., None]
    return picture.clip(0, 255).astype(np.int16), covers
