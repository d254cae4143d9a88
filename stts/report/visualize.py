"""`stts ask` and `stts visualize`: one video, one question, one pruner, as text and as one file.

.png   a sheet of all frames, dropped cells darkened, with the answers
.mp4   the same frame by frame, with the number of tokens kept
.html  the page of `stts report`, with scrubber and score heat map

Shape suffixes beside those of `stts.tokens`: H, W = pixels, C = 3 colour channels (RGB).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stts.data.video.sample import check_file
from stts.eval.answering.method import cell_of
from stts.eval.results.table import DENSE, Cell
from stts.files import staged, write_whole
from stts.models.checkpoints.chat import Asked
from stts.models.checkpoints.hub import PrunedVLM
from stts.models.checkpoints.load import pruner_settings
from stts.pruners.base import Positions
from stts.report.page import render_page
from stts.report.run_data import cell_data, encode_frames, first_of_cells, kept_data
from stts.tokens import Grid

_LEFT_OF_DROPPED = 0.22  # brightness
_SIDE = 240  # shortest side of a frame in the sheet, longest in the film 3 times that
_MARGIN, _LINE = 8, 22
_CHOICES = (".png", ".mp4", ".html")


@dataclass(frozen=True)
class View:
    """What one pruner kept of one video, and what the model said with and without it."""

    asked: Asked
    cell: Cell

    @property
    def grid(self) -> Grid:
        return self.asked.report.grids[0]

    @property
    def index_K(self) -> Tensor:
        return self.asked.report.index[0].cpu()

    @property
    def scores_G(self) -> Tensor | None:
        scores = self.asked.report.scores[0]
        return None if scores is None else scores.float().cpu()

    @property
    def frames_THWC(self) -> NDArray[np.uint8]:
        """The first frame of every temporal cell."""
        assert self.asked.example.frames is not None
        return first_of_cells(self.asked.example.frames, self.grid.t)

    @property
    def times_s(self) -> list[float]:
        """Of all sampled frames."""
        assert self.asked.example.timestamps_s is not None
        times: list[float] = self.asked.example.timestamps_s.tolist()
        return times

    @property
    def said(self) -> str:
        return self.asked.pruned.text.strip()

    @property
    def said_dense(self) -> str:
        return self.asked.dense.text.strip()

    @property
    def retention(self) -> float:
        """Equivalent retention, measured."""
        return self.asked.report.retention_measured

    @property
    def mask_THW(self) -> NDArray[np.bool_]:
        mask_G = np.zeros(self.grid.num_groups, bool)
        mask_G[self.index_K.numpy()] = True
        return mask_G.reshape(self.grid.t, self.grid.h, self.grid.w)


def ask(
    video: Path,
    question: str,
    /,
    *,
    model: str,
    pruner: str | None = None,
    pruner_options: dict[str, Any] | None = None,
    retention_ratio: float | None = None,
    num_frames: int | None = None,
    sampler: str | None = None,
    positions: Positions | None = None,
    clip: tuple[float, float] | None = None,
    folder_fps: float = 1.0,
    max_new_tokens: int = 32,
    save: Path | None = None,
) -> str:
    """Ask one question about one video, with every token and with those that a pruner keeps.

    Args:
        video: video file, or a folder with its frames as pictures.
        question: what to ask about it.
        model: model folder or hub id.
        pruner: name (see `stts pruners`), module:Class or file.py:Class; null: the model's own, else tango.
        pruner_options: options of the pruner, as in '{compat: official}'.
        retention_ratio: fraction kept; null: the model's own, else 0.5.
        num_frames: frames, at most; null: as the model was trained, else 16.
        sampler: how frames are chosen; null: as trained, else uniform_inclusive.
        positions: of kept tokens in the LLM, original or compact; null: as trained.
        clip: seconds of the video to look at, start and end.
        folder_fps: pictures of a folder per second.
        max_new_tokens: longest answer.
        save: also write what was kept, as .png, .mp4 or .html.
    """
    if save is not None:
        check_ending("--save", save)
    view = look(
        video, question=question, model=model, pruner=pruner, retention_ratio=retention_ratio, num_frames=num_frames,
        sampler=sampler, positions=positions, clip=clip, folder_fps=folder_fps, max_new_tokens=max_new_tokens,
        options=pruner_options,
    )  # fmt: skip
    if save is None:
        return str(view.asked)
    write_view(view, save)
    return f"{view.asked}\n\nwrote {save}: {_counts(view)}"


def visualize(
    video: Path,
    /,
    *,
    question: str,
    model: str,
    pruner: str | None = None,
    retention_ratio: float | None = None,
    num_frames: int | None = None,
    sampler: str | None = None,
    positions: Positions | None = None,
    clip: tuple[float, float] | None = None,
    folder_fps: float = 1.0,
    max_new_tokens: int = 32,
    out: Path | None = None,
) -> str:
    """Show which tokens of one video a pruner keeps for one question.

    Args:
        video: video file, or a folder with its frames as pictures.
        question: what to ask about it.
        model: model folder or hub id.
        pruner: name (see `stts pruners`), module:Class or file.py:Class; null: the model's own, else tango.
        retention_ratio: fraction kept; null: the model's own, else 0.5.
        num_frames: frames, at most; null: as the model was trained, else 16.
        sampler: how frames are chosen; null: as trained, else uniform_inclusive.
        positions: of kept tokens in the LLM; null: as trained.
        clip: seconds of the video to look at, start and end.
        folder_fps: pictures of a folder per second.
        max_new_tokens: longest answer.
        out: file ending in .png, .mp4 or .html; null: .png named as the video.
    """
    out = out or Path(video.stem + ".png")
    check_ending("--out", out)
    view = look(
        video, question=question, model=model, pruner=pruner, retention_ratio=retention_ratio, num_frames=num_frames,
        sampler=sampler, positions=positions, clip=clip, folder_fps=folder_fps, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    write_view(view, out)
    return f"wrote {out}: {_counts(view)}; says {json.dumps(view.said)}, dense {json.dumps(view.said_dense)}"


def check_ending(option: str, file: Path) -> None:
    if file.suffix not in _CHOICES:
        raise ValueError(f"{option} {file} ends in {file.suffix or 'nothing'!r}; expected one of {', '.join(_CHOICES)}")


def look(
    video: str | Path,
    *,
    question: str,
    model: str | Path,
    pruner: str | None = None,
    retention_ratio: float | None = None,
    num_frames: int | None = None,
    sampler: str | None = None,
    positions: Positions | None = None,
    clip: tuple[float, float] | None = None,
    folder_fps: float = 1.0,
    max_new_tokens: int = 32,
    options: Mapping[str, Any] | None = None,
) -> View:
    """Load a model and ask it once densely and once pruned, as `PrunedVLM.ask` does. Pruner, ratio, frames and
    positions that are None are those that a folder of ours records; else tango and a ratio of 0.5, 16 frames by
    uniform_inclusive, and positions as the pruner declares.

    options: of the pruner. ValueError: the video is broken, the pruner unknown or out of reach."""
    if not 0 < folder_fps < math.inf:
        raise ValueError(f"--folder_fps {folder_fps} must be a positive number of pictures a second")
    if num_frames == 0 or min(num_frames or 1, max_new_tokens) < 1:
        raise ValueError("--num_frames and --max_new_tokens must be at least 1")
    if not Path(video).is_dir():
        check_file(str(video))
    if pruner is None and pruner_settings(model) is None:
        pruner = "tango"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vlm = PrunedVLM.from_pretrained(
        model, pruner, retention_ratio, device=device, positions=positions, **dict(options or {})
    )
    asked = vlm.ask(
        video, question, num_frames=num_frames, sampler=sampler, clip=clip, folder_fps=folder_fps,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    return View(asked, cell_of(vlm.pruning))


def darken(frame_HWC: NDArray[np.uint8], mask_hw: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The frame with dropped cells dark; cell borders are rounded, so that any frame size fits any grid."""
    height, width = frame_HWC.shape[:2]
    rows_H = np.arange(height) * mask_hw.shape[0] // height
    columns_W = np.arange(width) * mask_hw.shape[1] // width
    kept_HW1 = mask_hw[rows_H[:, None], columns_W[None]][..., None]
    return np.where(kept_HW1, frame_HWC, (frame_HWC * _LEFT_OF_DROPPED).astype(np.uint8))


def draw_sheet(view: View) -> Image.Image:
    """All frames in rows, under the question and both answers."""
    height, width = view.frames_THWC.shape[1:3]
    scale = _SIDE / min(height, width)
    size = round(width * scale), round(height * scale)
    columns = math.ceil(math.sqrt(view.grid.t))
    rows = -(-view.grid.t // columns)
    font = ImageFont.load_default(16)
    sheet_width = max(640, _MARGIN + columns * (size[0] + _MARGIN))
    lines = [line for text in _headlines(view) for line in _wrapped(text, font, sheet_width - 2 * _MARGIN)]
    top = 2 * _MARGIN + _LINE * len(lines)
    sheet = Image.new("RGB", (sheet_width, top + rows * (size[1] + _LINE + _MARGIN)), "white")
    pen = ImageDraw.Draw(sheet)
    for place, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + _LINE * place), line, "black", font)
    for number, (frame, mask) in enumerate(zip(view.frames_THWC, view.mask_THW, strict=True)):
        x = _MARGIN + (number % columns) * (size[0] + _MARGIN)
        y = top + (number // columns) * (size[1] + _LINE + _MARGIN)
        large = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
        sheet.paste(Image.fromarray(darken(large, mask)), (x, y))
        pen.text((x, y + size[1] + 2), _caption(view, number), "black", font)
    return sheet


def draw_film(view: View, path: Path) -> None:
    """H.264, two frames a second, so that each can be read."""
    height, width = view.frames_THWC.shape[1:3]
    scale = 3 * _SIDE / max(height, width)
    size = 2 * round(width * scale / 2), 2 * round(height * scale / 2)  # the codec wants even sides
    font = ImageFont.load_default(18)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = size[0], size[1] + 2 * _LINE, "yuv420p"
        for number, (frame, mask) in enumerate(zip(view.frames_THWC, view.mask_THW, strict=True)):
            page = Image.new("RGB", (stream.width, stream.height), "white")
            large = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
            page.paste(Image.fromarray(darken(large, mask)), (0, 0))
            text = f"{view.cell.title} {view.cell.retention_configured:g}, {_caption(view, number)}"
            ImageDraw.Draw(page).text((_MARGIN, size[1] + _LINE // 2), text, "black", font)
            container.mux(stream.encode(av.VideoFrame.from_image(page)))
        container.mux(stream.encode(None))


def draw_page(views: Sequence[View], summary: str = "", notes: Sequence[str] = ()) -> str:
    """The page of `stts report` about one question on one video, with a card for each view; dense comes first."""
    first = views[0]

    def outcome(said: str, retention: float) -> dict[str, object]:
        return {"said": said, "right": None, "retention": retention}

    index = {view.cell.key: view.index_K for view in views}
    scores = {view.cell.key: view.scores_G for view in views if view.scores_G is not None}
    outcomes = {view.cell.key: outcome(view.said, view.retention) for view in views}
    sample = {
        "uid": "video", "task": "", "family": "", "question": first.asked.question, "answer": "", "frames": 0,
        "missing": "", "outcomes": {DENSE: outcome(first.said_dense, 1.0), **outcomes},
        **kept_data(first.grid, first.times_s, index, scores),
    }  # fmt: skip
    title = f"{first.cell.title} {first.cell.retention_configured:g}" if len(views) == 1 else f"{len(views)} methods"
    run = {
        "points": False, "budget": False, "name": title,
        "summary": summary or _counts(first), "rows": [], "notes": list(notes), "num_samples": 1,
        "samples": [sample],
        "cells": [cell_data(Cell(DENSE)), *(cell_data(view.cell) for view in views)],
        "frames": [encode_frames(first.frames_THWC)],
    }  # fmt: skip
    return render_page(title, [run])


def _headlines(view: View) -> list[str]:
    return [
        f"{view.cell.title} {view.cell.retention_configured:g}: {_counts(view)}",
        f"Question: {view.asked.question}",
        f"Answer: {view.said}",
        f"Dense answer: {view.said_dense}",
    ]


def _counts(view: View) -> str:
    inside = view.cell.kind == "inside the LLM"
    behind = f" behind the last cut, {view.retention:.1%} meaned over the layers of the LLM" if inside else ""
    return f"{len(view.index_K)} of {view.grid.num_groups} tokens kept{behind}"


def _caption(view: View, number: int) -> str:
    second = view.times_s[number * -(-len(view.times_s) // view.grid.t)]
    return f"{second:.1f} s: {view.mask_THW[number].sum()}/{view.grid.per_frame}"


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines = [*lines[:-1], longer] if font.getlength(longer) <= width else [*lines, word]
    return lines


def write_view(view: View, out: Path) -> Path:
    """Write the file whose kind its name says; whole or not at all."""
    if out.suffix == ".html":
        return write_whole(out, draw_page([view]))
    with staged(out) as part:
        if out.suffix == ".png":
            draw_sheet(view).save(part, "PNG")
        else:
            draw_film(view, part)
    return out
