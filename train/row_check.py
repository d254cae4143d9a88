"""The rows of a run before it starts: all of them parsed, two of each file decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stts.data.datasets import Example, VideoJsonl


@dataclass(frozen=True)
class Rows:
    """Training rows, all parsed and two decoded."""

    number: int
    lines: tuple[str, ...]
    """What was found, a line for each file."""


def check_rows(data: Any) -> Rows:
    """The rows that a run would train on, from its settings `data`. ValueError where a file is not there or unusable,
    or neither of the two rows can be decoded."""
    number, lines = 0, []
    for source in sources_of(data):
        file = VideoJsonl(
            source["path"],
            root=data["root"] if source.get("root") is None else source["root"],
            **{name: data[name] for name in ("sampler", "num_frames", "max_fps", "on_error", "timeout_s")},
            follow_links=data["follow_links"],
        )
        read = [file[place] for place in sorted({0, len(file) // 2})]
        seen = [example for example in read if isinstance(example, Example)]
        if not seen:
            raise ValueError(f"{source['path']}: {read[0].reason}")  # type: ignore[union-attr]
        shapes = [frames.shape for example in seen if (frames := example.frames) is not None]
        shown = dict.fromkeys(f"{count} frames of {width} x {height}" for count, height, width, _ in shapes)
        left_out = f", {len(file.samples.left_out)} left out" if file.samples.left_out else ""
        lines.append(
            f"{len(file):,} of {source['path']} parsed{left_out}; {len(seen)} of {len(read)} decoded"
            + (f": {', '.join(shown)}" if shown else ", without video")
        )
        number += len(file)
    return Rows(number, tuple(lines))


def sources_of(data: Any) -> list[Mapping[str, Any]]:
    """Data files of the training settings; [] where clips are drawn."""
    if data["kind"] == "shapes":
        return []
    train = data["train"]
    if not isinstance(train, list):
        return [{"path": train}]
    return [source if isinstance(source, Mapping) else vars(source) for source in train]
