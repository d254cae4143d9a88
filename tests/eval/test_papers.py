"""Published settings: every file is read, names what exists, and one runs as the README says, on small benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stts.cli import main
from stts.command_line import parse
from stts.eval.answering.questions import open_tasks
from stts.eval.benchmarks.tasks import SUITES, TASKS
from stts.eval.compare import compare
from stts.pruners.registry import PRUNERS
from tests.data.video.clips import numbered_images, write_video
from tests.eval.benchmarks import test_longvideobench, test_mlvu, test_videomme
from tests.eval.benchmarks.folders import touch, write_json, write_parquet

FOLDER = Path(__file__).parents[2] / "configs" / "papers"
PAPERS = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", PAPERS)
def test_a_file_needs_model_data_and_out_only(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    given = ["--model", str(tiny_folder), "--data_root", str(tmp_path), "--out", str(tmp_path / "out")]
    [config], _ = parse(compare, "stts compare", ["--config", str(FOLDER / f"{name}.yaml"), *given])
    tasks = [task for entry in config.tasks for task in SUITES.get(entry, (entry,))]
    assert set(tasks) <= set(TASKS) and set(config.pruners) <= set(PRUNERS)
    for task in tasks:
        assert config.scoring in ("strict", *TASKS[task].compat), "a reading of answers that each task knows"


def write_benchmarks(root: Path) -> None:
    """Video-MME, MLVU and LongVideoBench in their own layouts, with videos that can be read."""
    write_parquet(root / "Video-MME", test_videomme.TABLE, test_videomme.ROWS)
    touch(root / "Video-MME", "data/aaa.mp4", "data/bbb.mp4", "data/ccc.mp4")
    test_mlvu.write_folders(root / "MLVU")
    write_json(root / "LongVideoBench", "lvb_val.json", test_longvideobench.ROWS)
    touch(root / "LongVideoBench", "videos/abc.mp4", "videos/def.mp4")
    for path in root.rglob("*.mp4"):
        write_video(path, numbered_images(12, 56, 56))


def test_adatp_as_published_on_small_benchmarks(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_benchmarks(tmp_path / "benchmarks")
    assert len(open_tasks(["mlvu_dev"], tmp_path / "benchmarks")[0].questions) == 9
    args = [
        "--config",
        str(FOLDER / "adatp_llava_ov.yaml"),
        "--model",
        str(tiny_folder),
        "--out",
        str(tmp_path / "out"),
    ]
    args += ["--data_root", str(tmp_path / "benchmarks"), "--limit=2", "--num_frames=4", "--retention_ratios=0.8"]
    code = main(["compare", *args, "--max_new_tokens=2", "--wide"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "adatp (our reconstruction)" in shown.out and "mlvu_dev %" in shown.out and "retained" in shown.out
    made = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert {record["task"] for record in made["records"]} == {"videomme", "mlvu_dev", "longvideobench_val_v"}
