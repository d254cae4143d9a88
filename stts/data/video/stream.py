"""Pixel values of a long video, decoded, resized and normalised a piece at a time, when the model asks for them.

`Collator` puts `StreamedPixels` where a model's inputs have `pixel_values_videos`; `stts.Pruning(chunk_frames=...)`
loads a piece, runs the tower on it and lets go. `stts.data.processors` says which processors treat frames one by one.

Shape suffixes beside those of `stts.tokens`: C = 3 colour channels, H, W = pixels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from stts.data.processors import PROCESSORS, traits_of
from stts.data.video.sample import FrameStream

VALUES = "pixel_values_videos"


class StreamedPixels:
    """In place of a tensor of pixel values: frames `start` to `stop` - 1 of all videos of a batch, concatenated."""

    def __init__(
        self,
        streams: Sequence[FrameStream],
        video_processor: Any,
        *,
        device: torch.device | str = "cpu",
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self._streams, self._video_processor = tuple(streams), video_processor
        self.device = torch.device(device)
        self.lengths = [len(stream) for stream in streams]
        self._start, self._stop = start, sum(self.lengths) if stop is None else stop

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, rows: slice) -> Self:
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"streamed frames are read in order, got a step of {step}; use a step of 1")
        return type(self)(
            self._streams, self._video_processor, device=self.device,
            start=self._start + start, stop=self._start + stop,
        )  # fmt: skip

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same frames, which `load` puts on `device`."""
        return type(self)(self._streams, self._video_processor, device=device, start=self._start, stop=self._stop)

    def load(self) -> Tensor:
        """(T, C, H, W) fp32, decoded now."""
        parts, begin = [], 0
        for stream in self._streams:
            first, last = max(self._start - begin, 0), min(self._stop - begin, len(stream))
            if first < last:
                parts.append(_preprocess(self._video_processor, stream, first, last))
            begin += len(stream)
        return torch.cat(parts).to(self.device)


def _preprocess(video_processor: Any, stream: FrameStream, first: int, last: int) -> Tensor:
    frames_THWC = torch.from_numpy(stream.read(first, last))
    values = video_processor(
        videos=[frames_THWC], do_sample_frames=False, input_data_format="channels_last", return_tensors="pt"
    )
    pixels_TCHW: Tensor = values[VALUES][0]
    return pixels_TCHW


@contextmanager
def stand_in(processor: ProcessorMixin, streams: Sequence[FrameStream]) -> Any:
    """While on, `processor` writes the placeholders of whole videos and reads one frame of each.

    ValueError for a family whose processor cannot take a video frame by frame."""
    if not traits_of(processor).frame_by_frame:
        able = ", ".join(name for name, traits in PROCESSORS.items() if traits.frame_by_frame)
        raise ValueError(
            f"{type(processor).__name__} does not treat the frames of a video one by one, so they cannot be streamed; "
            f"{able} can. Read the video whole, with fewer frames if memory is short"
        )
    real = processor.video_processor

    def first_frames(*_: Any, **__: Any) -> BatchFeature:
        pixels = [_preprocess(real, stream, 0, 1).expand(len(stream), -1, -1, -1) for stream in streams]
        return BatchFeature({VALUES: pixels})  # no memory: every frame is a view of the first

    processor.video_processor = first_frames
    try:
        yield
    finally:
        processor.video_processor = real
