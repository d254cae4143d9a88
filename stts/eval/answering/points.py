"""The points of a comparison: the same questions at several numbers of frames, whole or in parts.

    whole   a prompt shows all frames, and the model writes an answer
    parts   the frames are cut into disjoint interleaved parts; each part is a prompt of its own, whose options are
            scored in one forward pass, and `vote` puts the parts of a question together

Points are answered one after another by `stts.eval.answering.loop`, into one folder: with several of them, keys begin
with the number of frames. A prompt that would not fit the context of the LLM is found before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from transformers import ProcessorMixin

from stts.data.batches import make_batch
from stts.data.collate import Batch, Collator
from stts.data.datasets import Skipped
from stts.data.video.cache import Decoded
from stts.eval.answering.loop import Answers
from stts.eval.answering.method import Answer, Measured, Runner, Texts
from stts.eval.answering.questions import Asked, Source
from stts.eval.answering.voting import Vote, combine, interleaved
from stts.eval.benchmarks.base import Question
from stts.metrics.accuracy import normalise
from stts.metrics.cost import DecodeCost, VideoCost
from stts.metrics.extract import letters
from stts.models.pruning.context import Pruning
from stts.tokens import Grid

Overflow = Literal["raise", "skip"]


@dataclass(frozen=True, kw_only=True)
class PointSource(Source):
    """The questions of one point; with `parts` > 1 every question is asked once per part."""

    prefix: str = ""
    """Of every key."""
    parts: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = tuple(replace(one, key=key) for one in self.asked for key in self.keys_of(one))
        object.__setattr__(self, "asked", asked)

    def keys_of(self, one: Asked) -> list[str]:
        """The keys under which a question of the plain source is asked here."""
        key = self.prefix + one.key
        return [f"{key}#{part}" for part in range(self.parts)] if self.parts > 1 else [key]

    def shown(self, place: int) -> Decoded:
        video = super().shown(place)
        if self.parts == 1:
            return video
        mine = interleaved(len(video.frames), self.parts)[place % self.parts]
        return Decoded(video.frames[mine], video.timestamps_s[mine], video.duration_s)


def at_point(source: Source, num_frames: int, parts: int, *, prefix: str) -> PointSource:
    """The questions of `source` at this number of frames."""
    same = {item.name: getattr(source, item.name) for item in fields(Source) if item.init}
    return PointSource(**{**same, "num_frames": num_frames}, prefix=prefix, parts=parts)


# --- answers by scoring the options ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptionRunner(Runner):
    """Scores the options in one forward pass instead of generating: the first token of each, behind the prompt."""

    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By key."""
    packed: bool = False
    """All rows of the batch as one row, each attending to itself only."""

    def generate(self, batch: Batch, processor: ProcessorMixin, max_new_tokens: int) -> tuple[Texts, Measured]:
        pruning = self.pruning
        assert pruning is not None
        pruning.run_all_modules(self.packed)  # our own road also where the stock code could run: only it packs

        def first_step() -> torch.Tensor:
            logits_BLV: torch.Tensor = pruning.model(**batch.inputs, use_cache=not self.packed, logits_to_keep=1).logits
            return logits_BLV[:, -1]

        logits_BV, measured = self.timed(batch, first_step)
        logprob_BV = logits_BV.double().log_softmax(-1)
        texts: Texts = []
        for row, key in enumerate(batch.uids):
            ids = option_ids(processor, self.options[key])
            logprobs = logprob_BV[row, ids].tolist()
            texts.append((self.options[key][combine([logprobs], "mean").option], 1, logprobs))
        return texts, measured


def candidates(question: Question) -> tuple[str, ...]:
    """What an answer may be, as the model would write it: letters, or the options themselves where the answer is one.

    ValueError for a question without options."""
    if not question.options:
        raise ValueError(f"question {question.uid!r} has no options, which --parts scores; leave --parts out")
    texts = [normalise(option) for option in question.options]
    if question.answer is not None and normalise(question.answer) in texts:
        return tuple(question.options)
    return letters(len(texts))


def option_ids(processor: ProcessorMixin, options: Sequence[str]) -> list[int]:
    """First token of each option. ValueError where two begin alike: one token could not tell them apart."""
    ids = [processor.tokenizer(option, add_special_tokens=False)["input_ids"][0] for option in options]
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"options {list(options)} do not differ in their first token, which is what parts vote on; ask for letters"
        )
    return ids


# --- before anything runs --------------------------------------------------------------------------------------------


def first_batch(source: Source, collate: Collator) -> Batch:
    """The first question whose video can be read. ValueError when there is none."""
    for place in range(len(source)):
        item = source[place]
        batch = None if isinstance(item, Skipped) else make_batch(collate, [item], source.on_error)[0]
        if batch is not None:
            return batch
    raise ValueError(f"none of the {len(source)} videos can be read")


def grid_of(batch: Batch, pruning: Pruning) -> Grid:
    """Of a batch of one video."""
    visual = pruning.adapter.take_visual(dict(batch.inputs))
    assert visual is not None
    return visual.grids[0]


def check_context(
    source: PointSource, runners: Sequence[Runner], collate: Collator, on_overflow: Overflow
) -> list[Runner]:
    """`runners` without those whose prompts would not fit the context of the LLM, which keep the reason; measured on
    the first video, with the longest text of all questions. ValueError for the first of them with "raise"."""
    batch = first_batch(source, collate)
    text = _longest_text(source, collate) - collate.num_text_tokens(batch.samples)[0]
    longest = text + int(batch.inputs["attention_mask"].sum())
    checked = []
    for runner in runners:
        if runner.pruning is not None and (reason := _overflow(runner.pruning, batch, longest)):
            reason = f"{runner.cell.key} at {source.num_frames} frames {reason}"
            if on_overflow == "raise":
                raise ValueError(
                    f"{reason}; nothing is ever cut: use fewer --num_frames, lower --retention_ratios with --positions "
                    "compact, or --on_overflow skip to leave such methods out"
                )
            runner = replace(runner, cell=replace(runner.cell, reason=reason), pruning=None)
        checked.append(runner)
    return checked


def _overflow(pruning: Pruning, batch: Batch, longest: int) -> str:
    """ "" where the longest prompt fits."""
    grid = grid_of(batch, pruning)
    kept = pruning.llm_tokens(grid)
    need = longest - (grid.num_groups - kept if pruning.positions == "compact" else 0)
    if need <= pruning.context:
        return ""
    return (
        f"needs a context of {need} positions ({kept} of {grid.num_groups} visual tokens, positions "
        f"{pruning.positions!r}), but the LLM was made for {pruning.context}"
    )


def _longest_text(source: Source, collate: Collator) -> int:
    """Of a subtitle task no more entries are shown than there are frames: here the longest are."""
    samples = []
    for one in source.asked:
        longest = sorted(one.question.subtitles, key=lambda entry: -len(entry.text))[: source.num_frames]
        wording = source.wordings[one.task.name] if source.prompt == "official" else None
        samples.append(one.task.benchmark.sample(one.question, [entry.start_s for entry in longest], wording))
    return max(collate.num_text_tokens(samples))


# --- after all points have run ---------------------------------------------------------------------------------------


def merge_points(plain: Source, points: Sequence[tuple[PointSource, Answers]], vote: Vote) -> Answers:
    """The answers of all points under the keys of the plain source, parts of a question put together.

    A question that was skipped at one point, or in one part, is left out everywhere: points share their questions."""
    everywhere = [
        one for one in plain.asked if all(key in point.asked for source, point in points for key in source.keys_of(one))
    ]
    first, shown = points[0]
    asked: dict[str, Mapping[str, Any]] = {}
    for one in everywhere:
        parts = [shown.asked[key] for key in first.keys_of(one)]
        times = sorted(time for part in parts for time in part["frame_times"])
        asked[one.key] = {**parts[0], "frame_times": times}
    said = {
        cell: {one.key: _put_together(one, [answers[key] for key in source.keys_of(one)], vote) for one in everywhere}
        for source, point in points
        for cell, answers in point.said.items()
    }
    origin = {key: one.key for source, _ in points for one in plain.asked for key in source.keys_of(one)}
    skipped = {origin[item["uid"]]: item["reason"] for _, point in points for item in point.skipped}
    ms = {
        cell: {phase: tuple(source.parts * value for value in values) for phase, values in phases.items()}
        for source, point in points
        for cell, phases in point.ms.items()
    }
    results = [point for _, point in points]
    return Answers(
        asked=asked,
        said=said,
        skipped=tuple({"uid": key, "reason": reason} for key, reason in skipped.items()),
        failed={cell: reason for point in results for cell, reason in point.failed.items()},
        signals={cell: sources for point in results for cell, sources in point.signals.items()},
        ms=ms,
        sample_ms={},
        peak_gib={cell: gib for point in results for cell, gib in point.peak_gib.items()},
    )


def _put_together(one: Asked, parts: Sequence[Answer], vote: Vote) -> Answer:
    """Costs add up; the retention is the mean."""
    if len(parts) == 1:
        return parts[0]
    verdict = combine([part.option_logprobs or [] for part in parts], vote)

    def total(name: str) -> Any:
        return sum(getattr(part, name) for part in parts)

    def cost(name: str) -> VideoCost:
        costs = [getattr(part, name) for part in parts]
        return VideoCost(**{item.name: sum(getattr(one, item.name) for one in costs) for item in fields(VideoCost)})

    return replace(
        parts[0],
        prediction=candidates(one.question)[verdict.option],
        num_frames=total("num_frames"),
        num_groups=total("num_groups"),
        num_kept=total("num_kept"),
        retention=total("retention") / len(parts),
        cost=cost("cost"),
        dense_cost=cost("dense_cost"),
        decode=None
        if any(part.decode is None for part in parts)
        else DecodeCost(*(sum(getattr(part.decode, name) for part in parts) for name in ("flops", "cache_bytes"))),
        llm_flops={name: sum(part.llm_flops[name] for part in parts) for name in parts[0].llm_flops},
        kept_per_frame=[count for part in parts for count in part.kept_per_frame],
        num_input_tokens=total("num_input_tokens"),
        num_output_tokens=total("num_output_tokens"),
        option_logprobs=list(verdict.mean_logprob),
    )
