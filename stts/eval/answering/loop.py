"""The one loop behind `stts eval`, `stts compare` and `stts scale`: questions in, what every method said out.

Every batch is decoded and preprocessed once and then answered by every method in turn, so that nothing but the pruner
differs. A finished batch is noted at once; a killed run goes on behind it. Ranks share nothing but the folder.

A note (a line of a part file) holds, with `cell` = `Cell.key` and `key` = `Asked.key`:

    keys     what the batch was about                  asked    {key: {input, frame_times}}
    said     {cell: {key: Answer}}                       skipped  [{uid, reason}]
    failed   {cell: why it refused a video}            signals  {cell: {signal: what it was made from}}
    ms       {cell: {generate, ... per sample}}, empty where the batch is not comparable
    gib      {cell: peak memory}
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stts.data.batches import make_batch
from stts.data.collate import Batch, Collator
from stts.data.datasets import Skipped
from stts.eval.answering.evidence import count_kept
from stts.eval.answering.kept_tokens import kept_tensors
from stts.eval.answering.method import Answer, Runner
from stts.eval.answering.questions import Source
from stts.eval.answering.run_folder import Note, Store
from stts.models.checkpoints.chat import asked_of
from stts.progress import progress_bar


@dataclass(frozen=True)
class Answers:
    """What every method said to every question, of all ranks, in the order of the source."""

    asked: Mapping[str, Mapping[str, Any]]
    """By key: `input`, the prompt without its chat template, and `frame_times`, seconds. Skipped ones are left out."""
    said: Mapping[str, Mapping[str, Answer]]
    """By cell, then by key. A method that refused a video is in `failed` only."""
    skipped: tuple[Mapping[str, str], ...]
    """`uid` and `reason` of every question whose video could not be read."""
    failed: Mapping[str, str]
    """Cell -> why it stopped."""
    signals: Mapping[str, Mapping[str, str]]
    ms: Mapping[str, Mapping[str, tuple[float, ...]]]
    """By cell, then by phase (`generate` is all of them): milliseconds per sample of every timed batch."""
    sample_ms: Mapping[str, Mapping[str, Mapping[str, float]]]
    """By cell, key and phase: mean over the batch the question was in, where that was timed."""
    peak_gib: Mapping[str, float]
    """By cell, on a GPU: the most that was allocated, weights included."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions:
    batch_size: int = 1
    max_new_tokens: int | None = None
    """None: each task's own."""
    shown: Collection[str] = ()
    """Keys of which the kept tokens are written."""
    num_workers: int = 0
    """Processes that decode ahead."""
    refusals: Literal["note", "raise"] = "note"
    """What a pruner does that refuses a video: leave it out and go on with the others, or stop."""
    progress: bool = True
    name: str = "eval"
    """Of the progress bar."""


def answer_all(
    source: Source, runners: Sequence[Runner], collate: Collator, store: Store, options: LoopOptions
) -> Answers | None:
    """Ask every question of every runner that has a pruner, except for what `store` holds already.

    None on ranks other than 0. ValueError: a video is broken (unless the source skips those), dense fails, the folder
    cannot be written, another rank stopped."""
    try:
        _answer_mine(source, runners, collate, store, options)
    except ValueError as error:
        store.stop(str(error))
        raise
    if not store.ranks.is_first:
        return None
    return gather(source, store.wait(source.keys, progress=options.progress))


def _answer_mine(
    source: Source, runners: Sequence[Runner], collate: Collator, store: Store, options: LoopOptions
) -> None:
    active = [runner for runner in runners if runner.pruning is not None]
    notes, ranks = of_source(source, store.notes()), store.ranks
    done = {key for note in notes for key in note["keys"]}
    failed = {cell for note in notes for cell in note["failed"]}
    batches = source.batches(options.batch_size, ranks.rank, ranks.world_size)
    left = [[place for place in places if source.asked[place].key not in done] for places in batches]
    left = [places for places in left if places]
    loader = DataLoader(
        _Batches(source, left, collate),
        batch_size=None,
        num_workers=options.num_workers,
        multiprocessing_context="fork" if options.num_workers else None,
    )
    total, ahead = sum(map(len, batches)), sum(map(len, left))
    bar = progress_bar(
        total * len(active),
        options.name if ranks.world_size == 1 else f"{options.name}, rank 0 of {ranks.world_size}",
        "answers",
        done=(total - ahead) * len(active),
        shown=options.progress and ranks.is_first,
    )
    warm = False
    with bar:
        for places, loaded in zip(left, loader, strict=True):
            if isinstance(loaded, ValueError):
                raise loaded
            running = [runner for runner in active if runner.cell.key not in failed]
            note, kept = _answer_batch(source, places, loaded, running, collate, options, bar)
            failed |= set(note["failed"])
            if not warm or len(note["asked"]) < options.batch_size:
                note["ms"] = {}  # the first pass warms caches, a short batch costs more per sample: not comparable
            warm = warm or bool(note["asked"])
            store.add(note, kept, f"{source.number(places[0]):06d}" if kept else "")


@dataclass(frozen=True)
class _Loaded:
    batch: Batch | None
    skipped: tuple[Skipped, ...]
    ms: Mapping[str, float]
    """Per sample: `video` (file to frames) and `preprocess` (frames to tensors)."""


class _Batches(Dataset[Any]):
    """Batches ready for the model. A ValueError is returned, not raised: a worker would bury it under a traceback."""

    def __init__(self, source: Source, batches: Sequence[Sequence[int]], collate: Collator) -> None:
        self._source, self._batches, self._collate = source, batches, collate

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> _Loaded | ValueError:
        places = self._batches[number]
        begin = time.perf_counter()
        try:
            items = [self._source[place] for place in places]
            decoded = time.perf_counter()
            batch, skipped = make_batch(self._collate, items, self._source.on_error)
        except ValueError as error:
            return error
        end = time.perf_counter()
        ms = {"video": 1000 * (decoded - begin) / len(places), "preprocess": 1000 * (end - decoded) / len(places)}
        return _Loaded(batch, skipped, ms)


def _answer_batch(
    source: Source,
    places: Sequence[int],
    loaded: _Loaded,
    runners: Sequence[Runner],
    collate: Collator,
    options: LoopOptions,
    bar: Any,
) -> tuple[Note, dict[str, Tensor]]:
    """The note of one batch, every method in turn, and the tokens that pruners kept of those shown."""
    note: Note = {
        "keys": [source.asked[place].key for place in places],
        "asked": {},
        "said": {},
        "skipped": [asdict(item) for item in loaded.skipped],
        "failed": {},
        "signals": {},
        "ms": {},
        "gib": {},
    }
    bar.update(len(loaded.skipped) * len(runners))
    kept: dict[str, Tensor] = {}
    if loaded.batch is None:
        return note, kept
    batch = loaded.batch
    for sample, time_F in zip(batch.samples, batch.timestamps_s, strict=True):
        times = [] if time_F is None else time_F.tolist()
        note["asked"][sample.uid] = {"input": asked_of(sample), "frame_times": [round(time, 6) for time in times]}
    labels = _labels(source, places, batch)
    limit = options.max_new_tokens or source.asked[places[0]].task.benchmark.max_new_tokens
    moved: Batch | None = None
    for runner in runners:
        assert runner.pruning is not None
        cell = runner.cell.key
        if moved is None:
            begin = time.perf_counter()
            moved = batch.to(runner.pruning.model.device)
            to_device = 1000 * (time.perf_counter() - begin) / len(batch.uids)
        try:
            answers, measured = runner.answer(moved, collate.processor, limit)
        except ValueError as error:
            if runner.cell.kind == "unpruned" or options.refusals == "raise":
                raise
            note["failed"][cell] = (
                f"stopped at sample {batch.uids[0]!r} or one beside it: {' '.join(str(error).split())}"
            )
        else:
            answers = [
                one if label_TYX is None else replace(one, cells=count_kept(index_K, grid, label_TYX))
                for one, index_K, grid, label_TYX in zip(
                    answers, measured.report.index, measured.report.grids, labels, strict=True
                )
            ]
            note["said"][cell] = {uid: one.to_json() for uid, one in zip(batch.uids, answers, strict=True)}
            ms = {name: value / len(batch.uids) for name, value in measured.ms.items()}
            before = {**loaded.ms, "preprocess": loaded.ms["preprocess"] + to_device}
            note["ms"][cell] = {**before, **ms, "ttft_e2e": sum(before.values()) + ms["ttft"]}
            note["signals"][cell] = dict(measured.report.signals)
            if measured.peak_gib is not None:
                note["gib"][cell] = measured.peak_gib
            if runner.cell.kind != "unpruned":
                kept |= kept_tensors(cell, measured.report, batch.uids, batch.timestamps_s, options.shown)
        bar.update(len(batch.uids))
    return note, kept


def _labels(source: Source, places: Sequence[int], batch: Batch) -> list[NDArray[np.uint8] | None]:
    """What cells show, by row of the batch; None where that is not known of the frames shown."""
    by_key = {source.asked[place].key: source.cell_labels(place) for place in places}
    labels = [by_key[uid] for uid in batch.uids]
    shown = [0 if time_F is None else len(time_F) for time_F in batch.timestamps_s]
    return [one if one is not None and len(one) == num else None for one, num in zip(labels, shown, strict=True)]


def of_source(source: Source, notes: Sequence[Note]) -> list[Note]:
    """Those about its questions: one folder may hold the notes of several sources, with keys of their own."""
    keys = set(source.keys)
    return [note for note in notes if note["keys"][0] in keys]


def gather(source: Source, notes: Sequence[Note]) -> Answers:
    """The notes of all ranks as if one had made them, in the order of the source; each question once."""
    place = {key: number for number, key in enumerate(source.keys)}
    notes = sorted(of_source(source, notes), key=lambda note: place[note["keys"][0]])
    asked, said, failed = {}, {}, {}  # type: dict[str, Any], dict[str, dict[str, Answer]], dict[str, str]
    skipped: dict[str, Mapping[str, str]] = {}
    signals: dict[str, Mapping[str, str]] = {}
    ms: dict[str, dict[str, list[float]]] = {}
    sample_ms: dict[str, dict[str, Mapping[str, float]]] = {}
    gib: dict[str, float] = {}
    for note in notes:
        asked |= note["asked"]
        skipped |= {item["uid"]: item for item in note["skipped"]}
        for cell, reason in note["failed"].items():
            failed.setdefault(cell, reason)
        signals |= {cell: content for cell, content in note["signals"].items() if content}
        for cell, answers in note["said"].items():
            said.setdefault(cell, {}).update({key: Answer.from_json(content) for key, content in answers.items()})
        for cell, phases in note["ms"].items():
            sample_ms.setdefault(cell, {}).update(dict.fromkeys(note["asked"], phases))
            for phase, value in phases.items():
                ms.setdefault(cell, {}).setdefault(phase, []).append(value)
        for cell, value in note["gib"].items():
            gib[cell] = max(value, gib.get(cell, 0.0))

    def ordered(answers: Mapping[str, Any]) -> dict[str, Any]:
        return {key: answers[key] for key in sorted(answers, key=place.__getitem__)}

    return Answers(
        asked=ordered(asked),
        said={cell: ordered(answers) for cell, answers in said.items() if cell not in failed},
        skipped=tuple(ordered(skipped).values()),
        failed=failed,
        signals=signals,
        ms={cell: {phase: tuple(values) for phase, values in phases.items()} for cell, phases in ms.items()},
        sample_ms=sample_ms,
        peak_gib=gib,
    )
