"""How many tokens a video becomes in the prompt, from its processor alone: before any file is opened."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.video_utils import VideoMetadata

from stts.tokens import Grid


def largest_grid(processor: Any, grid: Grid, num_frames: int) -> Grid:
    """At least as many tokens per frame (Qwen: per temporal patch) as a video of any resolution can have.

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
