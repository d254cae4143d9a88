"""The times of frames as models read them: as text behind the video, or as metadata for the processor."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from transformers.video_utils import VideoMetadata

from stts.data.datasets import Example
from stts.data.rows import Sample

LATE_S = 9999.99
"""A time with as many digits as any in a video of up to 9999 seconds."""
_TICKS_PER_S = 1_000_000_000


def time_instruction(timestamps_s: Sequence[float], duration_s: float) -> str:
    """What some models were trained to read behind every video: its length, the number of frames and their times.

    Facts, order and number format are those of arXiv 2410.02713 and its release, the words ours."""
    times = ",".join(f"{time:.2f}s" for time in timestamps_s)
    return (
        f"This video is {duration_s:.2f} seconds long. {len(timestamps_s)} frames were taken from it, at {times}. "
        "Please answer the questions about this video."
    )


def timed(example: Example) -> Sample:
    """The sample of an example, with the times of its frames behind the video marker."""
    if not example.has_video:
        return example.sample
    if example.timestamps_s is None or example.duration_s is None:
        raise ValueError(
            f"sample {example.sample.uid!r} has no frame times or no duration, which this model reads in the prompt; "
            "fill timestamps_s and duration_s of the Example, or set processor.time_instruction = False"
        )
    return with_times(example.sample, example.timestamps_s.tolist(), example.duration_s)


def with_times(sample: Sample, timestamps_s: Sequence[float], duration_s: float) -> Sample:
    """The sample with a time instruction behind its video marker."""
    text = f"<video>\n{time_instruction(timestamps_s, duration_s)}\n"
    messages = [replace(turn, text=re.sub(r"<video>\s*", lambda _: text, turn.text)) for turn in sample.messages]
    return replace(sample, messages=tuple(messages))


def video_metadata(example: Example) -> VideoMetadata:
    """The true times of the frames in the words of the processors, for which a frame has a number and a file a rate.

    Numbers are nanoseconds, so that times of a variable rate survive; the file is as long as its frames at their mean
    distance, from which some processors take seconds per temporal patch."""
    times_s = example.timestamps_s
    if times_s is None:
        raise ValueError(
            f"sample {example.sample.uid!r} has no frame times, which this model reads in the prompt; fill "
            "timestamps_s of the Example"
        )
    frames = example.stream if example.frames is None else example.frames
    assert frames is not None
    num_frames, height, width, _ = frames.shape
    step_s = float(times_s[-1] - times_s[0]) / max(num_frames - 1, 1)
    return VideoMetadata(
        total_num_frames=max(round(num_frames * step_s * _TICKS_PER_S), 1),
        fps=float(_TICKS_PER_S),
        width=width,
        height=height,
        duration=example.duration_s,
        frames_indices=[round(time * _TICKS_PER_S) for time in times_s.tolist()],
    )
