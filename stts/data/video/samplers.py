"""Which frames of a video to look at: every sampler that a published result was made with, by name.

Changing the sampler alone moves benchmark scores, so each rule is kept to the index, truncation included. Rules that
count frames work on frame numbers. Rules that speak of seconds work on the true presentation times of the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_TIME_SLACK_S = 1e-6  # two times closer than this are the same instant: seconds in annotations are decimals

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """When the frames of a file (or of a clip of it) are shown."""

    timestamps_F: npt.NDArray[np.float64]
    """Seconds from the start of the file or clip, increasing, at least one."""
    native_fps: float
    """Mean frames per second of the file."""
    duration_s: float
    """Length of the file or clip, the last frame's own display time included."""

    def __post_init__(self) -> None:
        if self.timestamps_F.ndim != 1 or not len(self.timestamps_F) or not self.native_fps > 0:
            raise ValueError(
                f"a timeline needs frames and a frame rate: got timestamps of shape {self.timestamps_F.shape} "
                f"and native_fps={self.native_fps}; check that the file has video frames"
            )

    @classmethod
    def constant(cls, num_frames: int, native_fps: float) -> Timeline:
        """A file with `num_frames` frames at exactly `native_fps`."""
        return cls(np.arange(num_frames) / native_fps, native_fps, num_frames / native_fps)

    @property
    def num_frames(self) -> int:
        return len(self.timestamps_F)

    def shown_at(self, times_s: npt.ArrayLike) -> Indices:
        """Number of the last frame at or before each time; frame 0 before the first."""
        numbers = np.searchsorted(self.timestamps_F, np.asarray(times_s, np.float64) + _TIME_SLACK_S, side="right") - 1
        return np.maximum(numbers, 0).astype(np.int64)

    @property
    def is_constant(self) -> bool:
        """Whether no frame is more than half a frame off the even grid of `native_fps`.

        Half a frame, because containers that store milliseconds (Matroska) round their times, and that must not
        change which frame is chosen."""
        even_F = self.timestamps_F[0] + np.arange(self.num_frames) / self.native_fps
        return bool(np.abs(self.timestamps_F - even_F).max() * self.native_fps <= 0.5)

    def at_nominal(self, number: npt.ArrayLike) -> Indices:
        """Frame `i` of a constant-rate file, or the frame shown at `i / native_fps` when the rate varies."""
        numbers = np.asarray(number, np.int64)
        if self.is_constant:
            return np.minimum(numbers, self.num_frames - 1)
        return self.shown_at(numbers / self.native_fps)


def uniform_inclusive(timeline: Timeline, num_frames: int) -> Indices:
    """Evenly spaced frame numbers, first and last included, truncated; numbers repeat in a shorter file."""
    return np.linspace(0, timeline.num_frames - 1, num_frames, dtype=np.int64)


def fps_then_uniform(timeline: Timeline, num_frames: int, target_fps: float = 1.0) -> Indices:
    """Every `round(native / target)`-th frame; `uniform_inclusive` where that gives more than `num_frames`.

    The LLaVA-Video loader's `force` option always takes the second road: ask for `uniform_inclusive` then."""
    step = max(1, round(timeline.native_fps / target_fps))
    nominal = timeline.num_frames if timeline.is_constant else math.ceil(timeline.duration_s * timeline.native_fps)
    chosen_T = timeline.at_nominal(np.arange(0, nominal, step))
    return chosen_T if len(chosen_T) <= num_frames else uniform_inclusive(timeline, num_frames)


def interior(timeline: Timeline, num_frames: int) -> Indices:
    """The inner points of an even division into `num_frames + 1` parts: never the very first or last moment."""
    # The step is rounded before it is multiplied, as in VLMEvalKit; i * n / (F + 1) differs, e.g. n=45, F=32, i=11.
    step = timeline.num_frames / (num_frames + 1)
    return np.array([int(i * step) for i in range(1, num_frames + 1)], np.int64)


def bins_left(timeline: Timeline, num_frames: int) -> Indices:
    """The left edge of K bins of a whole number of frames, K = min(num_frames, whole seconds, but at least 1)."""
    num_bins = max(1, min(num_frames, int(timeline.duration_s + _TIME_SLACK_S)))
    # Slack, because a product such as 1.1 s * 30 may fall a hair under the whole number it stands for.
    width = int(int(timeline.duration_s * timeline.native_fps + 1e-3) / num_bins)
    return timeline.at_nominal(np.arange(num_bins) * width)


def time_last(timeline: Timeline, num_frames: int, cap_fps: float = 2.0) -> Indices:
    """Even times at no more than `cap_fps`, always with the end; the last frame at or before each time.

    `num_frames` times on [0, duration] where that stays under the cap, else 0, 0.5, 1.0, ... and the end."""
    if (num_frames - 1) / cap_fps < timeline.duration_s:
        return timeline.shown_at(np.linspace(0, timeline.duration_s, num_frames))
    count = math.ceil(timeline.duration_s * cap_fps - _TIME_SLACK_S)
    return timeline.shown_at(np.append(np.arange(count) / cap_fps, timeline.duration_s))


SAMPLERS: Mapping[str, Callable[[Timeline, int], Indices]] = {
    "uniform_inclusive": uniform_inclusive,
    "fps_then_uniform": fps_then_uniform,
    "interior": interior,
    "bins_left": bins_left,
    "time_last": time_last,
}


def choose_frames(
    timeline: Timeline,
    sampler: str,
    num_frames: int,
    clip: tuple[float, float] | None = None,
    max_fps: float | None = None,
) -> Indices:
    """Frame numbers of the whole file, int64 `(T,)`, never decreasing, 1 <= T <= num_frames.

    `clip = (start_s, end_s)` lets the sampler see only the frames shown in that range, both ends included; a range
    between two frames holds the frame on screen at its start. An end after the end of the video (or inf) means its end
    (annotations are rounded up), a start there is an error. `max_fps` lowers `num_frames` until the mean rate from
    the first to the last chosen frame is at most that. Raises ValueError for arguments outside these rules."""
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; expected one of {', '.join(sorted(SAMPLERS))}")
    if isinstance(num_frames, bool) or not isinstance(num_frames, (int, np.integer)) or num_frames < 1:
        raise ValueError(f"num_frames={num_frames!r} must be a whole number of at least 1; ask for one frame or more")
    if max_fps is not None and not 0 < max_fps < math.inf:
        raise ValueError(f"max_fps={max_fps} must be a positive number; leave it out (None) for no limit")
    first, part = (0, timeline) if clip is None else _cut(timeline, clip)
    rule = SAMPLERS[sampler]
    count = most_frames(part.duration_s, num_frames, max_fps)
    chosen_T = rule(part, count)
    while max_fps is not None and count > 1 and _mean_fps(part.timestamps_F[chosen_T]) > max_fps + _TIME_SLACK_S:
        count -= 1
        chosen_T = rule(part, count)
    return chosen_T + first


def most_frames(duration_s: float, num_frames: int, max_fps: float | None) -> int:
    """The most frames that can be chosen of `duration_s` seconds under `max_fps`, because their span is no longer."""
    return int(num_frames if max_fps is None else min(num_frames, 1 + duration_s * max_fps + _TIME_SLACK_S))


def _mean_fps(times_T: npt.NDArray[np.float64]) -> float:
    """Frames per second from the first to the last time; infinite for several frames at one instant."""
    if len(times_T) < 2:
        return 0.0
    span_s = float(times_T[-1] - times_T[0])
    return (len(times_T) - 1) / span_s if span_s > 0 else math.inf


def _cut(timeline: Timeline, clip: tuple[float, float]) -> tuple[int, Timeline]:
    """The number of the first frame inside `clip`, and the timeline of the clip with its start as zero."""
    start_s, end_s = (float(edge) for edge in clip)
    if not start_s < end_s:
        raise ValueError(f"clip=({start_s}, {end_s}) is empty; expected start_s < end_s, in seconds: check the row")
    if start_s < 0 or start_s >= timeline.duration_s - _TIME_SLACK_S:
        raise ValueError(
            f"clip=({start_s}, {end_s}) starts outside the video, which runs from 0 to {timeline.duration_s:.3f} s; "
            "check the row's times (seconds, from the first frame) and that it names the right file"
        )
    times_F = timeline.timestamps_F
    first, stop = np.searchsorted(times_F, [start_s - _TIME_SLACK_S, end_s + _TIME_SLACK_S])
    if first == stop:
        first = int(timeline.shown_at(start_s))
        stop = first + 1
    inside_F = np.maximum(times_F[first:stop] - start_s, 0.0)
    return int(first), Timeline(inside_F, timeline.native_fps, min(end_s, timeline.duration_s) - start_s)
