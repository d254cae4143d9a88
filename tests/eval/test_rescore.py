"""A finished run is graded again without its model, and goes on with a larger limit in the same folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stts.cli import main
from stts.eval import evaluate
from stts.eval.compare import CompareConfig, run_compare
from stts.eval.evaluate import RescoreConfig, run_eval, run_rescore
from stts.eval.run_config import EvalConfig
from tests.data.video.clips import numbered_images, write_video
from tests.eval.benchmarks import test_mvbench, test_videomme
from tests.eval.benchmarks.folders import touch, write_parquet
from tests.eval.test_eval import written


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Video-MME and MVBench on videos that can be read."""
    root = tmp_path / "benchmarks"
    write_parquet(root / "videomme", test_videomme.TABLE, test_videomme.ROWS)
    touch(root / "videomme", "data/aaa.mp4", "data/bbb.mp4", "data/ccc.mp4")
    test_mvbench.write_all(root / "mvbench", 1)
    for path in root.rglob("*.mp4"):
        write_video(path, numbered_images(6, 28, 28), fps=3)
    return root


@pytest.fixture
def settings(tiny_folder: Path, root: Path, tmp_path: Path) -> dict[str, Any]:
    shutil.copytree(tiny_folder, tmp_path / "model")
    return {
        "model": tmp_path / "model", "tasks": ("videomme", "mvbench_action_count"), "data_root": root,
        "pruner": "uniform", "retention_ratio": 0.5, "num_frames": 2, "max_new_tokens": 3,
    }  # fmt: skip


def scores(out: Path) -> dict[str, Any]:
    """What grading decides."""
    made = written(out)
    own = made["results"]["stts"]
    return {"results": made["results"]["results"], "samples": made["samples"], "tasks": own["tasks"],
            "scoring": own["scoring"], "efficiency": own["efficiency"]}  # fmt: skip


def test_graded_again_is_as_if_graded_so_at_once(settings: dict[str, Any], tmp_path: Path) -> None:
    first = run_eval(EvalConfig(**settings, out=tmp_path / "run"), progress=False)
    run_eval(EvalConfig(**settings, out=tmp_path / "straight", scoring="compat"), progress=False)
    shutil.rmtree(tmp_path / "model")
    shutil.move(settings["data_root"], tmp_path / "elsewhere")
    assert main([
        "eval", f"--rescore={tmp_path / 'run'}", "--scoring", "compat", "--data_root", str(tmp_path / "elsewhere")
    ]) == 0  # fmt: skip
    assert scores(tmp_path / "run-compat") == scores(tmp_path / "straight")
    assert scores(tmp_path / "run")["scoring"] == "strict", "the run itself stays as it was"
    again = RescoreConfig(rescore=tmp_path / "run-compat", out=tmp_path / "back", data_root=tmp_path / "elsewhere")
    back = run_rescore(again)
    assert first is not None and back["results"] == first["results"]
    assert run_rescore(again) == back, "finished: read, not made again"


def test_what_cannot_be_graded_again(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--rescore", str(tmp_path)]) == 2
    assert "holds no finished `stts eval`" in capsys.readouterr().err
    run_eval(EvalConfig(**settings, out=tmp_path / "run"), progress=False)
    with pytest.raises(ValueError, match="--scoring 'mine' is unknown for videomme"):
        run_rescore(RescoreConfig(rescore=tmp_path / "run", scoring="mine"))
    answers = (tmp_path / "run/answers.jsonl").read_bytes()
    (tmp_path / "run/answers.jsonl").unlink()
    with pytest.raises(ValueError, match=r"holds no answers\.jsonl"):
        run_rescore(RescoreConfig(rescore=tmp_path / "run"))
    (tmp_path / "run/answers.jsonl").write_bytes(answers)
    write_parquet(settings["data_root"] / "videomme", test_videomme.TABLE, test_videomme.ROWS[:2])
    with pytest.raises(ValueError, match="files of its questions have changed since"):
        run_rescore(RescoreConfig(rescore=tmp_path / "run"))


def test_a_larger_limit_goes_on_in_the_same_folder(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"tasks": ("videomme", "mvbench"), "save_kept": "all"}
    run_eval(EvalConfig(**settings, out=tmp_path / "straight"), progress=False)
    out = tmp_path / "out"
    run_eval(EvalConfig(**settings, out=out, limit=1), progress=False)
    before = (out / "answers.jsonl").read_text().splitlines()[1:]
    grown = EvalConfig(**settings, out=out, limit=3)
    with monkeypatch.context() as patch:  # killed when all is answered and nothing is written
        patch.setattr(evaluate, "result_files", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_eval(grown, progress=False)
    run_eval(grown, progress=False)
    with pytest.raises(ValueError, match=r"another evaluation \(different: limit\)"):
        run_eval(EvalConfig(**settings, out=out, limit=2), progress=False)
    run_eval(EvalConfig(**settings, out=out), progress=False)
    after = (out / "answers.jsonl").read_text().splitlines()[1:]
    assert set(before) < set(after) and len(after) == len(set(after)), "what was answered is not asked again"
    assert written(out) == written(tmp_path / "straight")
    kept = sorted(file.name for file in (out / "kept").iterdir())
    assert kept == sorted(file.name for file in (tmp_path / "straight/kept").iterdir()) and len(kept) > 20


def test_a_comparison_grows_too(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {name: value for name, value in settings.items() if name not in ("pruner", "retention_ratio")}
    settings |= {"pruners": ("uniform",), "retention_ratios": (0.5,), "batch_size": 1}
    run_compare(CompareConfig(**settings, out=tmp_path / "out", limit=1), progress=False)
    grown = run_compare(CompareConfig(**settings, out=tmp_path / "out"), progress=False)
    straight = run_compare(CompareConfig(**settings, out=tmp_path / "straight"), progress=False)
    assert grown is not None and straight is not None and grown.records == straight.records
    assert json.loads((tmp_path / "out/comparison.json").read_text())["config"]["limit"] is None
