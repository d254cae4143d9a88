"""`stts compare --video CLIP --question "..."`: every method on one clip, as a table and as one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from stts.budget import check_ratio
from stts.data.video.sample import check_file
from stts.eval.answering.method import cell_of, every_pruner
from stts.eval.results.table import aligned
from stts.files import write_whole
from stts.models.checkpoints.chat import Asked, Chat, Piece
from stts.models.checkpoints.load import as_recorded, load_vlm
from stts.models.families.base import host_info
from stts.models.pruning.context import Pruning
from stts.pruners.base import Positions
from stts.pruners.registry import make_pruner
from stts.report.visualize import View, draw_page

_LONGEST_ANSWER = 32


def compare_clip(
    *,
    video: Path,
    question: str,
    model: str,
    pruners: tuple[str, ...] = ("all",),
    retention_ratios: tuple[float, ...] = (0.25,),
    num_frames: int | None = None,
    sampler: str | None = None,
    positions: Positions | None = None,
    clip: tuple[float, float] | None = None,
    folder_fps: float = 1.0,
    max_new_tokens: int = 32,
    out: Path | None = None,
) -> str:
    """Ask one question about one video under every method, with what each kept on one page.

    Args:
        video: video file, or a folder with its frames as pictures.
        question: what to ask about it.
        model: model folder or hub id.
        pruners: names (see `stts pruners`), module:Class or file.py:Class; all: every one that this model can run.
        retention_ratios: fractions of visual tokens kept, each in (0, 1].
        num_frames: frames, at most; null: as the model was trained, else 16.
        sampler: how frames are chosen; null: as trained, else uniform_inclusive.
        positions: of kept tokens in the LLM, original or compact; null: as trained, else as each method declares.
        clip: seconds of the video to look at, start and end.
        folder_fps: pictures of a folder per second.
        max_new_tokens: longest answer.
        out: the page; null: .html named as the video.
    """
    out = out or Path(f"{video.stem}.html")
    if out.suffix != ".html":
        raise ValueError(f"--out {out} ends in {out.suffix or 'nothing'!r}; expected a page, .html")
    for ratio in retention_ratios:
        check_ratio(ratio)
    if not video.is_dir():
        check_file(str(video))
    names = every_pruner(model) if tuple(pruners) == ("all",) else tuple(name for name in pruners if name != "none")
    if not names or not retention_ratios:
        raise ValueError("--pruners and --retention_ratios must each name at least one that drops tokens")
    piece = Piece("video", video, clip, folder_fps)
    recorded = as_recorded(model, num_frames=num_frames, sampler=sampler, max_fps=None, exact=None, positions=positions)
    vlm, processor = load_vlm(model)
    vlm.to("cuda" if torch.cuda.is_available() else "cpu")
    prunings, reasons = make_prunings(vlm, model, names, retention_ratios, recorded)
    views = ask_all(prunings, processor, recorded, piece, question, max_new_tokens=max_new_tokens)
    summary = f"{video.name}: {question} ({len(views[0].times_s)} frames)"
    write_whole(out, draw_page(views, summary, reasons))
    return "\n".join([summary, "", *_table(views), "", *reasons, f"wrote {out}"])


def ask_all(
    prunings: Sequence[Pruning],
    processor: ProcessorMixin,
    recorded: Mapping[str, Any],
    piece: Piece,
    question: str,
    *,
    max_new_tokens: int = _LONGEST_ANSWER,
    like: Asked | None = None,
) -> list[View]:
    """The question under every one of `prunings`, which are on one model; decoded and answered densely once, or not at
    all with `like`, an earlier answer to the same question on the same clip."""
    views: list[View] = []
    for pruning in prunings:
        with pruning:
            chat = Chat(
                pruning, processor, num_frames=recorded["num_frames"] or 16,
                sampler=recorded["sampler"] or "uniform_inclusive", max_fps=recorded["max_fps"],
            )  # fmt: skip
            asked = chat.side_by_side(piece, question, max_new_tokens=max_new_tokens, like=like)
        views.append(View(asked, cell_of(pruning)))
        like = like or asked
    return views


def make_prunings(
    vlm: PreTrainedModel, model: str, names: Sequence[str], ratios: Sequence[float], recorded: Mapping[str, Any]
) -> tuple[list[Pruning], list[str]]:
    """Every method at every ratio, and why some cannot be run. ValueError: a name is unknown, or none can be run."""
    prunings, reasons = [], []
    for name in names:
        make_pruner(name, host_info(vlm))
    for ratio in ratios:
        for name in names:
            try:
                pruning = Pruning(
                    vlm, name, retention_ratio=ratio, exact=recorded["exact"] is not False, weights=model,
                    positions=recorded["positions"],
                )  # fmt: skip
            except ValueError as error:  # a ratio no video reaches, a site this model lacks, no weights
                reasons.append(f"{name} {ratio:g} was not run: {error}")
            else:
                prunings.append(pruning)
    if not prunings:
        raise ValueError(f"no method can be run: {reasons[0]}")
    return prunings, reasons


def _table(views: Sequence[View]) -> list[str]:
    """A line per method, dense first."""
    first = views[0].asked
    rows = [["dense", "", str(first.num_tokens[0]), *times_of(first, dense=True), _short(first.dense.text)]]
    rows += [
        [
            view.cell.title, f"{view.cell.retention_configured:g}", str(view.asked.num_tokens[1]),
            *times_of(view.asked, dense=False), _short(view.asked.pruned.text),
        ]
        for view in views
    ]  # fmt: skip
    return aligned(["method", "kept", "tokens", "first ms", "all ms", "answer"], rows)


def times_of(asked: Asked, *, dense: bool) -> tuple[str, str]:
    times = asked.dense_times if dense else asked.pruned_times
    return f"{times.ttft_ms:.1f}", f"{asked.ms[0 if dense else 1]:.1f}"


def _short(answer: str) -> str:
    line = " ".join(answer.split())
    return line if len(line) <= _LONGEST_ANSWER else f"{line[: _LONGEST_ANSWER - 3]}..."
