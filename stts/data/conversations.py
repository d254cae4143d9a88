"""One row of a data file as a `Sample`: what was said, with which media; `Samples` lists the forms it may have."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from stts.data.paths import confined

Role = Literal["user", "assistant", "system"]

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""Suffixes of pictures: the frames of a folder, or of a list."""
_ROLES: Mapping[str, Role] = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
}
_CLIP_KEYS = (("start", "end"), ("video_start", "video_end"))
_READ_KEYS = frozenset(
    {"id", "video", "videos", "image", "images", "conversations", "messages", "system", "clip", "QA"}
).union(*_CLIP_KEYS)
_NOTED_KEYS = frozenset({"data_source", "fps", "family", "options", "duration"})
"""Keys of `Sample.meta` that somebody reads."""
_TURN_KEYS = {"conversations": ("from", "value"), "messages": ("role", "content")}

PathOrFrames = str | tuple[str, ...]


@dataclass(frozen=True)
class Message:
    role: Role
    text: str
    """Media stand where they are shown, as the literal markers `<video>` and `<image>`."""


@dataclass(frozen=True)
class Sample:
    uid: str
    messages: tuple[Message, ...]
    video: Path | tuple[Path, ...] | None = None
    """A file, a folder of frames, or the files of the frames in order."""
    images: tuple[Path, ...] = ()
    clip: tuple[float, float] | None = None
    """Seconds (start, end) of the video to look at, an infinite end being its own; None for all of it."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Every other key of the row."""

    @property
    def files(self) -> str:
        """The media files, for messages."""
        videos = self.video if isinstance(self.video, tuple) else (self.video,)
        paths = [str(path) for path in (*videos, *self.images) if path is not None]
        return ", ".join(paths if len(paths) < 4 else [*paths[:2], "...", paths[-1]])


def parse_row(row: Any, base: str, *, follow_links: bool = False) -> Sample:
    """ValueError, without the row's place, for anything else than the forms that `Samples` lists."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}; write one object per line, or one array")
    uid = row.get("id", "")
    if isinstance(uid, bool) or not isinstance(uid, (str, int)):
        raise ValueError(
            f"key 'id' is {uid!r}, expected a string or an integer; give every row its own, or leave the key out"
        )
    for key in ("audio", "audios"):
        if row.get(key):
            raise ValueError(f"key {key!r} names sound, which no model here hears; drop the key or the row")
    if "QA" in row:
        row = _from_pairs(row)
    videos = _videos(row, "video") + _videos(row, "videos")
    images = _paths(row, "image") + _paths(row, "images")
    clips = [_clip_of(row, keys) for keys in _CLIP_KEYS]
    messages = _turns(row, videos, images, clips)
    if len(videos) > 1:
        raise ValueError(f"the row names {len(videos)} videos, expected at most one; split the row")
    if videos and "data_source" in row and isinstance(videos[0], str):
        source, video = str(row["data_source"]), videos[0].lstrip("/")
        # As published, the JSON file lies in the folder of its source, beside the videos.
        videos = [video if os.path.basename(base) == source else f"{source}/{video}"]
    return Sample(
        uid=str(uid),
        messages=_with_markers(messages, len(videos), len(images)),
        video=_placed(base, videos[0], follow_links) if videos else None,
        images=tuple(confined(base, image, follow_links=follow_links) for image in images),
        clip=_one_clip([_seconds(row.get("clip")), *clips], bool(videos)),
        meta={key: value for key, value in row.items() if key not in _READ_KEYS},
    )


def unread_keys(row: Mapping[str, Any]) -> set[str]:
    """What `parse_row` leaves aside, with `messages[].` and the like in front of the keys of turns and parts."""
    unread = {key for key in row if key not in _READ_KEYS | _NOTED_KEYS}
    for form, read in _TURN_KEYS.items():
        for turn in row.get(form, ()):
            unread |= {f"{form}[].{key}" for key in turn if key not in read}
            parts = turn.get("content") if form == "messages" else None
            for part in parts if isinstance(parts, list) else ():
                read_part = {"type", "path", "text", "video", "image", "video_start", "video_end"}
                unread |= {f"messages[].content[].{key}" for key in part if key not in read_part}
    return unread


def _from_pairs(row: Mapping[str, Any]) -> dict[str, Any]:
    """A VideoChat2-IT row as conversations: the instruction of the first pair is the system text."""
    pairs = row["QA"]
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, dict) for pair in pairs):
        raise ValueError(f"key 'QA' is {pairs!r}, expected a list of one or more objects with 'q' and 'a'")
    instruction = pairs[0].get("i")
    turns = [{"from": "system", "value": instruction}] if instruction else []
    for pair in pairs:
        turns += [{"from": "human", "value": pair.get("q")}, {"from": "gpt", "value": pair.get("a")}]
    return {key: value for key, value in row.items() if key != "QA"} | {"conversations": turns}


def _paths(row: Mapping[str, Any], key: str) -> list[str]:
    value = row.get(key)
    paths = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) and item for item in paths):
        raise ValueError(f"key {key!r} is {value!r}, expected a path or a list of paths")
    return [path.removeprefix("file://") for path in paths]


def _videos(row: Mapping[str, Any], key: str) -> list[PathOrFrames]:
    """Paths of videos. A list of pictures, or a list inside the list, holds the frames of one video."""
    value = row.get(key)
    if isinstance(value, list) and any(isinstance(item, list) for item in value):
        return [video for item in value for video in _videos({key: item}, key)]
    paths = _paths(row, key)
    return [tuple(paths)] if paths and all(path.lower().endswith(PICTURES) for path in paths) else list(paths)


def _placed(base: str, video: PathOrFrames, follow_links: bool) -> Path | tuple[Path, ...]:
    if isinstance(video, str):
        return confined(base, video, follow_links=follow_links)
    return tuple(confined(base, frame, follow_links=follow_links) for frame in video)


Clip = tuple[float, float]


def _turns(
    row: Mapping[str, Any], videos: list[PathOrFrames], images: list[str], clips: list[Clip | None]
) -> list[Message]:
    """The row's messages; media and clips named inside `content` are appended to the lists."""
    forms = [key for key in _TURN_KEYS if key in row]
    if len(forms) != 1:
        raise ValueError(f"expected one of the keys 'conversations' and 'messages', got {forms or sorted(row)}")
    [key] = forms
    role_key, text_key = _TURN_KEYS[key]
    turns = row[key]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"key {key!r} must be a list of one or more objects with {role_key!r} and {text_key!r}")
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise ValueError(f"key 'system' is {system!r}, expected text")
    messages = [Message("system", system)] if system else []
    for turn in turns:
        role, content = turn.get(role_key), turn.get(text_key)
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"{key}: {role_key!r} is {role!r}, expected one of {tuple(_ROLES)}")
        if isinstance(content, list) and key == "messages":
            content = "\n".join(_part(part, videos, images, clips) for part in content)
        if not isinstance(content, str):
            raise ValueError(f"{key}: {text_key!r} is {type(content).__name__}, expected text")
        messages.append(Message(_ROLES[role], content))
    spoken = [message.role for message in messages if message.role != "system"]
    expected = ["user" if turn % 2 == 0 else "assistant" for turn in range(len(spoken))]
    if not spoken or spoken != expected or any(message.role == "system" for message in messages[1:]):
        raise ValueError(f"{key}: turns must be user, assistant, user, ... after at most one system, got {spoken}")
    return messages


def _part(part: Any, videos: list[PathOrFrames], images: list[str], clips: list[Clip | None]) -> str:
    """The text of one content part, a marker where it is a medium."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "video", "image") or "url" in part:
        raise ValueError(
            f"messages: content part {part!r} must be like {{'type': 'text', 'text': ...}}, or video, image with a path"
        )
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError("messages: a content part of type 'text' lacks its key 'text', or that is no text")
        return str(part["text"])
    media = {kind: part.get(kind) or part.get("path")}  # without a path: the marker of the row's own "video" or "image"
    if kind == "video":
        videos += _videos(media, kind)
        clips.append(_clip_of(part, _CLIP_KEYS[1]))
    else:
        images += _paths(media, kind)
    return f"<{kind}>"


def _with_markers(messages: Sequence[Message], num_videos: int, num_images: int) -> tuple[Message, ...]:
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


def _clip_of(values: Mapping[str, Any], keys: tuple[str, str]) -> Clip | None:
    """A clip from two keys; a missing start is 0, a missing end that of the video."""
    start, end = (values.get(key) for key in keys)
    if start is None and end is None:
        return None
    return _seconds([0.0 if start is None else start, math.inf if end is None else end], " and ".join(map(repr, keys)))


def _seconds(value: Any, keys: str = "'clip'") -> Clip | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and len(value) == 2 and all(type(edge) in (int, float) for edge in value)
    if not numbers or not 0 <= value[0] < value[1]:
        raise ValueError(f"key {keys} is {value!r}, expected [start_s, end_s] with 0 <= start_s < end_s")
    return float(value[0]), float(value[1])


def _one_clip(clips: Sequence[Clip | None], has_video: bool) -> Clip | None:
    stated = sorted({clip for clip in clips if clip is not None})
    if len(stated) > 1:
        raise ValueError(f"the row names several clips, {stated}; keep one of 'clip', 'start' and 'video_start'")
    if stated and not has_video:
        raise ValueError("a key 'clip', 'start' or 'end' needs a 'video'; add the video or drop the key")
    return stated[0] if stated else None
