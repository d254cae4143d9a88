"""Subtitles of a video, and which of them belong to the frames that a model sees."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stts.eval.benchmarks.files import read_json

_TIMES = re.compile(r"(\d+):(\d+):(\d+[,.]?\d*)\s*-->\s*(\d+):(\d+):(\d+[,.]?\d*)")
_MARKUP = re.compile(r"<[^<>]*>|\{\\[^{}]*\}")


class Subtitle(NamedTuple):
    start_s: float
    end_s: float
    text: str


def read_srt(path: Path) -> tuple[Subtitle, ...]:
    """Entries with text, in time order, without markup; blocks without times are passed over."""
    found = []
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig", errors="replace").replace("\r", "")):
        head, times, text = block, _TIMES.search(block), ""
        if times:
            text = " ".join(_MARKUP.sub("", head[times.end() :]).split())
        if times and text:
            found.append(Subtitle(_clock(*times.group(1, 2, 3)), _clock(*times.group(4, 5, 6)), text))
    return tuple(sorted(found, key=lambda entry: entry.start_s))


def _clock(hours: str, minutes: str, seconds: str) -> float:
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))


def shown_at(subtitles: Sequence[Subtitle], times_s: Sequence[float]) -> list[str]:
    """Texts whose half-open interval holds at least one of the times, each entry once."""
    return [entry.text for entry in subtitles if any(entry.start_s <= time < entry.end_s for time in times_s)]


def read_json_subtitles(path: Path, shift_s: float, duration_s: float) -> tuple[Subtitle, ...]:
    """LongVideoBench's two forms, `shift_s` earlier; an end that is no decimal number is the end of the video."""
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of subtitles")
    try:
        entries = [_entry(row, duration_s) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: a subtitle is neither {{timestamp: [s, e], text}} nor {{start: 'h:m:s', end, line}}: {error!r}"
        ) from error
    return tuple(Subtitle(start - shift_s, end - shift_s, text) for start, end, text in entries)


def _entry(row: Mapping[str, Any], duration_s: float) -> Subtitle:
    if "timestamp" in row:
        start, end = row["timestamp"]
        return Subtitle(float(start), end if isinstance(end, float) else duration_s, str(row["text"]))
    return Subtitle(_clock(*row["start"].split(":")), _clock(*row["end"].split(":")), str(row["line"]))


def interleave(subtitles: Sequence[Subtitle], times_s: Sequence[float], frame: str) -> list[str]:
    """`frame` once per time, and each subtitle after the last frame that is not later than its middle.

    Kept is a subtitle with a frame strictly inside it; one under a second long is widened to half a second each way."""
    parts: list[str] = []
    placed = 0
    for start, end, text in subtitles:
        middle = (start + end) / 2
        while placed < len(times_s) and times_s[placed] <= middle:
            parts.append(frame)
            placed += 1
        if end - start < 1:
            start, end = middle - 0.5, middle + 0.5
        if any(start < time < end for time in times_s):
            parts.append(text)
    return parts + [frame] * (len(times_s) - placed)
