"""The files that a row names: a video, a folder or list of frames, a picture; and a limit on the time to read them.

Shape suffixes beside those of `stts.tokens`: H, W = pixels, C = 3 colour channels (RGB)."""

from __future__ import annotations

import os
import re
import signal
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from stts.data.conversations import PICTURES
from stts.data.paths import confined
from stts.data.video.sample import VideoClip, VideoError, VideoSource, sample_frames
from stts.data.video.samplers import Timeline, choose_frames


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
    path: Path | Sequence[Path],
    *,
    sampler: str,
    num_frames: int,
    clip: tuple[float, float] | None,
    max_fps: float | None,
    timeout_s: float | None,
    folder_fps: float,
    inside: str | Path | None = None,
) -> VideoClip:
    """`sample_frames` of a video file, or the same choice among the pictures of a folder or list, at `folder_fps`.

    inside: links in a folder of frames must not lead out of this one (see `stts.data.paths`); None: they may."""
    if isinstance(path, Path) and not path.is_dir():
        return sample_frames(
            path, sampler=sampler, num_frames=num_frames, clip=clip, max_fps=max_fps, timeout_s=timeout_s
        )
    pictures = _pictures_of(path, inside) if isinstance(path, Path) else list(path)
    name = str(path) if isinstance(path, Path) else f"{len(pictures)} frames from {pictures[0]} on"
    timeline = Timeline.constant(len(pictures), folder_fps)
    try:
        chosen_T = choose_frames(timeline, sampler, num_frames, clip, max_fps)
    except ValueError as error:
        raise VideoError(f"{name}: {error}") from error
    images = {number: read_picture(pictures[number]) for number in np.unique(chosen_T).tolist()}
    shapes = {image.shape for image in images.values()}
    if len(shapes) > 1:
        raise VideoError(f"{name}: frames of several sizes {sorted(shapes)}, expected one; is this one video?")
    source = VideoSource(name, folder_fps, timeline.duration_s, sampler, len(pictures))
    return VideoClip(
        np.stack([images[number] for number in chosen_T.tolist()]), timeline.timestamps_F[chosen_T], source
    )


def _pictures_of(folder: Path, inside: str | Path | None) -> list[Path]:
    """The frames of a folder in natural order, without hidden files (macOS writes a ._name beside every name)."""
    entries = [
        entry
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(PICTURES) and not entry.name.startswith(".") and entry.is_file()
    ]
    links = [entry.path for entry in entries if entry.is_symlink()] if inside is not None else []
    try:
        for link in links:
            confined(inside or "", os.path.realpath(folder) + os.sep + os.path.basename(link))
    except ValueError as error:
        raise VideoError(f"{folder}: a folder without pictures of its own: {error}") from error
    if not entries:
        raise VideoError(f"{folder}: a folder without pictures {PICTURES}, expected the frames of a video")
    return [folder / name for name in sorted((entry.name for entry in entries), key=_natural)]


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
    except (TimeoutError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise whatever they meet: SyntaxError, EOFError, struct.error
        raise VideoError(f"cannot read the image {path} ({error}); replace it or drop the row") from error
