"""Pruners outside the registry: `file.py:Class`, modules of the current folder, and the file that `--new` writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stts.cli import main
from stts.data.shapes.files import write_shapes
from stts.eval.compare import CompareConfig, run_compare
from stts.pruners.base import keep_top
from stts.pruners.check import HOST, example_video
from stts.pruners.novelty import Novelty
from stts.pruners.own import TEMPLATE, load_own, source_of
from stts.pruners.registry import make_pruner
from stts.tokens import Grid


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_the_file_that_new_writes_keeps_its_promises(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pruners", "--new", "keeps_edges.py"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("wrote keeps_edges.py; try it: stts pruners --check keeps_edges.py:KeepsEdges")
    assert main(["pruners", "--check", "keeps_edges.py:KeepsEdges", "--options", "{frame_share: 0.2}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 10 and all(line.startswith("ok ") for line in lines)
    assert main(["pruners", "keeps_edges.py:KeepsEdges"]) == 0
    assert "frame_share = 0.5" in capsys.readouterr().out
    assert Path("keeps_edges.py").read_text() == TEMPLATE.read_text().replace("MyPruner", "KeepsEdges")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--new", "a.txt"], "--new a.txt must be a Python file such as my_pruner.py"),
        (["--new", "my-pruner.py"], "must be a Python file"),
        (["--new", "there.py"], "--new there.py is there already"),
        (["--new", "x.py", "--check", "tango"], "takes one of NAME, --check NAME, --new FILE.py and --matrix"),
        (["--options", "{a: 1}"], "need a pruner"),
        (["--check", "tango", "--options", "{nosuch: 1}"], "does not take the options ['nosuch']"),
        (["--check", "nosuch.py:X"], "expected 'file.py:Class', or 'module:Class'"),
        (["--check", "there.py:Absent"], "has no attribute 'Absent'"),
        (["--check", "broken.py:X"], "could not be loaded"),
        (["--check", "nosuchmodule:X"], "No module named 'nosuchmodule'"),
        (["tangoo"], "unknown pruner 'tangoo'; did you mean 'tango'?"),
    ],
)
def test_what_cannot_be_is_one_line(
    words: list[str], said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("there.py").write_text("")
    Path("broken.py").write_text("def (")
    assert main(["pruners", *words]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_class_of_a_file_is_one_class_until_the_file_changes(here: Path) -> None:
    file = here / "sub" / "mine.py"
    file.parent.mkdir()
    file.write_text(TEMPLATE.read_text())
    first = load_own(f"{file}:MyPruner")
    assert load_own("sub/mine.py:MyPruner") is first
    assert make_pruner("sub/mine.py:MyPruner", HOST, frame_share=0.25) == first(frame_share=0.25)
    file.write_text(TEMPLATE.read_text().replace("0.5", "0.75", 1))
    assert load_own("sub/mine.py:MyPruner")().frame_share == 0.75


def test_a_console_script_finds_modules_of_the_current_folder(here: Path) -> None:
    (here / "mine_here.py").write_text(TEMPLATE.read_text())
    code = "import sys; sys.path = [p for p in sys.path if p]; from stts.cli import main; sys.exit(main(sys.argv[1:]))"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(1, {root!r}); {code}", "pruners", "mine_here:MyPruner"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith("MyPruner: "), done.stderr


def test_changed_code_is_another_run(here: Path, tiny_folder: Path) -> None:
    """Else the answers of the old code would be read as those of the new one."""
    write_shapes(here / "data", sizes={"test": 1}, progress=False)
    file = here / "mine.py"
    file.write_text(TEMPLATE.read_text())
    assert source_of("mine.py:MyPruner") == Path("mine.py") and source_of("tango") is None
    config = CompareConfig(
        model=tiny_folder, data=here / "data/test.jsonl", out=here / "out", num_frames=2, max_new_tokens=1,
        pruners=(f"{file}:MyPruner",), retention_ratios=(0.5,), save_kept=1, limit=1,
    )  # fmt: skip
    result = run_compare(config, progress=False)
    assert result is not None and result.cells[1].reason is None and (here / "out/kept").is_dir()
    file.write_text(TEMPLATE.read_text().replace("-similarity_N, budget", "similarity_N, budget"))
    with pytest.raises(ValueError, match=r"another comparison \(different: files\)"):
        run_compare(config, progress=False)


def test_keep_top_takes_half_precision_and_reports_fp32() -> None:
    video = example_video(Novelty(), Grid(1, 2, 2), dtype=torch.bfloat16)
    kept = keep_top(video, torch.tensor([0.5, 2.0, 2.0, -1.0], dtype=torch.bfloat16), 2)
    assert kept.index_K.tolist() == [1, 2]
    assert kept.scores_G is not None and kept.scores_G.dtype == torch.float32
    assert kept.scores_G.tolist() == [0.5, 2.0, 2.0, -1.0]
