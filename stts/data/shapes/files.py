"""ShapesQA as real files: H.264 clips (or pictures) and one JSONL of questions per split, as evaluation reads them."""

from __future__ import annotations

import json
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stts.data.shapes.clips import SPLITS, Clip, Question, ShapesConfig, make_clip, sampled_indices
from stts.data.shapes.world import LETTERS
from stts.files import staged, write_whole
from stts.progress import progress_bar

Files = Literal["mp4", "png"]
MANIFEST = "shapes.json"
_VERSION = 1  # raise when the same settings would give other clips or questions
_CHUNK_FRAMES = 64  # rendered at a time: a 5-minute clip never lies in memory whole
# 4:4:4 because the colour is the answer: halved chroma more than doubles the error of a decoded frame (mean 5.5
# against 2.4 of 255). No B-frames and a keyframe every two seconds keep seeking cheap.
_PIXEL_FORMAT = "yuv444p"
# Without look-ahead: at this frame size about one encode in a hundred had other bytes in another process; none
# of 120 did with these settings (nor without x264's assembly, which is slower).
_X264 = {"crf": "14", "preset": "veryfast", "bf": "0", "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0"}


def shapes(
    out: Path,
    train: int = 2000,
    val: int = 100,
    test: int = 500,
    long: int = 0,
    seed: int = 0,
    num_sampled: int = 16,
    form: ShapesConfig = ShapesConfig(),  # noqa: B008  (frozen)
    files: Files = "mp4",
    processes: int = 1,
) -> Path:
    """Write ShapesQA, a synthetic video question-answering data set, as MP4 files with JSONL questions.

    Args:
        out: folder to write; an interrupted run goes on where it stopped.
        train: clips of 2 to 8 s for training; every clip has three questions, unless `form` says otherwise.
        val: clips for validation.
        test: clips for evaluation.
        long: clips of 30 s to 5 min for test-time scaling.
        seed: of clips and questions.
        num_sampled: frames a uniform sampler must take to see all evidence; fewer miss some of it.
        form: everything else about the clips, as in `--form.families '[order,flash]' --form.grid 4`; its `num_sampled`
            is not read.
        files: mp4, or png for folders with the sampled frames alone, which need no video decoder to write or read.
        processes: that write clips at the same time; the files are the same for any number.
    """
    sizes = {name: size for name, size in zip(SPLITS, (train, val, test, long), strict=True) if size}
    return write_shapes(out, sizes=sizes, seed=seed, config=form.sampled(num_sampled), files=files, processes=processes)


def write_shapes(
    out: Path,
    *,
    sizes: Mapping[str, int],
    seed: int = 0,
    config: ShapesConfig | None = None,
    progress: bool = True,
    files: Files = "mp4",
    processes: int = 1,
) -> Path:
    """Writes `sizes[split]` clips of each split and returns `out`.

        out/shapes.json             the settings; another run must bring the same
        out/<split>/<uid>.mp4       H.264, `config.fps`, one file per clip; files="png": a folder <uid> of pictures,
                                    the `config.num_sampled` frames that a uniform sampler takes
        out/<split>.jsonl           one row per question: id, video, conversations, family, options, duration (seconds)
        out/<split>_cells.jsonl     one row per clip: video, and a string per sampled frame with a letter per cell, row
                                    by row, for what it shows (`stts.data.shapes.world.LETTERS`)
        out/<split>_conversations.jsonl   one row per clip, its questions as turns: one decoded clip teaches several

    Files appear whole or not at all, a JSONL only once all of its clips exist; clips that exist are kept, so a killed
    run goes on where it stopped and a larger size adds clips. Raises ValueError for sizes that make no sense and for
    a folder written with other settings."""
    out, config = Path(out), ShapesConfig() if config is None else config
    if not sizes or any(split not in SPLITS or size < 1 for split, size in sizes.items()):
        raise ValueError(f"sizes={dict(sizes)} must give at least 1 clip for one or more of the splits {SPLITS}")
    if files not in get_args(Files):
        raise ValueError(f"files={files!r} must be one of {get_args(Files)}")
    if processes < 1:
        raise ValueError(f"processes={processes} must be at least 1")
    make_clip(seed, SPLITS[0], 0, config)  # a wrong seed must not leave a folder behind
    form = {"pixels": _PIXEL_FORMAT, "x264": _X264} if files == "mp4" else {"pixels": "png"}
    _claim(out, {"version": _VERSION, "seed": seed, "config": asdict(config), **form})
    # in this order: processes are forked before the bar starts a thread
    with _writers(processes) as each, progress_bar(sum(sizes.values()), "ShapesQA", "clips", shown=progress) as bar:
        for split, size in sizes.items():
            (out / split).mkdir(exist_ok=True)
            single_rows, conversation_rows, cell_rows = [], [], []
            for singles, conversation, cells in each(
                [(out, seed, split, index, config, files) for index in range(size)]
            ):
                single_rows += singles
                conversation_rows.append(conversation)
                cell_rows.append(cells)
                bar.update()
            kinds = (("_cells", cell_rows), ("", single_rows), ("_conversations", conversation_rows))
            for suffix_of_file, rows in kinds:
                write_whole(out / f"{split}{suffix_of_file}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return out


_Job = tuple[Path, int, str, int, ShapesConfig, Files]
_Row = dict[str, Any]
_Rows = tuple[list[_Row], _Row, _Row]
"""Of one clip: a row per question, one with all of them as turns, and what its cells show."""


@contextmanager
def _writers(processes: int) -> Iterator[Callable[[Sequence[_Job]], Iterator[_Rows]]]:
    """What writes clips, in order: this process, or several."""
    if processes == 1:
        yield lambda jobs: map(_write_clip, jobs)
        return
    with multiprocessing.Pool(processes, _leave_ctrl_c) as pool:
        yield lambda jobs: pool.imap(_write_clip, jobs, chunksize=4)


def _leave_ctrl_c() -> None:
    """Ctrl-C reaches every process; the first one ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _write_clip(job: _Job) -> _Rows:
    """The file of one clip, unless it is there, and its rows."""
    out, seed, split, index, config, files = job
    clip = make_clip(seed, split, index, config)
    write, suffix = (_encode_one, ".mp4") if files == "mp4" else (_save_pictures, "")
    name = f"{split}/{clip.uid}{suffix}"
    if not (out / name).exists():
        with staged(out / name) as part:
            write(clip, part)
    families = [one.family for one in clip.questions]
    single_rows = []
    for place, one in enumerate(clip.questions):
        turn = families[: place + 1].count(one.family)
        uid = f"{clip.uid}-{one.family}" + (f"-{turn}" if turn > 1 else "")
        single_rows.append(_row(clip, name, [one], uid))
    cells = ["".join(LETTERS[label] for label in frame) for frame in clip.labels.reshape(len(clip.labels), -1)]
    return single_rows, _row(clip, name, clip.conversation, clip.uid), {"video": name, "cells": cells}


def read_cells(questions: Path) -> dict[str, NDArray[np.uint8]]:
    """By `video` of a ShapesQA file of questions or conversations: (T, grid, grid), what every cell shows on every
    sampled frame, as `stts.data.shapes.world` numbers it. Empty where no file of cells lies beside.

    ValueError for a frame whose cells make no square."""
    path = questions.with_name(questions.stem.removesuffix("_conversations") + "_cells.jsonl")
    if not path.exists():
        return {}
    cells = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        label_TG = np.array([[LETTERS.index(letter) for letter in frame] for frame in row["cells"]], np.uint8)
        grid = math.isqrt(label_TG.shape[1])
        if grid**2 != label_TG.shape[1]:
            raise ValueError(
                f"{path}: {row['video']} has {label_TG.shape[1]} cells a frame, which is no square; write it anew"
            )
        cells[row["video"]] = label_TG.reshape(-1, grid, grid)
    return cells


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Writes the manifest, or checks that the one there says the same."""
    manifest = out / MANIFEST
    if manifest.exists():
        try:
            recorded = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{manifest} is not JSON ({error}); choose another folder or remove this one") from error
        asked_for = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        if isinstance(recorded, dict) and isinstance(recorded.get("config"), dict):  # a newer setting may be absent
            recorded["config"] = {**json.loads(json.dumps(asdict(ShapesConfig()))), **recorded["config"]}
        if recorded != asked_for:
            raise ValueError(f"{out} holds ShapesQA with settings {recorded}, not {asked_for}; choose another folder")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and was not written by write_shapes (no {MANIFEST}); choose an empty folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings, indent=2) + "\n"
        write_whole(manifest, text)


def _save_pictures(clip: Clip, path: Path) -> None:
    path.mkdir()
    for number, picture in enumerate(clip.render(sampled_indices(clip.num_frames, clip.config.num_sampled))):
        Image.fromarray(picture).save(path / f"{number:03d}.png")


def _encode_one(clip: Clip, path: Path) -> None:
    encode([clip], path)


def encode(clips: Sequence[Clip], path: Path) -> None:
    """Writes clips of one config to an MP4 file, one behind the other; a keyframe every two seconds."""
    import av  # not everywhere; pictures do without

    config = clips[0].config
    rate = Fraction(config.fps).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={**_X264, "g": str(max(1, round(2 * rate)))})
        stream.width = stream.height = config.frame_size
        stream.pix_fmt = _PIXEL_FORMAT
        stream.thread_count = 1  # the file must not depend on the number of cores
        for clip in clips:
            for first in range(0, clip.num_frames, _CHUNK_FRAMES):
                for picture in clip.render(np.arange(first, min(first + _CHUNK_FRAMES, clip.num_frames))):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _row(clip: Clip, video: str, questions: Sequence[Question], uid: str) -> dict[str, Any]:
    """One line of a JSONL file: the questions as turns of one conversation, described by the first."""
    turns = [
        turn
        for number, question in enumerate(questions)
        for turn in (
            {"from": "human", "value": ("" if number else "<video>\n") + question.text},
            {"from": "gpt", "value": question.answer},
        )
    ]
    return {
        "id": uid,
        "video": video,
        "conversations": turns,
        "family": questions[0].family,
        "options": list(questions[0].options),
        "duration": clip.num_frames / clip.config.fps,
        **({} if video.endswith(".mp4") else {"fps": clip.config.num_sampled * clip.config.fps / clip.num_frames}),
    }
