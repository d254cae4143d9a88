"""`stts eval`: one model under one pruner on one or more tasks, in the files that lmms-eval's readers know.

The loop, its resuming and its ranks are those of `stts.eval.answering.loop`. Under torchrun every rank answers its own
questions and writes its own file; rank 0 waits for all and writes what one process would have written, up to times and
dates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stts.data.collate import Collator
from stts.eval.answering.cell import DENSE, Cell
from stts.eval.answering.loop import LoopOptions, answer_all, gather
from stts.eval.answering.method import Runner, environment, make_runners
from stts.eval.answering.questions import Task
from stts.eval.answering.ranks import Ranks
from stts.eval.answering.run_folder import Store, read_notes
from stts.eval.lmms_eval_files import RESULTS, SAMPLES, Run, result_files
from stts.eval.results.dense_reference import DenseReference
from stts.eval.results.footnotes import interval
from stts.eval.results.grading import score_tasks
from stts.eval.results.table import aligned
from stts.eval.run_config import EvalConfig, notes_on_tasks, resumable
from stts.metrics.accuracy import note_on_videos

PATTERNS = (f"*/*{RESULTS}", f"*/*{SAMPLES}*.jsonl", "*/*_submission_*.json")


def run_eval(
    config: EvalConfig,
    *,
    progress: bool = True,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> dict[str, Any] | None:
    """Run an evaluation, go on with it, or read the finished one: the content of its results.json.

    None on ranks other than 0. ValueError: `out` holds something else, a question has no video, the pruner cannot be
    run or refuses a video, a video is broken (unless on_error="skip"), the dense reference is of another run."""
    config, recorded = config.as_recorded()
    tasks = config.open_tasks()
    identity = config.identity(tasks)
    reference = None if config.dense_reference is None else DenseReference.open(config.dense_reference, identity)
    store = Store(
        Path(config.out), identity, kind="evaluation", result=PATTERNS, overwrite=config.overwrite, ranks=ranks
    )
    if store.finished is not None:
        return store.finished if ranks.is_first else None

    source = config.make_source(tasks, config.frames[0])
    model, processor, siglip = config.load(ranks)
    assert config.pruner is not None
    runner = _runner(config, make_runners(
        model, config.model, pruners=() if config.pruner == "none" else (config.pruner,),
        retention_ratios=(config.retention_ratio or 1.0,), exact=config.exact is not False, positions=config.positions,
        options={config.pruner: config.pruner_options}, siglip=siglip, seed=config.seed,
    ))  # fmt: skip
    options = LoopOptions(
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        shown=config.shown(source),
        num_workers=config.workers(model.device),
        refusals="raise",
        progress=progress,
        name="eval",
    )
    answers = answer_all(source, [runner], Collator(processor, training=False), store, options)
    if answers is None:
        return None
    if not answers.asked:
        raise ValueError(f"none of the {len(source)} videos can be read; first: {answers.skipped[0]}")
    run = Run(
        config=config,
        source=source,
        answers=answers,
        cell=runner.cell,
        scores=score_tasks(source, answers, runner.cell.key, config.scoring),
        reference=reference,
        environment=environment(model),
        identity=store.identity,
        config_hash=store.config_hash,
        began=store.began,
        weights_gib=model.get_memory_footprint() / 2**30,
        recorded=recorded,
    )
    results, files = result_files(run)
    store.finish(files)
    return results


@dataclass(frozen=True, kw_only=True)
class RescoreConfig:
    """Grade the answers of a finished `stts eval` again, in another way; no model is loaded, no video decoded."""

    rescore: Path
    """Folder of the run. Its benchmarks must be where they were, or at --data_root."""
    scoring: str = "strict"
    """strict, compat, or a name such as lmms-eval: as that public scorer."""
    out: Path | None = None
    """Folder of the new result; None: beside the run, with the scoring behind its name."""
    data_root: Path | None = None
    """Where the benchmarks are now; None: where the run found them."""
    dense_reference: Path | None = None
    """As of `stts eval`: a run with pruner none, graded in the same way."""
    overwrite: bool = False
    """Throw an earlier result in `out` away."""

    @property
    def target(self) -> Path:
        """Folder of the new result."""
        folder = self.rescore.resolve()
        return self.out or folder.with_name(f"{folder.name}-{self.scoring}")


class _FinishedRun(EvalConfig):
    """Settings of a run whose model need not be there any more."""

    def _check_folders(self) -> None:
        pass


def run_rescore(config: RescoreConfig) -> dict[str, Any]:
    """The content of the new results.json; all its files are in `out`, beside the same answers.

    ValueError: the folder holds no finished `stts eval`, its questions have changed or lie elsewhere, the scoring is
    unknown."""
    folder = config.rescore
    finished = sorted(folder.glob(PATTERNS[0]))
    if not finished:
        raise ValueError(f"--rescore {folder} holds no finished `stts eval`")
    own, notes = json.loads(finished[-1].read_text(encoding="utf-8"))["stts"], read_notes(folder)
    changes = {"out": config.target, "scoring": config.scoring, "dense_reference": config.dense_reference}
    if config.data_root is not None:
        changes["data_root"] = config.data_root
    run = _FinishedRun(**{**own["settings"], **changes})
    tasks = run.open_tasks()
    if own["identity"]["questions"] != {task.name: dict(task.loaded.files) for task in tasks}:
        raise ValueError(f"--rescore {folder}: the files of its questions have changed since; run it again")
    identity = {**own["identity"], "scoring": config.scoring, "dense_reference": run.settings()["dense_reference"]}
    reference = None if run.dense_reference is None else DenseReference.open(run.dense_reference, identity)
    store = Store(config.target, identity, kind="evaluation", result=PATTERNS, overwrite=config.overwrite)
    if store.finished is not None:
        return store.finished
    for note in notes:
        store.add(note, {}, "")
    before = [note for note in own["notes"] if note not in notes_on_tasks(tasks)]
    results, files = result_files(
        _graded(run, tasks, own, store, reference, [*before, f"Graded again from {folder.resolve().name}."])
    )
    store.finish(files)
    return results


def _graded(
    config: EvalConfig,
    tasks: Sequence[Task],
    own: Mapping[str, Any],
    store: Store,
    reference: DenseReference | None,
    notes: Sequence[str],
) -> Run:
    """The answers in `store`, graded; `own` is the block of our own in the results of the run that gave them."""
    source, efficiency = config.make_source(tasks, config.frames[0]), own["efficiency"]
    answers = gather(source, store.notes())
    cell = Cell(
        DENSE if own["pruner"] == "none" else own["pruner"], own["retention_ratio"], kind=own["stage"],
        label=own["label"], positions=own["positions"] or "",
    )  # fmt: skip
    return Run(
        config=config,
        source=source,
        answers=answers,
        cell=cell,
        scores=score_tasks(source, answers, cell.key, config.scoring),
        reference=reference,
        environment=efficiency["env"],
        identity=store.identity,
        config_hash=store.config_hash,
        began=store.began,
        weights_gib=efficiency["memory_gib"]["weights"],
        recorded=notes,
    )


def _runner(config: EvalConfig, runners: Sequence[Runner]) -> Runner:
    runner = runners[0] if config.pruner == "none" else runners[-1]
    if runner.pruning is None:
        raise ValueError(f"--pruner {config.pruner} --retention_ratio {config.retention_ratio}: {runner.cell.reason}")
    assert (runner.cell.method == DENSE) == (config.pruner == "none")
    return runner


def render(results: Mapping[str, Any]) -> str:
    """A line per task and suite."""
    own = results["stts"]
    head = ["task", "questions", "accuracy %", "unparsed", "vs dense", "kept", "tokens/frame", "FLOPs of dense", "ms"]
    body = []
    for task, row in own["tasks"].items():
        shown = [task, str(row["num_samples"])]
        if row["acc"] is None:
            shown += ["- (no public answers)", "-", "-"]
        else:
            shown += [interval(row["acc"], row["acc_low"], row["acc_high"]), str(row["parse_failures"]), "-"]
        if (paired := row.get("dense")) is not None:
            shown[-1] = interval(paired["difference"], paired["difference_low"], paired["difference_high"], "+")
        shown += [f"{row['retention_measured']:.3f}", f"{row['kept_per_frame']:.3g}"]
        shown += [f"{100 * row['flops_share']:.1f} %", "-" if row["ms"] is None else f"{row['ms']:.1f}"]
        body.append(shown)
    lines = aligned(head, body)
    pruner = "every token" if own["pruner"] == "none" else f"{own['pruner']} at {own['retention_ratio']:g}"
    notes = [*own["notes"], *(f"Suite {name}: {100 * score:.1f} %." for name, score in own["suites"].items() if score)]
    scored = [row["num_videos"] for row in own["tasks"].values() if row["acc"] is not None]
    notes += filter(None, map(note_on_videos, dict.fromkeys(scored)))
    if skipped := own["skipped"]:
        notes.insert(0, f"Skipped, video not readable: {len(skipped)} (first {skipped[0]['uid']}).")
    return "\n".join(
        [f"{results['model_name']}: {pruner}", "", lines[0], "-" * max(map(len, lines)), *lines[1:], "", *notes]
    )


def evaluate(config: EvalConfig) -> str | None:
    """`stts eval`: a table, and where the files are; None on ranks other than 0."""
    with resumable(config.out):
        results = run_eval(config, ranks=Ranks.from_env())
    return None if results is None else _shown(results, config.out)


def rescore(config: RescoreConfig) -> str | None:
    """`stts eval --rescore`: the same of answers graded again."""
    return _shown(run_rescore(config), config.target) if Ranks.from_env().is_first else None


def _shown(results: Mapping[str, Any], out: Path) -> str:
    return f"{render(results)}\nwritten: {out}/{results['model_name_sanitized']}/"
