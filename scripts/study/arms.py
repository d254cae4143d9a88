"""The study in the world where change is not relevance: one VLM, fine-tuned with one way of choosing tokens at a time.

An arm is fine-tuned at one ratio and compared at every ratio of the scale, on clips with labels, so that its table says
what was kept of the evidence beside what was answered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
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
    further: bool = False
    """Compared at all of `Scale.further`."""
    begins: str = ""
    """The arm whose model of the same seed it goes on from; none: the pretrained VLM."""


TRAINED_AT = 0.25
_TAUGHT = (
    "--model.loss_weights", "{answer: 1.0, temporal: 0.0, teacher: 1.0}",
    "--model.pruner_options.answer_gradient", "false",
)  # fmt: skip
_PLAIN = ("--model.retention_ratio", str(TRAINED_AT))
_MORE_FRAMES = ("--data.phases", "[{num_clips: 960, questions_per_clip: 20, num_sampled: 64}]")
_FURTHER_ON = f"target: {TRAINED_AT}, dense_first: 0, dense_every: 10"
_TOWER = ("--model.vit_lr", "0")
_ELASTIC = f"low: 0.1, high: 0.5, eval_ratio: {TRAINED_AT}"
_SCHEDULE = f"target: {TRAINED_AT}, dense_first: 32, dense_every: 10"
_SCORER_ALONE = f"{{{_SCHEDULE}, dense_trains: scorer}}"
_ELASTIC_TEACHER = _SCORER_ALONE.replace(f"target: {TRAINED_AT}", f"target: {{{_ELASTIC}}}")
_EVEN = ("--data.phases", "[{num_clips: 1672, questions_per_clip: 20}]")  # 160 steps beside 49 dense ones
_NO_TEMPORAL = ("--model.loss_weights", "{answer: 1.0, temporal: 0.0}")
_LONGER = ("--data.phases", "[{num_clips: 3840, questions_per_clip: 20}]")  # 480 steps


def _rule(method: str) -> tuple[str, ...]:
    return "--model.pruner", method, "--model.pruner_options", "null"


def _teacher(options: str, schedule: str = _SCORER_ALONE) -> tuple[str, ...]:
    return ("--model.retention_ratio", schedule, "--model.pruner_options.teacher", options, *_TAUGHT)


_RULE = _rule("evs")
ARMS: Mapping[str, Arm] = MappingProxyType(
    {  # those that `Scale.arms` does not name have not been run
        "evs": Arm("evs (a rule)", "evs", (*_PLAIN, *_RULE)),
        "stts": Arm("STTS as published", "stts", _PLAIN),
        "teacher": Arm("STTS with the teacher", "stts", _teacher("{share: 0.1}")),
        "evs-elastic": Arm(
            "evs, elastic", "evs", ("--model.retention_ratio", f"{{{_ELASTIC}}}", *_RULE), once=True, further=True
        ),
        "evs-elastic-even": Arm(
            "evs, elastic, 209 steps", "evs", ("--model.retention_ratio", f"{{{_ELASTIC}}}", *_RULE, *_EVEN),
            further=True,
        ),
        "teacher-elastic": Arm(
            "the teacher, elastic", "stts", _teacher("{share: 0.1}", _ELASTIC_TEACHER), once=True, further=True
        ),
        "teacher-elastic-even": Arm(
            "the teacher, elastic, 209 steps", "stts",
            (*_teacher("{share: 0.1}", _ELASTIC_TEACHER), *_EVEN),
            further=True,
        ),
        "teacher-trains": Arm(
            "the teacher, dense steps train the VLM too", "stts",
            _teacher("{share: 0.1}", f"{{{_SCHEDULE}}}"), once=True,
        ),
        "teacher-half": Arm(
            "the teacher, half the change weight", "stts", _teacher("{share: 0.1, weight: 0.5}"), once=True
        ),
        "teacher-rest": Arm("the teacher, no change weight", "stts", _teacher("{share: 0.1, weight: none}"), once=True),
        "teacher-temporal": Arm(
            "STTS with the teacher, and the temporal loss", "stts",
            (*_teacher("{share: 0.1}"), "--model.loss_weights.temporal", "0.5"), once=True,
        ),
        "attention": Arm(
            "attention of LLM layer 4 as the teacher", "stts",
            _teacher("{share: 0.1, signal: attention, layer: 4}"), once=True,
        ),
        "noise-gate": Arm("a noise gate", "stts", _teacher("{share: 0.2, signal: noise_gate}"), once=True),
        "scale-gate": Arm("a scale gate", "stts", _teacher("{share: 0.2, signal: scale_gate}"), once=True),
        "straight-through": Arm(
            "straight-through, no temporal loss", "stts",
            (*_PLAIN, *_NO_TEMPORAL, "--model.pruner_options.straight_through", "true"), once=True,
        ),
        "gumbel": Arm(
            "straight-through with Gumbel noise, no temporal loss", "stts",
            (*_PLAIN, *_NO_TEMPORAL, "--model.pruner_options.straight_through", "true",
             "--model.pruner_options.gumbel", "1.0"), once=True,
        ),
        "temporal": Arm(
            "the temporal loss alone", "stts", (*_PLAIN, "--model.pruner_options.answer_gradient", "false"), once=True
        ),
        "evs-longer": Arm("evs, 480 steps", "evs", (*_PLAIN, *_RULE, *_LONGER), further=True),
        "teacher-longer": Arm(
            "the teacher, 480 steps, dense steps train the VLM too", "stts",
            (*_teacher("{share: 0.1}", f"{{{_SCHEDULE}}}"), *_LONGER), further=True,
        ),
        "evs-tower": Arm("evs (a rule), the tower frozen", "evs", (*_PLAIN, *_RULE, *_TOWER)),
        "teacher-tower": Arm("STTS with the teacher, the tower frozen", "stts", (*_teacher("{share: 0.1}"), *_TOWER)),
        "evs-frames": Arm(
            "evs, 120 more steps of 64 frames", "evs", (*_PLAIN, *_RULE, *_MORE_FRAMES), once=True, begins="evs-longer"
        ),
        "teacher-frames": Arm(
            "the teacher, 120 more steps of 64 frames", "stts",
            (*_teacher("{share: 0.1}", f"{{{_FURTHER_ON}}}"), *_MORE_FRAMES), once=True, begins="teacher-longer",
        ),
        "tango": Arm("tango (a rule)", "tango", (*_PLAIN, *_rule("tango")), once=True),
        "random": Arm("random tokens", "random", (*_PLAIN, *_rule("random")), once=True),
        "teacher-share": Arm("the teacher, share 0.2", "stts", _teacher("{share: 0.2}"), once=True),
        "teacher-loss": Arm(
            "the teacher, the loss as objective", "stts", _teacher("{share: 0.1, objective: log_prob}"), once=True
        ),
        "teacher-seldom": Arm(
            "the teacher, dense every 20", "stts",
            _teacher("{share: 0.1}", _SCORER_ALONE.replace("dense_every: 10", "dense_every: 20")), once=True,
        ),
    }
)  # fmt: skip
RIVAL, OURS = "evs", "teacher"
FROZEN = "frozen"
OF_MORE_FRAMES = ("teacher-frames", "evs-frames")


class ArmsStudy(Study):
    """The steps of a scale that has arms."""

    def steps(self) -> list[Step]:
        return [*self._data(), *self._pretrain(), *self._finetune(), *self._compare(), *self._worlds(),
                *self._scaling()]  # fmt: skip

    def seeds(self, arm: str) -> tuple[int, ...]:
        return self.scale.seeds[:1] if ARMS[arm].once else self.scale.seeds

    def run_name(self, arm: str, seed: int) -> str:
        return f"{arm}-s{seed}"

    def _finetune(self) -> list[Step]:
        steps = []
        for arm in self.scale.arms:
            for seed in self.seeds(arm):
                seeds = ["--seed_everything", str(seed), "--data.seed", str(100 + seed)]
                begins = ARMS[arm].begins
                start = self.path(self.run_name(begins, seed)) / "model" if begins else None
                steps.append(self._fit("finetune", self.run_name(arm, seed), [*ARMS[arm].options, *seeds], start))
        return steps

    def _compare(self) -> list[Step]:
        steps = self._of_the_pretrained()
        for arm in self.scale.arms:
            for seed in self.seeds(arm):
                name = self.run_name(arm, seed)
                model = self.path(name) / "model"
                ratios = self.scale.further if ARMS[arm].further else self.scale.ratios
                steps.append(self._against("compare", name, model, [ARMS[arm].method], ratios))
        return [*steps, *self._further()]

    @staticmethod
    def further_name(who: str) -> str:
        return f"further-{who}"

    def _main(self, *more: str) -> dict[str, tuple[Path, str]]:
        """Models and pruners of the rule, the teacher and `more`, of the first seed, and of the rule frozen."""
        names = {arm: self.run_name(arm, self.scale.seeds[0]) for arm in (RIVAL, OURS, *more)}
        arms = {arm: (self.path(name) / "model", ARMS[arm].method) for arm, name in names.items()}
        return arms | {FROZEN: (self.pretrained, ARMS[RIVAL].method)}

    def _further(self) -> list[Step]:
        steps = []
        for who, (model, method) in self._main().items() if self.scale.further else ():
            more = ("--save_kept", "all")
            steps.append(self._against("compare", self.further_name(who), model, [method], self.scale.further, *more))
        return steps

    @staticmethod
    def world_name(world: str, who: str) -> str:
        return f"world-{world}-{who}"

    def _worlds(self) -> list[Step]:
        """The rule and the teacher of the first seed, and the rule frozen, on other clips than those of training."""
        steps = []
        for world, differs in self.scale.worlds.items():
            out = self.path("data") / f"world-{world}"
            form = self.scale.form | differs
            steps.append(self._clips(f"world {world}", out, "test", self._test_size, form))
            for who, (model, method) in self._main().items():
                name, data = self.world_name(world, who), f"world-{world}/test"
                steps.append(self._against("compare", name, model, [method], self.scale.ratios, data=data))
        return steps

    @staticmethod
    def scaling_name(frames: int, who: str) -> str:
        return f"long-{frames}-{who}"

    def _scaling(self) -> list[Step]:
        """The same on long clips: more frames at the tokens that 16 dense ones have."""
        steps = []
        for frames in self.scale.frames:
            for who, (model, method) in self._main(*OF_MORE_FRAMES).items():
                name, ratio = self.scaling_name(frames, who), self.scaling_ratio(frames)
                more = ("--num_frames", str(frames))
                steps.append(self._against("compare", name, model, [method], [ratio], *more, data="long/long"))
        return steps
