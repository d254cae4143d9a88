"""Training and validation data: which samples share a batch, in an order that is a pure function of seed and epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from stts.data.collate import Batch, Collator
from stts.data.datasets import VideoJsonl
from stts.data.mixture import Mixture, Source, weights_of
from stts.data.rows import OnError, Samples
from stts.data.shapes.clips import ShapesConfig, ShapesFrames
from stts.data.shapes.files import read_cells
from stts.data.video.cache import FrameCache

from .batches import Collate, Order, Phase, ResumableLoader, outlive_signals
from .console import print_rank_zero
from .lengths import _TokenCounts
from .precision import PIXEL_DTYPES

_LOOKED_FOR = 256  # videos of each file; more would take long on a disk far away


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
        on_error: 'raise' stops at a sample that cannot be used (a broken file, text or picture beyond a limit), 'skip'
            counts and lists it.
        follow_links: take absolute paths and links that lead out of `root`; links of a Hugging Face cache are followed
            anyway.
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
        follow_links: bool = False,
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
        self.on_error: OnError = on_error
        reading: dict[str, Any] = {"sampler": sampler, "num_frames": num_frames, "max_fps": max_fps}
        self.frames = frames_of(
            {"kind": kind, **reading, "shapes": vars(shapes), "phases": [vars(phase) for phase in phases or []]}
        )
        self.cache = FrameCache(int(cache_gib * 2**30)) if cache_gib else None
        self._told = 0, 0  # look-ups in the frame cache and hits, of the epochs that were reported
        self.sources: list[Source] = []
        self.files: list[VideoJsonl] = []
        self.mixture: Mixture | None = None
        self.train_data: ConcatDataset[Any]
        self.val_data: Dataset[Any] | None = None
        self.shuffle = kind == "jsonl"  # drawn clips are independent already, and phases must keep their order
        if kind == "shapes":
            self._draw(shapes, phases or [], num_val_clips)
        else:
            assert train
            reading |= {"on_error": on_error, "timeout_s": timeout_s, "follow_links": follow_links}
            self._open([Source(train)] if isinstance(train, str) else list(train), val, root, reading)

    def _draw(self, shapes: ShapesConfig, phases: Sequence[Phase], num_val_clips: int) -> None:
        """ShapesQA: the phases of training one behind the other."""
        parts = [
            ShapesFrames(
                "train",
                phase.num_clips,
                self.seed + number,
                replace(shapes, families=tuple(phase.families or shapes.families)).sampled(
                    phase.num_sampled or shapes.num_sampled
                ),
                weights=phase.weights,
                questions_per_item=phase.questions_per_clip,
            )
            for number, phase in enumerate(phases)
        ]
        self.train_data = ConcatDataset(parts)
        if num_val_clips:  # whatever the training mixture, so that scores of two runs compare
            self.val_data = ShapesFrames("val", num_val_clips, self.seed, shapes)

    def _open(self, sources: list[Source], val: str | None, root: str | None, reading: dict[str, Any]) -> None:
        """Data files, and how they are mixed."""
        self.sources = sources
        weights = weights_of(sources)
        self.files = [
            VideoJsonl(
                source.path,
                root=root if source.root is None else source.root,
                limit=source.limit,
                limit_seed=self.seed,
                uid_prefix=f"{source.path}:" if len(sources) > 1 else "",  # other files have the same ids
                cache=self.cache,
                **reading,
            )
            for source in sources
        ]
        self.train_data = ConcatDataset(self.files)
        self.mixture = Mixture(tuple(len(file) for file in self.files), weights)
        checked = list(self.files)
        if val is not None:
            self.val_data = file = VideoJsonl(val, root=root, labels=read_cells(Path(val)), **reading)
            checked.append(file)
        if self.on_error == "raise":
            for file in checked:
                file.check_files(_LOOKED_FOR)

    def train_dataloader(self) -> ResumableLoader:
        collator = self._collator()
        lengths = None
        if self.max_tokens:
            lengths = np.concatenate([self._lengths(collator, file.samples) for file in self.files])
        assert self.trainer is not None
        size, per_step = len(self.train_data), self.trainer.accumulate_grad_batches
        order = self._order(
            size,
            shuffle=self.shuffle,
            batch_size=self.batch_size,
            lengths=lengths,
            max_tokens=self.max_tokens,
            mixture=self.mixture,
            per_step=per_step,
        )
        loader = ResumableLoader(
            self.train_data,
            order,
            self._collate(),
            self.num_workers,
            per_step,
            self._tell,
            self.cache is not None,
        )
        if not len(loader):
            raise ValueError(
                f"{size} training samples do not fill {per_step} batch(es) on every rank, which make one optimizer "
                "step; lower data.batch_size or trainer.accumulate_grad_batches"
            )
        if len(self.sources) > 1 and self.mixture is not None:
            for source, count, rows in zip(self.sources, self.mixture.counts, self.mixture.sizes, strict=True):
                print_rank_zero(f"data: {count} samples per epoch of the {rows} rows of {source.path}")
        return loader

    def _tell(self, epoch: int) -> None:
        """One line about the frame cache, and its hit rate in the log, at the end of every epoch."""
        if self.cache is None or self.cache.lookups == self._told[0]:
            return
        assert self.trainer is not None
        lookups, hits = self.cache.lookups - self._told[0], self.cache.hits - self._told[1]
        self._told = self.cache.lookups, self.cache.hits
        held_mib = self.cache.used_bytes / 2**20
        print_rank_zero(
            f"epoch {epoch}: {hits} of {lookups} videos came from the frame cache, which holds {held_mib:.0f} MiB"
        )
        for logger in self.trainer.loggers:
            logger.log_metrics({"frame_cache_hit_rate": hits / lookups}, step=self.trainer.global_step)

    def val_dataloader(self) -> Any:
        if self.val_data is None:
            return []
        order = self._order(len(self.val_data), batch_size=self.val_batch_size, shuffle=False, drop_last=False)  # type: ignore[arg-type]
        return DataLoader(
            self.val_data,
            batch_sampler=order.batches(0),
            collate_fn=self._collate(),
            num_workers=self.num_workers,
            worker_init_fn=outlive_signals,
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device, non_blocking=True)

    def _order(self, num_samples: int, **settings: Any) -> Order:
        assert self.trainer is not None
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        return Order(num_samples, seed=self.seed, rank=rank, world_size=world_size, **settings)

    @property
    def _pins(self) -> bool:
        assert self.trainer is not None
        return self.trainer.strategy.root_device.type == "cuda"

    def _collate(self) -> Collate:
        assert self.trainer is not None
        return Collate(self._collator(), self.on_error, PIXEL_DTYPES.get(str(self.trainer.precision)))

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
        pieces = _TokenCounts(samples, collator, tokens, self.num_frames, self.max_fps, self.on_error)
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


def frames_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How videos were sampled under these arguments of `VideoData`, as exported folders record it."""
    if settings["kind"] == "jsonl":
        return {name: settings[name] for name in ("num_frames", "sampler", "max_fps")}
    last = settings["phases"][-1].get("num_sampled")
    return {"num_frames": last or settings["shapes"]["num_sampled"], "sampler": "uniform_inclusive"}
