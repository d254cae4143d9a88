"""What is in a ShapesQA clip: the questions' families, and the scene built around answers drawn beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stts.data.shapes.draw import COLOURS, Thing

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
DISTRACTOR_KINDS = ("grey", "confetti", "answer")
SHORTEST_S = 2.0  # seconds of the shortest clip


@dataclass(frozen=True)
class ShapesConfig:
    """What clips look like. `families` also decides the content: one family alone gives sparse, easy scenes."""

    frame_size: int = 48
    """Pixels, height and width; things scale with a cell (radius 5.5 to 7 in one of 16 pixels)."""
    fps: float = 8.0
    num_sampled: int = 16
    """Frames of the uniform sampler for which evidence is timed."""
    families: tuple[str, ...] = FAMILIES
    families_per_clip: int = 3
    """At most so many kinds of questions about one clip."""
    grid: int = 3
    """Cells per side, one thing a cell: more cells make evidence smaller, and leave room for more of it."""
    ask_by: Literal["shape", "colour"] = "shape"
    """What `count` and `existence` name. By colour they need no telling apart of small shapes; see shapes_colour.py."""
    questions_per_family: int = 1
    """With ask_by='colour': 2 asks twice, about other things, where the scene has room; more also ask about every
    colour there is, so that one pass of the model teaches a dozen answers."""
    num_glares: int = 0
    """Bright black-and-white things that rest and that no question is about: contrast without an answer."""
    active_share: float = 1.0
    """Share of the sampled frames, one stretch at a random time, in which things come and go. All others are near
    duplicates of their neighbours."""
    pair_ticks: tuple[int, int] | None = None
    """Fewest and most sampled frames on which a thing that comes and goes is seen; null: a fifth to a third of the
    stretch in which things come and go."""
    distractors: tuple[int, int] = (0, 0)
    """Fewest and most cells of every sampled frame, as far as they are free, in which something that no question is
    about is drawn anew: change that is not relevant. See world.py."""
    distracted_share: float = 1.0
    """Share of the clips that have distractors; the others are as calm as without them."""
    distractor_kinds: tuple[str, ...] = DISTRACTOR_KINDS
    """Kinds of distractors: grey patterns, confetti of all answer colours, patterns of one answer colour."""
    camera_drift: float = 0.0
    """Pixels by which the background moves from one sampled frame to the next, in one direction; things stay in their
    cells."""
    camera_shake: int = 0
    """Most pixels by which the background is off its place, drawn anew for every sampled frame."""
    flicker: float = 0.0
    """Exposure of a sampled frame: everything times a factor between 1 - flicker and 1 + flicker."""
    show: Literal["clip", "one_frame", "nothing"] = "clip"
    """What can be seen: the clip; its middle sampled frame all the time; or the background alone. The questions stay,
    so that the last two are the controls `single-frame` and `question-only` of a data set."""

    def __post_init__(self) -> None:
        for name in ("families", "distractors", "distractor_kinds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.pair_ticks is not None:
            object.__setattr__(self, "pair_ticks", tuple(self.pair_ticks))
        unknown = [family for family in self.families if family not in OPTIONS]
        if unknown or not self.families or len(set(self.families)) != len(self.families):
            raise ValueError(f"families={self.families} must be one or more different names out of {tuple(OPTIONS)}")
        if self.frame_size < 24 or self.frame_size % 2:
            raise ValueError(f"frame_size={self.frame_size} must be even (video codecs) and at least 24 pixels")
        for name, allowed in (("ask_by", ("shape", "colour")), ("show", ("clip", "one_frame", "nothing"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")
        if not 1 <= self.questions_per_family <= (6 if self.ask_by == "colour" else 1) or self.families_per_clip < 1:
            raise ValueError(
                f"families_per_clip={self.families_per_clip} must be at least 1, and questions_per_family="
                f"{self.questions_per_family} be 1, or 1 to 6 with ask_by='colour'"
            )
        still = self.ask_by == "colour" and not {"order", "flash", "direction"} & set(self.families)
        if self.num_sampled < (1 if still else 8):
            raise ValueError(
                f"num_sampled={self.num_sampled} must be at least 8 to show two things in turn; fewer only "
                "without order, flash and direction, and with ask_by='colour'"
            )
        self._check_time()
        self._check_room()
        self._check_world()
        if not SHORTEST_S * self.fps >= self.num_sampled:
            raise ValueError(
                f"fps={self.fps} gives a {SHORTEST_S:g}-second clip fewer frames than num_sampled={self.num_sampled}; "
                f"set fps to {self.num_sampled / SHORTEST_S:g} or more"
            )

    def sampled(self, num_sampled: int) -> ShapesConfig:
        """The same form for a sampler of so many frames, at a frame rate that gives the shortest clip as many."""
        return replace(self, num_sampled=num_sampled, fps=max(self.fps, num_sampled / SHORTEST_S))

    @property
    def active_ticks(self) -> int:
        """Sampled frames in a row on which things may come and go."""
        return max(1, round(self.active_share * self.num_sampled))

    def _check_time(self) -> None:
        least, most = self.pair_ticks or (2, max(2, self.active_ticks // 3))
        events = {"order", "existence", "flash"} & set(self.families) and self.num_sampled >= 8
        if not 0 < self.active_share <= 1 or (events and not 1 <= least <= most <= (self.active_ticks - 1) // 2):
            raise ValueError(
                f"active_share={self.active_share} (in (0, 1]) leaves {self.active_ticks} of num_sampled="
                f"{self.num_sampled} frames, in which two things must be seen for {least} to {most} frames each, one "
                "after the other, and not on the first frame; raise the share or lower pair_ticks"
            )

    @property
    def camera_moves(self) -> bool:
        return self.camera_drift != 0 or self.camera_shake != 0

    def _check_world(self) -> None:
        least, most = self.distractors if len(self.distractors) == 2 else (0, -1)
        if not 0 <= least <= most <= self.grid**2:
            raise ValueError(
                f"distractors={self.distractors} must be the fewest and the most per frame, 0 to {self.grid**2} (the "
                f"cells of grid={self.grid}), such as [3, 5]"
            )
        if most and "direction" in self.families:
            raise ValueError(
                f"distractors={self.distractors}: a moving thing owns a row; leave direction out of families"
            )
        if not self.distractor_kinds or not set(self.distractor_kinds) <= set(DISTRACTOR_KINDS):
            raise ValueError(f"distractor_kinds={self.distractor_kinds} must be one or more of {DISTRACTOR_KINDS}")
        if not 0 <= self.distracted_share <= 1:
            raise ValueError(f"distracted_share={self.distracted_share} must be a share of the clips, in [0, 1]")
        if self.camera_drift < 0 or self.camera_shake < 0 or not 0 <= self.flicker < 1:
            raise ValueError(
                f"camera_drift={self.camera_drift} and camera_shake={self.camera_shake} are pixels from 0 on, flicker="
                f"{self.flicker} is a share in [0, 1)"
            )

    def num_things(self, family: str) -> int:
        """Groups of `count`, or named shapes of `colour`: as many as are asked about, and fit."""
        most = min(2, self.questions_per_family)
        colours = most if self._cells_needed({"colour": most, "count": 1}) <= self.grid**2 else 1
        both = {"colour": colours, "count": most}
        return {"colour": colours, "count": both["count"] if self._cells_needed(both) <= self.grid**2 else 1}[family]

    def _cells_needed(self, num: Mapping[str, int]) -> int:
        need = {"direction": self.grid, "count": 4 * num["count"], "colour": num["colour"], "flash": 1}
        asked = [need[family] for family in self.families if family in need]
        if {"order", "existence"} & set(self.families):
            asked.append(2)
        return sum(sorted(asked)[-self.families_per_clip :]) + self.num_glares

    def _check_room(self) -> None:
        cells = self._cells_needed({"colour": 1, "count": 1})
        if self.num_glares < 0 or self.grid < 2 or cells > self.grid**2:
            raise ValueError(
                f"grid={self.grid} (at least 2) has {self.grid**2} cells for up to {cells} things with num_glares="
                f"{self.num_glares} (at least 0) and families_per_clip={self.families_per_clip}; raise grid"
            )
        if self.frame_size < 8 * self.grid:
            raise ValueError(f"frame_size={self.frame_size} leaves cells of fewer than 8 pixels with grid={self.grid}")


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
        self.unit = config.frame_size / (16 * config.grid)
        self.tick = sampled_indices(num_frames, config.num_sampled)
        self.cells = [divmod(int(cell), config.grid) for cell in rng.permutation(config.grid**2)]
        self.shapes = [str(shape) for shape in rng.permutation(list(PLURALS))]
        self.things: list[Thing] = []
        self.named_colours: set[str] = set()  # part of a question's words: no bystander may wear them
        self.unique_shapes: set[str] = set()
        spare = config.num_sampled - config.active_ticks
        begin = int(rng.integers(spare + 1)) if spare else 0
        self.active = range(max(1, begin), begin + config.active_ticks)  # ticks on which something may be new

    def build(self, families: Sequence[str]) -> dict[str, list[Question]]:
        """Places everything; the questions of each family asked, in the order in which to ask them."""
        asked: dict[str, list[Question]] = {}
        self.glares()
        if "direction" in families:
            asked["direction"] = self.direction()
        if "order" in families or "existence" in families:
            asked |= self.pair()
        if "count" in families:
            asked["count"] = self.count()
        if "colour" in families:
            asked["colour"] = self.colour_of()
        if "flash" in families:
            asked["flash"] = self.flash()
        if "count" in families or "colour" in families:
            self.bystanders()
        return asked

    def any_colour(self) -> str:
        return str(self.rng.choice(list(COLOURS)))

    def colour(self) -> str:
        """Of something at rest, or that moves."""
        return self.any_colour()

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

    def direction(self) -> list[Question]:
        """Must come first: it takes a whole row or column."""
        answer = str(self.rng.choice(list(DIRECTIONS)))
        dy, dx = DIRECTIONS[answer]
        lane, shape, colour = int(self.rng.integers(self.config.grid)), self.shapes.pop(), self.colour()
        self.cells = [cell for cell in self.cells if cell[0 if dx else 1] != lane]
        radius, size = self.unit * self.rng.uniform(5.5, 7.0), self.config.frame_size
        across, along = (lane + 0.5) * 16 * self.unit, self.rng.uniform(radius, size - radius)
        # Whole on the first frame: something first seen half-way would answer "which colour appeared first" wrongly.
        # 2.6 to 3.4 pixels between 16 sampled frames: about one crossing of the frame, whatever the length.
        speed = 15 * (size / 48) * self.rng.uniform(2.6, 3.4) / (self.num_frames - 1)
        y, x = (across, along) if dx else (along, across)
        self.things.append(Thing(shape, colour, y, x, radius, 0, self.num_frames, (dy * speed, dx * speed)))
        self.named_colours.add(colour)
        return [ask("direction", f"which way does the {colour} {shape} move ?", answer)]

    def pair_spans(self) -> list[tuple[int, int]]:
        """First and last tick of two things, never both on one."""
        num_ticks = self.config.active_ticks
        least, most = self.config.pair_ticks or (max(2, num_ticks // 5), max(2, num_ticks // 3))
        lengths = self.rng.integers(least, most + 1, 2)
        starts = np.sort(self.rng.integers(self.active.start, self.active.stop + 1 - lengths.sum(), 2))
        starts += np.array([0, lengths[0]])
        return [(int(start), int(start + length) - 1) for start, length in zip(starts, lengths, strict=True)]

    def pair(self) -> dict[str, list[Question]]:
        """Two things of different shape and colour, shown one after the other; serves `order` and `existence`."""
        rng = self.rng
        spans = self.pair_spans()
        colours = [str(colour) for colour in rng.permutation(list(COLOURS))[:2]]
        shapes = [self.shapes.pop(), self.shapes.pop()]
        for shape, colour, (first, last) in zip(shapes, colours, spans, strict=True):
            self.place(shape, colour, *self.shown(first, last))
        self.named_colours.update(colours)
        which, one, real = (int(flag) for flag in rng.integers(0, 2, 3))
        named = f"{colours[one]} {shapes[one if real else 1 - one]}"
        return {
            "order": [ask("order", f"which colour appeared {('first', 'last')[which]} ?", colours[which])],
            "existence": [ask("existence", f"is there a {named} ?", "yes" if real else "no")],
        }

    def count(self) -> list[Question]:
        shape, answer = self.shapes.pop(), int(self.rng.integers(1, 5))
        for _ in range(answer):
            self.place(shape, self.colour())
        self.unique_shapes.add(shape)
        return [ask("count", f"how many {PLURALS[shape]} are there ?", str(answer))]

    def colour_of(self) -> list[Question]:
        shape, colour = self.shapes.pop(), self.colour()
        self.place(shape, colour)
        self.unique_shapes.add(shape)
        return [ask("colour", f"what colour is the {shape} ?", colour)]

    def flash(self) -> list[Question]:
        """Fills half of the way to the neighbouring ticks, so denser sampling sees it on more frames, not on one."""
        at = int(self.rng.integers(self.active.start, min(self.active.stop, len(self.tick) - 1)))
        colour = self.any_colour()
        before, here, after = (int(frame) for frame in self.tick[at - 1 : at + 2])
        self.place("flash", colour, here - (here - before - 1) // 2, here + (after - here - 1) // 2 + 1)
        return [ask("flash", "which colour flashed ?", colour)]

    def glares(self) -> None:
        for _ in range(self.config.num_glares):
            self.place("glare", "white")

    def num_bystanders(self) -> int:
        """One or two; beside distractors, which need cells, one or none."""
        fewest, most = (0, 1) if self.config.distractors[1] else (1, 2)
        return min(len(self.cells), int(self.rng.integers(fewest, most + 1)))

    def bystanders(self) -> None:
        """Resting things that no question is about."""
        shapes = [shape for shape in PLURALS if shape not in self.unique_shapes]
        colours = [colour for colour in COLOURS if colour not in self.named_colours]
        for _ in range(self.num_bystanders()):
            self.place(str(self.rng.choice(shapes)), str(self.rng.choice(colours)))


def ask(family: str, text: str, answer: str) -> Question:
    return Question(family, text, answer, OPTIONS[family])
