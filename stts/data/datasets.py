"""JSONL rows to samples, and samples to examples with decoded frames; no processor and no model yet.

Shape suffixes:  T = frames,  H, W = pixels,  C = 3 colour channels (RGB)"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from stts.data.video import VideoError, sample_frames

Role = Literal["user", "assistant", "system"]
OnError = Literal["raise", "skip"]

_ROLES: Mapping[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
_READ_KEYS = frozenset({"id", "video", "image", "images", "conversations", "messages", "clip"})


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
    """Every other key of the row."""


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


@dataclass(frozen=True)
class Skipped:
    """Stands in for an example whose media could not be read, so that callers can count and name it."""

    uid: str
    reason: str


def read_jsonl(path: str | Path, root: str | Path | None = None) -> list[Sample]:
    """Reads rows of either form; extra keys land in `meta`.

        {"id", "video" | "image", "conversations": [{"from": "human" | "gpt" | "system", "value": str}, ...]}
        {"id", "messages": [{"role", "content": str | [{"type": "text" | "video" | "image", <type>: str}, ...]}, ...]}

    Both may carry `"clip": [start_s, end_s]`. A missing marker is put at the start of the first user message, and
    `<image>` in front of a video becomes `<video>` (LLaVA-Video-178K; its `data_source` is part of the path).
    Media are relative to `root` (default: the folder of `path`) and must stay inside it, links followed.
    Raises ValueError, with file and line, for anything else; files are looked for only when loaded."""
    path = Path(path)
    base = (path.parent if root is None else Path(root)).resolve()
    if not path.is_file():
        raise ValueError(f"no JSONL file at {path}; check the path")
    samples: list[Sample] = []
    line_of: dict[str, int] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                sample = _parse_row(line, base)
                if sample.uid in line_of:
                    raise ValueError(f"id {sample.uid!r} is already on line {line_of[sample.uid]}; make ids unique")
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
            line_of[sample.uid] = number
            samples.append(sample)
    if not samples:
        raise ValueError(f"{path} has no rows; expected one JSON object per line")
    return samples


def _parse_row(line: bytes, base: Path) -> Sample:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a JSON object on one line of UTF-8 ({error}); split arrays: jq -c '.[]'") from error
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}; split arrays into lines: jq -c '.[]'")
    uid = row.get("id")
    if isinstance(uid, bool) or not isinstance(uid, (str, int)) or uid == "":
        raise ValueError(f"key 'id' is {uid!r}, expected a string or an integer; give every row its own")
    videos, images = _paths(row, "video"), _paths(row, "image") + _paths(row, "images")
    messages = _turns(row, videos, images)
    if len(videos) > 1:
        raise ValueError(f"key 'video' names {len(videos)} videos, expected at most one; split the row")
    if videos and "data_source" in row:
        videos = [f"{row['data_source']}/{videos[0].lstrip('/')}"]
    return Sample(
        uid=str(uid),
        messages=_with_markers(messages, len(videos), len(images)),
        video=_confined(base, videos[0]) if videos else None,
        images=tuple(_confined(base, image) for image in images),
        clip=_seconds(row.get("clip"), bool(videos)),
        meta={key: value for key, value in row.items() if key not in _READ_KEYS},
    )


def _paths(row: Mapping[str, Any], key: str) -> list[str]:
    value = row.get(key)
    paths = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) and item for item in paths):
        raise ValueError(f"key {key!r} is {value!r}, expected a path or a list of paths")
    return list(paths)


def _turns(row: Mapping[str, Any], videos: list[str], images: list[str]) -> list[Message]:
    """The row's messages; media named inside `content` are appended to `videos` and `images`."""
    found = [key for key in ("conversations", "messages") if key in row]
    if len(found) != 1:
        raise ValueError(f"expected one of the keys 'conversations' and 'messages', got {found or sorted(row)}")
    [key] = found
    role_key, text_key = ("from", "value") if key == "conversations" else ("role", "content")
    turns = row[key]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"key {key!r} must be a list of one or more objects with {role_key!r} and {text_key!r}")
    messages = []
    for turn in turns:
        role, content = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"{key}: {role_key!r} is {role!r}, expected one of {tuple(_ROLES)}")
        if isinstance(content, list) and key == "messages":
            content = "\n".join(_part(part, videos, images) for part in content)
        if not isinstance(content, str):
            raise ValueError(f"{key}: {text_key!r} is {type(content).__name__}, expected text")
        messages.append(Message(_ROLES[role], content))
    spoken = [message.role for message in messages if message.role != "system"]
    expected = ["user" if turn % 2 == 0 else "assistant" for turn in range(len(spoken))]
    if not spoken or spoken != expected or any(message.role == "system" for message in messages[1:]):
        raise ValueError(f"{key}: turns must be user, assistant, user, ... after at most one system, got {spoken}")
    return messages


def _part(part: Any, videos: list[str], images: list[str]) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "video", "image") or not isinstance(part.get(kind, ""), str):
        raise ValueError(
            f"messages: content part {part!r} must be like {{'type': 'text', 'text': ...}}, or video, image"
        )
    if kind == "text":
        if "text" not in part:
            raise ValueError("messages: a content part of type 'text' lacks its key 'text'")
        return str(part["text"])
    if part.get(kind):  # without a path the part is the marker of the row's own "video" or "image"
        (videos if kind == "video" else images).append(part[kind])
    return f"<{kind}>"


def _with_markers(messages: list[Message], num_videos: int, num_images: int) -> tuple[Message, ...]:
    """Exactly one marker per medium, all in the first user message."""
    at = next(place for place, message in enumerate(messages) if message.role == "user")
    text = messages[at].text
    if num_videos and not num_images and "<video>" not in text:
        text = text.replace("<image>", "<video>")
    for marker, expected in (("<image>", num_images), ("<video>", num_videos)):
        if marker not in text:
            text = f"{marker}\n" * expected + text
        elsewhere = sum(message.text.count(marker) for message in messages) - messages[at].text.count(marker)
        if text.count(marker) != expected or elsewhere:
            raise ValueError(
                f"{text.count(marker)} {marker} in the first user message and {elsewhere} elsewhere for {expected} "
                f"{marker[1:-1]}(s); write one marker per file, in the first user message, or none at all"
            )
    return (*messages[:at], replace(messages[at], text=text), *messages[at + 1 :])


def _confined(base: Path, value: str) -> Path:
    """`value` under `base`, links followed. A data set is input from elsewhere: it must not read outside its folder."""
    try:
        resolved = (base / value).resolve()  # an absolute value replaces base
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"path {value!r} cannot be followed ({error}); correct it") from error
    if ".." in Path(value).parts or not resolved.is_relative_to(base):
        raise ValueError(f"path {value!r} leaves the root {base}; move the file there, or set root to a common folder")
    return resolved


def _seconds(value: Any, has_video: bool) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and len(value) == 2 and all(type(edge) in (int, float) for edge in value)
    if not numbers or not 0 <= value[0] < value[1] < math.inf:
        raise ValueError(f"key 'clip' is {value!r}, expected [start_s, end_s] with 0 <= start_s < end_s")
    if not has_video:
        raise ValueError("key 'clip' needs a 'video'; add the video or drop the clip")
    return float(value[0]), float(value[1])


class VideoJsonl(Dataset[Example | Skipped]):
    """The rows of one JSONL file, decoded when asked for; never more than the sampled frames in memory.

    `on_error="skip"` returns a `Skipped` where media are missing or broken; "raise" lets the ValueError out. Rows
    that cannot be parsed raise here, in the constructor, whatever `on_error` says."""

    def __init__(
        self,
        path: str | Path,
        *,
        root: str | Path | None = None,
        sampler: str = "uniform_inclusive",
        num_frames: int = 16,
        max_fps: float | None = None,
        on_error: OnError = "raise",
    ) -> None:
        if on_error not in get_args(OnError):
            raise ValueError(f"on_error={on_error!r} must be one of {get_args(OnError)}")
        self.samples = read_jsonl(path, root)
        self.sampler, self.num_frames, self.max_fps, self.on_error = sampler, num_frames, max_fps, on_error

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Example | Skipped:
        sample = self.samples[index]
        try:
            return self._load(sample)
        except VideoError as error:
            if self.on_error == "raise":
                raise VideoError(f"sample {sample.uid!r}: {error}") from error
            return Skipped(sample.uid, str(error))

    def _load(self, sample: Sample) -> Example:
        images = tuple(_read_image(path) for path in sample.images)
        if sample.video is None:
            return Example(sample, images=images)
        if not sample.video.is_file():
            raise VideoError(f"no video file at {sample.video}; fetch it, or correct the row's 'video' or the root")
        video = sample_frames(
            sample.video,
            sampler=self.sampler,
            num_frames=self.num_frames,
            clip=sample.clip,
            max_fps=self.max_fps,
        )
        return Example(sample, video.frames, video.timestamps_s, images, video.source.duration_s)


def _read_image(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise VideoError(f"cannot read the image {path} ({error}); replace it or drop the row") from error
