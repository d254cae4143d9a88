"""`stts compare`: dense, learned and training-free pruners on the same model, frames, prompts and token budgets.

Every batch is decoded and preprocessed once and then answered by every method in turn, dense first, so that nothing but
the pruner differs; the loop is `stts.eval.answering.loop`, which notes every batch and goes on behind the last one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from stts.budget import check_ratio
from stts.data.batches import make_batch
from stts.data.collate import Collator
from stts.eval.answering.equal_flops import match_flops
from stts.eval.answering.loop import Answers, LoopOptions, answer_all
from stts.eval.answering.method import Runner, environment, every_pruner, make_baseline, make_runners
from stts.eval.answering.questions import Source
from stts.eval.answering.ranks import Ranks
from stts.eval.answering.run_folder import RESULT, Store
from stts.eval.results.grading import TaskScore, make_records, score_tasks
from stts.eval.results.plot import draw
from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import render_csv, render_markdown, render_text
from stts.eval.run_config import RunConfig, check_answers, command, notes_on_tasks
from stts.pruners.registry import PRUNERS
from stts.tokens import Grid

Match = Literal["tokens", "flops", "both"]
FILES = (RESULT, "comparison.csv", "comparison.md", "comparison.png")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(RunConfig):
    """Compare pruners with dense on one model, on a data set or on benchmarks."""

    pruners: tuple[str, ...] = (
        "stts", "random", "visionzip", "fastvid", "holitom", "tango", "vidcom2", "fastv"
    )  # fmt: skip
    """Names (see `stts pruners`) or module:Class. Dense is always run, so `none` adds nothing. all: every one there is,
    of the learned ones that which the model's folder was trained with."""
    pruner_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by pruner, such as {tango: {compat: official}, fastvid: {variant: lv}}."""
    retention_ratios: tuple[float, ...] = (0.5, 0.25, 0.1)
    """Fractions of visual tokens kept, each in (0, 1]; a mean over the LLM's layers."""
    match: Match = "tokens"
    """What is equal between methods: tokens (every method at each ratio), flops (each at the ratio at which tower,
    connector, LLM and its own work cost what `match_to` costs at that ratio), or both, one after the other."""
    match_to: str = "stts"
    """The method whose FLOPs the others get, for --match flops and both."""
    baseline_model: str | Path | None = None
    """The same model before fine-tuning, for a dense row that shows what fine-tuning itself changed."""
    batch_size: int = 16
    """Questions answered at once."""

    def __post_init__(self) -> None:
        if tuple(self.pruners) == ("all",):
            object.__setattr__(self, "pruners", every_pruner(self.model))
        for flag in ("pruners", "retention_ratios"):
            values = tuple(getattr(self, flag))
            object.__setattr__(self, flag, values)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"--{flag} {list(values)} must name at least one value, each once")
        for name in self.pruners:
            if name not in PRUNERS and ":" not in name:
                raise ValueError(f"--pruners: {name!r} is unknown; known: {', '.join(PRUNERS)}; your own: module:Class")
        unknown = sorted(set(self.pruner_options) - (set(self.pruners) - {"none"}))
        if unknown:
            raise ValueError(f"--pruner_options: {unknown} are not among --pruners {list(self.pruners)}")
        for ratio in self.retention_ratios:
            try:
                check_ratio(ratio)
            except ValueError as error:
                raise ValueError(f"--retention_ratios: {error}") from error
        if self.match not in get_args(Match):
            raise ValueError(f"--match {self.match!r} must be one of {get_args(Match)}")
        if self.match != "tokens" and self.match_to not in self.pruners:
            raise ValueError(
                f"--match_to {self.match_to!r} is not among --pruners {list(self.pruners)}; name the one whose FLOPs "
                "the others get, or use --match tokens"
            )
        super().__post_init__()


def run_compare(
    config: CompareConfig,
    *,
    progress: bool = True,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> ComparisonResult | None:
    """Run a comparison, go on with it, or read the finished one; its files appear in `config.out` whole or not at all.

    None on ranks other than 0. ValueError: `out` holds something else, a question has no video or no usable answer, a
    learned pruner has no weights, a video is broken (unless on_error="skip")."""
    config, recorded = config.as_recorded()
    tasks = config.open_tasks()
    check_answers(tasks)
    identity = config.identity(tasks, config.baseline_model)
    store = Store(Path(config.out), identity, kind="comparison", result=FILES, overwrite=config.overwrite, ranks=ranks)
    if store.finished is not None:
        return ComparisonResult.from_json(store.finished)

    source = config.make_source(tasks)
    model, processor, siglip = config.load(ranks)
    weights_gib = model.get_memory_footprint() / 2**30
    runners = make_runners(
        model,
        config.model,
        pruners=config.pruners,
        retention_ratios=config.retention_ratios,
        exact=config.exact is not False,
        positions=config.positions,
        options=config.pruner_options,
        siglip=siglip,
        seed=config.seed,
    )
    collate = Collator(processor, training=False)
    if config.match != "tokens":
        grid = _first_grid(source, collate, runners[0])
        runners = match_flops(runners, grid, config.match_to, tokens_too=config.match == "both")
    if config.baseline_model is not None:
        runners.insert(0, make_baseline(config.baseline_model, model, processor))
    options = LoopOptions(
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
        shown=config.shown(source),
        num_workers=config.workers(model.device),
        progress=progress,
        name="compare",
    )
    answers = answer_all(source, runners, collate, store, options)
    if answers is None:
        return None
    result = make_result(config, source, runners, answers, environment(model), weights_gib)
    result = replace(result, notes=(*recorded, *result.notes))
    store.finish(
        {
            FILES[3]: draw(result),
            FILES[1]: render_csv(result),
            FILES[2]: render_markdown(result),
            RESULT: json.dumps({"identity": store.identity, **result.to_json()}, indent=1) + "\n",
        }
    )
    return result


def make_result(
    config: CompareConfig,
    source: Source,
    runners: Sequence[Runner],
    answers: Answers,
    environment: dict[str, Any],
    weights_gib: float | None,
) -> ComparisonResult:
    """The answers graded. ValueError when not one video could be read."""
    if not answers.asked:
        raise ValueError(
            f"none of the {len(source)} videos of {config.data or config.data_root} can be read; first: "
            f"{answers.skipped[0]}"
        )
    scores = {cell: score_tasks(source, answers, cell, config.scoring) for cell in answers.said}
    missing = tuple(
        {"uid": reason.partition(":")[0], "reason": reason}
        for task in source.tasks
        for reason in task.loaded.missing_video
    )
    return ComparisonResult(
        config={
            **config.settings(),
            "data": str(config.data or config.data_root),
            "sampler": config.sampler or ", ".join(sorted({task.benchmark.sampler for task in source.tasks})),
            "name": config.title,
        },
        environment=environment,
        cells=tuple(
            replace(runner.cell, reason=answers.failed.get(runner.cell.key, runner.cell.reason)) for runner in runners
        ),
        records=make_records(source, answers, scores),
        skipped=(*missing, *answers.skipped),
        batch_ms={cell: phases.get("generate", ()) for cell, phases in answers.ms.items() if cell in answers.said},
        signals=answers.signals,
        scores={cell: {task: TaskScore.of(found) for task, found in tasks.items()} for cell, tasks in scores.items()},
        phase_ms={
            cell: {phase: values for phase, values in phases.items() if phase != "generate"}
            for cell, phases in answers.ms.items()
            if cell in answers.said
        },
        peak_gib=answers.peak_gib,
        weights_gib=weights_gib,
        notes=notes_on_tasks(source.tasks),
    )


def _first_grid(source: Source, collate: Collator, dense: Runner) -> Grid:
    """Of the first video that can be read. ValueError when there is none."""
    assert dense.pruning is not None
    for place in range(len(source)):
        batch, _ = make_batch(collate, [source[place]], source.on_error)
        if batch is not None:
            visual = dense.pruning.adapter.take_visual(dict(batch.inputs))
            assert visual is not None
            return visual.grids[0]
    raise ValueError(f"none of the {len(source)} videos can be read")


def main(argv: Sequence[str] | None = None) -> int:
    """`stts compare`: prints the table."""

    def work(config: CompareConfig, ranks: Ranks) -> str | None:
        result = run_compare(config, ranks=ranks)
        written = f"written: {config.out}/comparison.json, .csv, .md, .png"
        return None if result is None else f"{render_text(result)}\n\n{written}"

    return command("stts compare", CompareConfig, argv, work)
