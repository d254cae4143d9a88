"""The files a row names: a video, a folder of frames, or a picture; and a limit on how long reading them may take.

Shape suffixes:  T = frames,  H, W = pixels,  C = 3 colour channels (RGB)"""

from __future__ import annotations

import os
import re
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from stts.data.video.sample import VideoClip, VideoError, VideoSource, sample_frames
from stts.data.video.samplers import Timeline, choose_frames

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raises TimeoutError where the body takes longer, also inside a system call that never returns (a dead network
    mount). By SIGALRM, so only in the main thread of a process, which is where loader workers read; elsewhere no limit.
    """
    if seconds is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    expired = False

    def expire(number: int, frame: FrameType | None) -> None:
        nonlocal expired
        expired = True
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as error:
        if expired:  # whatever the interrupted call made of it
            raise TimeoutError from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_video(
    path: Path,
    *,
    sampler: str,
    num_frames: int,
    clip: tuple[float, float] | None,
    max_fps: float | None,
    timeout_s: float | None,
    folder_fps: float,
) -> VideoClip:
    """`sample_frames` of a video file, or the same choice among the pictures of a folder, shown at `folder_fps`."""
    if not path.is_dir():
        return sample_frames(
            path, sampler=sampler, num_frames=num_frames, clip=clip, max_fps=max_fps, timeout_s=timeout_s
        )
    # No links: they could lead out of the data set's root.
    names = [entry.name for entry in os.scandir(path) if entry.is_file(follow_symlinks=False)]
    names = sorted((name for name in names if name.lower().endswith(_PICTURES)), key=_natural)
    if not names:
        raise VideoError(f"{path}: a folder without pictures {_PICTURES}, expected the frames of a video")
    timeline = Timeline.constant(len(names), folder_fps)
    try:
        chosen_T = choose_frames(timeline, sampler, num_frames, clip, max_fps)
    except ValueError as error:
        raise VideoError(f"{path}: {error}") from error
    pictures = {number: read_picture(path / names[number]) for number in np.unique(chosen_T).tolist()}
    shapes = {picture.shape for picture in pictures.values()}
    if len(shapes) > 1:
        raise VideoError(f"{path}: frames of several sizes {sorted(shapes)}, expected one; is this one video?")
    source = VideoSource(str(path), folder_fps, timeline.duration_s, sampler, len(names))
    return VideoClip(
        np.stack([pictures[number] for number in chosen_T.tolist()]), timeline.timestamps_N[chosen_T], source
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key under which frame_10 follows frame_9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_picture(path: Path) -> NDArray[np.uint8]:
    """uint8 (H, W, 3), upright."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise OSError("not a regular file")
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except TimeoutError:
        raise
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"cannot read the image {path} ({error}); replace it or drop the row") from error
