"""The study's script that splits what is kept by kind of cell, and by thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stts.data.shapes.clips import ShapesConfig
from stts.data.shapes.files import read_cells, write_shapes
from stts.eval.compare import CompareConfig, run_compare
from tests.scripts import load_script

WORLD = ShapesConfig(
    families=("order", "count", "flash"), ask_by="colour", grid=4, num_sampled=8, distractors=(3, 5)
)  # fmt: skip


def test_a_thing_is_an_unbroken_run_at_one_place() -> None:
    runs = load_script("study/kinds_kept").runs
    shown_TG = np.array([[1, 0, 0], [1, 0, 1], [0, 0, 1], [1, 0, 1]], bool)
    assert list(runs(shown_TG)) == [(0, 0, 2), (0, 3, 4), (2, 1, 4)]


def test_kinds_sum_to_what_compare_counts(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("study/kinds_kept")
    data = write_shapes(tmp_path / "data", sizes={"test": 3}, config=WORLD, files="png", progress=False) / "test.jsonl"
    config = CompareConfig(
        model=tiny_folder, data=data, out=tmp_path / "out", pruners=("novelty",), retention_ratios=(0.5,),
        num_frames=8, batch_size=9, max_new_tokens=1, save_kept="all",
    )  # fmt: skip
    row = run_compare(config, progress=False).rows[-1]
    [(cell, counts)] = script.kept_by_kind(config.out, read_cells(data))
    kept, there = (sum(counts[kind][part] for kind in ("flash", "pair")) for part in (0, 1))
    assert cell == "novelty@0.5" and kept / there == pytest.approx(row.evidence_kept)
    assert counts["distractor"][0] / counts["distractor"][1] == pytest.approx(row.distractors_kept)
    every = [counts[kind] for kind in (*script.KINDS, "background")]
    assert [sum(part) for part in zip(*every, strict=True)] == counts["places"] == [3 * (64 - 16), 3 * (128 - 16)]
    for kind in ("flash", "pair"):
        kept, things = counts[f"{kind} things"]
        assert kept <= things <= counts[kind][1] and kept / things >= counts[kind][0] / counts[kind][1]
    capsys.readouterr()
    assert script.main([str(data), str(config.out)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3 and f"| {100 * row.distractors_kept:.1f} |" in table[2]
