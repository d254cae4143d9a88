"""Training and validation data: which samples share a batch, in an order that is a pure function of seed and epoch."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from stts.data.collate import Batch, Collator, Step
from stts.data.datasets import Example, Skipped, VideoJsonl
from stts.data.mixture import Mixture, Source, weights_of
from stts.data.rows import OnError, Sample, Samples
from stts.data.shapes.clips import ShapesConfig, ShapesFrames
from stts.data.video.cache import FrameCache
from stts.data.video.samplers import most_frames
from stts.packing.pack import pack_samples

from .callbacks import line

_WINDOW = 1024  # shuffled samples packed together, and as many more for every 32 ranks: first-fit is quadratic
_COUNTED_AT_ONCE = 1024  # samples whose tokens are counted in one piece of work for a loader process
Items = Sequence[Example | Skipped]


class Collate:
    """A batch from items, also when every one of them was skipped; picklable for loader workers."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, items: Items) -> Batch:
        skipped = [item for item in items if isinstance(item, Skipped)]
        return self.collator(items) or self.collator.blank(skipped)


@dataclass(frozen=True)
class Order:
    """Which samples each batch of an epoch holds, on one rank; every rank has the same number of batches."""

    num_samples: int
    batch_size: int
    """Samples per batch when `lengths` is None."""
    lengths: Sequence[int] | NDArray[np.int32] | None = None
    """LLM tokens of each sample: pack as many as fit, and give the ranks batches of about equal size in every step."""
    max_tokens: int = 0
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True
    """Drop what does not fill a batch on every rank; False: ranks that run out get empty batches."""
    rank: int = 0
    world_size: int = 1
    mixture: Mixture | None = None
    """Which samples an epoch shows; None: each of them once."""

    def batches(self, epoch: int) -> list[list[int]]:
        """This rank's batches of one epoch."""
        everything = self._in_turn(epoch) if self.lengths is None else self._balanced(epoch, self.lengths)
        surplus = len(everything) % self.world_size
        if surplus and self.drop_last:
            del everything[len(everything) - surplus :]
        elif surplus:
            everything += [[] for _ in range(self.world_size - surplus)]
        return everything[self.rank :: self.world_size]

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.num_samples)
        return (self.mixture or Mixture((self.num_samples,))).draw(self.seed, epoch)

    def _in_turn(self, epoch: int) -> list[list[int]]:
        order = self._drawn(epoch)
        whole = self.num_samples // self.batch_size * self.batch_size if self.drop_last else self.num_samples
        return [order[i : i + self.batch_size].tolist() for i in range(0, whole, self.batch_size)]

    def _balanced(self, epoch: int, lengths: Sequence[int] | NDArray[np.int32]) -> list[list[int]]:
        """Batches such that every `world_size` that follow each other, one step, hold about equally many tokens.

        Within a window of shuffled samples, packed batches are sorted by their tokens and cut into steps, whose order
        is shuffled again. The least full, which make no whole step, go back among the samples of the next window."""
        order, window, ranks = self._drawn(epoch), _WINDOW * (1 + self.world_size // 32), self.world_size
        batches: list[list[int]] = []
        left: list[int] = []
        for start in range(0, len(order), window):
            samples = left + order[start : start + window].tolist()
            sizes = np.asarray([lengths[sample] for sample in samples])
            rows = pack_samples(sizes.tolist(), self.max_tokens)
            rows.sort(key=lambda row: -sizes[row].sum())
            whole = len(rows) // ranks * ranks
            steps = np.random.default_rng([self.seed, epoch, start, 2]).permutation(whole // ranks)
            firsts = (steps if self.shuffle else np.sort(steps)) * ranks
            batches += [[samples[p] for p in rows[first + rank]] for first in firsts for rank in range(ranks)]
            left = [samples[place] for row in rows[whole:] for place in row]
        last = pack_samples([lengths[sample] for sample in left], self.max_tokens)
        return batches + [[left[place] for place in row] for row in last]


@dataclass(frozen=True)
class Phase:
    """A stretch of drawn ShapesQA clips; phases follow each other, so a list of them is a curriculum."""

    num_clips: int
    families: list[str] | None = None
    """Question families in the clips, null: all of them. One family alone gives sparse, easy scenes."""
    weights: dict[str, float] | None = None
    """Relative weight of each family in the questions; null: as written files have them."""
    questions_per_clip: int = 1
    """So many questions about a clip, or all there are, as turns of one conversation: one pass of the tower teaches
    several answers."""
    num_sampled: int | None = None
    """Frames of a clip in this phase, null: as `data.shapes` says. More of them show positions that
    longer videos need. A number of clips that fills whole batches keeps batches of one length."""


class ResumableLoader:
    """Batches of `order`, epoch after epoch; two integers say where it is, so that a killed run resumes at that batch.

    The order is a pure function of (seed, epoch, rank) and items depend on nothing but their number, so nothing else
    has to be stored, and a resumed run may use another number of workers. Every epoch has as many batches as epoch 0:
    with a token budget the count differs a little, and then some batches are left out or the first ones come twice.

    `per_step` batches make one optimizer step. They are read before the first of them is handed out, so that each can
    be weighed by its share of the whole step; what does not fill a step is left out. `epoch_ends` is called with the
    number of an epoch when its last batch has been read. `fork`: workers start by forking, whatever the platform's
    default; a frame cache needs that."""

    def __init__(
        self,
        dataset: Dataset[Any],
        order: Order,
        collate: Callable[[Items], Batch],
        num_workers: int,
        per_step: int = 1,
        epoch_ends: Callable[[int], None] | None = None,
        fork: bool = False,
    ) -> None:
        self.epoch_ends, self.fork = epoch_ends, fork
        self.dataset, self.order, self.collate, self.num_workers = dataset, order, collate, num_workers
        self.per_step = per_step
        self.epoch = self.position = 0
        self._length = len(order.batches(0)) // per_step * per_step

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        if self.position >= self._length:
            self.epoch, self.position = self.epoch + 1, 0
        batches = self.order.batches(self.epoch)
        batches = [batches[i % len(batches)] for i in range(self.position, self._length)]
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            prefetch_factor=4 if self.num_workers else None,
            worker_init_fn=_outlive_sigterm,
            multiprocessing_context="fork" if self.fork and self.num_workers else None,
        )
        step: list[Batch] = []
        for batch in loader:
            step.append(batch)
            if len(step) == self.per_step:
                tokens, videos = (sum(b.num_answer_tokens for b in step), sum(b.num_videos for b in step))
                for place, part in enumerate(step):
                    self.position += 1
                    if self.position == self._length and self.epoch_ends is not None:
                        self.epoch_ends(self.epoch)  # here: nobody asks for more than the last batch
                    yield replace(part, step=Step(tokens, videos, len(step), place))
                step = []

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def _outlive_sigterm(worker: int) -> None:
    """A scheduler signals every process of a job; the run still needs its batches to finish the step and save."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class VideoData(pl.LightningDataModule):
    """Data files with videos and images (JSONL, JSON arrays, Parquet; see stts/data/datasets.py), or ShapesQA.

    Args:
        kind: 'jsonl' reads `train` and `val`; 'shapes' draws ShapesQA clips on the fly and needs no files.
        train: data file, or a mixture: a list of {path, weight, limit, root} (kind 'jsonl'; see stts/data/mixture.py).
        val: data file to validate on; null: no validation.
        root: folder that media paths are relative to; null: the data file's own.
        sampler: which frames of a video are read (see stts/data/video/samplers.py).
        num_frames: at most so many frames per video.
        max_fps: upper bound on frames per second of video.
        on_error: 'raise' stops at a broken file, 'skip' counts and lists it.
        timeout_s: seconds one sample's files may take to read before they count as broken; null: no limit.
        cache_gib: memory per rank, in GiB, for decoded frames that later epochs read again; 0: none.
        shapes: form of the clips (kind 'shapes').
        phases: training clips in the order of training (kind 'shapes').
        num_val_clips: validation clips with all families alike (kind 'shapes'); 0: no validation.
        batch_size: samples per batch and rank; 0 when `max_tokens` decides.
        max_tokens: LLM tokens per batch and rank, after pruning; as many samples as fit (kind 'jsonl'). Under `max_fps`
            rows that tell a `duration` in seconds, or a `clip`, are counted as short as they are; others as
            `num_frames` long.
        val_batch_size: samples per validation batch.
        num_workers: loader processes per rank; 0 reads in the main process.
        seed: of order and drawn clips.
    """

    def __init__(
        self,
        kind: Literal["jsonl", "shapes"] = "jsonl",
        train: str | list[Source] | None = None,
        val: str | None = None,
        root: str | None = None,
        sampler: str = "uniform_inclusive",
        num_frames: int = 16,
        max_fps: float | None = None,
        on_error: OnError = "raise",
        timeout_s: float | None = 60.0,
        cache_gib: float = 0.0,
        shapes: ShapesConfig = ShapesConfig(),  # noqa: B008  (frozen)
        phases: list[Phase] | None = None,
        num_val_clips: int = 0,
        batch_size: int = 8,
        max_tokens: int = 0,
        val_batch_size: int = 16,
        num_workers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (batch_size > 0) == (max_tokens > 0) or min(batch_size, max_tokens) < 0 or val_batch_size < 1:
            raise ValueError(
                f"batch_size={batch_size} and max_tokens={max_tokens}: give one and set the other to 0; "
                f"val_batch_size={val_batch_size} must be at least 1"
            )
        if kind == "jsonl" and not train:
            raise ValueError("data.kind=jsonl needs data.train, a data file or a list (or set data.kind: shapes)")
        if cache_gib < 0:
            raise ValueError(f"data.cache_gib={cache_gib} must not be negative; 0 for no cache")
        if kind == "shapes" and not phases:
            raise ValueError("data.kind=shapes needs data.phases, for example [{num_clips: 100000}]")
        if kind == "shapes" and max_tokens:
            raise ValueError("data.kind=shapes has samples of one length; use data.batch_size, not data.max_tokens")
        self.batch_size, self.max_tokens, self.val_batch_size = batch_size, max_tokens, val_batch_size
        self.num_workers, self.seed, self.num_frames, self.max_fps = num_workers, seed, num_frames, max_fps
        self.cache = FrameCache(int(cache_gib * 2**30)) if cache_gib else None
        self._told = 0, 0  # look-ups in the frame cache and hits, of the epochs that were reported
        self.sources: list[Source] = []
        self.files: list[VideoJsonl] = []
        self.mixture: Mixture | None = None
        self.train_data: ConcatDataset[Any]
        self.val_data: Dataset[Any] | None = None
        self.shuffle = kind == "jsonl"  # drawn clips are independent already, and phases must keep their order
        if kind == "shapes":
            parts = [
                ShapesFrames(
                    "train",
                    phase.num_clips,
                    seed + number,
                    replace(shapes, families=tuple(phase.families or shapes.families)).sampled(
                        phase.num_sampled or shapes.num_sampled
                    ),
                    weights=phase.weights,
                    questions_per_item=phase.questions_per_clip,
                )
                for number, phase in enumerate(phases or [])
            ]
            self.train_data = ConcatDataset(parts)
            if num_val_clips:  # whatever the training mixture, so that scores of two runs compare
                self.val_data = ShapesFrames("val", num_val_clips, seed, shapes)
        else:
            reading: dict[str, Any] = {"sampler": sampler, "num_frames": num_frames, "max_fps": max_fps}
            reading |= {"on_error": on_error, "timeout_s": timeout_s}
            assert train
            self.sources = [Source(train)] if isinstance(train, str) else list(train)
            weights = weights_of(self.sources)
            self.files = [
                VideoJsonl(
                    source.path,
                    root=root if source.root is None else source.root,
                    limit=source.limit,
                    limit_seed=seed,
                    uid_prefix=f"{source.path}:" if len(self.sources) > 1 else "",  # other files have the same ids
                    cache=self.cache,
                    **reading,
                )
                for source in self.sources
            ]
            self.train_data = ConcatDataset(self.files)
            self.mixture = Mixture(tuple(len(file) for file in self.files), weights)
            if val is not None:
                self.val_data = VideoJsonl(val, root=root, **reading)

    def train_dataloader(self) -> ResumableLoader:
        collator = self._collator()
        lengths = None
        if self.max_tokens:
            lengths = np.concatenate([self._lengths(collator, file.samples) for file in self.files])
        size = len(self.train_data)
        order = self._order(
            size,
            shuffle=self.shuffle,
            batch_size=self.batch_size,
            lengths=lengths,
            max_tokens=self.max_tokens,
            mixture=self.mixture,
        )
        assert self.trainer is not None
        per_step = self.trainer.accumulate_grad_batches
        loader = ResumableLoader(
            self.train_data, order, Collate(collator), self.num_workers, per_step, self._tell, self.cache is not None
        )
        if not len(loader):
            raise ValueError(
                f"{size} training samples do not fill {per_step} batch(es) on every rank, which make one optimizer "
                "step; lower data.batch_size or trainer.accumulate_grad_batches"
            )
        if len(self.sources) > 1 and self.mixture is not None:
            for source, count, rows in zip(self.sources, self.mixture.counts, self.mixture.sizes, strict=True):
                line(f"data: {count} samples per epoch of the {rows} rows of {source.path}")
        return loader

    def _tell(self, epoch: int) -> None:
        """One line about the frame cache, and its hit rate in the log, at the end of every epoch."""
        if self.cache is None or self.cache.lookups == self._told[0]:
            return
        assert self.trainer is not None
        lookups, hits = self.cache.lookups - self._told[0], self.cache.hits - self._told[1]
        self._told = self.cache.lookups, self.cache.hits
        held_mib = self.cache.used_bytes / 2**20
        line(f"epoch {epoch}: {hits} of {lookups} videos came from the frame cache, which holds {held_mib:.0f} MiB")
        for logger in self.trainer.loggers:
            logger.log_metrics({"frame_cache_hit_rate": hits / lookups}, step=self.trainer.global_step)

    def val_dataloader(self) -> Any:
        if self.val_data is None:
            return []
        order = self._order(len(self.val_data), batch_size=self.val_batch_size, shuffle=False, drop_last=False)  # type: ignore[arg-type]
        return DataLoader(
            self.val_data,
            batch_sampler=order.batches(0),
            collate_fn=Collate(self._collator()),
            num_workers=self.num_workers,
            worker_init_fn=_outlive_sigterm,
        )

    def _order(self, num_samples: int, **settings: Any) -> Order:
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return Order(num_samples, seed=self.seed, rank=rank, world_size=world_size, **settings)

    def _collator(self) -> Collator:
        assert self.trainer is not None
        return Collator(self.trainer.lightning_module.processor, training=True)

    def _lengths(self, collator: Collator, samples: Samples) -> NDArray[np.int32]:
        """LLM tokens of every sample, known before any video is opened; an upper bound where a video is short and its
        row does not say so."""
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        counts = range(1, self.num_frames + 1) if self.max_fps is not None else [self.num_frames]
        tokens = {count: module.tokens_per_video(count) for count in counts}
        pieces = _TokenCounts(samples, collator, tokens, self.num_frames, self.max_fps)
        num_workers = self.num_workers if len(pieces) > 1 else 0
        counted = []
        for piece in DataLoader(pieces, batch_size=None, num_workers=num_workers):
            if isinstance(piece, ValueError):  # raised there, a worker's whole traceback would come with it
                raise piece
            counted.append(piece)
        lengths = np.concatenate(counted)
        longest = int(lengths.argmax())
        if lengths[longest] > self.max_tokens:
            raise ValueError(
                f"sample {samples[longest].uid!r} alone has {lengths[longest]} tokens, more than data.max_tokens="
                f"{self.max_tokens}; raise it, or use fewer frames or a lower retention_ratio"
            )
        return lengths


@dataclass(frozen=True)
class _TokenCounts(Dataset[NDArray[np.int32] | ValueError]):
    """LLM tokens of samples, in pieces that loader processes count: templates and tokenizers are slow for millions."""

    samples: Samples
    collator: Collator
    tokens_per_video: Mapping[int, int]
    """By number of frames."""
    num_frames: int
    max_fps: float | None

    def __len__(self) -> int:
        return -(-len(self.samples) // _COUNTED_AT_ONCE)

    def __getitem__(self, piece: int) -> NDArray[np.int32] | ValueError:
        samples = self.samples[piece * _COUNTED_AT_ONCE : (piece + 1) * _COUNTED_AT_ONCE]
        pictured = next((sample.uid for sample in samples if sample.images), None)
        try:
            if pictured is not None:
                raise ValueError(
                    f"sample {pictured!r} has images, whose token count depends on their size; data.max_tokens needs "
                    "rows without: use data.batch_size"
                )
            texts = np.asarray(self.collator.num_text_tokens(samples, self.num_frames), np.int32)
        except ValueError as error:
            return error
        return texts + np.asarray([self._of_video(sample) for sample in samples], np.int32)

    def _of_video(self, sample: Sample) -> int:
        """At most, by what the row tells: its `clip`, or `duration` in seconds."""
        if sample.video is None:
            return 0
        seconds = sample.clip[1] - sample.clip[0] if sample.clip is not None else sample.meta.get("duration")
        if not isinstance(seconds, (int, float)) or seconds <= 0:
            return self.tokens_per_video[self.num_frames]
        return self.tokens_per_video[most_frames(seconds, self.num_frames, self.max_fps)]
