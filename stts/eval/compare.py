"""`stts compare`: dense, learned and training-free pruners on the same model, frames, prompts and token budgets.

Every batch is decoded and preprocessed once and then answered by every method in turn, dense first, so that nothing but
the pruner differs; the loop is `stts.eval.answering.loop`, which notes every batch and goes on behind the last one.
With several --num_frames all methods are compared at each of them, with dense at the first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from stts.budget import check_ratio
from stts.data.collate import Collator
from stts.eval.answering.cell import Cell
from stts.eval.answering.equal_flops import match_flops
from stts.eval.answering.loop import Answers, LoopOptions, answer_all
from stts.eval.answering.method import (
    Runner,
    environment,
    every_pruner,
    load_alike,
    make_baseline,
    make_runners,
)
from stts.eval.answering.points import (
    OptionRunner,
    Overflow,
    PointSource,
    at_point,
    candidates,
    check_context,
    first_batch,
    grid_of,
    merge_points,
)
from stts.eval.answering.questions import Source
from stts.eval.answering.ranks import Ranks
from stts.eval.answering.run_folder import RESULT, Store
from stts.eval.answering.voting import Vote
from stts.eval.results.grading import TaskScore, make_records, score_tasks
from stts.eval.results.plot import draw
from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import BEFORE, DENSE, render_csv, render_markdown, render_text
from stts.eval.run_config import RunConfig, check_answers, notes_on_tasks, resumable
from stts.models.checkpoints.load import pruner_settings, recorded_pruner
from stts.models.pruning.siglip import SiglipSource
from stts.pruners.registry import check_name
from stts.tokens import Grid

Match = Literal["tokens", "flops", "both"]
SHARED = "On a CPU the tower runs once per batch for all methods behind it; the time that it took is in the ms of each."
FILES = (RESULT, "comparison.csv", "comparison.md", "comparison.png")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(RunConfig):
    """Compare pruners with dense on one model, on a data set or on benchmarks.

    `stts compare --model M --video CLIP --question "..."` runs every method on one clip, without a data file."""

    pruners: tuple[str, ...] = (
        "stts", "random", "visionzip", "fastvid", "holitom", "tango", "vidcom2", "fastv"
    )  # fmt: skip
    """Names (see `stts pruners`), module:Class or file.py:Class. Dense is always run, so `none` adds nothing. all:
    every one there is, of the learned ones that which the model's folder was trained with."""
    pruner_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by pruner, such as {tango: {compat: official}, fastvid: {variant: lv}}."""
    retention_ratios: tuple[float, ...] = (0.5, 0.25, 0.1)
    """Fractions of visual tokens kept, each in (0, 1]; a mean over the LLM's layers."""
    match: Match = "tokens"
    """What is equal between methods: tokens (every method at each ratio), flops (each at the ratio at which tower,
    connector, LLM and its own work cost what `match_to` costs at that ratio), or both, one after the other."""
    match_to: str = "stts"
    """The method whose FLOPs the others get, for --match flops and both."""
    trained: dict[str, str] = field(default_factory=dict)
    """Further models, fine-tuned from --model, by the names of their rows: {stts: runs/stts/model, evs-tuned:
    runs/evs/model}. Each runs the pruner that its folder records, at every ratio; --pruners run on --model. The first
    is compared with each of the others, paired by question."""
    baseline_model: str | Path | None = None
    """The same model before fine-tuning, for a dense row that shows what fine-tuning itself changed."""
    budget: int | Literal["dense"] | None = None
    """Visual tokens of a video that the LLM sees at most, in place of retention_ratios: r = min(1, budget / tokens of
    the video); dense: as many as the first of num_frames has."""
    parts: tuple[int, ...] = (1,)
    """Interleaved parts in which the frames of a video are shown, one number or one for each of num_frames; the options
    of each part are scored, and `vote` puts the parts together."""
    packed: bool = False
    """All parts of a video as one packed row, each attending to itself only."""
    vote: Vote = "mean"
    """How parts are put together: mean of the log-probabilities of the options, or majority of the best ones."""
    on_overflow: Overflow = "raise"
    """What a prompt does that is longer than the context of the LLM: raise before anything runs, or skip that method
    and say so in the table."""
    chunk_frames: int | None = None
    """Run the tower on so many frames at a time, for videos that do not fit memory whole."""
    batch_size: int = 16
    """Questions answered at once."""
    wide: bool = False
    """Print every column: tokens, FLOPs by part, tasks, times by phase. comparison.md has them anyway."""

    def __post_init__(self) -> None:
        if tuple(self.pruners) == ("all",):
            object.__setattr__(self, "pruners", every_pruner(self.model))
        for flag in ("pruners", "retention_ratios"):
            values = tuple(getattr(self, flag))
            object.__setattr__(self, flag, values)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"--{flag} {list(values)} must name at least one value, each once")
        for name in self.pruners:
            check_name(name)
        unknown = sorted(set(self.pruner_options) - ({*self.pruners, *self.trained} - {"none"}))
        if unknown:
            raise ValueError(f"--pruner_options: {unknown} are not among --pruners {[*self.pruners, *self.trained]}")
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
        if taken := sorted(set(self.trained) & {*self.pruners, DENSE, BEFORE}):
            raise ValueError(
                f"--trained: {taken} are names of other rows; call them otherwise, such as {taken[0]}-tuned"
            )
        if self.trained and self.match != "tokens":
            raise ValueError("--trained goes with --match tokens: these models differ in more than their pruner")
        super().__post_init__()
        self._check_points()

    def _check_points(self) -> None:
        parts = tuple(self.parts)
        object.__setattr__(self, "parts", parts)
        for flag, allowed in (("vote", Vote), ("on_overflow", Overflow)):
            if getattr(self, flag) not in get_args(allowed):
                raise ValueError(f"--{flag} {getattr(self, flag)!r} must be one of {get_args(allowed)}")
        if not parts or min(parts) < 1 or len(parts) not in (1, len(self.frames)):
            raise ValueError(f"--parts {list(parts)} must be one number from 1 on, or one for each of --num_frames")
        if isinstance(self.budget, int) and self.budget < 1:
            raise ValueError(f"--budget {self.budget} must be at least 1 token")
        if self.packed and (parts == (1,) or self.chunk_frames is not None):
            raise ValueError("--packed goes with --parts, and without --chunk_frames: it is one pass for all")
        several = len(self.frames) > 1 or self.budget is not None or parts != (1,)
        if several and self.match != "tokens":
            raise ValueError("--match flops and both go with one number of --num_frames, no --budget and no --parts")
        if (len(self.frames) > 1 or parts != (1,)) and self.save_kept:
            raise ValueError("--save_kept goes with one number of --num_frames and no --parts")

    @property
    def recording(self) -> tuple[str | Path, ...]:
        return (self.model, *self.trained.values())

    @property
    def points(self) -> list[tuple[int, int]]:
        """Frames and parts of every point."""
        parts = self.parts if len(self.parts) > 1 else self.parts * len(self.frames)
        return list(zip(self.frames, parts, strict=True))


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
    identity = config.identity(tasks, config.baseline_model, *config.trained.values())
    store = Store(Path(config.out), identity, kind="comparison", result=FILES, overwrite=config.overwrite, ranks=ranks)
    if store.finished is not None:
        return ComparisonResult.from_json(store.finished)

    plain = config.make_source(tasks, config.frames[0])
    model, processor, siglip = config.load(ranks)
    weights_gib = model.get_memory_footprint() / 2**30
    collate = Collator(processor, training=False)
    trained = {name: load_alike(path, model, processor, "--trained") for name, path in config.trained.items()}
    points = _points(config, plain, model, trained, siglip, collate)
    if not store.notes() or config.on_overflow == "skip":  # what goes on was checked when it began
        points = [(source, check_context(source, runners, collate, config.on_overflow)) for source, runners in points]
    if config.baseline_model is not None:
        baseline = make_baseline(config.baseline_model, model, processor)
        points[0][1].insert(0, _at(baseline, config, points[0][0], 0))
    answered: list[tuple[PointSource, Answers]] = []
    for number, (source, runners) in enumerate(points):
        options = LoopOptions(
            batch_size=source.parts if config.packed else config.batch_size,
            max_new_tokens=config.max_new_tokens,
            shown=config.shown(source),
            num_workers=config.workers(model.device),
            progress=progress,
            name="compare" if len(points) == 1 else f"{number + 1} of {len(points)}: {source.num_frames} frames",
        )
        answers = answer_all(source, runners, collate, store, options)
        if answers is not None:
            answered.append((source, answers))
    if not answered:
        return None
    merged = merge_points(plain, answered, config.vote)
    cells = [runner.cell for _, runners in points for runner in runners]
    result = make_result(config, plain, cells, merged, environment(model), weights_gib)
    once = (SHARED,) if model.device.type == "cpu" else ()
    result = replace(result, notes=(*recorded, *result.notes, *once))
    store.finish(
        {
            FILES[3]: draw(result),
            FILES[1]: render_csv(result),
            FILES[2]: render_markdown(result),
            RESULT: json.dumps({"identity": store.identity, **result.to_json()}, indent=1) + "\n",
        }
    )
    return result


def _points(
    config: CompareConfig,
    plain: Source,
    model: PreTrainedModel,
    trained: Mapping[str, PreTrainedModel],
    siglip: SiglipSource | None,
    collate: Collator,
) -> list[tuple[PointSource, list[Runner]]]:
    """What is asked, and who answers, at every number of frames."""
    points: list[tuple[PointSource, list[Runner]]] = []
    budget = config.budget
    for number, (num_frames, parts) in enumerate(config.points):
        source = at_point(plain, num_frames, parts, prefix=f"{num_frames}f/" if len(config.points) > 1 else "")
        runners = _runners(config, model, trained, siglip)
        dense = runners[0].pruning
        assert dense is not None
        if config.match != "tokens":
            grid = grid_of(first_batch(source, collate), dense)
            runners = match_flops(runners, grid, config.match_to, tokens_too=config.match == "both")
        if budget is not None:
            grid = grid_of(first_batch(source, collate), dense)
            budget = grid.num_groups if budget == "dense" else budget
            runners = [_limited(runner, budget, grid) for runner in runners]
        points.append((source, [_at(runner, config, source, number) for runner in runners]))
    return points


def _runners(
    config: CompareConfig, model: PreTrainedModel, trained: Mapping[str, PreTrainedModel], siglip: SiglipSource | None
) -> list[Runner]:
    """Dense, then at every ratio what was fine-tuned and the pruners of --model."""
    ratios = config.retention_ratios if config.budget is None else (1.0,)

    def of(
        model: PreTrainedModel, path: str | Path, pruners: Sequence[str], options: Mapping[str, Mapping[str, Any]]
    ) -> list[Runner]:
        return make_runners(
            model,
            path,
            pruners=pruners,
            retention_ratios=ratios,
            exact=config.exact is not False,
            positions=config.positions,
            options=options,
            siglip=siglip,
            seed=config.seed,
        )

    dense, *runners = of(model, config.model, config.pruners, config.pruner_options)
    tuned: list[Runner] = []
    for name, own in trained.items():
        path = config.trained[name]
        pruner = _pruner_of(path)
        _, *its = of(own, path, [pruner], {pruner: config.pruner_options.get(name, {})})
        tuned += [replace(runner, cell=replace(runner.cell, method=name)) for runner in its]
    return [dense, *sorted([*tuned, *runners], key=lambda runner: ratios.index(runner.cell.retention_configured))]


def _pruner_of(path: str) -> str:
    """The pruner that a folder of --trained records. ValueError where there is none."""
    settings = pruner_settings(path)
    if settings is None or settings["pruner"] == "none":
        raise ValueError(f"--trained {path} records no pruner; name the `model` folder of a run of `stts fit` with one")
    return recorded_pruner(path, settings)


def _limited(runner: Runner, budget: int, grid: Grid) -> Runner:
    """With at most `budget` tokens of every video; the table names the ratio of the first one."""
    if runner.pruning is None or runner.cell.kind == "unpruned":
        return runner
    runner.pruning.limit_tokens(budget)
    return replace(runner, cell=replace(runner.cell, retention_configured=min(1.0, budget / grid.num_groups)))


def _at(runner: Runner, config: CompareConfig, source: PointSource, number: int) -> Runner:
    """The runner at point `number`."""
    cell = replace(runner.cell, point=number, num_frames=source.num_frames, parts=source.parts)
    runner = replace(runner, cell=cell)
    if runner.pruning is not None and config.chunk_frames is not None:
        try:
            runner.pruning.chunk_frames = config.chunk_frames
        except ValueError as error:
            runner = Runner(replace(cell, reason=str(error)), None)
    if config.parts == (1,):
        return runner
    options = {one.key: candidates(one.question) for one in source.asked}
    return OptionRunner(runner.cell, runner.pruning, options, config.packed)


def make_result(
    config: CompareConfig,
    source: Source,
    cells: Sequence[Cell],
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
        cells=tuple(replace(cell, reason=answers.failed.get(cell.key, cell.reason)) for cell in cells),
        records=make_records(source, answers, scores),
        skipped=(*missing, *answers.skipped),
        batch_ms={cell: phases.get("generate", ()) for cell, phases in answers.ms.items() if cell in answers.said},
        signals=answers.signals,
        scores={cell: {task: TaskScore.of(one) for task, one in tasks.items()} for cell, tasks in scores.items()},
        phase_ms={
            cell: {phase: values for phase, values in phases.items() if phase != "generate"}
            for cell, phases in answers.ms.items()
            if cell in answers.said
        },
        peak_gib=answers.peak_gib,
        weights_gib=weights_gib,
        notes=notes_on_tasks(source.tasks),
    )


def compare(config: CompareConfig) -> str | None:
    """`stts compare`: the table, and what was written; None on ranks other than 0."""
    with resumable(config.out):
        result = run_compare(config, ranks=Ranks.from_env())
    written = f"written: {config.out}/comparison.json, .csv, .md, .png"
    return None if result is None else f"{render_text(result, wide=config.wide)}\n\n{written}"
