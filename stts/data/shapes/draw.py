"""Drawing for ShapesQA: things with soft edges, a textured still background, and cheap frame noise.

Shape suffixes beside those of `stts.tokens`: H, W = pixels, C = 3 colour channels (RGB)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLOURS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (222, 36, 36),
        "green": (36, 176, 52),
        "blue": (40, 72, 232),
        "yellow": (240, 222, 40),
        "purple": (168, 44, 196),
        "cyan": (56, 214, 224),
    }
)
_PAINT = {**COLOURS, "white": (255, 255, 255)}  # white is no answer
NOISE_SHIFTS = 32


@dataclass(frozen=True, slots=True)
class Thing:
    """One object: where it is (pixels; the centre at frame 0) and on which native frames it shows."""

    shape: str
    """A key of `PLURALS`, "flash" or "glare"."""
    colour: str
    y: float
    x: float
    radius: float
    start: int
    stop: int
    """First frame shown, and one past the last."""
    velocity: tuple[float, float] = (0.0, 0.0)
    """(dy, dx) in pixels per native frame."""


def background(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(size, size, 3): smooth texture, fixed noise, and two to four bright corners, contrast without an answer."""
    weights = _upsampling(size)
    grey = rng.uniform(70, 150, (6, 6, 1)) + rng.uniform(-12, 12, (6, 6, 3))
    smooth: NDArray[np.float64] = weights @ grey.transpose(2, 0, 1) @ weights.T  # (C, H, W)
    still = smooth.transpose(1, 2, 0) + rng.uniform(-5, 5, (size, size, 3))
    blob = max(2, size // 16)
    for corner in rng.permutation(4)[: rng.integers(2, 5)]:
        y, x = (size - blob) * (corner // 2), (size - blob) * (corner % 2)
        still[y : y + blob, x : x + blob] = rng.choice((0, 255), (blob, blob, 1), p=(0.3, 0.7))
    return still


def noise_bank(size: int, rng: np.random.Generator) -> NDArray[np.int16]:
    """One sheet of noise, larger than a frame, from which `frame_noise` cuts a window for each frame."""
    return rng.integers(-4, 5, (size + NOISE_SHIFTS, size + NOISE_SHIFTS, 3), dtype=np.int16)


def frame_noise(bank: NDArray[np.int16], size: int, index_T: NDArray[np.int64]) -> NDArray[np.int16]:
    """(T, H, W, 3) noise that depends on the frame number alone.

    The place of the window is hashed from the frame number: random access for the price of a copy, where one random
    generator per frame would cost more than the rest of the drawing."""
    hashed = (index_T + 1) * 2654435761 >> 7
    windows = np.lib.stride_tricks.sliding_window_view(bank, (size, size), axis=(0, 1))
    cut: NDArray[np.int16] = windows[hashed % NOISE_SHIFTS, (hashed >> 9) % NOISE_SHIFTS].transpose(0, 2, 3, 1)
    return cut


@lru_cache(maxsize=8)
def _upsampling(size: int) -> NDArray[np.float64]:
    """(size, 6) bilinear weights from a coarse grid to pixels."""
    position = np.linspace(0, 5, size)[:, None]
    weights: NDArray[np.float64] = np.clip(1 - np.abs(position - np.arange(6)), 0, None)
    return weights


def _inside(shape: str, dy: NDArray[np.float64], dx: NDArray[np.float64], r: float) -> NDArray[np.float64]:
    """Signed distance in pixels, positive inside, of points relative to the centre."""
    distance: NDArray[np.float64]
    ax, ay = np.abs(dx), np.abs(dy)
    if shape in ("circle", "flash"):
        distance = r - np.sqrt(dy * dy + dx * dx)
    elif shape in ("square", "glare"):
        distance = 0.86 * r - np.maximum(ax, ay)
    elif shape == "triangle":  # apex up, as wide as high
        distance = np.minimum(0.8 * r - dy, (dy + r - 1.8 * ax) / 2.06)
    else:
        assert shape == "cross", shape
        bar = 0.34 * r
        distance = np.maximum(np.minimum(r - ax, bar - ay), np.minimum(r - ay, bar - ax))
    return distance


def draw(frames: NDArray[Any], thing: Thing, index_T: NDArray[np.int64]) -> None:
    """Blends one thing into the frames (T, H, W, 3) on which it shows, with a one-pixel soft edge."""
    rows = np.flatnonzero((index_T >= thing.start) & (index_T < thing.stop))
    if not len(rows):
        return
    size, reach = frames.shape[1], thing.radius + 1
    span = {"y": (thing.y, thing.velocity[0]), "x": (thing.x, thing.velocity[1])}
    low_high, offset = {}, {}
    for axis, (centre, velocity) in span.items():
        if velocity:  # leaves fully on one side before it comes back on the other
            period = size + 2 * reach
            centres = (centre + velocity * index_T[rows] + reach) % period - reach
            low, high = 0, size
        else:
            centres = np.array([centre])
            low, high = max(0, int(centre - reach)), min(size, int(centre + reach) + 1)
        low_high[axis] = (low, high)
        offset[axis] = np.arange(low, high) - centres[:, None]
    dy, dx = offset["y"][:, :, None], offset["x"][:, None, :]
    alpha = np.clip(_inside(thing.shape, dy, dx, thing.radius) + 0.5, 0, 1)[..., None]
    (top, bottom), (left, right) = low_high["y"], low_high["x"]
    patch = frames[rows, top:bottom, left:right]
    patch = patch + alpha * (np.array(_PAINT[thing.colour], float) - patch)
    if thing.shape == "flash":
        core = np.clip(_inside("circle", dy, dx, 0.4 * thing.radius) + 0.5, 0, 1)[..., None]
        patch = patch + core * (255 - patch)
    if thing.shape == "glare":  # a chequered square: the strongest contrast there can be
        patch = patch * (1 - alpha * (dy * dx > 0)[..., None])
    frames[rows, top:bottom, left:right] = patch.astype(frames.dtype)
