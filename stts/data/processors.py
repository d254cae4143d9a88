"""What sets the processors of model families apart, where only the processor decides: one row each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin


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
    row_by_row: bool = False
    """It stacks the videos of a call, which must be of one length, and puts images beside them into one tensor: every
    row is a call of its own, with tensors returned."""


PROCESSORS = {
    "LlavaOnevisionProcessor": ProcessorTraits(frame_by_frame=True),
    "Qwen2_5_VLProcessor": ProcessorTraits(reads_times=True),
    "Qwen3VLProcessor": ProcessorTraits(reads_times=True),
    "Molmo2Processor": ProcessorTraits(reads_times=True, one_kind_per_call=True),
    "InternVLProcessor": ProcessorTraits(row_by_row=True),
}
"""By the name of the stock class."""


def traits_of(processor: ProcessorMixin) -> ProcessorTraits:
    """The row of this processor; the defaults for one that has none."""
    return PROCESSORS.get(type(processor).__name__, ProcessorTraits())


def join_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, padding_side: str
) -> dict[str, Any]:
    """A batch from the outputs of one processor call a row: text padded on that side, everything else one behind the
    other along its first axis."""
    text = ("input_ids", "attention_mask")
    padded = tokenizer.pad(
        {name: [row[name][0] for row in rows] for name in text}, padding_side=padding_side, return_tensors="pt"
    )
    media: dict[str, list[Tensor]] = {}
    for row in rows:
        for name in row.keys() - set(text):
            media.setdefault(name, []).append(row[name])
    return {name: padded[name] for name in text} | {name: torch.cat(parts) for name, parts in sorted(media.items())}
