"""The study: does learning the scores pay? One command that resumes, from nothing to docs/results.

    python scripts/study.py --scale cpu --jobs 2    2 CPU cores, two hours: the shipped VLM with 9 tokens a frame
    python scripts/study.py --scale wide --jobs 2   33 minutes: the shipped VLM with 36 tokens a frame
    python scripts/study.py --stages report         tables and plots of docs/results from what has been run
    python scripts/study.py --scale tiny            every stage in a minute, untrained: shows that it runs
    python scripts/study.py --model FOLDER          from another pretrained small VLM
    python scripts/study.py --list                  the commands, without running them

Every step is one `stts` command, printed before it runs and again beside the table made from it. A step whose output
exists, or that nothing needs any more, is not run again, and `stts fit` and `stts compare` go on where they were
stopped. With `--jobs` steps that need nothing from one another run side by side, each with its share of the cores and a
log under RUNS/log. Stages:

    data      ShapesQA as pictures (no video decoder needed): test, controls that show one frame or nothing, and long
              clips of 30 s to 5 min with the evidence timed for the largest number of frames
    pretrain  a dense VLM from nothing, where none is given
    finetune  STTS at 0.5, at 0.2 and elastic, configs/shapes_study_stts.yaml; and `novelty`, a fixed rule, elastic and
              fine-tuned likewise, one seed
    compare   dense and the training-free pruners at every ratio of the scale; the learned ones likewise; the controls
    ablation  STTS at 0.5 with one thing changed
    scaling   8 to 64 frames of the long clips at the tokens of 16 frames: dense, STTS, training-free
    report    docs/results/README.md and its plots

A copy of the repository is enough: `pip install` is not needed, nor PyAV, nor DeepSpeed.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("data", "pretrain", "finetune", "compare", "ablation", "scaling", "report")
SMALL = {  # form of the clips; configs/shapes_pretrain_small.yaml says the same
    "frame_size": "48", "families": "[order,count,flash]", "families_per_clip": "3", "questions_per_family": "1",
    "ask_by": "colour", "grid": "3", "num_glares": "1", "active_share": "0.75",
}  # fmt: skip
WIDE = SMALL | {"frame_size": "96"}  # configs/shapes_pretrain.yaml says the same
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
    form: Mapping[str, str] = field(default_factory=SMALL.copy)
    """Of the clips that are tested."""


FROZEN = (
    "random", "uniform", "novelty", "random-vit", "easy", "heuristic", "visionzip", "fastvid", "holitom",
    "holitom+inner", "stop-visionzip", "stop-fastvid", "stop-holitom", "tango", "tango+inner", "adatp", "fastv", "dart",
    "vidcom2",
)  # fmt: skip
SCALED = ("uniform", "random", "novelty", "visionzip", "fastvid", "stop-holitom", "tango")  # of the long clips
SCALES = {
    "cpu": Scale(
        num_test=250, num_long=100, seeds=(0, 1, 2), ratios=(0.7, 0.5, 0.3, 0.2, 0.1), frames=(8, 16, 32, 64),
        pruners=FROZEN, ablations=tuple(ABLATIONS), batch_size=30,
        given=Path("stts/assets/shapes_vlm"), form=SMALL, num_longer=2080,
        fit=(*(word for name, value in SMALL.items() if name != "questions_per_family"
               for word in (f"--data.shapes.{name}", value)),
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
    "tiny": Scale(
        num_test=1, num_long=1, seeds=(0, 1), ratios=(0.5, 0.2), frames=(8, 16), pruners=("random", "fastv"),
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
    command: str = "python scripts/study.py"

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
        options = [word for name, value in self.scale.form.items() for word in (f"--form.{name}", value)]
        kinds = {"test": ["--test", str(self.scale.num_test), "--long", "0"]}
        if self.scale.frames:
            frames = str(max(*self.scale.frames, 16))
            kinds["long"] = ["--test", "0", "--long", str(self.scale.num_long), "--num_sampled", frames]
        steps = []
        for kind, size in kinds.items():
            for show in ("clip", "one_frame", "nothing") if kind == "test" else ("clip",):
                out = self.path("data") / (kind if show == "clip" else f"{kind}-{show}")
                argv = ["data", "shapes", "--out", str(out), "--train", "0", "--val", "0", *size, "--files", "png"]
                argv += [*options, "--form.show", show]
                steps.append(Step("data", f"{kind}, {show}", tuple(argv), out / f"{kind}.jsonl"))
        return steps

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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--scale", choices=list(SCALES), default="cpu")
    parser.add_argument("--model", type=Path, help="a pretrained small VLM, instead of the stage pretrain")
    parser.add_argument("--runs", type=Path, help="folder of everything that is run (default: runs/study_SCALE)")
    parser.add_argument("--out", type=Path, help="folder of tables and plots (default: docs/results, or SCALE in it)")
    parser.add_argument("--jobs", type=int, default=1, help="steps side by side, each in a process of its own")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    args.runs = args.runs or Path(f"runs/study_{args.scale}")
    args.out = args.out or Path("docs/results") / ("" if args.scale == "cpu" else args.scale)
    scale = replace(SCALES[args.scale], given=args.model or SCALES[args.scale].given)
    more = [f"--model {args.model}"] if args.model else []
    command = " ".join(["python scripts/study.py --scale", args.scale, *more, f"--runs {args.runs}"])
    study = Study(args.runs, scale, _accelerate(), command)
    wanted = [step for step in study.steps() if step.stage in args.stages]
    missing = [step for step in wanted if not study.is_there(step)]
    for number, step in enumerate(wanted, 1):
        state = "to run" if step in missing else "there already"
        print(f"[{number}/{len(wanted)}] {step.stage}, {step.name} ({state})\n    {step.command}", flush=True)
        if args.jobs == 1 and not args.list and step in missing and (code := _run(step)) != 0:
            return _failed(step, code)
    if args.jobs > 1 and not args.list:
        for step, code in _side_by_side(missing, args.jobs, args.runs):
            if code != 0:
                return _failed(step, code)
    if "report" in args.stages and not args.list:
        from study_report import write_report

        print(f"wrote {write_report(study, args.out)}")
    return 0


def _failed(step: Step, code: int) -> int:
    print(f"error: {step.stage}, {step.name} ended with {code}; the same command goes on there", file=sys.stderr)
    return code


def _side_by_side(steps: Sequence[Step], jobs: int, runs: Path) -> Iterable[tuple[Step, int]]:
    """Steps and their exit codes as they end. A step waits for every earlier one whose output it names."""
    log = runs / "log"
    log.mkdir(parents=True, exist_ok=True)
    waiting, running = list(steps), dict[Future[int], tuple[Step, float]]()
    # worker processes stay, so that Python and its libraries start once; `spawn`: torch does not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(jobs,)) as pool:
        while waiting or running:
            for step in [step for step in waiting if len(running) < jobs]:
                before = [*waiting[: waiting.index(step)], *(other for other, _ in running.values())]
                if len(running) < jobs and not any(step.needs(other) for other in before):
                    waiting.remove(step)
                    running[pool.submit(_run, step, log / f"{step.stage}-{step.name}.txt")] = step, time.monotonic()
                    print(f"begun: {step.stage}, {step.name}", flush=True)
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                step, begun = running.pop(ended)
                if ended.result() != 0:
                    waiting.clear()
                print(f"ended: {step.stage}, {step.name}, {time.monotonic() - begun:.0f} s", flush=True)
                yield step, ended.result()


def _start(jobs: int) -> None:
    """A worker process of `_side_by_side`, which ends with the one that it works for: `stts fit` saves first."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _reach()
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    while True:  # `stts fit` takes the first as a word to save itself; the next one then ends this process
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


def _accelerate() -> tuple[str, ...]:
    import torch

    return ("--trainer.accelerator", "gpu", "--trainer.precision", "bf16-mixed") if torch.cuda.is_available() else ()


def _run(step: Step, log: Path | None = None) -> int:
    """In this process: starting Python anew for every step would take longer than some steps."""
    import torch

    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)

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
