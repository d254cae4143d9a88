"""The study: does learning the scores pay? One command that resumes, from nothing to docs/results.

    python scripts/study.py                         everything, on one GPU; about 20 minutes of it is pretraining
    python scripts/study.py --scale cpu             less of it, on 2 CPU cores, from the shipped VLM of the quick start
    python scripts/study.py --stages report         tables and plots of docs/results from what has been run
    python scripts/study.py --scale tiny            every stage in a minute, untrained: shows that it runs
    python scripts/study.py --model FOLDER          from a pretrained small VLM, without the stage pretrain
    python scripts/study.py --list                  the commands, without running them

Every step is one `stts` command, printed before it runs and again beside the table made from it. A step whose output
exists is not run again, and `stts fit` and `stts compare` go on where they were stopped. Stages:

    data      ShapesQA in its hard form as pictures (no video decoder needed): test, the controls that show one frame or
              nothing, and long clips of 30 s to 5 min with the evidence timed for 64 frames
    pretrain  the dense VLM, configs/shapes_pretrain.yaml
    finetune  STTS at 0.5, at 0.2 and elastic (0.1 to 0.7), three seeds each, configs/shapes_study_stts.yaml
    compare   dense and every training-free pruner at 0.7, 0.5, 0.3, 0.2, 0.1; the learned ones likewise; the controls
    ablation  STTS at 0.5 with one thing changed
    scaling   8 to 64 frames of the long clips at the tokens of 16 frames: dense, STTS, training-free
    report    docs/results/README.md and its plots

A copy of the repository is enough: `pip install` is not needed, nor PyAV, nor DeepSpeed.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import shlex
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("data", "pretrain", "finetune", "compare", "ablation", "scaling", "report")
HARD = {  # form of the clips; the configs say the same
    "families": "[colour,existence,order,count,flash]", "families_per_clip": "5", "questions_per_family": "2",
    "ask_by": "colour", "grid": "4", "num_glares": "2", "active_share": "0.75",
}  # fmt: skip
EASY = {  # what the shipped VLM has learned
    "families": "[colour,order,count,flash]", "families_per_clip": "3", "questions_per_family": "1", "ask_by": "shape",
    "grid": "3", "num_glares": "0", "active_share": "1.0",
}  # fmt: skip
ABLATIONS = {  # name -> options of `stts fit`; the base is STTS at 0.5, seed 0
    "temporal loss off": ["--model.loss_weights.temporal", "0"],
    "answer gradient off": ["--model.pruner_options.answer_gradient", "false"],
    "prune block 0": ["--model.pruner_options.prune_block", "0"],
    "prune block 2": ["--model.pruner_options.prune_block", "2"],
    "prune block 3": ["--model.pruner_options.prune_block", "3"],
    "rescale over a frame": ["--model.pruner_options.rescale_scope", "frame"],
    "rescale over the video": ["--model.pruner_options.rescale_scope", "video"],
    "straight-through gate": ["--model.pruner_options.straight_through", "true"],
    "half the fine-tuning": ["--trainer.limit_train_batches", "0.5"],
    "scorer only": ["--model.llm_lr", "0", "--model.vit_lr", "0", "--model.connector_lr", "0"],
    "novelty, fine-tuned likewise": ["--model.pruner", "novelty", "--model.pruner_options", "null"],
}


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    num_test: int
    num_long: int
    seeds: tuple[int, ...]
    ratios: tuple[float, ...]
    frames: tuple[int, ...]
    pruners: tuple[str, ...]
    ablations: tuple[str, ...]
    batch_size: int
    fit: tuple[str, ...] = ()
    """Further options of every `stts fit`."""
    init: tuple[str, ...] = ()
    """Sizes of the untrained VLM."""
    given: Path | None = None
    """A pretrained VLM to begin with; None: the stage `pretrain` makes one."""
    form: Mapping[str, str] = field(default_factory=HARD.copy)
    """Of the clips that are tested."""


FROZEN = (
    "random", "uniform", "novelty", "random-vit", "easy", "heuristic", "visionzip", "fastvid", "holitom",
    "holitom+inner", "stop-visionzip", "stop-fastvid", "stop-holitom", "tango", "tango+inner", "adatp", "fastv", "dart",
    "vidcom2",
)  # fmt: skip
SCALES = {
    "full": Scale(
        num_test=400, num_long=200, seeds=(0, 1, 2), ratios=(0.7, 0.5, 0.3, 0.2, 0.1), frames=(8, 16, 32, 64),
        pruners=FROZEN, ablations=tuple(ABLATIONS), batch_size=50,
        init=("--patch_size", "4", "--vit_width", "128", "--vit_mlp", "256",
              "--llm_width", "192", "--llm_heads", "6", "--llm_mlp", "512"),
    ),
    "cpu": Scale(
        num_test=120, num_long=40, seeds=(0,), ratios=(0.5, 0.3, 0.2), frames=(8, 16, 32), batch_size=30,
        pruners=("random", "uniform", "novelty", "visionzip", "fastvid", "holitom", "stop-holitom", "tango", "vidcom2",
                 "fastv"),
        ablations=("temporal loss off", "novelty, fine-tuned likewise"),
        given=Path("stts/assets/shapes_vlm"), form=EASY,
        fit=(*(word for name, value in EASY.items() for word in (f"--data.shapes.{name}", value)),
             "--data.phases", "[{num_clips: 1200, questions_per_clip: 3}]", "--data.num_val_clips", "100",
             "--data.batch_size", "8", "--data.num_workers", "1", "--trainer.val_check_interval", "75",
             "--trainer.log_every_n_steps", "25", "--progress_every", "25", "--model.warmup_steps", "20"),
    ),
    "tiny": Scale(
        num_test=1, num_long=1, seeds=(0, 1), ratios=(0.5, 0.2), frames=(8, 16), pruners=("random", "fastv"),
        ablations=("temporal loss off",), batch_size=10,
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


@dataclass(frozen=True)
class Study:
    """Where everything lies, and the steps in their order."""

    runs: Path
    scale: Scale
    accelerate: tuple[str, ...] = ()
    command: str = "python scripts/study.py"

    @property
    def pretrained(self) -> Path:
        return self.scale.given or self.runs / "pretrain" / "best"

    def path(self, name: str) -> Path:
        return self.runs / name

    def steps(self) -> list[Step]:
        return [*self._data(), *self._pretrain(), *self._finetune(), *self._compare(), *self._ablation(),
                *self._scaling()]  # fmt: skip

    def learned(self) -> dict[str, list[str]]:
        """Name -> the options of `stts fit` that make it."""
        elastic = f"{{low: {min(self.scale.ratios)}, high: {max(self.scale.ratios)}}}"
        return {"stts-0.5": ["0.5"], "stts-0.2": ["0.2"], "stts-elastic": [elastic]}

    def comparison(self, name: str) -> Path:
        return self.path(f"compare/{name}")

    def _data(self) -> list[Step]:
        form = dict(self.scale.form)
        families = form.pop("families")
        options = [word for name, value in form.items() for word in (f"--form.{name}", value)]
        long = ["--num_sampled", str(max(*self.scale.frames, 16))]
        kinds = {
            "test": ["--test", str(self.scale.num_test), "--long", "0"],
            "long": ["--test", "0", "--long", str(self.scale.num_long), *long],
        }
        steps = []
        for kind, size in kinds.items():
            for show in ("clip", "one_frame", "nothing") if kind == "test" else ("clip",):
                out = self.path("data") / (kind if show == "clip" else f"{kind}-{show}")
                argv = ["data", "shapes", "--out", str(out), "--train", "0", "--val", "0", *size, "--files", "png"]
                argv += ["--families", families, *options, "--form.show", show]
                steps.append(Step("data", f"{kind}, {show}", tuple(argv), out / f"{kind}.jsonl"))
        return steps

    def _pretrain(self) -> list[Step]:
        if self.scale.given is not None:
            return []
        empty, out = self.path("untrained"), self.path("pretrain")
        argv = ["init", "--out", str(empty), *(self.scale.init or ())]
        fit = ["fit", "--config", "configs/shapes_pretrain.yaml", "--model.model", str(empty), "--out", str(out)]
        fit += [*self.accelerate, *self.scale.fit]
        return [
            Step("pretrain", "untrained folder", tuple(argv), empty / "config.json"),
            Step("pretrain", "dense", tuple(fit), out / "model"),
        ]

    def _fit(self, stage: str, name: str, options: Sequence[str]) -> Step:
        out = self.path(name)
        argv = ["fit", "--config", "configs/shapes_study_stts.yaml", "--model.model", str(self.pretrained)]
        argv += ["--out", str(out), *self.accelerate, *self.scale.fit, *options]
        return Step(stage, name, tuple(argv), out / "model")

    def _finetune(self) -> list[Step]:
        return [
            self._fit("finetune", f"{name}-s{seed}", ["--model.retention_ratio", *ratio, "--seed_everything", str(seed),
                                                      "--data.seed", str(100 + seed)])
            for name, ratio in self.learned().items()
            for seed in self.scale.seeds
        ]  # fmt: skip

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

    def _compare(self) -> list[Step]:
        scale = self.scale
        steps = [self._against("compare", "frozen", self.pretrained, scale.pruners, scale.ratios)]
        for show in ("one_frame", "nothing"):
            steps.append(
                self._against("compare", show, self.pretrained, ["random"], [0.5], data=f"test-{show}/test")
            )  # fmt: skip
        before = ["--baseline_model", str(self.pretrained)]
        for name in self.learned():
            ratios = [float(name.split("-")[1])] if "elastic" not in name else scale.ratios
            for seed in scale.seeds:
                model = self.path(f"{name}-s{seed}") / "model"
                steps.append(self._against("compare", f"{name}-s{seed}", model, ["stts"], ratios, *before))
        return steps

    def _ablation(self) -> list[Step]:
        steps = []
        for name in self.scale.ablations:
            slug = "ablation-" + name.replace(",", "").replace(" ", "-")
            steps.append(self._fit("ablation", slug, ["--model.retention_ratio", "0.5", *ABLATIONS[name]]))
            pruner = "novelty" if "novelty" in name else "stts"
            steps.append(self._against("ablation", slug, self.path(slug) / "model", [pruner], [0.5]))
        return steps

    def _scaling(self) -> list[Step]:
        steps = []
        budget = 16 if 16 in self.scale.frames else min(self.scale.frames)
        for frames in self.scale.frames:
            ratio = round(min(1.0, budget / frames), 4)
            more = ["--num_frames", str(frames)]
            frozen = [name for name in ("uniform", "visionzip", "fastvid", "tango", "random") if name in FROZEN]
            frozen = [name for name in frozen if name in self.scale.pruners]
            model = self.path("stts-elastic-s0") / "model"
            for name, folder, pruners in (("frozen", self.pretrained, frozen), ("stts", model, ["stts"])):
                step = f"long-{name}-{frames}"
                steps.append(self._against("scaling", step, folder, pruners, [ratio], *more, data="long/long"))
        return steps


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--scale", choices=list(SCALES), default="full")
    parser.add_argument("--model", type=Path, help="a pretrained small VLM, instead of the stage pretrain")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of everything that is run")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of tables and plots")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(argv)
    scale = replace(SCALES[args.scale], given=args.model or SCALES[args.scale].given)
    more = [f"--model {args.model}"] if args.model else []
    command = " ".join(["python scripts/study.py --scale", args.scale, *more, f"--runs {args.runs}"])
    study = Study(args.runs, scale, _accelerate(), command)
    wanted = [step for step in study.steps() if step.stage in args.stages]
    for number, step in enumerate(wanted, 1):
        state = "there already" if step.done.exists() else "to run"
        print(f"[{number}/{len(wanted)}] {step.stage}, {step.name} ({state})\n    {step.command}", flush=True)
        if not args.list and not step.done.exists() and (code := _run(step)) != 0:
            print(
                f"error: {step.stage}, {step.name} ended with {code}; the same command goes on there", file=sys.stderr
            )
            return code
    if "report" in args.stages and not args.list:
        from study_report import write_report

        print(f"wrote {write_report(study, args.out)}")
    return 0


def _accelerate() -> tuple[str, ...]:
    import torch

    return ("--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed") if torch.cuda.is_available() else ()


def _run(step: Step) -> int:
    """In this process: starting Python anew for every step would take longer than some steps."""
    import torch

    from stts.cli import main as stts

    try:
        code = stts(step.argv)
        return code if code or step.done.exists() else 130  # `stts fit` ends well when a signal stops it
    except SystemExit as stop:  # of a parser
        return int(stop.code or 0) if isinstance(stop.code, int | None) else 2
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _reach() -> None:
    """Lets a plain copy of the repository be imported; `stts_train` is the name under which `train` is installed."""
    sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
    try:
        import stts_train  # noqa: F401
    except ImportError:
        folder = Path(tempfile.mkdtemp(prefix="stts-study-"))
        atexit.register(shutil.rmtree, folder)
        (folder / "stts_train").symlink_to(ROOT / "train")
        sys.path.insert(0, str(folder))


if __name__ == "__main__":
    _reach()
    sys.exit(main())
