"""ShapesQA: small synthetic clips whose questions need small, often short-lived evidence.

A clip is a pure function of `(seed, split, index, config)`. Its world is a list of `Thing`s on a 3 x 3 grid of cells
(one thing a cell; a moving thing owns a whole row or column), so nothing ever overlaps. Time is planned in *ticks*,
the frames that a uniform sampler with `num_sampled` frames sees: a 5-minute clip is as answerable as a 4-second one,
and writing clips with a larger `num_sampled` makes evidence that sparser sampling misses.

Six families of questions; every answer is drawn first, uniformly and apart from the words of the question, and the
scene is built around it, so guessing without the video stays at chance:

    colour      a shape that occurs once, among others          existence   yes/no; "no" recombines two things seen
    order       two things, one after the other                 direction   one moving thing, re-entering at the edge
    count       1 to 4 things of one shape, always visible      flash       a white-cored disc on exactly one tick

`ShapesConfig` makes clips harder: smaller things, bright things at rest, most frames near duplicates, brief evidence,
and change that is not relevant (world.py).

Shape suffixes beside those of `stts.tokens`: H, W = pixels, C = 3 colour channels (RGB)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts.data.shapes.colour import ColourScene
from stts.data.shapes.draw import COLOURS, Thing, background, draw, frame_noise, noise_bank
from stts.data.shapes.scene import (
    COUNTS,
    DIRECTIONS,
    PLURALS,
    SHORTEST_S,
    Question,
    Scene,
    ShapesConfig,
    sampled_indices,
)
from stts.data.shapes.world import World

__all__ = ["Clip", "Question", "ShapesConfig", "ShapesFrames", "Thing", "make_clip", "sampled_indices", "vocabulary"]

SPLITS = ("train", "val", "test", "long")  # the position is part of the seed: append only


def vocabulary() -> list[str]:
    """Every word that a question or an answer may use, sorted."""
    words = {*COLOURS, *PLURALS, *PLURALS.values(), *DIRECTIONS, *COUNTS, "yes", "no", "first", "last"}
    return sorted(
        words.union(
            ("what", "colour", "is", "the", "?"),
            ("is", "there", "a", "?"),
            ("which", "colour", "appeared", "?"),
            ("which", "way", "does", "the", "move", "?"),
            ("how", "many", "are", "there", "?"),
            ("which", "colour", "flashed", "?"),
            ("thing", "things"),
        )
    )


@dataclass(frozen=True)
class Clip:
    seed: int
    split: str
    index: int
    config: ShapesConfig
    num_frames: int
    things: tuple[Thing, ...]
    questions: tuple[Question, ...]

    @property
    def uid(self) -> str:
        return f"{self.split}-{self.index:06d}"

    @property
    def conversation(self) -> tuple[Question, ...]:
        """Questions that may be asked in turn. By colour, the answers to `order` name what comes and goes, and asking
        later whether there is such a colour would teach to read earlier turns: `existence` comes first, or not at all
        where `order` is the clip's first question."""
        if self.config.ask_by == "shape":
            return self.questions
        first, *rest = self.questions
        rest = [question for question in rest if first.family != "order" or question.family != "existence"]
        return first, *sorted(rest, key=lambda question: question.family != "existence")

    @property
    def labels(self) -> NDArray[np.uint8]:
        """(T, grid, grid): what every cell shows on every sampled frame, as `stts.data.shapes.world` numbers it."""
        label_TYX = self._world.label_TYX
        if self.config.show == "nothing":
            return np.zeros_like(label_TYX)
        if self.config.show == "one_frame":
            return np.repeat(label_TYX[None, len(label_TYX) // 2], len(label_TYX), axis=0)
        return label_TYX

    @cached_property
    def _world(self) -> World:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, SPLITS.index(self.split), self.index, 3]))
        return World(self.things, self.num_frames, self.config, rng)

    @cached_property
    def _pixels(self) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Still picture with everything that never changes (H, W, 3), and the bank of frame noise. Where the camera
        moves, the picture is the background alone."""
        size = self.config.frame_size
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, SPLITS.index(self.split), self.index, 1]))
        still = background(size, rng)[None]
        for thing in self._shown:
            if self._is_still(thing):
                draw(still, thing, np.zeros(1, np.int64))
        return still[0].astype(np.int16), noise_bank(size, rng)

    @property
    def _shown(self) -> tuple[Thing, ...]:
        return () if self.config.show == "nothing" else self.things

    def _is_still(self, thing: Thing) -> bool:
        whole = thing.start == 0 and thing.stop == self.num_frames and not any(thing.velocity)
        return whole and not self.config.camera_moves

    def render(self, frame_indices: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Draws only the native frames asked for: (T,) indices in [0, num_frames) -> (T, H, W, 3) uint8.

        A frame does not depend on which others are asked for. Raises ValueError for an index outside the clip."""
        index_T = np.asarray(frame_indices, dtype=np.int64)
        if index_T.ndim != 1 or (index_T.size and not 0 <= index_T.min() <= index_T.max() < self.num_frames):
            raise ValueError(f"frame_indices must be 1-D and in [0, {self.num_frames}) for clip {self.uid}")
        still, bank = self._pixels
        seen_T = index_T
        if self.config.show == "one_frame":
            num_sampled = self.config.num_sampled
            seen_T = np.full_like(index_T, sampled_indices(self.num_frames, num_sampled)[num_sampled // 2])
        frames = self._world.still(still, seen_T)
        if self.config.show != "nothing":
            self._world.distract(frames, seen_T)
        for thing in self._shown:
            if not self._is_still(thing):
                draw(frames, thing, seen_T)
        frames = self._world.expose(frames, seen_T) + frame_noise(bank, self.config.frame_size, index_T)
        return frames.clip(0, 255).astype(np.uint8)


def make_clip(seed: int, split: str, index: int, config: ShapesConfig, focus: str | None = None) -> Clip:
    """Plans clip `index` of a split; nothing is drawn before `Clip.render`.

    `focus` names a family that the first question must come from (for weighted training); None: any order, as in
    written files. Raises ValueError for an unknown split, a negative seed or index, or a focus not in the config."""
    if split not in SPLITS or seed < 0 or index < 0:
        raise ValueError(f"split={split!r}, seed={seed}, index={index}: split is one of {SPLITS}, the others are >= 0")
    if focus is not None and focus not in config.families:
        raise ValueError(f"focus={focus!r} is not in families={config.families}; add it there")
    rng = np.random.default_rng(np.random.SeedSequence([seed, SPLITS.index(split), index]))
    families = [str(family) for family in rng.permutation(list(config.families)) if family != focus]
    families = ([focus] if focus else []) + families
    del families[config.families_per_clip :]
    shortest, longest = (30.0, 300.0) if split == "long" else (SHORTEST_S, 8.0)
    num_frames = int(rng.integers(int(np.ceil(shortest * config.fps)), int(longest * config.fps) + 1))

    scene = (ColourScene if config.ask_by == "colour" else Scene)(config, rng, num_frames)
    asked = scene.build(families)
    rounds = range(config.questions_per_family)
    questions = [asked[family][turn] for turn in rounds for family in families if turn < len(asked[family])]
    return Clip(seed, split, index, config, num_frames, tuple(scene.things), tuple(questions))


def _turns(question: Question, *, first: bool) -> tuple[Message, Message]:
    marker = "<video>\n" if first else ""
    return Message("user", marker + question.text), Message("assistant", question.answer)


class ShapesFrames(Dataset[Example]):
    """ShapesQA drawn on the fly, one question per clip: item i holds the first question of clip i.

    `families` narrows the questions *and* the scenes (`families=("direction",)`: one moving thing and nothing else);
    without `weights` item i shows what `write_shapes` would write for clip i under the same config. `weights` draws
    the family of each item with these relative weights; the others remain in the scene as distraction.
    `questions_per_item` above 1 asks further questions about the same clip as later turns of one conversation, so that
    one pass through the tower teaches several answers; `uid` and `meta` are those of the first."""

    def __init__(
        self,
        split: str,
        num_clips: int,
        seed: int,
        config: ShapesConfig,
        families: Sequence[str] | None = None,
        weights: Mapping[str, float] | None = None,
        questions_per_item: int = 1,
    ) -> None:
        if questions_per_item < 1:
            raise ValueError(f"questions_per_item={questions_per_item} must be at least 1")
        self.questions_per_item = questions_per_item
        self.config = config if families is None else replace(config, families=tuple(families))
        self.split, self.num_clips, self.seed = split, num_clips, seed
        self._shares: NDArray[np.float64] | None = None
        if weights is not None:
            shares = np.array([float(weights.get(family, 0.0)) for family in self.config.families])
            if set(weights) - set(self.config.families) or (shares < 0).any() or shares.sum() <= 0:
                raise ValueError(
                    f"weights={dict(weights)} must be >= 0, not all 0, for names in families={self.config.families}"
                )
            self._shares = shares / shares.sum()
        if num_clips < 1:
            raise ValueError(f"num_clips={num_clips} must be at least 1")
        make_clip(seed, split, 0, self.config)  # a wrong split or seed fails here, not in a loader's worker

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < self.num_clips:
            raise IndexError(f"item {index} is outside [0, {self.num_clips})")
        clip = make_clip(self.seed, self.split, index, self.config, self._focus(index))
        frame_index_T = sampled_indices(clip.num_frames, self.config.num_sampled)
        questions = clip.conversation[: self.questions_per_item]  # begins as clip.questions does
        question = questions[0]
        sample = Sample(
            uid=f"{clip.uid}-{question.family}",
            messages=tuple(turn for number, asked in enumerate(questions) for turn in _turns(asked, first=number == 0)),
            meta={
                "family": question.family,
                "options": question.options,
                "duration": clip.num_frames / self.config.fps,
            },
        )
        times_T = frame_index_T / self.config.fps
        seconds = clip.num_frames / self.config.fps
        return Example(sample, clip.render(frame_index_T), times_T, duration_s=seconds, label_TYX=clip.labels)

    def _focus(self, index: int) -> str | None:
        if self._shares is None:
            return None
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, SPLITS.index(self.split), index, 2]))
        return str(rng.choice(list(self.config.families), p=self._shares))
