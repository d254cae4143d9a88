"""What the study runs: its scales, and every step as a command with the file that shows that it is done."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("data", "pretrain", "finetune", "compare", "ablation", "scaling", "report")
SMALL = {  # form of the clips; configs/shapes_pretrain_small.yaml says the same
    "frame_size": "48", "families": "[order,count,flash]", "families_per_clip": "3", "questions_per_family": "1",
    "ask_by": "colour", "grid": "3", "num_glares": "1", "active_share": "0.75",
}  # fmt: skip
WIDE = SMALL | {"frame_size": "96"}  # configs/shapes_pretrain.yaml says the same
DISTRACTORS = SMALL | {"num_glares": "0", "distractors": "[3,5]"}  # configs/shapes_pretrain_world.yaml: 2 to 5
WORLDS = {  # numbers of distractors on the same scenes, the world of the scale `cpu`, background and exposure
    "0": {"distracted_share": "0"},
    **{str(number): {"distractors": f"[{number},{number}]"} for number in (1, 2, 3, 5)},
    "old": SMALL | {"distractors": "[0,0]"},
    "shaking": {"camera_shake": "2"},
    "drifting": {"camera_drift": "1.0"},
    "flickering": {"flicker": "0.2"},
}
RIVAL = "novelty-elastic"
LONG = "stts-long"
LIKEWISE = "dense, fine-tuned likewise"
SHORTER = "half the fine-tuning"
CONTROLS = {  # name -> options of `stts fit`; the base is STTS at 0.5, seed 0
    LIKEWISE: ["--model.pruner", "none", "--model.pruner_options", "null", "--model.retention_ratio", "1.0"],
    "novelty, fine-tuned likewise": ["--model.pruner", "novelty", "--model.pruner_options", "null"],
    "twice the fine-tuning": ["--trainer.max_epochs", "2"],
    SHORTER: ["--trainer.limit_train_batches", "0.5"],
}
ABLATIONS = {
    **CONTROLS,
    "random, fine-tuned likewise": ["--model.pruner", "random", "--model.pruner_options", "null"],
    "tango, fine-tuned likewise": ["--model.pruner", "tango", "--model.pruner_options", "null"],
    "temporal loss off": ["--model.loss_weights.temporal", "0"],
    "answer gradient off": ["--model.pruner_options.answer_gradient", "false"],
    "straight-through gate": ["--model.pruner_options.straight_through", "true"],
    "scorer only": ["--model.llm_lr", "0", "--model.vit_lr", "0", "--model.connector_lr", "0"],
    "prune block 0": ["--model.pruner_options.prune_block", "0"],
    "prune block 2": ["--model.pruner_options.prune_block", "2"],
    "prune block 3": ["--model.pruner_options.prune_block", "3"],
    "rescale over a frame": ["--model.pruner_options.rescale_scope", "frame"],
    "rescale over the video": ["--model.pruner_options.rescale_scope", "video"],
}


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    num_test: int
    num_long: int
    seeds: tuple[int, ...]
    ratios: tuple[float, ...]
    frames: tuple[int, ...]
    """Of long clips; none: no scaling."""
    pruners: tuple[str, ...]
    ablations: tuple[str, ...]
    batch_size: int
    num_longer: int = 0
    """Clips that `LONG` is trained on."""
    fit: tuple[str, ...] = ()
    """Further options of every `stts fit`."""
    ablate: tuple[str, ...] = ()
    """Further options of those of the ablations, controls apart."""
    init: tuple[str, ...] = ()
    """Sizes of the untrained VLM."""
    given: Path | None = None
    """A pretrained VLM to begin with; None: the stage `pretrain` makes one."""
    arms: tuple[str, ...] = ()
    """Names of arms.py that are fine-tuned in place of STTS at three ratios."""
    further: tuple[float, ...] = ()
    """Ratios at which the main arms of the first seed are compared again, and elastic arms. At 0.1 of 144 tokens STTS
    keeps 15 and a rule 14; at 0.103 both keep 15."""
    worlds: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Name -> what differs there in the form of the clips: the main arms of the first seed answer there too."""
    form: Mapping[str, str] = field(default_factory=SMALL.copy)
    """Of the clips that are tested."""
    title: str = ""
    """Of the page of a scale with arms."""


FROZEN = (  # what is compared: chosen, not the whole zoo, so that a new method does not reopen a finished study
    "random", "uniform", "novelty", "random-vit", "easy", "heuristic", "visionzip", "fastvid", "holitom",
    "holitom+inner", "stop-visionzip", "stop-fastvid", "stop-holitom", "tango", "tango+inner", "adatp", "fastv", "dart",
    "vidcom2",
)  # fmt: skip


def trained_on(form: Mapping[str, str]) -> tuple[str, ...]:
    """Options of `stts fit` for clips of this form; training asks more about a clip than testing does."""
    pairs = ((f"--data.shapes.{name}", value) for name, value in form.items() if name != "questions_per_family")
    return tuple(word for pair in pairs for word in pair)


SCALED = ("uniform", "random", "novelty", "visionzip", "fastvid", "stop-holitom", "tango")  # of the long clips
_FIT = (
    "--data.phases", "[{num_clips: 1280, questions_per_clip: 20}]", "--data.num_val_clips", "50", "--data.batch_size",
    "8", "--data.num_workers", "0", "--trainer.val_check_interval", "80", "--trainer.log_every_n_steps", "20",
    "--progress_every", "20",
)  # fmt: skip
_DISTRACTORS = Scale(
    title="Where change is not relevance, and the tower has learned what is",
    num_test=120, num_long=0, seeds=(0, 1, 2), ratios=(0.25, 0.15), frames=(), ablations=(),
    pruners=("random", "uniform", "evs", "novelty", "visionzip", "fastvid", "holitom", "tango", "fastv"),
    further=(0.5, 0.25, 0.15, 0.103), given=Path("stts/assets/shapes_vlm_world"), form=DISTRACTORS, worlds=WORLDS,
    batch_size=30,
    arms=("evs", "stts", "teacher", "evs-longer", "teacher-longer", "evs-elastic", "evs-elastic-even",
          "teacher-elastic", "teacher-elastic-even", "teacher-trains", "teacher-half", "teacher-rest",
          "teacher-loss", "teacher-share", "teacher-seldom", "temporal", "attention", "noise-gate", "scale-gate",
          "straight-through", "gumbel"),
    fit=(*trained_on(DISTRACTORS), *_FIT),
)  # fmt: skip
SCALES = {
    "cpu": Scale(
        num_test=250, num_long=100, seeds=(0, 1, 2), ratios=(0.7, 0.5, 0.3, 0.2, 0.1), frames=(8, 16, 32, 64),
        pruners=FROZEN, ablations=tuple(ABLATIONS), batch_size=30,
        given=Path("stts/assets/shapes_vlm"), form=SMALL, num_longer=2080,
        fit=(*trained_on(SMALL),
             "--data.phases", "[{num_clips: 5600, questions_per_clip: 20}, {num_clips: 320, questions_per_clip: 20, "
             "num_sampled: 64}, {num_clips: 2400, questions_per_clip: 20}]",
             "--data.num_val_clips", "100", "--data.batch_size", "8", "--data.num_workers", "1",
             "--trainer.val_check_interval", "260", "--trainer.log_every_n_steps", "40", "--progress_every", "40",
             "--model.warmup_steps", "20"),
        ablate=("--trainer.limit_train_batches", "0.5"),
    ),
    "wide": Scale(
        num_test=100, num_long=0, seeds=(0,), ratios=(0.5, 0.2, 0.1), frames=(), ablations=(), batch_size=15,
        pruners=("random", "uniform", "novelty", "visionzip", "fastvid", "holitom", "stop-holitom", "tango", "adatp",
                 "fastv", "dart", "vidcom2"),
        given=Path("stts/assets/shapes_vlm36"), form=WIDE,
    ),
    "distractors": _DISTRACTORS,
    "frozen_tower": replace(
        _DISTRACTORS, title="Where change is not relevance, and the tower does not know it",
        given=Path("stts/assets/shapes_vlm_frozen_tower"), num_long=60, frames=(16, 32, 64),
        arms=("evs", "stts", "teacher", "evs-longer", "teacher-longer", "evs-tower", "teacher-tower", "tango", "random",
              "teacher-rest", "noise-gate", "scale-gate", "temporal", "evs-frames", "teacher-frames"),
    ),
    "calm": replace(
        _DISTRACTORS, title="Where change is relevance", given=Path("stts/assets/shapes_vlm"), form=SMALL, worlds={},
        arms=("evs", "stts", "teacher", "evs-longer", "teacher-longer", "teacher-temporal"),
        fit=(*trained_on(SMALL), *_FIT),
    ),
    "tiny": Scale(
        num_test=1, num_long=1, seeds=(0,), ratios=(0.5, 0.2), frames=(16,), pruners=("random", "fastv"),
        ablations=("temporal loss off", LIKEWISE), batch_size=10, num_longer=4,
        fit=("--data.phases", "[{num_clips: 4, questions_per_clip: 8}]", "--data.num_val_clips", "2",
             "--data.batch_size", "2", "--data.num_workers", "0", "--trainer.val_check_interval", "1",
             "--trainer.log_every_n_steps", "1", "--progress_every", "1", "--model.warmup_steps", "1"),
        init=("--vit_width", "16", "--vit_heads", "2", "--vit_mlp", "16", "--llm_width", "16", "--llm_heads", "2",
              "--llm_mlp", "16", "--llm_layers", "3"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One command; `done` exists once it has been run."""

    stage: str
    name: str
    argv: tuple[str, ...]
    done: Path

    @property
    def command(self) -> str:
        return shlex.join(("stts", *self.argv))

    def needs(self, other: Step) -> bool:
        """Whether this step reads what `other` writes: an argument lies in its folder."""
        written = Path(other.argv[other.argv.index("--out") + 1])
        return any(Path(word).is_relative_to(written) for word in self.argv if not word.startswith("-"))


@dataclass(frozen=True)
class Study:
    """Where everything lies, and the steps in their order."""

    runs: Path
    scale: Scale
    accelerate: tuple[str, ...] = ()
    rival: ClassVar[str] = RIVAL
    long: ClassVar[str] = LONG
    controls: ClassVar[Mapping[str, Sequence[str]]] = CONTROLS
    shorter: ClassVar[str] = SHORTER
    command: str = "python scripts/study/run_study.py"

    @property
    def pretrained(self) -> Path:
        return self.scale.given or self.runs / "pretrain" / "best"

    def path(self, name: str) -> Path:
        return self.runs / name

    def steps(self) -> list[Step]:
        return [*self._data(), *self._pretrain(), *self._finetune(), *self._compare(), *self._ablation(),
                *self._scaling()]  # fmt: skip

    def learned(self) -> dict[str, str]:
        """Name -> the retention ratio that it is trained at."""
        return {"stts-0.5": "0.5", "stts-0.2": "0.2", "stts-elastic": self.elastic}

    @property
    def elastic(self) -> str:
        return f"{{low: {min(self.scale.ratios)}, high: {max(self.scale.ratios)}}}"

    @staticmethod
    def ablated(name: str) -> tuple[str, str]:
        """The folder of an ablation, and the pruner that its model is compared under; a dense one under any."""
        rule = name.partition(",")[0] if name.endswith("likewise") else "stts"
        pruner = "random" if name == LIKEWISE else rule
        return "ablation-" + name.replace(",", "").replace(" ", "-"), pruner

    def is_there(self, step: Step) -> bool:
        """Whether a step has been run, or everything that reads what it writes."""
        readers = [other for other in self.steps() if other != step and other.needs(step)]
        return step.done.exists() or (bool(readers) and all(map(self.is_there, readers)))

    @staticmethod
    def scaling_ratio(frames: int) -> float:
        """That leaves the tokens of 16 frames."""
        return round(min(1.0, 16 / frames), 4)

    def comparison(self, name: str) -> Path:
        return self.path(f"compare/{name}")

    def _data(self) -> list[Step]:
        kinds = {"test": self._test_size}
        if self.scale.frames:
            frames = str(max(*self.scale.frames, 16))
            kinds["long"] = ["--test", "0", "--long", str(self.scale.num_long), "--num_sampled", frames]
        steps = []
        for kind, size in kinds.items():
            for show in ("clip", "one_frame", "nothing") if kind == "test" else ("clip",):
                out = self.path("data") / (kind if show == "clip" else f"{kind}-{show}")
                steps.append(self._clips(f"{kind}, {show}", out, kind, size, self.scale.form | {"show": show}))
        return steps

    @staticmethod
    def _clips(name: str, out: Path, kind: str, size: Sequence[str], form: Mapping[str, str]) -> Step:
        options = [word for setting, value in form.items() for word in (f"--form.{setting}", value)]
        argv = ["data", "shapes", "--out", str(out), "--train", "0", "--val", "0", *size, "--files", "png", *options]
        return Step("data", name, tuple(argv), out / f"{kind}.jsonl")

    @property
    def _test_size(self) -> list[str]:
        return ["--test", str(self.scale.num_test), "--long", "0"]

    def _pretrain(self) -> list[Step]:
        if self.scale.given is not None:
            return []
        empty, out = self.path("untrained"), self.path("pretrain")
        argv = ["init", "--out", str(empty), *(self.scale.init or ())]
        fit = ["fit", "--config", "configs/shapes_pretrain.yaml", "--model.model", str(empty), "--out", str(out)]
        fit += ["--trainer.strategy", "auto", "--trainer.devices", "1"]  # a step is one process: this one
        fit += [*self.accelerate, *self.scale.fit]
        return [
            Step("pretrain", "untrained folder", tuple(argv), empty / "config.json"),
            Step("pretrain", "dense", tuple(fit), out / "model"),
        ]

    def _fit(self, stage: str, name: str, options: Sequence[str], start: Path | None = None) -> Step:
        out = self.path(name)
        argv = ["fit", "--config", "configs/shapes_study_stts.yaml", "--model.model", str(start or self.pretrained)]
        argv += ["--out", str(out), *self.accelerate, *self.scale.fit, *options]
        return Step(stage, name, tuple(argv), out / "model")

    def _finetune(self) -> list[Step]:
        def begin(ratio: str, seed: int) -> list[str]:
            seeds = ["--seed_everything", str(seed), "--data.seed", str(100 + seed)]
            return ["--model.retention_ratio", ratio, *seeds]

        steps = [
            self._fit("finetune", f"{name}-s{seed}", begin(ratio, seed))
            for name, ratio in self.learned().items()
            for seed in self.scale.seeds
        ]
        rule = ["--model.pruner", "novelty", "--model.pruner_options", "null"]
        return [*steps, self._fit("finetune", RIVAL, [*begin(self.elastic, self.scale.seeds[0]), *rule])]

    def _against(
        self, stage: str, name: str, model: Path, pruners: Sequence[str], ratios: Sequence[float], *options: str,
        data: str = "test/test",
    ) -> Step:  # fmt: skip
        out = self.comparison(name)
        argv = ["compare", "--model", str(model), "--data", str(self.path("data") / f"{data}.jsonl"), "--out", str(out)]
        argv += ["--pruners", f"[{','.join(pruners)}]", "--retention_ratios", f"[{','.join(map(str, ratios))}]"]
        argv += ["--positions", "original", "--batch_size", str(self.scale.batch_size), "--max_new_tokens", "2"]
        argv += ["--name", f"ShapesQA, {name}", *options]
        return Step(stage, name, tuple(argv), out / "comparison.json")

    def _of_the_pretrained(self) -> list[Step]:
        """Every frozen pruner, and the controls."""
        steps = [self._against("compare", "frozen", self.pretrained, self.scale.pruners, self.scale.ratios)]
        for show in ("one_frame", "nothing"):
            steps.append(
                self._against("compare", show, self.pretrained, ["random"], [0.5], data=f"test-{show}/test")
            )  # fmt: skip
        return steps

    def _compare(self) -> list[Step]:
        scale = self.scale
        steps = self._of_the_pretrained()
        before = ["--baseline_model", str(self.pretrained)]
        for name in self.learned():
            ratios = [float(name.split("-")[1])] if "elastic" not in name else scale.ratios
            for seed in scale.seeds:
                model = self.path(f"{name}-s{seed}") / "model"
                steps.append(self._against("compare", f"{name}-s{seed}", model, ["stts"], ratios, *before))
        rival = self.path(RIVAL) / "model"
        return [*steps, self._against("compare", RIVAL, rival, ["novelty"], scale.ratios, *before)]

    def _ablation(self) -> list[Step]:
        steps = []
        for name in self.scale.ablations:
            slug, pruner = self.ablated(name)
            shorter = () if name in CONTROLS else self.scale.ablate
            steps.append(self._fit("ablation", slug, ["--model.retention_ratio", "0.5", *shorter, *ABLATIONS[name]]))
            steps.append(self._against("ablation", slug, self.path(slug) / "model", [pruner], [0.5]))
        return steps

    def _scaling(self) -> list[Step]:
        """Frozen pruners on the pretrained model, STTS on its own ones, and dense fine-tuned on as many clips.

        `LONG` goes on from the elastic model, on clips of as many frames as the longest row has."""
        if not self.scale.frames:
            return []
        elastic, most = self.path(f"stts-elastic-s{self.scale.seeds[0]}") / "model", max(self.scale.frames)
        phase = f"[{{num_clips: {self.scale.num_longer}, questions_per_clip: 20, num_sampled: {most}}}]"
        options = ["--model.retention_ratio", str(self.scaling_ratio(most)), "--data.phases", phase]
        steps = [self._fit("scaling", LONG, options, elastic)]
        frozen = [name for name in self.scale.pruners if name in SCALED]
        models = {"frozen": (self.pretrained, frozen)}
        models |= {name: (self.path(f"{name}-s{self.scale.seeds[0]}") / "model", ["stts"]) for name in self.learned()}
        models[LONG] = (self.path(LONG) / "model", ["stts"])
        if LIKEWISE in self.scale.ablations:
            slug, pruner = self.ablated(LIKEWISE)
            models["likewise"] = (self.path(slug) / "model", [pruner])
        for frames in self.scale.frames:
            ratio = self.scaling_ratio(frames)
            for name, (model, pruners) in models.items():
                more = ["--num_frames", str(frames)]
                step = f"long-{name}-{frames}"
                steps.append(self._against("scaling", step, model, pruners, [ratio], *more, data="long/long"))
        return steps


def accelerate() -> tuple[str, ...]:
    import torch

    return ("--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed") if torch.cuda.is_available() else ()
