"""Chosen frames of video files: which frames (`samplers`), how they are decoded (`decode`), whole or streamed."""

from __future__ import annotations

from stts.data.video.sample import FrameStream, VideoError, sample_frames

__all__ = ["FrameStream", "VideoError", "sample_frames"]
