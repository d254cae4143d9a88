"""A data set of decoded examples: the rows of a data file with their frames and pictures, before any processor.

Shape suffixes beside those of `stts.tokens`: H, W = pixels, C = 3 colour channels (RGB)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from stts.data.rows import OnError, Sample, Samples
from stts.data.video.cache import Decoded, FrameCache, frames_key
from stts.data.video.files import read_picture, read_video, time_limit
from stts.data.video.sample import FrameStream, VideoError


@dataclass(frozen=True)
class Example:
    sample: Sample
    frames: NDArray[np.uint8] | None = None
    """(T, H, W, 3)"""
    timestamps_s: NDArray[np.float64] | None = None
    """(T,) true times in the file"""
    images: tuple[NDArray[np.uint8], ...] = ()
    """each (H, W, 3)"""
    duration_s: float | None = None
    """Of the whole video file."""
    stream: FrameStream | None = None
    """Instead of `frames`: decoded piece by piece while the model runs"""
    label_TYX: NDArray[np.uint8] | None = None
    """What every cell of a ShapesQA clip shows, as `stts.data.shapes.world` numbers it; None where nothing says so."""

    @property
    def has_video(self) -> bool:
        return self.frames is not None or self.stream is not None


@dataclass(frozen=True)
class Skipped:
    """In place of an example that cannot be used, so that callers can count it and name it."""

    uid: str
    reason: str


class VideoJsonl(Dataset[Example | Skipped]):
    """The rows of one data file, decoded when asked for; never more than the sampled frames in memory, and with
    `stream` not even those: a video file then becomes an `Example.stream` (folders of pictures are read as ever).

    `on_error="skip"` returns a `Skipped` where media are missing, broken or not read within `timeout_s`, and leaves out
    rows that cannot be parsed (see `Samples`); "raise" lets the ValueError out, which names sample and file. The
    pictures of a frame folder or list are shown at the row's key `fps`, one a second where it has none. follow_links:
    see `Samples`; it holds for the pictures of a folder too. labels: (T, Y, X) by a row's `video`, for
    `Example.label_TYX`."""

    def __init__(
        self,
        path: str | Path,
        *,
        root: str | Path | None = None,
        limit: str = "all",
        limit_seed: int = 0,
        uid_prefix: str = "",
        sampler: str = "uniform_inclusive",
        num_frames: int = 16,
        max_fps: float | None = None,
        on_error: OnError = "raise",
        timeout_s: float | None = None,
        cache: FrameCache | None = None,
        stream: bool = False,
        follow_links: bool | None = None,
        labels: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> None:
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error={on_error!r} must be one of {get_args(OnError)}")
        if timeout_s is not None and not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s={timeout_s} must be a positive number of seconds; None for no limit")
        self.samples = Samples(
            path,
            root,
            limit=limit,
            seed=limit_seed,
            uid_prefix=uid_prefix,
            on_error=on_error,
            follow_links=follow_links,
        )
        self.sampler, self.num_frames, self.max_fps, self.on_error = sampler, num_frames, max_fps, on_error
        self.timeout_s, self.cache, self.stream = timeout_s, cache, stream
        self.labels = labels or {}

    def __len__(self) -> int:
        return len(self.samples)

    def check_files(self, at_most: int) -> None:
        """VideoError, which names the sample, where a video of so many rows, evenly spread, is not there."""
        for index in np.linspace(0, len(self) - 1, min(at_most, len(self))).astype(int).tolist():
            sample = self.samples[index]
            try:
                if sample.video is not None:
                    _check_there(sample.video)
            except VideoError as error:
                raise VideoError(f"sample {sample.uid!r}: {error}") from error

    def __getitem__(self, index: int) -> Example | Skipped:
        sample = self.samples[index]
        try:
            return self._load(sample)
        except MemoryError:
            raise
        except Exception as error:
            files = "" if isinstance(error, VideoError) else f"{sample.files}: {type(error).__name__}: "
            if self.on_error == "raise":
                raise VideoError(f"sample {sample.uid!r}: {files}{error}") from error
            return Skipped(sample.uid, f"{files}{error}")

    def _load(self, sample: Sample) -> Example:
        try:
            with time_limit(self.timeout_s):
                images = tuple(read_picture(path) for path in sample.images)
            if sample.video is None:
                return Example(sample, images=images)
            if self.stream and isinstance(sample.video, Path) and not sample.video.is_dir():
                return self._streamed(sample, sample.video, images)
            video = self._video(sample, sample.video)
        except TimeoutError as error:
            raise VideoError(
                f"{sample.files}: not read within timeout_s={self.timeout_s}; is the disk there? Otherwise raise the "
                "limit, ask for a shorter clip, or re-encode the file"
            ) from error
        labels = self._labels(sample, sample.video)
        return Example(sample, video.frames, video.timestamps_s, images, video.duration_s, label_TYX=labels)

    def _labels(self, sample: Sample, video: Path | tuple[Path, ...]) -> NDArray[np.uint8] | None:
        if not self.labels or isinstance(video, tuple):
            return None
        label_TYX = self.labels.get(os.path.relpath(video, self.samples.base))
        reading = self.sampler, self.num_frames, self.max_fps
        return labels_as_read(label_TYX, video, reading, sample.clip)

    def _streamed(self, sample: Sample, path: Path, images: tuple[NDArray[np.uint8], ...]) -> Example:
        stream = FrameStream(
            path,
            sampler=self.sampler,
            num_frames=self.num_frames,
            clip=sample.clip,
            max_fps=self.max_fps,
            timeout_s=self.timeout_s,
        )
        return Example(sample, None, stream.timestamps_s, images, stream.source.duration_s, stream)

    def _video(self, sample: Sample, path: Path | tuple[Path, ...]) -> Decoded:
        fps = sample.meta.get("fps", 1.0)
        if type(fps) not in (int, float) or not 0 < fps < math.inf:
            raise VideoError(f"key 'fps' is {fps!r}, expected a positive number; correct it or leave it out")
        with time_limit(self.timeout_s):
            first = _check_there(path)
            key = frames_key(first, (path, self.sampler, self.num_frames, sample.clip, self.max_fps, fps))
        # The cache stays outside the limit: an alarm must not fall between taking its lock and giving it back.
        cached = None if self.cache is None else self.cache.get(key)
        if cached is not None:
            return cached
        with time_limit(self.timeout_s):
            video = read_video(
                path,
                sampler=self.sampler,
                num_frames=self.num_frames,
                clip=sample.clip,
                max_fps=self.max_fps,
                timeout_s=self.timeout_s,
                folder_fps=fps,
                inside=None if self.samples.follow_links else self.samples.base,
            )
        decoded = Decoded(video.frames, video.timestamps_s, video.source.duration_s)
        if self.cache is not None:
            self.cache.put(key, decoded)
        return decoded


def labels_as_read(
    label_TYX: NDArray[np.uint8] | None,
    video: Path,
    reading: tuple[str, int, float | None],
    clip: tuple[float, float] | None,
) -> NDArray[np.uint8] | None:
    """The labels of a ShapesQA clip, where the frames that are read are those that were labelled; else None.

    reading: sampler, number of frames, upper bound on frames a second. clip: the part of the video that is read."""
    sampler, num_frames, max_fps = reading
    whole = clip is None and max_fps is None and (video.is_dir() or sampler == "uniform_inclusive")
    return label_TYX if whole and label_TYX is not None and len(label_TYX) == num_frames else None


def _check_there(video: Path | tuple[Path, ...]) -> Path:
    """The file or folder of a video, or its first picture. VideoError where it is not there."""
    first = video if isinstance(video, Path) else video[0]
    if not first.is_file() and not first.is_dir():
        raise VideoError(f"no video file at {first}; fetch it, or correct the row's 'video' or the root")
    return first
