"""Subtitles of a video, and which of them belong to the frames that a model sees."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from stts.eval.benchmarks.files import read_json, read_text

_TIME = r"((?:\d+:)?\d+:\d+[,.]?\d*)"
_TIMES = re.compile(rf"^[^\S\n]*{_TIME}\s*-->\s*{_TIME}(.*)$", re.MULTILINE)
_SETTINGS = re.compile(r"(?:\s+(?:align|line|position|size|vertical|region|[XY][12]):\S+)+\s*$")
_NOTE = re.compile(r"\n\s*\n(?:NOTE|STYLE|REGION)\b.*?(?=\n\s*\n|\Z)", re.DOTALL)
_MARKUP = re.compile(
    r"</?(?:b|i|u|s|c|v|p|br|em|rt|font|lang|ruby|span|strong)(?=[\s.>/])[^<>]*>|<\d+:[\d:.]+>|\{\\[^{}]*\}",
    re.IGNORECASE,
)


class Subtitle(NamedTuple):
    start_s: float
    end_s: float
    text: str


def read_srt(path: Path) -> tuple[Subtitle, ...]:
    """Entries of a SubRip or WebVTT file with text, in time order, without markup.

    An entry begins at its line of times and ends at the next: blank lines may stand inside it or be missing behind it.
    UTF-8, UTF-16 or Windows-1252."""
    text = re.sub(r"\r\n?", "\n", read_text(path, legacy=True))
    if text.startswith("WEBVTT"):
        text = _NOTE.sub("", text)
    times = list(_TIMES.finditer(text))
    numbered = bool(times) and text[: times[0].start()].rstrip("\n").rpartition("\n")[2].strip().isdigit()
    subtitles = []
    for this, following in pairwise([*times, None]):
        assert this is not None
        body = text[this.end() : following.start() if following else len(text)]
        if following:
            body = _without_name(body, numbered)
        said = html.unescape(_MARKUP.sub("", f"{_SETTINGS.sub('', this[3])} {body}")).split()
        if said:
            subtitles.append(Subtitle(_seconds(this[1]), _seconds(this[2]), " ".join(said)))
    return tuple(sorted(subtitles, key=lambda entry: entry.start_s))


def _without_name(body: str, numbered: bool) -> str:
    """`body` without the number or name of the next entry: the line right above its times, if it is a number in a file
    of numbered entries, or stands behind a blank line in another."""
    if body.endswith("\n\n"):
        return body
    rest, _, last = body.rstrip("\n").rpartition("\n")
    named = last.strip().isdigit() if numbered else bool(rest) and not rest.rpartition("\n")[2].strip()
    return rest if named else body


def _seconds(clock: str) -> float:
    """Of "h:m:s" or "m:s", with a period or comma before the fraction."""
    seconds = 0.0
    for part in clock.replace(",", ".").split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: a subtitle is neither {{timestamp: [s, e], text}} nor {{start: 'h:m:s', end, line}}: {error!r}"
        ) from error
    return tuple(Subtitle(start - shift_s, end - shift_s, text) for start, end, text in entries)


def _entry(row: Mapping[str, Any], duration_s: float) -> Subtitle:
    if "timestamp" in row:
        start, end = row["timestamp"]
        return Subtitle(float(start), end if isinstance(end, float) else duration_s, str(row["text"]))
    return Subtitle(_seconds(row["start"]), _seconds(row["end"]), str(row["line"]))


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
