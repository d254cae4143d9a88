"""A few chosen frames of a video file as RGB arrays, with the times at which they are shown.

Two passes over the file. The first reads packet headers only and lists the presentation time of every frame without
decoding, so times are exact at a variable frame rate too. The second decodes up to each chosen frame, jumps to a
keyframe where that saves work, and converts only the chosen frames: memory holds the result and the decoder's few
frames.

Shape suffixes beside those of `stts.tokens`: H, W = pixels after rotation."""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stts.data.video.samplers import choose_frames

_REMEDY = "fetch the file again, re-encode it (ffmpeg -i IN -c:v libx264 OUT.mp4), or drop it from the data"


class VideoError(ValueError):
    """A file or request that cannot give the frames asked for. The message names the file, the fault, the remedy."""


@dataclass(frozen=True, slots=True)
class VideoSource:
    """Where frames came from; for the sample record."""

    path: str
    native_fps: float
    """Mean frames per second over the whole file."""
    duration_s: float
    """From the first frame to the end of the last one."""
    sampler: str
    num_frames_in_file: int


@dataclass(frozen=True, slots=True, eq=False)
class VideoClip:
    """Chosen frames in time order."""

    frames: npt.NDArray[np.uint8]
    """uint8 (T, H, W, 3), RGB, 0 to 255, upright."""
    timestamps_s: npt.NDArray[np.float64]
    """float64 (T,), seconds since the first frame of the file, also when a clip was asked for."""
    source: VideoSource


def sample_frames(
    path: str | os.PathLike[str],
    *,
    sampler: str = "uniform_inclusive",
    num_frames: int,
    clip: tuple[float, float] | None = None,
    max_fps: float | None = None,
    timeout_s: float | None = None,
) -> VideoClip:
    """Decode the frames that `sampler` chooses (see `stts.data.video.samplers`) among those inside `clip`, in seconds.

    Returns at most `num_frames` frames; a short file repeats frames, each decoded once. `max_fps` lowers the number
    until the mean rate is no higher. `timeout_s` bounds the whole call (checked at every packet). One thread, so that
    loader workers do not crowd each other out. Raises VideoError for whatever prevents a complete, undamaged answer."""
    name = os.fspath(path)
    if timeout_s is not None and not timeout_s > 0:
        raise VideoError(f"{name}: timeout_s={timeout_s} must be positive; leave it out (None) for no limit")
    check_file(name)
    from stts.data.video.decode import NotShownError, Reader

    with _naming(name, timeout_s):
        reader = Reader(name, _deadline_s(timeout_s))
        try:
            index = reader.index()
            chosen_T = choose_frames(index.timeline, sampler, num_frames, clip, max_fps)
            frames = reader.collect(index, chosen_T)
        except NotShownError:
            # Packets without times, or packets that never become frames (a cut inside a group): count by decoding.
            index = reader.index_by_decoding()
            chosen_T = choose_frames(index.timeline, sampler, num_frames, clip, max_fps)
            frames = reader.collect(index, chosen_T)
    timeline = index.timeline
    source = VideoSource(name, timeline.native_fps, timeline.duration_s, sampler, timeline.num_frames)
    return VideoClip(frames, timeline.timestamps_F[chosen_T], source)


class FrameStream:
    """The frames that `sample_frames` would choose, decoded a few at a time when asked for, so that an hour of video
    never lies in memory as pixels.

    Arguments and errors as there (`timeout_s` holds for each call). Decoding jumps to keyframes: re-encode files that
    have few of them. Containers without reliable times (AVI, MPEG program streams, joined transport streams) are
    decoded in order instead, so pieces should be asked for in order too."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        sampler: str = "uniform_inclusive",
        num_frames: int,
        clip: tuple[float, float] | None = None,
        max_fps: float | None = None,
        timeout_s: float | None = None,
    ) -> None:
        self._name, self._timeout_s = os.fspath(path), timeout_s
        self._picture_shape: tuple[int, ...] | None = None
        self._ahead: Iterator[tuple[int, npt.NDArray[np.uint8]]] | None = None  # of a file decoded in order
        self._newest: tuple[int, npt.NDArray[np.uint8]]
        check_file(self._name)
        from stts.data.video.decode import Reader

        self._reader = Reader(self._name, _deadline_s(timeout_s))
        with _naming(self._name, timeout_s):
            self._index = self._reader.index()
            timeline = self._index.timeline
            self._chosen_T = choose_frames(timeline, sampler, num_frames, clip, max_fps)
        self.timestamps_s: npt.NDArray[np.float64] = timeline.timestamps_F[self._chosen_T]
        self.source = VideoSource(self._name, timeline.native_fps, timeline.duration_s, sampler, timeline.num_frames)
        _, height, width, channels = self.read(0, 1).shape
        self._picture_shape = height, width, channels
        self.shape: tuple[int, int, int, int] = (len(self._chosen_T), height, width, channels)

    def __len__(self) -> int:
        return len(self._chosen_T)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_ahead": None}  # an open file does not cross to another process

    def read(self, first: int, last: int) -> npt.NDArray[np.uint8]:
        """uint8 (last - first, H, W, 3), RGB, upright: frames first to last - 1 of those chosen."""
        self._reader.deadline_s = _deadline_s(self._timeout_s)
        with _naming(self._name, self._timeout_s):
            if self._index.can_jump:
                return self._reader.collect(self._index, self._chosen_T[first:last], self._picture_shape)
            try:
                return self._read_on(first, last)
            except BaseException:
                self._ahead = None  # a generator that raised is at its end
                raise

    def _read_on(self, first: int, last: int) -> npt.NDArray[np.uint8]:
        """Go on decoding where the last piece ended; from the start of the file where this piece lies before that."""
        pictures = []
        for number in self._chosen_T[first:last].tolist():
            if self._ahead is None or number < self._newest[0]:
                numbers = np.unique(self._chosen_T[first:])
                self._ahead = self._reader.pictures(self._index, numbers, False, self._picture_shape)
                self._newest = next(self._ahead)
            while self._newest[0] < number:
                self._newest = next(self._ahead)
            pictures.append(self._newest[1])
        return np.stack(pictures)


def _deadline_s(timeout_s: float | None) -> float:
    """On the clock of `time.monotonic()`."""
    return math.inf if timeout_s is None else time.monotonic() + timeout_s


def check_file(name: str) -> None:
    """VideoError unless `name` is a regular file with content."""
    try:
        status = os.stat(name)
    except OSError as error:
        raise VideoError(f"{name}: {error.strerror}; expected a video file: check the path and data root") from error
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise VideoError(f"{name}: it is a directory or device, expected a regular video file; name the file itself")
    if status.st_size == 0:
        raise VideoError(f"{name}: the file is empty (0 bytes), expected a video; {_REMEDY}")


@contextmanager
def _naming(name: str, timeout_s: float | None) -> Iterator[None]:
    """Turn what goes wrong inside into a VideoError that names the file."""
    import av

    from stts.data.video.container import UnusableFileError

    try:
        yield
    except (TimeoutError, av.error.ExitError) as error:  # ExitError: ffmpeg itself was stopped by the limit
        raise VideoError(
            f"{name}: not decoded within timeout_s={timeout_s}; raise it, ask for a shorter clip, or re-encode the file"
        ) from error
    except av.FFmpegError as error:
        raise VideoError(
            f"{name}: not readable as a video ({error.strerror}); expected a complete MP4, MOV, MKV, WebM, AVI or "
            f"MPEG file: {_REMEDY}"
        ) from error
    except UnusableFileError as error:
        raise VideoError(
            f"{name}: {error}; expected a whole video whose chosen frames decode cleanly: {_REMEDY}"
        ) from error
    except (ValueError, OSError) as error:  # the request: choose_frames says what to change
        raise VideoError(f"{name}: {error}") from error
