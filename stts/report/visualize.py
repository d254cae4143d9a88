"""`stts visualize`: one video, one question, one pruner, as one file.

.png   a sheet of all frames, dropped cells darkened, with the answers
.mp4   the same frame by frame, with the number of tokens kept
.html  the page of `stts report`, with scrubber and score heat map

Shape suffixes beside those of `stts.tokens`: H, W = pixels, C = 3 colour channels (RGB).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import PreTrainedModel

from stts.data.collate import Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts.data.video.files import read_video
from stts.eval.answering.method import Runner, make_runners
from stts.eval.results.table import DENSE, Cell
from stts.files import staged, write_whole
from stts.models.checkpoints.load import as_recorded, load_vlm, pruner_settings, recorded_pruner
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

    frames_THWC: NDArray[np.uint8]
    """The first frame of every temporal cell."""
    times_s: list[float]
    """Of all sampled frames."""
    grid: Grid
    index_K: Tensor
    scores_G: Tensor | None
    cell: Cell
    question: str
    said: str
    said_dense: str
    retention: float
    """Equivalent retention, measured."""

    @property
    def mask_THW(self) -> NDArray[np.bool_]:
        mask_G = np.zeros(self.grid.num_groups, bool)
        mask_G[self.index_K.numpy()] = True
        return mask_G.reshape(self.grid.t, self.grid.h, self.grid.w)


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
        pruner: name (see `stts pruners`) or module:Class; null: the model's own.
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
    if out.suffix not in _CHOICES:
        raise ValueError(f"--out {out} ends in {out.suffix or 'nothing'!r}; expected one of {', '.join(_CHOICES)}")
    if num_frames == 0 or min(num_frames or 1, max_new_tokens) < 1:
        raise ValueError("--num_frames and --max_new_tokens must be at least 1")
    view = look(
        video, question=question, model=model, pruner=pruner, retention_ratio=retention_ratio, num_frames=num_frames,
        sampler=sampler, positions=positions, clip=clip, folder_fps=folder_fps, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    write_view(view, out)
    return f"wrote {out}: {_counts(view)}; says {json.dumps(view.said)}, dense {json.dumps(view.said_dense)}"


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
) -> View:
    """Ask once densely and once pruned. Pruner, ratio, frames and positions that are None are those that a folder of
    ours records; else a ratio of 0.5, 16 frames by uniform_inclusive, and positions as the pruner declares.

    video: a file, or a folder with its frames as pictures, `folder_fps` of them a second. clip: seconds (start, end) to
    look at. ValueError: the video is broken, the pruner unknown or out of reach."""
    if not 0 < folder_fps < math.inf:
        raise ValueError(f"--folder_fps {folder_fps} must be a positive number of pictures a second")
    frames = as_recorded(model, num_frames=num_frames, sampler=sampler, max_fps=None)
    shown = read_video(
        Path(video), sampler=frames["sampler"] or "uniform_inclusive", num_frames=frames["num_frames"] or 16, clip=clip,
        max_fps=frames["max_fps"], timeout_s=None, folder_fps=folder_fps,
    )  # fmt: skip
    own = pruner_settings(model) or {}
    if pruner is None and not own:
        raise ValueError(f"--model {model} was not written by `stts fit` or `stts export`, so name a --pruner")
    pruner = pruner or recorded_pruner(model, own)
    vlm, processor = load_vlm(model)
    vlm.to("cuda" if torch.cuda.is_available() else "cpu")
    dense, runner = _runners(vlm, model, pruner, retention_ratio, positions)
    sample = Sample("video", (Message("user", f"<video>\n{question}"),), Path(video))
    example = Example(sample, shown.frames, shown.timestamps_s, duration_s=shown.source.duration_s)
    batch = Collator(processor, training=False)([example])
    assert batch is not None
    batch = batch.to(vlm.device)
    [plain], _ = dense.answer(batch, processor, max_new_tokens)
    [answer], measured = runner.answer(batch, processor, max_new_tokens)
    report = measured.report
    grid, scores = report.grids[0], report.scores[0]
    return View(
        frames_THWC=first_of_cells(shown.frames, grid.t),
        times_s=shown.timestamps_s.tolist(),
        grid=grid,
        index_K=report.index[0].cpu(),
        scores_G=None if scores is None else scores.float().cpu(),
        cell=runner.cell,
        question=question,
        said=answer.prediction.strip(),
        said_dense=plain.prediction.strip(),
        retention=answer.retention,
    )


def _runners(
    vlm: PreTrainedModel, path: str | Path, pruner: str, ratio: float | None, positions: Positions | None
) -> tuple[Runner, Runner]:
    """Dense, and the pruner. ValueError for one that drops nothing or cannot be run."""
    own = pruner_settings(path) or {}
    if ratio is None:
        ratio = own["retention_ratio"] if pruner == own.get("pruner") else 0.5
    dense, *others = make_runners(
        vlm, path, pruners=(pruner,), retention_ratios=(ratio,),
        exact=own.get("exact", True), positions=positions or own.get("positions"), options={}, siglip=None, seed=0,
    )  # fmt: skip
    if not others:
        raise ValueError(f"--pruner {pruner!r} keeps everything; name one that drops tokens (see `stts pruners`)")
    [runner] = others
    if runner.pruning is None:
        raise ValueError(str(runner.cell.reason))
    return dense, runner


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


def draw_page(view: View) -> str:
    key = view.cell.key
    scores = {} if view.scores_G is None else {key: view.scores_G}

    def outcome(said: str, retention: float) -> dict[str, object]:
        return {"said": said, "right": None, "retention": retention}

    sample = {
        "uid": "video", "task": "", "family": "", "question": view.question, "answer": "", "frames": 0, "missing": "",
        "outcomes": {DENSE: outcome(view.said_dense, 1.0), key: outcome(view.said, view.retention)},
        **kept_data(view.grid, view.times_s, {key: view.index_K}, scores),
    }  # fmt: skip
    title = f"{view.cell.title} {view.cell.retention_configured:g}"
    run = {
        "points": False, "budget": False, "name": title,
        "summary": _counts(view), "rows": [], "notes": [], "num_samples": 1,
        "samples": [sample],
        "cells": [cell_data(Cell(DENSE)), cell_data(view.cell)], "frames": [encode_frames(view.frames_THWC)],
    }  # fmt: skip
    return render_page(title, [run])


def _headlines(view: View) -> list[str]:
    return [
        f"{view.cell.title} {view.cell.retention_configured:g}: {_counts(view)}",
        f"Question: {view.question}",
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
        return write_whole(out, draw_page(view))
    with staged(out) as part:
        if out.suffix == ".png":
            draw_sheet(view).save(part, "PNG")
        else:
            draw_film(view, part)
    return out
