"""`stts eval`: one model under one pruner on one or more tasks, in the files that lmms-eval's readers know.

The loop, its resuming and its ranks are those of `stts.eval.answering.loop`. Under torchrun every rank answers its own
questions and writes its own file; rank 0 waits for all and writes what one process would have written, up to times and
dates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stts.data.collate import Collator
from stts.eval.answering.cell import DENSE
from stts.eval.answering.loop import LoopOptions, answer_all
from stts.eval.answering.method import Runner, environment, make_runners
from stts.eval.answering.ranks import Ranks
from stts.eval.answering.run_folder import Store
from stts.eval.lmms_eval_files import RESULTS, SAMPLES, Run, result_files
from stts.eval.results.dense_reference import DenseReference
from stts.eval.results.grading import score_tasks
from stts.eval.results.table import aligned, interval
from stts.eval.run_config import EvalConfig, command
from stts.metrics.accuracy import note_on_videos


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
    patterns = (f"*/*{RESULTS}", f"*/*{SAMPLES}*.jsonl", "*/*_submission_*.json")
    store = Store(
        Path(config.out), identity, kind="evaluation", result=patterns, overwrite=config.overwrite, ranks=ranks
    )
    if store.finished is not None:
        return store.finished if ranks.is_first else None

    source = config.make_source(tasks)
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


def _runner(config: EvalConfig, made: Sequence[Runner]) -> Runner:
    runner = made[0] if config.pruner == "none" else made[-1]
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


def main(argv: Sequence[str] | None = None) -> int:
    """`stts eval`: prints a table."""

    def work(config: EvalConfig, ranks: Ranks) -> str | None:
        results = run_eval(config, ranks=ranks)
        return (
            None if results is None else f"{render(results)}\nwritten: {config.out}/{results['model_name_sanitized']}/"
        )

    return command("stts eval", EvalConfig, argv, work)
