"""Rows of one data file as samples: what was said, with which media; nothing is decoded here."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from stts.data.formats import open_rows
from stts.data.mixture import limited

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


class Samples(Sequence[Sample]):
    """The rows of one data file (see `stts.data.formats`), parsed when asked for; in memory is where they lie.

        {"id", "video" | "image", "conversations": [{"from": "human" | "gpt" | "system", "value": str}, ...]}
        {"id", "messages": [{"role", "content": str | [{"type": "text" | "video" | "image", <type>: str}, ...]}, ...]}
        {"video", "QA": [{"i": instruction, "q": question, "a": answer}, ...], "start"?, "end"?}  (VideoChat2-IT)

    Every form may carry `"clip": [start_s, end_s]`; other keys land in `meta`. A missing marker is put at the start of
    the first user message, and `<image>` in front of a video becomes `<video>` (LLaVA-Video-178K). A video's path is
    root / `data_source` / `video` where a row has a `data_source`, or root / `video` where the root is that source's
    own folder already. Media are relative to `root` (default: the folder of `path`) and must stay inside it, links
    followed. JSONL rows need an `id` of their own; elsewhere a missing or repeated one gets its row number behind it.

    The constructor parses every row once: ValueError, with file and line, for anything else than these forms. Media
    files are looked for only when loaded."""

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        *,
        limit: str = "all",
        seed: int = 0,
        uid_prefix: str = "",
    ) -> None:
        """limit: rows to use, as in `stts.data.mixture.Source`; seed: of a random limit."""
        path = Path(path)
        self._base = os.path.realpath(path.parent if root is None else root)
        self._rows = open_rows(path)
        self._prefix = uid_prefix
        self._number_N = limited(limit, len(self._rows), seed)
        self._renamed_N = np.zeros(len(self), bool)
        digest_N = np.empty(len(self), np.uint64)
        for place, sample in enumerate(self._parsed(range(len(self)))):
            digest_N[place] = int.from_bytes(hashlib.blake2b(sample.uid.encode(), digest_size=8).digest(), "little")
        self._renamed_N = self._repeated(digest_N)

    def _repeated(self, digest_N: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which rows share their id with another one. Digests stand in for the ids: a million of those fill 100 MB."""
        order_N = np.argsort(digest_N, kind="stable")
        same = np.flatnonzero(np.diff(digest_N[order_N]) == 0)
        repeated_N = np.zeros(len(digest_N), bool)
        repeated_N[order_N[same]] = repeated_N[order_N[same + 1]] = True
        if len(same) and self._rows.strict_ids:
            later = int(order_N[same + 1].min())
            first = int(np.flatnonzero(digest_N == digest_N[later])[0])
            raise ValueError(
                f"{self._rows.where(int(self._number_N[later]))}: id {self[later].uid!r} is already on line "
                f"{self._rows.where(int(self._number_N[first])).rpartition(' ')[2]}; make ids unique"
            )
        return repeated_N

    def __len__(self) -> int:
        return len(self._number_N)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        places = range(len(self))[index]
        return list(self._parsed(places)) if isinstance(places, range) else next(self._parsed([places]))

    def __iter__(self) -> Iterator[Sample]:
        return self._parsed(range(len(self)))

    def _parsed(self, places: Iterable[int]) -> Iterator[Sample]:
        places = list(places) if not isinstance(places, range) else places
        rows = self._rows.read(self._number_N[place].item() for place in places)
        for place in places:
            number = int(self._number_N[place])
            try:
                sample = _parse_row(next(rows), self._base, needs_id=self._rows.strict_ids)
            except ValueError as error:
                raise ValueError(f"{self._rows.where(number)}: {error}") from error
            suffix = f"#{number + 1}" if self._renamed_N[place] or not sample.uid else ""
            yield replace(sample, uid=f"{self._prefix}{sample.uid}{suffix}") if self._prefix or suffix else sample


def read_jsonl(path: str | Path, root: str | Path | None = None) -> list[Sample]:
    """All `Samples` of a file at once."""
    return list(Samples(path, root))


def _parse_row(row: Any, base: str, needs_id: bool) -> Sample:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}; write one object per line, or one array")
    uid = row.get("id", None if needs_id else "")
    if isinstance(uid, bool) or not isinstance(uid, (str, int)) or (needs_id and uid == ""):
        raise ValueError(f"key 'id' is {uid!r}, expected a string or an integer; give every row its own")
    if "QA" in row:
        row = _from_pairs(row)
    videos, images = _paths(row, "video"), _paths(row, "image") + _paths(row, "images")
    messages = _turns(row, videos, images)
    if len(videos) > 1:
        raise ValueError(f"key 'video' names {len(videos)} videos, expected at most one; split the row")
    if videos and "data_source" in row:
        source, video = str(row["data_source"]), videos[0].lstrip("/")
        # As published, the JSON file lies in the folder of its source, beside the videos.
        videos = [video if os.path.basename(base) == source else f"{source}/{video}"]
    return Sample(
        uid=str(uid),
        messages=_with_markers(messages, len(videos), len(images)),
        video=_confined(base, videos[0]) if videos else None,
        images=tuple(_confined(base, image) for image in images),
        clip=_seconds(row.get("clip"), bool(videos)),
        meta={key: value for key, value in row.items() if key not in _READ_KEYS},
    )


def _from_pairs(row: Mapping[str, Any]) -> dict[str, Any]:
    """A VideoChat2-IT row as conversations: the instruction of the first pair is the system text."""
    pairs = row["QA"]
    if not isinstance(pairs, list) or not pairs or not all(isinstance(pair, dict) for pair in pairs):
        raise ValueError(f"key 'QA' is {pairs!r}, expected a list of one or more objects with 'q' and 'a'")
    instruction = pairs[0].get("i")
    turns = [{"from": "system", "value": instruction}] if instruction else []
    for pair in pairs:
        turns += [{"from": "human", "value": pair.get("q")}, {"from": "gpt", "value": pair.get("a")}]
    clip = {"clip": [row["start"], row["end"]]} if "start" in row and "end" in row else {}
    return (
        {key: value for key, value in row.items() if key not in ("QA", "start", "end")}
        | clip
        | {"conversations": turns}
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


def _confined(base: str, value: str) -> Path:
    """`value` under `base`, links followed. A data set is input from elsewhere: it must not read outside its folder."""
    try:
        folder, name = os.path.split(os.path.join(base, value))  # an absolute value replaces base
        resolved = os.path.join(_real_folder(folder), name)
        if os.path.islink(resolved):
            resolved = os.path.realpath(resolved)
    except (OSError, ValueError) as error:
        raise ValueError(f"path {value!r} cannot be followed ({error}); correct it") from error
    if ".." in value.split("/") or os.path.commonpath([base, resolved]) != base:
        raise ValueError(f"path {value!r} leaves the root {base}; move the file there, or set root to a common folder")
    return Path(resolved)


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    """Links followed, once per folder: each costs a system call per part of its path."""
    return os.path.realpath(folder)


def _seconds(value: Any, has_video: bool) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and len(value) == 2 and all(type(edge) in (int, float) for edge in value)
    if not numbers or not 0 <= value[0] < value[1] < math.inf:
        raise ValueError(f"key 'clip' is {value!r}, expected [start_s, end_s] with 0 <= start_s < end_s")
    if not has_video:
        raise ValueError("key 'clip' needs a 'video'; add the video or drop the clip")
    return float(value[0]), float(value[1])
