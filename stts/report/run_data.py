"""A run as the page reads it: rows, notes, and samples with what was kept of them.

    run     name, summary, headline, rows, notes, cells, samples, num_samples,
            frames {number: [picture per temporal cell]}, points (whether rows differ in frames),
            budget (whether they keep equal tokens there)
    cell    key, title, kind, ratio, equal_flops_to; in the order of the table, without those that were not run
    sample  uid, task, family, question, answer, outcomes {cell: {said, right, retention}}, grid [t, h, w], times,
            frames, missing (why there are no frames), kept {cell: {mask, scores}}

Shape suffixes beside those of `stts.tokens`: H, W = pixels, C = 3 colour channels (RGB).
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stts.data.datasets import Example
from stts.data.paths import following_links
from stts.eval.answering.kept_tokens import KeptCells, read_kept
from stts.eval.answering.questions import Source, open_jsonl, open_tasks
from stts.eval.answering.run_folder import RESULT
from stts.eval.results.result import ComparisonResult
from stts.eval.results.summary import Row
from stts.eval.results.table import Cell, Record, notes_on, title_of
from stts.tokens import Grid

_LONGEST_SIDE = 360
_JPEG_QUALITY = 82


def run_data(out: Path, num_samples: int) -> dict[str, Any]:
    """A finished comparison with its first `num_samples` samples. ValueError: `out` holds none."""
    path = Path(out) / RESULT
    if not path.is_file():
        raise ValueError(f"{out} holds no {RESULT}; give the --out folder of a finished run")
    result = ComparisonResult.from_json(json.loads(path.read_text(encoding="utf-8")))
    records = () if result.has_points else result.records[:num_samples]  # a sample has one grid of frames
    kept = read_kept(out, {record.uid for record in records})
    pictures = Pictures(found_from(Path(out), result.config))
    return {
        "points": result.has_points,
        "budget": result.config.get("budget") is not None,
        "name": result.config["name"],
        "summary": f"{title_of(result)}; {result.environment['device']}, {result.environment['dtype']}",
        "headline": headline(result.rows),
        "rows": [asdict(row) for row in result.rows],
        "notes": notes_on(result),
        "cells": [cell_data(cell) for cell in result.cells if cell.reason is None and not result.has_points],
        "samples": [_sample(record, kept.get(record.uid), pictures) for record in records],
        "num_samples": 0 if result.has_points else len(result.records),
        "frames": pictures.encoded,
    }


def headline(rows: Sequence[Row]) -> str:
    """One sentence: the most accurate pruned row, of learned ones if there are any, beside the best that drops nothing.

    "" where one of the two is missing."""
    graded = [row for row in rows if row.accuracy is not None and row.retention_measured is not None]
    dense = [row for row in graded if row.kind == "unpruned"]
    pruned = [row for row in graded if row.kind == "learned"] or [row for row in graded if row.kind != "unpruned"]
    if not dense or not pruned:
        return ""
    best = max(pruned, key=lambda row: (row.accuracy or 0, -(row.retention_measured or 0)))
    most = max(row.accuracy or 0 for row in dense)
    [name, *_] = [row.method for row in dense if row.accuracy == most]
    assert best.accuracy is not None and best.retention_measured is not None
    share = best.flops.get("exact", {}).get("share")
    flops = "" if share is None else f", {share:.0%} of the FLOPs"
    points = 100 * (best.accuracy - most)
    place = "level with" if abs(points) < 0.05 else f"{abs(points):.1f} {'below' if points < 0 else 'above'}"
    kept = f"{best.method} keeps {best.retention_measured:.0%} of the tokens{flops}"
    return f"{kept}: {100 * best.accuracy:.1f} % right, {place} {name}."


def cell_data(cell: Cell) -> dict[str, Any]:
    return {
        "key": cell.key, "title": cell.title, "kind": cell.kind, "ratio": cell.retention_configured,
        "equal_flops_to": cell.equal_flops_to,
    }  # fmt: skip


def found_from(out: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings with data that can be opened from here: a relative path that is not below the current folder
    is looked for below the folders above the run, one of which the comparison was started in."""
    paths = {name: Path(config[name]) for name in ("data", "data_root") if config.get(name)}
    for name, path in paths.items():
        places = [Path(), *out.resolve().parents]
        paths[name] = next((place / path for place in places if (place / path).exists()), path)
    return {**config, **{name: str(path) for name, path in paths.items()}}


class Pictures:
    """Frames of the samples of one comparison, decoded again as it chose them, once per video and clip."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.encoded: list[list[str]] = []
        self._known: dict[Any, int] = {}
        self._place: dict[str, int] = {}
        self._missing = "it is no longer in the data, or its video is gone"
        try:
            self._source = _source(config)
            self._place = {key: place for place, key in enumerate(self._source.keys)}
        except (ValueError, OSError) as error:
            self._missing = str(error)

    def of(self, key: str, num_cells: int) -> tuple[int | None, str]:
        """Number in `encoded` of a sample's frames, or the reason why they cannot be shown."""
        if key not in self._place:
            return None, self._missing
        asked = self._source.asked[self._place[key]]
        shown = (asked.task.name, asked.question.video, asked.question.clip, num_cells)
        if shown not in self._known:
            try:
                example = self._source[self._place[key]]
            except ValueError as error:
                return None, str(error)
            assert isinstance(example, Example) and example.frames is not None, "on_error is raise"
            self._known[shown] = len(self.encoded)
            self.encoded.append(encode_frames(first_of_cells(example.frames, num_cells)))
        return self._known[shown], ""


def _source(config: Mapping[str, Any]) -> Source:
    """The questions of a comparison as its `config` says. ValueError or OSError where they are gone."""
    follow_links = config.get("follow_links", False)
    with following_links(follow_links):
        if config.get("tasks"):
            tasks = open_tasks(config["tasks"], config["data_root"], skip_missing=True)
        else:
            tasks = [open_jsonl(config["data"], skip_missing=True)]
    return Source(
        tasks=tasks,
        follow_links=follow_links,
        num_frames=frames if isinstance(frames := config["num_frames"], int) else frames[0],
        sampler=config["sampler"],
        prompt=config.get("prompt", "letter"),
        wordings=config.get("wordings") or {},
    )


def first_of_cells(frames_FHWC: NDArray[np.uint8], num_cells: int) -> NDArray[np.uint8]:
    """The first frame of every temporal cell: some families have one cell for two frames."""
    per_cell = -(-len(frames_FHWC) // num_cells)
    return frames_FHWC[np.minimum(np.arange(num_cells) * per_cell, len(frames_FHWC) - 1)]


def encode_frames(frames_THWC: NDArray[np.uint8]) -> list[str]:
    """Data URIs of JPEGs, small enough for a page."""
    uris = []
    for frame in frames_THWC:
        picture = Image.fromarray(frame)
        picture.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=_JPEG_QUALITY)
        uris.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return uris


def _sample(record: Record, kept: KeptCells | None, pictures: Pictures) -> dict[str, Any]:
    num_frames = next(iter(record.outcomes.values())).num_frames
    frames, missing = pictures.of(record.uid, num_frames)
    return {
        "uid": record.uid,
        "task": record.task,
        "family": record.family,
        "question": record.question,
        "answer": record.answer,
        "outcomes": {
            key: {"said": outcome.prediction, "right": outcome.correct, "retention": outcome.retention}
            for key, outcome in record.outcomes.items()
        },
        "frames": frames,
        "missing": missing,
        **(kept_data(kept.grid, kept.times_s, kept.index, kept.scores) if kept else no_kept(num_frames)),
    }


def no_kept(num_frames: int) -> dict[str, Any]:
    return {"grid": [num_frames, 0, 0], "times": [], "kept": {}}


def kept_data(
    grid: Grid, times_s: Sequence[float], index: Mapping[str, Tensor], scores: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Grid, seconds and kept cells of one sample: a byte per cell, 1 = kept, and `ranks` of the scores."""
    kept = {}
    for key, index_K in index.items():
        mask_G = np.zeros(grid.num_groups, np.uint8)
        mask_G[index_K.long().numpy()] = 1
        kept[key] = {"mask": _text(mask_G)}
        if key in scores:
            kept[key]["scores"] = _text(ranks(scores[key].numpy()))
    return {"grid": [grid.t, grid.h, grid.w], "times": [round(time, 3) for time in times_s], "kept": kept}


def ranks(scores_G: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Place of each score among the distinct ones, 1 .. 255, and 0 where there is none (NaN): methods score on scales
    of their own, some infinite."""
    scored_G = ~np.isnan(scores_G)
    distinct, place = np.unique(scores_G[scored_G], return_inverse=True)
    rank_G = np.zeros(len(scores_G), np.uint8)
    rank_G[scored_G] = 1 + np.round(254 * place / max(1, len(distinct) - 1))
    return rank_G


def _text(values: NDArray[np.uint8]) -> str:
    return base64.b64encode(values.tobytes()).decode()
