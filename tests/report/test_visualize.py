"""`stts visualize`: one file, showing what the pruner really kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stts.cli import main as stts
from stts.data.video.sample import sample_frames
from stts.models.checkpoints.load import load_vlm, save_pruned
from stts.models.pruning.context import Pruning
from stts.report.visualize import View, darken, draw_sheet, look
from tests.report.test_page import data_in, mask_of


@pytest.fixture(scope="module")
def clip(clips: Path) -> Path:
    return clips / "test" / "test-000000.mp4"


@pytest.fixture(scope="module")
def view(tiny_folder: Path, clip: Path) -> View:
    return look(
        clip, question="which colour flashed ?", model=tiny_folder, pruner="uniform", retention_ratio=0.5,
        num_frames=5, max_new_tokens=2,
    )  # fmt: skip


def test_it_shows_what_the_pruner_keeps(view: View, clip: Path) -> None:
    assert (view.grid.t, view.grid.per_frame) == (5, 16) and view.mask_THW.sum() == 40
    assert np.array_equal(view.frames_THWC, sample_frames(clip, num_frames=5).frames)
    assert view.mask_THW.reshape(-1).nonzero()[0].tolist() == view.index_K.tolist()


def test_a_folder_of_frames_is_a_video(tiny_folder: Path, view: View, tmp_path: Path) -> None:
    for number, frame in enumerate(view.frames_THWC):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    asked = {"question": "which colour flashed ?", "model": tiny_folder, "pruner": "uniform", "max_new_tokens": 2}
    shown = look(tmp_path, num_frames=5, folder_fps=2.0, **asked)
    assert np.array_equal(shown.frames_THWC, view.frames_THWC) and np.array_equal(shown.mask_THW, view.mask_THW)
    assert shown.times_s == [0.0, 0.5, 1.0, 1.5, 2.0] and shown.said == view.said
    with pytest.raises(ValueError, match="--folder_fps 0 must be a positive number"):
        look(tmp_path, folder_fps=0, **asked)


def test_a_folder_of_ours_brings_its_pruner_and_ratio_and_a_clip_bounds_the_frames(
    tiny_folder: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = load_vlm(tiny_folder)
    save_pruned(tmp_path / "own", model, processor, Pruning(model, "novelty", retention_ratio=0.25))
    monkeypatch.chdir(tmp_path)
    words = [
        "visualize",
        str(clip),
        "--question",
        "a ?",
        "--model",
        "own",
        "--num_frames",
        "4",
        "--max_new_tokens",
        "1",
    ]
    assert stts([*words, "--clip", "0.5", "1.5"]) == 0
    assert "wrote test-000000.png: 16 of 64 tokens kept" in capsys.readouterr().out
    view = look(clip, question="a ?", model="own", num_frames=4, clip=(0.5, 1.5), max_new_tokens=1)
    assert view.cell.method == "novelty" and view.retention == 0.25
    assert min(view.times_s) >= 0.5 and max(view.times_s) <= 1.5


def test_dropped_cells_are_dark_at_any_frame_size() -> None:
    # 5 pixels in 2 cells: pixel p lies in cell p * 2 // 5, so the first three are of cell 0.
    frame = np.full((2, 5, 3), 200, np.uint8)
    shown = darken(frame, np.array([[False, True]]))
    assert shown[..., 0].tolist() == [[44, 44, 44, 200, 200]] * 2
    assert (frame == 200).all(), "the frame itself is left alone"


def test_the_sheet_shows_every_frame_with_its_own_cells(view: View) -> None:
    sheet = np.asarray(draw_sheet(view), np.float64)
    assert sheet.ndim == 3 and sheet.shape[1] >= 640
    report = replace(view.asked.report, index=[torch.arange(view.grid.num_groups)])
    everything = replace(view, asked=replace(view.asked, report=report))
    assert sheet.mean() < np.asarray(draw_sheet(everything), np.float64).mean(), "half of the cells are darker"


@pytest.mark.parametrize("ending", ["png", "mp4", "html"])
def test_one_file_of_the_kind_its_name_says(
    ending: str, tiny_folder: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / f"x.{ending}"
    words = ["visualize", str(clip), "--question", "which colour flashed ?", "--model", str(tiny_folder)]
    words += ["--pruner", "novelty", "--retention_ratio", "0.25", "--num_frames", "4", "--max_new_tokens", "1"]
    assert stts([*words, "--out", str(out)]) == 0
    assert "16 of 64 tokens kept" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    if ending == "png":
        assert Image.open(out).format == "PNG"
    elif ending == "mp4":
        with av.open(str(out)) as container:
            assert len(list(container.decode(video=0))) == 4
    else:
        [run] = data_in(out.read_text())["runs"]
        assert mask_of(run["samples"][0], "novelty@0.25").sum() == 16 and len(run["frames"][0]) == 4
        assert run["rows"] == [] and set(run["samples"][0]["outcomes"]) == {"dense", "novelty@0.25"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--out": "x.gif"}, "expected one of .png, .mp4, .html"),
        ({"--pruner": "none"}, "keeps everything"),
        ({"--pruner": "fastv", "--retention_ratio": "0.1"}, "cannot be reached"),
        ({"--num_frames": "0"}, "must be at least 1"),
        ({"--retention_ratio": "1.5", "--model": "/nowhere"}, "retention_ratio=1.5 must be in (0, 1]"),
        ({"--pruner": "nosuch"}, "nosuch"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_line(
    change: dict[str, str], said: str, tiny_folder: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--question": "a ?", "--model": str(tiny_folder), "--pruner": "random", "--out": str(tmp_path / "x.png")}
    words = [word for pair in (given | change).items() if pair[1] for word in pair]
    assert stts(["visualize", str(clip), *words]) == 2
    assert said in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_clip_that_is_not_there_is_named_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["ask", "none.mp4", "a ?"], ["compare", "--video", "none.mp4", "--question", "a ?"]):
        assert stts([*words, "--model", "/nowhere"]) == 2
        assert "error: none.mp4: No such file or directory" in capsys.readouterr().err


def test_ask_prints_both_answers_and_saves_the_picture_where_told(
    tiny_folder: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ask", str(clip), "which colour flashed ?", "--model", str(tiny_folder), "--num_frames", "4"]
    words += ["--max_new_tokens", "1"]
    assert stts([*words, "--save", str(tmp_path / "kept.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["dense", "tango"], "tango where a stock folder names none"
    assert lines[-1] == f"wrote {tmp_path}/kept.png: 32 of 64 tokens kept"
    assert Image.open(tmp_path / "kept.png").format == "PNG"
    options = ["--pruner", "fastvid", "--pruner_options", "{variant: lv}", "--retention_ratio", "0.25"]
    assert stts([*words, *options]) == 0 and "fastvid 0.25" in capsys.readouterr().out
    assert stts([*words, "--save", "x.gif"]) == 2
    assert "--save x.gif ends in '.gif'; expected one of" in capsys.readouterr().err
    assert stts([*words, "--pruner_options", "{nosuch: 1}"]) == 2
    assert "does not take the options ['nosuch']" in capsys.readouterr().err
