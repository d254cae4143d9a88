"""What sets the processors of model families apart, where only the processor decides: one row each."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import ProcessorMixin


@dataclass(frozen=True, kw_only=True)
class ProcessorTraits:
    """The defaults suit most processors."""

    reads_times: bool = False
    """It puts the times of frames into the prompt or the position ids, so it needs `video_metadata`; it returns
    `mm_token_type_ids` when asked."""
    frame_by_frame: bool = False
    """It treats every frame of a video by itself, so that a long video can be streamed. Others resize by the length of
    the video, or number their patches over all of it."""
    one_kind_per_call: bool = False
    """It has one placeholder for frames and images and tells them apart by call: a batch has images or videos."""


PROCESSORS = {
    "LlavaOnevisionProcessor": ProcessorTraits(frame_by_frame=True),
    "Qwen2_5_VLProcessor": ProcessorTraits(reads_times=True),
    "Qwen3VLProcessor": ProcessorTraits(reads_times=True),
    "Molmo2Processor": ProcessorTraits(reads_times=True, one_kind_per_call=True),
}
"""By the name of the stock class."""


def traits_of(processor: ProcessorMixin) -> ProcessorTraits:
    """The row of this processor; the defaults for one that has none."""
    return PROCESSORS.get(type(processor).__name__, ProcessorTraits())
