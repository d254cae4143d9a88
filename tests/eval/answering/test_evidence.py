"""Evidence recall: what a method kept of the cells that questions rest on, and of those that only distract."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stts.data.shapes.clips import ShapesConfig
from stts.data.shapes.files import read_cells, write_shapes
from stts.data.shapes.world import DISTRACTOR, EVIDENCE, FLASH, MOVING, PAIR, RESTING
from stts.eval.answering.evidence import count_kept, share_kept
from stts.eval.answering.kept_tokens import read_kept
from stts.eval.answering.questions import Source, open_jsonl
from stts.eval.compare import CompareConfig, run_compare
from stts.eval.results.table import render_markdown, render_text
from stts.report.run_data import run_data
from stts.tokens import Grid

WORLD = ShapesConfig(
    families=("order", "count", "flash"), ask_by="colour", grid=4, num_sampled=8, distractors=(3, 5)
)  # fmt: skip


def test_counts_by_hand() -> None:
    # Two frames of 1 x 3 cells; the first frame counts for nothing, though its evidence is kept.
    label = np.array([[[FLASH, DISTRACTOR, 0]], [[PAIR, DISTRACTOR, RESTING]], [[MOVING, 0, DISTRACTOR]]], np.uint8)
    kept = torch.tensor([0, 1, 3, 5, 8])
    assert count_kept(kept, Grid(3, 1, 3), label) == {"evidence": [1, 2], "distractors": [1, 2]}
    assert count_kept(torch.arange(9), Grid(3, 1, 3), label) == {"evidence": [2, 2], "distractors": [2, 2]}


def test_tokens_smaller_and_larger_than_cells() -> None:
    label = np.zeros((4, 2, 2), np.uint8)
    label[3, 0, 0], label[2, 1, 1], label[3, 1, 1] = FLASH, DISTRACTOR, PAIR
    # A cell is four tokens of a frame, of which two are kept.
    fine = torch.tensor([3 * 16 + 0, 3 * 16 + 5, 2 * 16 + 10])
    assert count_kept(fine, Grid(4, 4, 4), label) == {"evidence": [2, 8], "distractors": [1, 4]}
    # A token is one cell on two frames: evidence wins over a distractor.
    assert count_kept(torch.tensor([7]), Grid(2, 2, 2), label) == {"evidence": [1, 2], "distractors": [0, 0]}
    assert count_kept(torch.tensor([7]), Grid(4, 3, 3), label) == {}, "three tokens on two cells"
    assert count_kept(torch.tensor([7]), Grid(3, 2, 2), label) == {}


def test_shares_pool_the_clips() -> None:
    counts = [{"evidence": [1, 2], "distractors": [0, 0]}, {"evidence": [0, 6], "distractors": [3, 4]}, {}]
    assert share_kept(counts, "evidence") == 1 / 8 and share_kept(counts, "distractors") == 3 / 4
    assert share_kept([{}], "evidence") is None and share_kept(counts[:1], "distractors") is None


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "data"
    return write_shapes(out, sizes={"test": 3}, config=WORLD, files="png", progress=False) / "test.jsonl"


def test_compare_shows_evidence_beside_accuracy(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    config = CompareConfig(
        model=tiny_folder, data=data, out=tmp_path / "out", pruners=("random", "novelty", "fastv"),
        retention_ratios=(0.5,), num_frames=8, batch_size=3, max_new_tokens=1, save_kept="all",
    )  # fmt: skip
    result = run_compare(config, progress=False)
    labels, kept = read_cells(data), read_kept(config.out, {record.uid for record in result.records})
    for row in result.rows:
        if row.method == "dense":
            assert row.evidence_kept == row.distractors_kept == 1.0
            continue
        found = {"evidence": [0, 0], "distractors": [0, 0]}
        for record in result.records:
            label = labels[record.video].reshape(-1)
            chosen = kept[record.uid].index[f"{row.method}@0.5"].numpy()
            for name, shown in (("evidence", np.isin(label, EVIDENCE)), ("distractors", label == DISTRACTOR)):
                shown[:16] = False
                found[name][0] += int(shown[chosen].sum())
                found[name][1] += int(shown.sum())
        assert row.evidence_kept == pytest.approx(found["evidence"][0] / found["evidence"][1])
        assert row.distractors_kept == pytest.approx(found["distractors"][0] / found["distractors"][1])
        assert 0 < row.distractors_kept < 1
    head = render_text(result, wide=True).splitlines()[2]
    assert "evidence %" in head and "distractors %" in render_markdown(result)
    assert any(note.startswith("Evidence, distractors:") for note in render_text(result).splitlines())
    [first, *_] = csv.DictReader((config.out / "comparison.csv").open())
    assert float(first["evidence_kept"]) == 1.0
    assert run_data(config.out, 0)["rows"][1]["evidence_kept"] == result.rows[1].evidence_kept
    again = run_compare(replace(config), progress=False)
    assert again.rows == result.rows, "read back from the file"


def test_other_frames_and_other_data_have_no_labels(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    def source(**changes: object) -> Source:
        return Source(tasks=[open_jsonl(data)], **{"num_frames": 8, **changes})  # type: ignore[arg-type]

    [label] = {source().cell_labels(place).tobytes() for place in range(3)}  # three questions on one clip
    assert label == read_cells(data)["test/test-000000"].tobytes()
    assert source(num_frames=4).cell_labels(0) is None and source(max_fps=1.0).cell_labels(0) is None
    other = data.with_name("own.jsonl")
    other.write_text(data.read_text())
    assert Source(tasks=[open_jsonl(other)], num_frames=8).cell_labels(0) is None
    config = CompareConfig(
        model=tiny_folder, data=data, out=tmp_path / "out", pruners=("random",), retention_ratios=(0.5,), num_frames=4,
        limit=3, max_new_tokens=1,
    )  # fmt: skip
    result = run_compare(config, progress=False)
    assert all(row.evidence_kept is None for row in result.rows) and "evidence %" not in render_text(result, wide=True)
