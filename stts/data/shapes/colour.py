"""ShapesQA asked by colour: the same clips, whose `count`, `existence` and `direction` name a colour and no shape.

A model of a million parameters hardly tells a small circle from a small square, but reads colours well, so its answers
then depend on finding the evidence, which is what pruning is about. Asked twice, where it can be:

    count       1 to 4 things of a colour that nothing else wears; two colours
    order       what appeared first, and what appeared last
    colour      a shape that occurs once; two shapes
    existence   "yes": a colour that comes and goes (fewer than 8 frames: at rest); "no": one that nothing wears
    direction   which way the thing of some colour moves"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stts.data.shapes.draw import COLOURS
from stts.data.shapes.scene import PLURALS, Question, Scene, ShapesConfig, ask


class ColourScene(Scene):
    """Which colours may be worn by what is settled before anything is placed.

    A flash is no thing: it takes any colour, so that what rests in the scene tells nothing about it."""

    def __init__(self, config: ShapesConfig, rng: np.random.Generator, num_frames: int) -> None:
        super().__init__(config, rng, num_frames)
        self.free = self.palette()
        self.counted: list[str] = []
        self.absent: str | None = None
        self.comes: list[str] = []

    def build(self, families: Sequence[str]) -> dict[str, list[Question]]:
        if "existence" in families:
            self.absent = None if self.rng.integers(2) else self.free.pop()
        if "count" in families:
            self.counted = [self.free.pop() for _ in range(self.config.num_things("count"))]
        named = self.config.num_things("colour") if "colour" in families else 0
        self.unique_shapes = {self.shapes.pop() for _ in range(named)}
        asked = super().build(families)
        if "existence" in families:
            asked["existence"] = self.existence()
        if "count" in families and self.config.questions_per_family > 2:
            asked["count"] += self.other_counts()
        return asked

    @property
    def resting(self) -> list[str]:
        """What things at rest may wear: not what comes and goes, where that leaves a choice."""
        left = [colour for colour in self.free if colour not in self.comes]
        return left if len(left) > 1 else self.free

    def some(self, colours: Sequence[str]) -> str:
        return str(self.rng.choice(list(colours)))

    def direction(self) -> list[Question]:
        [question] = super().direction()
        return [ask("direction", " ".join([*question.text.split()[:5], "thing", "move", "?"]), question.answer)]

    def colour(self) -> str:
        return self.some(self.resting)

    def pair(self) -> dict[str, list[Question]]:
        self.comes = [str(colour) for colour in self.rng.permutation(self.free)[:2]]
        still = self.config.num_sampled < 8
        times = [(0, self.num_frames)] * 2 if still else [self.shown(*span) for span in self.pair_spans()]
        for colour, time in zip(self.comes, times, strict=True):
            self.place(self.some(self.shapes), colour, *time)
        turns = self.rng.permutation(2)[: self.config.questions_per_family]
        words = ("first", "last")
        return {"order": [ask("order", f"which colour appeared {words[turn]} ?", self.comes[turn]) for turn in turns]}

    def count(self) -> list[Question]:
        questions = []
        for colour in self.counted:
            answer = int(self.rng.integers(1, 5))
            for _ in range(answer):
                self.place(self.some(self.shapes), colour)
            questions.append(ask("count", f"how many {colour} things are there ?", str(answer)))
        return questions

    def colour_of(self) -> list[Question]:
        questions = []
        for shape in sorted(self.unique_shapes):
            colour = self.colour()
            self.place(shape, colour)
            questions.append(ask("colour", f"what colour is the {shape} ?", colour))
        self.rng.shuffle(questions)
        return questions

    def existence(self) -> list[Question]:
        """First what was settled beforehand, so that "yes" and "no" are equally frequent and the evidence is brief."""
        first = self.absent or self.some(self.comes)
        others = [] if self.config.questions_per_family < 3 else [c for c in self.palette() if c != first]
        worn = {thing.colour for thing in self.things if thing.shape in PLURALS}
        colours = [first, *others[: self.config.questions_per_family - 1]]
        return [ask("existence", f"is there a {c} thing ?", "yes" if c in worn else "no") for c in colours]

    def other_counts(self) -> list[Question]:
        """Of colours that rest and nothing else wears, whatever their number; uneven, and so never asked first."""
        worn = [thing.colour for thing in self.things if thing.shape in PLURALS]
        colours = [c for c in self.palette() if c not in (*self.counted, *self.comes) and 1 <= worn.count(c) <= 4]
        return [ask("count", f"how many {c} things are there ?", str(worn.count(c))) for c in colours]

    def palette(self) -> list[str]:
        return [str(colour) for colour in self.rng.permutation(list(COLOURS))]

    def bystanders(self) -> None:
        shapes = [shape for shape in PLURALS if shape not in self.unique_shapes]
        for _ in range(self.num_bystanders()):
            self.place(self.some(shapes), self.colour())
