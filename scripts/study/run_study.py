"""The study: does learning the scores pay? One command that resumes, from nothing to docs/results.

    python scripts/study/run_study.py --scale cpu --jobs 2    two hours on 2 CPU cores: 9 tokens a frame
    python scripts/study/run_study.py --scale wide --jobs 2   33 minutes: 36 tokens a frame
    python scripts/study/run_study.py --scale distractors     change is not relevance: a rule and STTS, with a teacher
    python scripts/study/run_study.py --stages report         tables and plots of docs/results from what has been run
    python scripts/study/run_study.py --scale tiny            every stage in a minute, untrained: shows that it runs
    python scripts/study/run_study.py --model FOLDER          from another pretrained small VLM
    python scripts/study/run_study.py --list                  the commands, without running them

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
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

from arms import ArmsStudy
from report import write_report
from report_arms import write_arms
from steps import ROOT, SCALES, STAGES, Step, Study, accelerate


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
    command = " ".join(["python scripts/study/run_study.py --scale", args.scale, *more, f"--runs {args.runs}"])
    study = (ArmsStudy if scale.arms else Study)(args.runs, scale, accelerate(), command)
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
        written = write_arms(study, args.out) if isinstance(study, ArmsStudy) else write_report(study, args.out)
        print(f"wrote {written}")
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
    sys.path[:0] = [str(ROOT / "scripts" / "study"), str(ROOT)]
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
