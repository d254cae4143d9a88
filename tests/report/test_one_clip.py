"""`stts compare --video`: every method on one clip, without a data file."""

from __future__ import annotations

from pathlib import Path

import pytest

from stts.cli import main
from stts.pruners.registry import PRUNERS
from stts.report.visualize import look
from tests.report.test_page import data_in, mask_of


def words(clips: Path, folder: Path, *more: str) -> list[str]:
    video = str(clips / "test" / "test-000000.mp4")
    asked = ["--video", video, "--question", "which colour flashed ?", "--model", str(folder), "--num_frames", "4"]
    return ["compare", *asked, "--max_new_tokens", "1", *more]


def test_every_method_stands_in_the_table_and_on_the_page(
    tiny_folder: Path, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(clips, tiny_folder, "--out", str(tmp_path / "x.html"), "--retention_ratios", "0.5")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[:-1])) <= 100 and lines[-1] == f"wrote {tmp_path}/x.html"
    learned = {"none", "stts", "visionselector", "cacovid"}
    rows = [line.split()[0] for line in lines[lines.index("") + 2 : lines.index("", 2)]]
    assert rows == ["dense", *(name for name in PRUNERS if name not in learned)]
    [run] = data_in((tmp_path / "x.html").read_text())["runs"]
    [sample] = run["samples"]
    assert len(run["cells"]) == len(rows) == len(sample["outcomes"]) and len(run["frames"][0]) == 4
    view = look(
        clips / "test" / "test-000000.mp4", question="which colour flashed ?", model=tiny_folder, pruner="tango",
        retention_ratio=0.5, num_frames=4, max_new_tokens=1,
    )  # fmt: skip
    assert (mask_of(sample, "tango@0.5").reshape(-1) == view.mask_THW.reshape(-1)).all()
    assert (
        sample["outcomes"]["tango@0.5"]["said"] == view.said and sample["outcomes"]["dense"]["said"] == view.said_dense
    )


def test_what_a_method_cannot_reach_is_said_and_the_others_run(
    tiny_folder: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words(clips, tiny_folder, "--pruners", "uniform,fastv", "--retention_ratios", "0.5,0.1")) == 0
    said = capsys.readouterr().out
    assert "fastv 0.1 was not run: " in said and "cannot be reached" in said
    assert [path.name for path in tmp_path.iterdir()] == ["test-000000.html"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--pruners", "nosuch"], "unknown pruner 'nosuch'"),
        (["--pruners", "none"], "must each name at least one that drops tokens"),
        (["--pruners", "stts"], "no method can be run: stts 0.25 was not run: "),
        (["--retention_ratios", "0"], "retention_ratio=0"),
        (["--out", "x.png"], "--out x.png ends in '.png'; expected a page, .html"),
    ],
)
def test_what_cannot_be_shown_is_refused_in_a_line(
    more: list[str], said: str, tiny_folder: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(clips, tiny_folder, *more)) == 2
    assert said in capsys.readouterr().err
