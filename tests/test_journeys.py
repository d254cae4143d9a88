"""The first hour of three newcomers, typed as they would type it, on the small VLM that is shipped: an engineer with a
clip, a researcher with own rows, and somebody with a method of their own."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stts.cli import main
from stts.data.shapes.clips import ShapesConfig
from stts.data.shapes.files import write_shapes

VLM = Path(__file__).parents[1] / "stts" / "assets" / "shapes_vlm"
QUESTION = "which colour appeared first ?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a newcomer has: clips and rows."""
    root = tmp_path_factory.mktemp("first_hour")
    form = ShapesConfig(num_sampled=8, ask_by="colour")
    write_shapes(root / "clips", sizes={"train": 6, "test": 1}, config=form, progress=False)
    return root


@pytest.fixture
def typed(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(line: str) -> str:
        """Standard output of `stts LINE`, which must succeed."""
        capsys.readouterr()
        code = main(shlex.split(line.replace("MODEL", str(VLM)).replace("CLIP", "clips/test/test-000000.mp4")))
        shown = capsys.readouterr()
        assert code == 0, shown.err
        return shown.out

    return run


def test_an_engineer_asks_a_clip_and_looks_at_every_method(typed: Callable[[str], str], folder: Path) -> None:
    frames = "--num_frames 8 --max_new_tokens 1"
    said = typed(f"ask CLIP '{QUESTION}' --model MODEL {frames} --pruner tango --retention_ratio 0.25 --save kept.png")
    assert "tango 0.25" in said and "saved" in said and (folder / "kept.png").is_file()
    said = typed(f"compare --model MODEL --video CLIP --question '{QUESTION}' {frames} --pruners 'tango,visionzip,evs'")
    assert said.endswith("wrote test-000000.html\n") and (folder / "test-000000.html").is_file()
    assert max(map(len, said.splitlines())) <= 100


def test_somebody_starts_a_method_checks_it_and_compares_it(typed: Callable[[str], str], folder: Path) -> None:
    typed("pruners --new mine.py")
    assert "FAILED" not in typed("pruners --check mine.py:Mine --options '{frame_share: 1.0}'")
    said = typed(f"ask CLIP '{QUESTION}' --model MODEL --num_frames 8 --max_new_tokens 1 --pruner mine:Mine")
    assert "mine:Mine 0.5" in said
    said = typed(
        "compare --model MODEL --data clips/test.jsonl --out runs/mine --num_frames 8 --max_new_tokens 1 "
        "--pruners mine.py:Mine,novelty --retention_ratios 0.5 --limit 2"
    )
    assert "mine.py:Mine" in said and (folder / "runs/mine/comparison.json").is_file()


@pytest.mark.slow
def test_a_researcher_trains_on_own_rows_without_a_config(typed: Callable[[str], str], folder: Path) -> None:
    said = typed(
        "fit --model_name_or_path MODEL --data.train clips/train.jsonl --output_dir runs/own --max_steps 2 "
        "--data.num_frames 8 --data.num_workers 0"
    )
    assert "recipe   shapes_stts.yaml" in said and "rows     18 of clips/train.jsonl parsed" in said
    summary = said.partition("training llm")[2].partition("step 1/")[0].splitlines()
    assert len(summary) == 3 and max(map(len, summary)) <= 100, summary
    assert "step 2/2  answer_loss" in said and said.endswith("wrote runs/own/model\n")
    assert json.loads((folder / "runs/own/model/stts.json").read_text())["pruner"] == "stts"
    said = typed(f"ask CLIP '{QUESTION}' --model runs/own/model --max_new_tokens 1")
    assert said.splitlines()[1].startswith("stts 0.5"), "its own pruner and ratio"
    said = typed("eval --model runs/own/model --data clips/test.jsonl --out runs/eval --limit 1")
    assert "stts at 0.5" in said
