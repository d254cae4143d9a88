"""The study in the world where change is not relevance: one VLM, fine-tuned with one way of choosing tokens at a time.

An arm is fine-tuned at one ratio and compared at every ratio of the scale, on clips with labels, so that its table says
what was kept of the evidence beside what was answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from steps import Step, Study


@dataclass(frozen=True)
class Arm:
    """A way of choosing tokens."""

    title: str
    method: str
    """Name of the pruner."""
    options: tuple[str, ...]
    """Of `stts fit`."""
    once: bool = False
    """With the first seed only."""


TRAINED_AT = 0.25
_TAUGHT = (
    "--model.loss_weights", "{answer: 1.0, temporal: 0.0, teacher: 1.0}",
    "--model.pruner_options.answer_gradient", "false",
)  # fmt: skip
_PLAIN = ("--model.retention_ratio", str(TRAINED_AT))
_SCHEDULE = f"target: {TRAINED_AT}, dense_first: 32, dense_every: 10"
_SCORER_ALONE = f"{{{_SCHEDULE}, dense_trains: scorer}}"


def _teacher(options: str, schedule: str = _SCORER_ALONE) -> tuple[str, ...]:
    return ("--model.retention_ratio", schedule, "--model.pruner_options.teacher", options, *_TAUGHT)


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "evs": Arm("evs (a rule)", "evs", (*_PLAIN, "--model.pruner", "evs", "--model.pruner_options", "null")),
        "stts": Arm("STTS as published", "stts", _PLAIN),
        "teacher": Arm("STTS with the teacher", "stts", _teacher("{share: 0.1}")),
        "teacher-trains": Arm(
            "the teacher, dense steps train the VLM too", "stts",
            _teacher("{share: 0.1}", f"{{{_SCHEDULE}}}"), once=True,
        ),
        "teacher-half": Arm(
            "the teacher, half the change weight", "stts", _teacher("{share: 0.1, weight: 0.5}"), once=True
        ),
        "teacher-rest": Arm("the teacher, no change weight", "stts", _teacher("{share: 0.1, weight: none}"), once=True),
    }
)  # fmt: skip
RIVAL, OURS = "evs", "teacher"


class ArmsStudy(Study):
    """The steps of a scale that has arms."""

    def steps(self) -> list[Step]:
        return [*self._data(), *self._pretrain(), *self._finetune(), *self._compare()]

    def seeds(self, arm: str) -> tuple[int, ...]:
        return self.scale.seeds[:1] if ARMS[arm].once else self.scale.seeds

    def run_name(self, arm: str, seed: int) -> str:
        return f"{arm}-s{seed}"

    def _finetune(self) -> list[Step]:
        steps = []
        for arm in self.scale.arms:
            for seed in self.seeds(arm):
                seeds = ["--seed_everything", str(seed), "--data.seed", str(100 + seed)]
                steps.append(self._fit("finetune", self.run_name(arm, seed), [*ARMS[arm].options, *seeds]))
        return steps

    def _compare(self) -> list[Step]:
        steps = self._of_the_pretrained()
        for arm in self.scale.arms:
            for seed in self.seeds(arm):
                name = self.run_name(arm, seed)
                model = self.path(name) / "model"
                steps.append(self._against("compare", name, model, [ARMS[arm].method], self.scale.ratios))
        return steps
