"""Training and validation data: which samples share a batch, in an order that is a pure function of seed and epoch."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from stts.data.collate import Batch, Collator, Step
from stts.data.datasets import Example, OnError, Skipped, VideoJsonl
from stts.data.shapes import ShapesConfig, ShapesFrames
from stts.packing.pack import pack_samples

_PACK_WINDOW = 8192  # shuffled samples packed together: first-fit over a whole data set would be quadratic
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
    lengths: tuple[int, ...] | None = None
    """LLM tokens of each sample: pack as many as fit."""
    max_tokens: int = 0
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True
    """Drop what does not fill a batch on every rank; False: ranks that run out get empty batches."""
    rank: int = 0
    world_size: int = 1

    def batches(self, epoch: int) -> list[list[int]]:
        """This rank's batches of one epoch."""
        everything = self._all(epoch)
        surplus = len(everything) % self.world_size
        if surplus and self.drop_last:
            del everything[len(everything) - surplus :]
        elif surplus:
            everything += [[] for _ in range(self.world_size - surplus)]
        return everything[self.rank :: self.world_size]

    def _all(self, epoch: int) -> list[list[int]]:
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = np.random.default_rng(np.random.SeedSequence([self.seed, epoch])).permutation(order)
        if self.lengths is None:
            whole = self.num_samples // self.batch_size * self.batch_size if self.drop_last else self.num_samples
            return [order[i : i + self.batch_size].tolist() for i in range(0, whole, self.batch_size)]
        batches = []
        for start in range(0, len(order), _PACK_WINDOW):
            window = order[start : start + _PACK_WINDOW].tolist()
            rows = pack_samples([self.lengths[sample] for sample in window], self.max_tokens)
            batches += [[window[place] for place in row] for row in rows]
        return batches


@dataclass(frozen=True)
class Phase:
    """A stretch of drawn ShapesQA clips; phases follow each other, so a list of them is a curriculum."""

    num_clips: int
    families: list[str] | None = None
    """Question families in the clips, null: all of them. One family alone gives sparse, easy scenes."""
    weights: dict[str, float] | None = None
    """Relative weight of each family in the questions; null: as written files have them."""
    questions_per_clip: int = 1
    """Up to 3 questions about a clip, as turns of one conversation: one pass of the tower teaches several answers."""


class ResumableLoader:
    """Batches of `order`, epoch after epoch; two integers say where it is, so that a killed run resumes at that batch.

    The order is a pure function of (seed, epoch, rank) and items depend on nothing but their number, so nothing else
    has to be stored, and a resumed run may use another number of workers. Every epoch has as many batches as epoch 0:
    with a token budget the count differs a little, and then some batches are left out or the first ones come twice.

    `per_step` batches make one optimizer step. They are read before the first of them is handed out, so that each can
    be weighed by its share of the whole step; what does not fill a step is left out."""

    def __init__(
        self,
        dataset: Dataset[Any],
        order: Order,
        collate: Callable[[Items], Batch],
        num_workers: int,
        per_step: int = 1,
    ) -> None:
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
        )
        step: list[Batch] = []
        for batch in loader:
            step.append(batch)
            if len(step) == self.per_step:
                tokens, videos = (sum(b.num_answer_tokens for b in step), sum(b.num_videos for b in step))
                for place, part in enumerate(step):
                    self.position += 1
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
    """JSONL files with videos and images, or ShapesQA drawn on the fly.

    Args:
        kind: 'jsonl' reads `train` and `val`; 'shapes' draws ShapesQA clips and needs no files.
        train: JSONL file (kind 'jsonl').
        val: JSONL file to validate on; null: no validation.
        root: folder that media paths are relative to; null: the JSONL file's own.
        sampler: which frames of a video are read (see stts/data/sampling.py).
        num_frames: at most so many frames per video.
        max_fps: upper bound on frames per second of video.
        on_error: 'raise' stops at a broken file, 'skip' counts and lists it.
        shapes: form of the clips (kind 'shapes').
        phases: training clips in the order of training (kind 'shapes').
        num_val_clips: validation clips with all families alike (kind 'shapes'); 0: no validation.
        batch_size: samples per batch and rank; 0 when `max_tokens` decides.
        max_tokens: LLM tokens per batch and rank, after pruning; as many samples as fit (kind 'jsonl').
        val_batch_size: samples per validation batch.
        num_workers: loader processes; 0 reads in the main process.
        seed: of order and drawn clips.
    """

    def __init__(
        self,
        kind: Literal["jsonl", "shapes"] = "jsonl",
        train: str | None = None,
        val: str | None = None,
        root: str | None = None,
        sampler: str = "uniform_inclusive",
        num_frames: int = 16,
        max_fps: float | None = None,
        on_error: OnError = "raise",
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
        if kind == "jsonl" and train is None:
            raise ValueError("data.kind=jsonl needs data.train, a JSONL file (or set data.kind: shapes)")
        if kind == "shapes" and not phases:
            raise ValueError("data.kind=shapes needs data.phases, for example [{num_clips: 100000}]")
        if kind == "shapes" and max_tokens:
            raise ValueError("data.kind=shapes has samples of one length; use data.batch_size, not data.max_tokens")
        self.batch_size, self.max_tokens, self.val_batch_size = batch_size, max_tokens, val_batch_size
        self.num_workers, self.seed, self.num_frames = num_workers, seed, num_frames
        self.train_data: Dataset[Any]
        self.val_data: Dataset[Any] | None = None
        self.shuffle = kind == "jsonl"  # drawn clips are independent already, and phases must keep their order
        if kind == "shapes":
            parts = [
                ShapesFrames(
                    "train",
                    phase.num_clips,
                    seed + number,
                    shapes,
                    phase.families,
                    phase.weights,
                    phase.questions_per_clip,
                )
                for number, phase in enumerate(phases or [])
            ]
            self.train_data = ConcatDataset(parts)
            if num_val_clips:  # whatever the training mixture, so that scores of two runs compare
                self.val_data = ShapesFrames("val", num_val_clips, seed, shapes)
        else:
            reading: dict[str, Any] = {"root": root, "sampler": sampler, "num_frames": num_frames, "max_fps": max_fps}
            assert train is not None
            self.train_data = VideoJsonl(train, on_error=on_error, **reading)
            if val is not None:
                self.val_data = VideoJsonl(val, on_error=on_error, **reading)

    def train_dataloader(self) -> ResumableLoader:
        collator = self._collator()
        lengths = None
        if self.max_tokens:
            assert isinstance(self.train_data, VideoJsonl)
            lengths = tuple(self._lengths(collator, self.train_data))
        size = len(self.train_data)  # type: ignore[arg-type]
        order = self._order(
            size, shuffle=self.shuffle, batch_size=self.batch_size, lengths=lengths, max_tokens=self.max_tokens
        )
        assert self.trainer is not None
        per_step = self.trainer.accumulate_grad_batches
        loader = ResumableLoader(self.train_data, order, Collate(collator), self.num_workers, per_step)
        if not len(loader):
            raise ValueError(
                f"{size} training samples do not fill {per_step} batch(es) on every rank, which make one optimizer "
                "step; lower data.batch_size or trainer.accumulate_grad_batches"
            )
        return loader

    def val_dataloader(self) -> Any:
        if self.val_data is None:
            return []
        order = self._order(len(self.val_data), batch_size=self.val_batch_size, shuffle=False, drop_last=False)  # type: ignore[arg-type]
        return DataLoader(
            self.val_data,
            batch_sampler=order.batches(0),
            collate_fn=Collate(self._collator()),
            num_workers=self.num_workers,
        )

    def _order(self, num_samples: int, **settings: Any) -> Order:
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return Order(num_samples, seed=self.seed, rank=rank, world_size=world_size, **settings)

    def _collator(self) -> Collator:
        assert self.trainer is not None
        return Collator(self.trainer.lightning_module.processor, training=True)

    def _lengths(self, collator: Collator, data: VideoJsonl) -> list[int]:
        """LLM tokens of every sample, known before any file is opened; an upper bound where a video is short."""
        if any(sample.images for sample in data.samples):
            raise ValueError("data.max_tokens needs rows without images, whose token count depends on their size")
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        visual = module.tokens_per_video(data.num_frames)
        texts = collator.num_text_tokens(data.samples, data.num_frames)
        return [text + (visual if s.video is not None else 0) for text, s in zip(texts, data.samples, strict=True)]
