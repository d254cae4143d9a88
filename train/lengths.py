"""How many tokens a video becomes in the prompt, from its processor alone: before any file is opened."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from transformers.video_utils import VideoMetadata

from stts.budget import plan
from stts.data.collate import Collator
from stts.data.rows import OnError, Sample, Samples
from stts.data.video.samplers import most_frames
from stts.models.pruning.context import Pruning
from stts.pruners.base import soft_in_training
from stts.tokens import Grid


def largest_grid(processor: Any, grid: Grid, num_frames: int) -> Grid:
    """At least as many tokens per frame (or temporal patch) as a video of any resolution can have.

    By the processor's own resizing of a square too large to stay as it is; the limit is on the area, so that a frame of
    another form has fewer tokens than the next larger square."""
    video = processor.video_processor
    edge = math.isqrt(video.size["longest_edge"]) + video.patch_size * video.merge_size
    num_frames = max(num_frames, video.temporal_patch_size)
    tokens = processor._get_num_multimodal_tokens(video_sizes=[(num_frames, edge, edge)])["num_video_tokens"][0]
    return Grid(grid.t, 1, (math.isqrt(tokens // grid.t) + 1) ** 2 - 1)


def num_placed_tokens(processor: Any, grid: Grid, num_frames: int) -> int:
    """All a processor writes for a video, at times late in a long one: tokens, newlines, frame marks and times."""
    side = getattr(processor.video_processor, "merge_size", 1)
    video = {  # what the families' `replace_video_token` read
        "pixel_values_videos": [torch.empty(num_frames, 0)],
        "video_grids": torch.tensor([[grid.t, grid.h, grid.w]]),
        "video_grid_thw": torch.tensor([[grid.t, grid.h * side, grid.w * side]]),
        "video_metadata": [VideoMetadata(num_frames, fps=10.0, frames_indices=[99_999] * num_frames)],
    }
    text = processor.replace_video_token(video, 0)
    return len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


def planned_tokens(processor: Any, pruning: Pruning, retention_ratio: float, num_frames: int) -> int:
    """LLM tokens of a video after pruning, with newlines, frame marks and times, as planned: known before the forward
    pass, because training uses exact budgets.

    Where resolution is free, of the largest frame that the processor's limits allow, at times late in a long
    video: an upper bound, and a loose one unless `size` in the processor's config is set for training."""
    grid, host = pruning.adapter.grid(num_frames), pruning.adapter.host
    if host.patches_per_frame == 0:
        grid = largest_grid(processor, grid, num_frames)
    placed = num_placed_tokens(processor, grid, num_frames)
    sites = [stage.site for stage in pruning.pruner.stages]
    planned = plan(sites, retention_ratio, [grid], host.llm_layers)
    soft = any(soft_in_training(stage) for stage in pruning.pruner.stages)
    kept = planned[-1][0].num_kept if planned and not soft else grid.num_groups
    return int(placed - grid.num_groups + kept)


_COUNTED_AT_ONCE = 1024  # samples whose tokens are counted in one piece of work for a loader process


@dataclass(frozen=True)
class _TokenCounts(Dataset[NDArray[np.int32] | ValueError]):
    """LLM tokens of samples, in pieces that loader processes count: templates and tokenizers are slow for millions."""

    samples: Samples
    collator: Collator
    tokens_per_video: Mapping[int, int]
    """By number of frames."""
    num_frames: int
    max_fps: float | None
    on_error: OnError = "raise"
    """skip: a sample whose text cannot be counted has length 0; the collator skips it by name."""

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
            texts = np.asarray(self._of_texts(samples), np.int32)
        except ValueError as error:
            return error
        return texts + np.asarray([self._of_video(sample) for sample in samples], np.int32)

    def _of_texts(self, samples: list[Sample]) -> list[int]:
        try:
            return self.collator.num_text_tokens(samples, self.num_frames)
        except ValueError:
            if self.on_error == "raise":
                raise
            return [0] if len(samples) == 1 else [self._of_texts([sample])[0] for sample in samples]

    def _of_video(self, sample: Sample) -> int:
        """At most, by what the row tells: its `clip`, or `duration` in seconds."""
        if sample.video is None:
            return 0
        seconds = sample.clip[1] - sample.clip[0] if sample.clip is not None else sample.meta.get("duration")
        if not isinstance(seconds, (int, float)) or seconds <= 0:
            return self.tokens_per_video[self.num_frames]
        return self.tokens_per_video[most_frames(seconds, self.num_frames, self.max_fps)]
