"""`stts scale`: what more frames are worth at test time, with unchanged weights.

Every point shows the model F' = multiple x num_frames frames of each video:

    frames     at each of `retention_ratios`, dense beside them
    budget     at most `budget` visual tokens, r = min(1, budget / tokens of the video)
    parallel   `multiple` passes over disjoint interleaved parts of num_frames frames each, put together by `vote`
    packed     the same parts as one packed row, each attending to itself only

Points run one after another in the loop of `stts.eval.answering.loop`, into one folder. A prompt that would not fit the
context of the LLM is found before anything runs, and never cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import ProcessorMixin

from stts.budget import check_ratio
from stts.data.collate import Batch, Collator
from stts.data.datasets import Example
from stts.data.video.cache import Decoded
from stts.eval.answering.loop import Answers, LoopOptions, answer_all
from stts.eval.answering.method import Answer, Measured, Runner, Texts, environment, make_runners
from stts.eval.answering.questions import Asked, Source, Task
from stts.eval.answering.ranks import Ranks
from stts.eval.answering.run_folder import Store
from stts.eval.answering.voting import Vote, combine, interleaved
from stts.eval.benchmarks.base import Question
from stts.eval.results.grading import make_records, score_tasks
from stts.eval.results.scale_plot import draw
from stts.eval.results.scale_result import (
    FILES,
    RESULT,
    ScaleResult,
    ScaleRow,
    make_point,
    notes_on,
    render_csv,
    render_text,
    right_of_dense,
)
from stts.eval.run_config import RunConfig, check_answers, command, notes_on_tasks
from stts.metrics.accuracy import normalise
from stts.metrics.cost import VideoCost
from stts.metrics.extract import letters
from stts.models.pruning.context import Pruning
from stts.pruners.registry import PRUNERS
from stts.tokens import Grid

Mode = Literal["frames", "budget", "parallel", "packed"]
Overflow = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(RunConfig):
    """Test-time scaling: more frames for the same model, against tokens, FLOPs and seconds."""

    mode: Mode = "frames"
    """frames, budget, parallel or packed, see the documentation of stts.eval.scale."""
    multiples: tuple[int, ...] = (1, 2, 4)
    """Of num_frames, the frames that the model was trained with: how many frames each point shows."""
    pruners: tuple[str, ...] = ("stts", "holitom", "visionzip")
    """Names (see `stts pruners`) or module:Class. Dense is always run."""
    pruner_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by pruner, such as {tango: {compat: official}}."""
    retention_ratios: tuple[float, ...] = (0.7, 0.5, 0.3, 0.2)
    """Fractions of visual tokens kept, each in (0, 1]; not used by --mode budget."""
    budget: int | None = None
    """Visual tokens of a video that the LLM sees at most, for --mode budget; None: those of num_frames frames dense."""
    vote: Vote = "mean"
    """How parts are put together: mean of the log-probabilities of the options, or majority of the best ones."""
    on_overflow: Overflow = "raise"
    """What a prompt does that is longer than the context of the LLM: raise before anything runs, or skip that method at
    that point and say so in the table."""
    chunk_frames: int | None = None
    """Run the tower on so many frames at a time, for videos that do not fit memory whole."""
    batch_size: int = 1
    """Questions answered at once."""

    def __post_init__(self) -> None:
        for flag in ("multiples", "pruners", "retention_ratios"):
            values = tuple(getattr(self, flag))
            object.__setattr__(self, flag, values)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"--{flag} {list(values)} must name at least one value, each once")
        for flag, allowed in (("mode", Mode), ("vote", Vote), ("on_overflow", Overflow)):
            if getattr(self, flag) not in get_args(allowed):
                raise ValueError(f"--{flag} {getattr(self, flag)!r} must be one of {get_args(allowed)}")
        if min(self.multiples) < 1 or self.multiples != tuple(sorted(self.multiples)):
            raise ValueError(f"--multiples {list(self.multiples)} must be whole numbers from 1 on, increasing")
        for name in self.pruners:
            if name not in PRUNERS and ":" not in name:
                raise ValueError(f"--pruners: {name!r} is unknown; known: {', '.join(PRUNERS)}; your own: module:Class")
        for ratio in self.retention_ratios:
            try:
                check_ratio(ratio)
            except ValueError as error:
                raise ValueError(f"--retention_ratios: {error}") from error
        if self.budget is not None and (self.budget < 1 or self.mode != "budget"):
            raise ValueError(f"--budget {self.budget} must be at least 1 token, and goes with --mode budget only")
        if self.chunk_frames is not None and self.mode == "packed":
            raise ValueError("--chunk_frames cannot go with --mode packed, one pass for all; use --mode parallel")
        if self.save_kept:
            raise ValueError("--save_kept is not supported here; `stts compare --num_frames ...` writes kept tokens")
        super().__post_init__()

    @property
    def looks(self) -> bool:
        """Whether a video is shown in parts."""
        return self.mode in ("parallel", "packed")


# --- what is asked ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PointSource(Source):
    """The questions of one point: keys begin with its frames, and with `looks` > 1 every question comes that often."""

    looks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = tuple(
            replace(one, key=point_key(self.num_frames, one.key, look if self.looks > 1 else None))
            for one in self.asked
            for look in range(self.looks)
        )
        object.__setattr__(self, "asked", asked)

    def shown(self, place: int) -> Decoded:
        whole = super().shown(place)
        if self.looks == 1:
            return whole
        mine = interleaved(len(whole.frames), self.looks)[place % self.looks]
        return Decoded(whole.frames[mine], whole.timestamps_s[mine], whole.duration_s)


def point_key(num_frames: int, key: str, look: int | None = None) -> str:
    return f"{num_frames}f/{key}" + ("" if look is None else f"#{look}")


def candidates(question: Question) -> tuple[str, ...]:
    """What an answer may be, as the model would write it: letters, or the options themselves where the answer is one.

    ValueError for a question without options."""
    if not question.options:
        raise ValueError(f"question {question.uid!r} has no options; --mode parallel and packed need some")
    texts = [normalise(option) for option in question.options]
    if question.answer is not None and normalise(question.answer) in texts:
        return tuple(question.options)
    return letters(len(texts))


# --- who answers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LookRunner(Runner):
    """Scores the options in one forward pass instead of generating: the first token of each, behind the prompt."""

    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By key."""
    packed: bool = False
    """All rows of the batch as one row, each attending to itself only."""

    def generate(self, batch: Batch, processor: ProcessorMixin, max_new_tokens: int) -> tuple[Texts, Measured]:
        assert self.pruning is not None
        self.pruning.run_all_modules(self.packed)  # our own road also where the stock code could run: only it packs

        def first_step() -> torch.Tensor:
            out = self.pruning.model(**batch.inputs, use_cache=not self.packed, logits_to_keep=1)  # type: ignore[union-attr]
            logits_BV: torch.Tensor = out.logits[:, -1]
            return logits_BV

        logits_BV, measured = self.timed(batch, first_step)
        logprob_BV = logits_BV.double().log_softmax(-1)
        texts: Texts = []
        for row, key in enumerate(batch.uids):
            ids = option_ids(processor, self.options[key])
            logprobs = logprob_BV[row, ids].tolist()
            texts.append((self.options[key][combine([logprobs], "mean").option], 1, logprobs))
        return texts, measured


def option_ids(processor: ProcessorMixin, options: Sequence[str]) -> list[int]:
    """First token of each option. ValueError where two begin alike: one token could not tell them apart."""
    ids = [processor.tokenizer(option, add_special_tokens=False)["input_ids"][0] for option in options]
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"options {list(options)} do not differ in their first token, which is what parts vote on; ask for letters"
        )
    return ids


# --- a run -----------------------------------------------------------------------------------------------------------


def run_scale(
    config: ScaleConfig,
    *,
    progress: bool = True,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> ScaleResult | None:
    """Run every point, go on with a killed run, or read the finished one.

    None on ranks other than 0. ValueError: `out` holds something else, a prompt exceeds the context (unless it is to be
    skipped), a question has no options (parts), a video is broken (unless skipped)."""
    config, recorded = config.as_recorded()
    tasks = config.open_tasks()
    check_answers(tasks)
    store = Store(
        Path(config.out), config.identity(tasks), kind="scaling run", result=FILES, overwrite=config.overwrite,
        ranks=ranks,
    )  # fmt: skip
    if store.finished is not None:
        return ScaleResult.from_json(store.finished)
    model, processor, siglip = config.load(ranks)
    collate = Collator(processor, training=False)
    points = []
    for multiple in config.multiples:
        runners = make_runners(
            model,
            config.model,
            pruners=config.pruners,
            retention_ratios=(1.0,) if config.mode == "budget" else config.retention_ratios,
            exact=config.exact is not False,
            positions=config.positions,
            options=config.pruner_options,
            siglip=siglip,
            seed=config.seed,
        )
        points.append(_point(config, tasks, multiple, runners, collate))
    for source, runners in points:
        _check_context(config, source, runners, collate)
    found: list[ScaleRow] = []
    reference: dict[str, bool] | None = None
    for number, (source, runners) in enumerate(points):
        options = LoopOptions(
            batch_size=source.looks if config.mode == "packed" else config.batch_size,
            max_new_tokens=config.max_new_tokens,
            num_workers=config.workers(model.device),
            progress=progress,
            name=f"scale {number + 1}/{len(points)}, {source.num_frames} frames",
        )
        answers = answer_all(source, runners, collate, store, options)
        if answers is None:
            continue
        if not answers.asked:
            raise ValueError(f"none of the videos can be read; first: {answers.skipped[0]}")
        base = replace(source, looks=1) if source.looks > 1 else source
        joined = _join(answers, base, source.looks, config) if config.looks else answers
        scores = {cell: score_tasks(base, joined, cell, config.scoring) for cell in joined.said}
        records = make_records(base, joined, scores)
        cells = [
            replace(runner.cell, reason=answers.failed.get(runner.cell.key, runner.cell.reason)) for runner in runners
        ]
        found += make_point(source.num_frames, source.looks, cells, records, answers, reference)
        reference = right_of_dense(records) if reference is None else reference
    if not ranks.is_first:
        return None
    settings = {**config.settings(), "data": str(config.data or config.data_root), "name": config.title}
    where = environment(model)
    notes = (*notes_on(settings, where, found), *recorded, *notes_on_tasks(tasks))
    result = ScaleResult(config=settings, environment=where, rows=tuple(found), notes=notes)
    store.finish(
        {
            FILES[2]: draw(result),
            FILES[1]: render_csv(result),
            RESULT: json.dumps({"identity": store.identity, **result.to_json()}, indent=1) + "\n",
        }
    )
    return result


def _point(
    config: ScaleConfig, tasks: Sequence[Task], multiple: int, runners: list[Runner], collate: Collator
) -> tuple[PointSource, list[Runner]]:
    """Source and runners of one point."""
    base = config.make_source(tasks)
    settings = {name: getattr(base, name) for name in base.__dataclass_fields__ if base.__dataclass_fields__[name].init}
    settings |= {"num_frames": multiple * base.num_frames, "looks": multiple if config.looks else 1}
    source = PointSource(**settings)
    made: list[Runner] = []
    for runner in runners:
        if runner.pruning is not None and config.chunk_frames is not None:
            try:
                runner.pruning.chunk_frames = config.chunk_frames
            except ValueError as error:
                runner = replace(runner, cell=replace(runner.cell, reason=str(error)), pruning=None)
        if config.looks:
            options = {one.key: candidates(one.question) for one in source.asked}
            runner = LookRunner(runner.cell, runner.pruning, options, config.mode == "packed")
        elif config.mode == "budget" and runner.pruning is not None and runner.cell.kind != "unpruned":
            grid = _grid(source, runner.pruning, collate)
            budget = config.budget or runner.pruning.adapter.grid(1).per_frame * base.num_frames
            runner.pruning.limit_tokens(budget)
            ratio = min(1.0, budget / grid.num_groups)
            runner = replace(runner, cell=replace(runner.cell, retention_configured=ratio))
        made.append(runner)
    return source, made


def _first(source: Source) -> Example:
    """The first question whose video can be read."""
    for place in range(len(source)):
        if isinstance(example := source[place], Example):
            return example
    raise ValueError("none of the videos can be read")


def _grid(source: Source, pruning: Pruning, collate: Collator) -> Grid:
    """Of the first video at this point's frames."""
    batch = collate([_first(source)])
    assert batch is not None
    visual = pruning.adapter.take_visual(dict(batch.inputs))
    assert visual is not None
    return visual.grids[0]


def _check_context(config: ScaleConfig, source: PointSource, runners: list[Runner], collate: Collator) -> None:
    """Leave out, or refuse, what would not fit the context of the LLM; measured on the first video, with the longest
    text of all questions."""
    example = _first(source)
    batch = collate([example])
    assert batch is not None
    text = _longest_text(source, collate) - collate.num_text_tokens([example.sample])[0]
    longest = text + int(batch.inputs["attention_mask"].sum())
    for number, runner in enumerate(runners):
        pruning = runner.pruning
        if pruning is None:
            continue
        visual = pruning.adapter.take_visual(dict(batch.inputs))
        assert visual is not None
        [grid] = visual.grids
        limit = pruning.context
        kept = pruning.llm_tokens(grid)
        need = longest - (grid.num_groups - kept if pruning.positions == "compact" else 0)
        if need <= limit:
            continue
        reason = (
            f"{runner.cell.key} at {source.num_frames} frames needs a context of {need} positions ({kept} of "
            f"{grid.num_groups} visual tokens, positions {pruning.positions!r}), but the LLM was made for {limit}"
        )
        if config.on_overflow == "raise":
            raise ValueError(
                f"{reason}; nothing is ever cut: use smaller --multiples, lower --retention_ratios with --positions "
                "compact, or --on_overflow skip to leave such methods out"
            )
        runners[number] = replace(runner, cell=replace(runner.cell, reason=reason), pruning=None)


def _longest_text(source: Source, collate: Collator) -> int:
    """Of a subtitle task no more entries are shown than there are frames: here the longest are."""
    samples = []
    for one in source.asked:
        longest = sorted(one.question.subtitles, key=lambda entry: -len(entry.text))[: source.num_frames]
        wording = source.wordings[one.task.name] if source.prompt == "official" else None
        samples.append(one.task.benchmark.sample(one.question, [entry.start_s for entry in longest], wording))
    return max(collate.num_text_tokens(samples))


def _join(answers: Answers, base: Source, looks: int, config: ScaleConfig) -> Answers:
    """One answer per question from its parts; a question of which a part is missing is left out."""
    said: dict[str, dict[str, Answer]] = {}
    asked: dict[str, Mapping[str, Any]] = {}
    for one in base.asked:
        parts = [f"{one.key}#{look}" for look in range(looks)] if looks > 1 else [one.key]
        if not all(part in answers.asked for part in parts):
            continue
        times = sorted(time for part in parts for time in answers.asked[part]["frame_times"])
        asked[one.key] = {**answers.asked[parts[0]], "frame_times": times}
        for cell, found in answers.said.items():
            said.setdefault(cell, {})[one.key] = _one(one, [found[part] for part in parts], config.vote)
    return replace(answers, asked=asked, said=said)


def _one(asked: Asked, parts: Sequence[Answer], vote: Vote) -> Answer:
    """Costs add up; the retention is the mean."""
    verdict = combine([part.option_logprobs or [] for part in parts], vote)

    def total(name: str) -> Any:
        return sum(getattr(part, name) for part in parts)

    def cost(name: str) -> VideoCost:
        costs = [getattr(part, name) for part in parts]
        return VideoCost(**{key: sum(getattr(one, key) for one in costs) for key in VideoCost.__dataclass_fields__})

    return replace(
        parts[0],
        prediction=candidates(asked.question)[verdict.option],
        num_frames=total("num_frames"),
        num_groups=total("num_groups"),
        num_kept=total("num_kept"),
        retention=total("retention") / len(parts),
        cost=cost("cost"),
        dense_cost=cost("dense_cost"),
        llm_flops={name: sum(part.llm_flops[name] for part in parts) for name in parts[0].llm_flops},
        kept_per_frame=[count for part in parts for count in part.kept_per_frame],
        num_input_tokens=total("num_input_tokens"),
        num_output_tokens=total("num_output_tokens"),
        option_logprobs=list(verdict.mean_logprob),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`stts scale`: prints the table."""

    def work(config: ScaleConfig, ranks: Ranks) -> str | None:
        result = run_scale(config, ranks=ranks)
        written = f"written: {', '.join(str(Path(config.out) / name) for name in FILES)}"
        return None if result is None else f"{render_text(result)}\n\n{written}"

    return command("stts scale", ScaleConfig, argv, work)
