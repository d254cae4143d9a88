"""What is in a ShapesQA clip: the questions' families, and the scene built around answers drawn beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from stts.data.shapes_draw import COLOURS, Thing

PLURALS: Mapping[str, str] = MappingProxyType(
    {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
)
DIRECTIONS: Mapping[str, tuple[int, int]] = MappingProxyType(  # (dy, dx), y grows downwards
    {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
)
COUNTS = ("1", "2", "3", "4")
OPTIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "colour": tuple(COLOURS),
        "existence": ("yes", "no"),
        "order": tuple(COLOURS),
        "direction": tuple(DIRECTIONS),
        "count": COUNTS,
        "flash": tuple(COLOURS),
    }
)
FAMILIES = tuple(OPTIONS)
SHORTEST_S = 2.0  # seconds of the shortest clip


@dataclass(frozen=True)
class ShapesConfig:
    """What clips look like. `families` also decides the content: one family alone gives sparse, easy scenes."""

    frame_size: int = 48
    """Pixels, height and width; things scale with it (radius 5.5 to 7 at 48)."""
    fps: float = 8.0
    num_sampled: int = 16
    """Frames of the uniform sampler for which evidence is timed."""
    families: tuple[str, ...] = FAMILIES

    def __post_init__(self) -> None:
        object.__setattr__(self, "families", tuple(self.families))
        unknown = [family for family in self.families if family not in OPTIONS]
        if unknown or not self.families or len(set(self.families)) != len(self.families):
            raise ValueError(f"families={self.families} must be one or more different names out of {tuple(OPTIONS)}")
        if self.frame_size < 24 or self.frame_size % 2:
            raise ValueError(f"frame_size={self.frame_size} must be even (video codecs) and at least 24 pixels")
        if self.num_sampled < 8:
            raise ValueError(f"num_sampled={self.num_sampled} must be at least 8 to show two things in turn")
        if not SHORTEST_S * self.fps >= self.num_sampled:
            raise ValueError(
                f"fps={self.fps} gives a {SHORTEST_S:g}-second clip fewer frames than num_sampled={self.num_sampled}; "
                f"set fps to {self.num_sampled / SHORTEST_S:g} or more"
            )


@dataclass(frozen=True, slots=True)
class Question:
    family: str
    text: str
    """Lower-case words and "?", separated by single spaces."""
    answer: str
    options: tuple[str, ...]


def sampled_indices(num_frames: int, num_sampled: int) -> NDArray[np.int64]:
    """The frames that the `uniform_inclusive` sampler picks: `trunc(linspace(0, num_frames - 1, num_sampled))`."""
    return np.linspace(0, num_frames - 1, num_sampled).astype(np.int64)


class Scene:
    """A clip under construction: which cells and shapes are still free, and what has been placed."""

    def __init__(self, config: ShapesConfig, rng: np.random.Generator, num_frames: int) -> None:
        self.config, self.rng, self.num_frames = config, rng, num_frames
        self.unit = config.frame_size / 48
        self.tick = sampled_indices(num_frames, config.num_sampled)
        self.cells = [(int(cell) // 3, int(cell) % 3) for cell in rng.permutation(9)]
        self.shapes = [str(shape) for shape in rng.permutation(list(PLURALS))]
        self.things: list[Thing] = []
        self.named_colours: set[str] = set()  # part of a question's words: no bystander may wear them
        self.unique_shapes: set[str] = set()

    def colour(self) -> str:
        return str(self.rng.choice(list(COLOURS)))

    def place(self, shape: str, colour: str, start: int = 0, stop: int | None = None) -> None:
        """Puts a resting thing into a free cell; clear of its neighbours by half a pixel or more."""
        cell = 16 * self.unit
        radius = self.unit * self.rng.uniform(5.5, 7.0)
        jitter = self.rng.uniform(-1, 1, 2) * (7.75 * self.unit - radius)
        y, x = (np.array(self.cells.pop()) + 0.5) * cell + jitter
        self.things.append(Thing(shape, colour, y, x, radius, start, self.num_frames if stop is None else stop))

    def shown(self, first: int, last: int) -> tuple[int, int]:
        """Native frames (start, stop) that are seen on the ticks first..last and on no other."""
        before = self.tick[first - 1] if first else -1
        after = self.tick[last + 1] if last + 1 < len(self.tick) else self.num_frames
        return int(self.rng.integers(before + 1, self.tick[first] + 1)), int(
            self.rng.integers(self.tick[last] + 1, after + 1)
        )

    def direction(self) -> Question:
        """Must come first: it takes a whole row or column."""
        answer = str(self.rng.choice(list(DIRECTIONS)))
        dy, dx = DIRECTIONS[answer]
        lane, shape, colour = int(self.rng.integers(3)), self.shapes.pop(), self.colour()
        self.cells = [cell for cell in self.cells if cell[0 if dx else 1] != lane]
        radius, size = self.unit * self.rng.uniform(5.5, 7.0), self.config.frame_size
        across, along = (lane + 0.5) * 16 * self.unit, self.rng.uniform(radius, size - radius)
        # Whole on the first frame: something first seen half-way would answer "which colour appeared first" wrongly.
        # 2.6 to 3.4 pixels between 16 sampled frames: about one crossing of the frame, whatever the length.
        speed = 15 * self.unit * self.rng.uniform(2.6, 3.4) / (self.num_frames - 1)
        y, x = (across, along) if dx else (along, across)
        self.things.append(Thing(shape, colour, y, x, radius, 0, self.num_frames, (dy * speed, dx * speed)))
        self.named_colours.add(colour)
        return _ask("direction", f"which way does the {colour} {shape} move ?", answer)

    def pair(self) -> dict[str, Question]:
        """Two things of different shape and colour, shown one after the other; serves `order` and `existence`."""
        rng, num_ticks = self.rng, len(self.tick)
        lengths = rng.integers(max(2, num_ticks // 5), num_ticks // 3 + 1, 2)
        first, second = np.sort(rng.integers(1, 1 + num_ticks - lengths.sum(), 2)) + np.array(
            [0, lengths[0]]
        )  # never on one tick
        colours = [str(colour) for colour in rng.permutation(list(COLOURS))[:2]]
        shapes = [self.shapes.pop(), self.shapes.pop()]
        for shape, colour, start, length in zip(shapes, colours, (first, second), lengths, strict=True):
            self.place(shape, colour, *self.shown(start, start + length - 1))
        self.named_colours.update(colours)
        which, one, real = (int(flag) for flag in rng.integers(0, 2, 3))
        named = f"{colours[one]} {shapes[one if real else 1 - one]}"
        return {
            "order": _ask("order", f"which colour appeared {('first', 'last')[which]} ?", colours[which]),
            "existence": _ask("existence", f"is there a {named} ?", "yes" if real else "no"),
        }

    def count(self) -> Question:
        shape, answer = self.shapes.pop(), int(self.rng.integers(1, 5))
        for _ in range(answer):
            self.place(shape, self.colour())
        self.unique_shapes.add(shape)
        return _ask("count", f"how many {PLURALS[shape]} are there ?", str(answer))

    def colour_of(self) -> Question:
        shape, colour = self.shapes.pop(), self.colour()
        self.place(shape, colour)
        self.unique_shapes.add(shape)
        return _ask("colour", f"what colour is the {shape} ?", colour)

    def flash(self) -> Question:
        """Fills half of the way to the neighbouring ticks, so denser sampling sees it on more frames, not on one."""
        at, colour = int(self.rng.integers(1, len(self.tick) - 1)), self.colour()
        before, here, after = (int(frame) for frame in self.tick[at - 1 : at + 2])
        self.place("flash", colour, here - (here - before - 1) // 2, here + (after - here - 1) // 2 + 1)
        return _ask("flash", "which colour flashed ?", colour)

    def bystanders(self) -> None:
        """One or two resting things that no question is about."""
        shapes = [shape for shape in PLURALS if shape not in self.unique_shapes]
        colours = [colour for colour in COLOURS if colour not in self.named_colours]
        for _ in range(min(len(self.cells), int(self.rng.integers(1, 3)))):
            self.place(str(self.rng.choice(shapes)), str(self.rng.choice(colours)))


def _ask(family: str, text: str, answer: str) -> Question:
    return Question(family, text, answer, OPTIONS[family])
