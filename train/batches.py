"""The order of batches, which resumes anywhere, and the loader that follows it."""

from __future__ import annotations

import ctypes
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from stts.data.batches import make_batch
from stts.data.collate import Batch, Collator, Step
from stts.data.datasets import Example, Skipped
from stts.data.mixture import Mixture
from stts.data.rows import OnError
from stts.packing.pack import pack_samples

PREFETCH = 4  # batches that every loader process holds ready
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_WINDOW = 1024  # shuffled samples packed together, more where a step has over 32 batches: first-fit is quadratic


class Collate:
    """A batch from items, also when every one of them was skipped; picklable for loader workers.

    pixel_dtype: of pixel values; None: as the processor makes them, fp32."""

    def __init__(self, collator: Collator, on_error: OnError = "raise", pixel_dtype: torch.dtype | None = None) -> None:
        self.collator, self.on_error, self.pixel_dtype = collator, on_error, pixel_dtype

    def __call__(self, items: Items) -> Batch:
        batch, skipped = make_batch(self.collator, items, self.on_error)
        batch, dtype = batch or self.collator.blank(skipped), self.pixel_dtype
        return batch if dtype is None else batch.with_pixels(lambda pixels: pixels.to(dtype))


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
    per_step: int = 1
    """Batches of one rank in an optimizer step. A step holds the same batches for every `world_size` and `per_step` of
    one product, so that a run may go on with another number of ranks."""
    mixture: Mixture | None = None
    """Which samples an epoch shows; None: each of them once."""

    def batches(self, epoch: int) -> list[list[int]]:
        """This rank's batches of one epoch."""
        everything = self._in_turn(epoch) if self.lengths is None else self._balanced(epoch, self.lengths)
        surplus = len(everything) % self._step_size
        if surplus and self.drop_last:
            del everything[len(everything) - surplus :]
        elif surplus:
            everything += [[] for _ in range(self._step_size - surplus)]
        return everything[self.rank :: self.world_size]

    @property
    def _step_size(self) -> int:
        """Batches of an optimizer step over all ranks."""
        return self.world_size * self.per_step

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.num_samples)
        return (self.mixture or Mixture((self.num_samples,))).draw(self.seed, epoch)

    def _in_turn(self, epoch: int) -> list[list[int]]:
        order = self._drawn(epoch)
        end = self.num_samples // self.batch_size * self.batch_size if self.drop_last else self.num_samples
        return [order[i : i + self.batch_size].tolist() for i in range(0, end, self.batch_size)]

    def _balanced(self, epoch: int, lengths: Sequence[int] | NDArray[np.int32]) -> list[list[int]]:
        """Batches such that those of one step, which follow each other, hold about equally many tokens.

        Within a window of shuffled samples, packed batches are sorted by their tokens and cut into steps, whose order
        is shuffled again. The least full, which make no whole step, go back among the samples of the next window."""
        order, window, size = self._drawn(epoch), _WINDOW * (1 + self._step_size // 32), self._step_size
        batches: list[list[int]] = []
        left: list[int] = []
        for start in range(0, len(order), window):
            samples = left + order[start : start + window].tolist()
            sizes = np.asarray([lengths[sample] for sample in samples])
            rows = pack_samples(sizes.tolist(), self.max_tokens)
            rows.sort(key=lambda row: -sizes[row].sum())
            num_rows = len(rows) // size * size
            steps = np.random.default_rng([self.seed, epoch, start, 2]).permutation(num_rows // size)
            firsts = (steps if self.shuffle else np.sort(steps)) * size
            batches += [[samples[p] for p in rows[first + place]] for first in firsts for place in range(size)]
            left = [samples[place] for row in rows[num_rows:] for place in row]
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
    default; a frame cache needs that. `pin`: batches come in page-locked memory."""

    def __init__(
        self,
        dataset: Dataset[Any],
        order: Order,
        collate: Callable[[Items], Batch],
        num_workers: int,
        per_step: int = 1,
        epoch_ends: Callable[[int], None] | None = None,
        fork: bool = False,
        pin: bool = False,
    ) -> None:
        self.epoch_ends, self.fork, self.pin = epoch_ends, fork, pin
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
            prefetch_factor=PREFETCH if self.num_workers else None,
            worker_init_fn=outlive_signals,
            pin_memory=self.pin,
            multiprocessing_context="fork" if self.fork and self.num_workers else None,
        )
        steps = self._steps(iter(loader))
        batches_of, counts = next(steps, ([], []))
        while batches_of:
            following: tuple[list[Batch], list[Step]] = [], []
            for place, count in enumerate(counts):
                batch, batches_of = batches_of[0], batches_of[1:]
                if place + 1 < len(counts):
                    yield self._next(replace(batch, step=count))
                    continue
                if self.order.world_size > 1:  # ranks tell each other of the next step at the end of this one
                    following = next(steps, following)
                if following[1]:
                    tokens, videos = following[1][0].num_tokens, following[1][0].num_videos
                    count = replace(count, has_next=True, next_tokens=tokens, next_videos=videos)
                yield self._next(replace(batch, step=count))
            batches_of, counts = following if self.order.world_size > 1 else next(steps, ([], []))

    def _steps(self, batches: Iterator[Batch]) -> Iterator[tuple[list[Batch], list[Step]]]:
        """The batches of one optimizer step after the other, and the counts that go with each."""
        is_first = True
        try:
            while step := list(islice(batches, self.per_step)):
                yield step, Step.of(step, is_first=is_first)
                is_first = False
        finally:  # after an error of a sample: workers outlive the SIGTERM with which Python would end them at exit
            if (end := getattr(batches, "_shutdown_workers", None)) is not None:
                end()

    def _next(self, batch: Batch) -> Batch:
        self.position += 1
        if self.position == self._length and self.epoch_ends is not None:
            self.epoch_ends(self.epoch)  # here: nobody asks for more than the last batch
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def outlive_signals(worker: int) -> None:
    """For a loader worker: a scheduler, or Ctrl-C, signals every process of a job; the run still needs its batches to
    finish the step and save.

    A rank that dies takes its workers with it (on Linux): they hold its connections open, and the other ranks would
    learn of its end only when torch's own watchdog ends the workers, 5 s later."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


Items = Sequence[Example | Skipped]
