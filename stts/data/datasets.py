"""What a data row is, before any processor: messages, the media they point to, and the decoded frames.

Shape suffixes:  T = frames,  H, W = pixels,  C = 3 colour channels (RGB)"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Role = Literal["user", "assistant", "system"]


@dataclass(frozen=True)
class Message:
    role: Role
    text: str
    """Media stand where they are shown, as the literal markers `<video>` and `<image>`."""


@dataclass(frozen=True)
class Sample:
    uid: str
    messages: tuple[Message, ...]
    video: Path | None = None
    images: tuple[Path, ...] = ()
    clip: tuple[float, float] | None = None
    """Seconds (start, end) of the video to look at; None for all of it."""
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    sample: Sample
    frames: NDArray[np.uint8] | None = None
    """(T, H, W, 3)"""
    timestamps_s: NDArray[np.float64] | None = None
    """(T,) true times in the file"""
    images: tuple[NDArray[np.uint8], ...] = ()
    """each (H, W, 3)"""
