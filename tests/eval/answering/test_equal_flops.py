"""Equal FLOPs: what is planned is what is measured, and what cannot be matched says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stts
from stts.data.shapes.files import write_shapes
from stts.eval.answering.equal_flops import cost_at, equal_flops_ratio
from stts.eval.answering.method import cost_of
from stts.eval.compare import CompareConfig, run_compare
from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import render_text
from stts.models.checkpoints.load import load_vlm, save_pruned
from stts.models.families.base import vlm_shape
from stts.tokens import Grid
from tests.conftest import make_inputs

FRAMES = 6


@pytest.mark.parametrize("name", ["random", "visionzip", "tango+inner", "fastv", "adatp", "stts"])
def test_the_planned_cost_is_the_measured_one(tiny: tuple[Any, Any], name: str) -> None:
    model, processor = tiny
    pruning = stts.pruning(model, name, retention_ratio=0.7)
    with pruning, torch.inference_mode():
        model(**make_inputs(processor, ["v what ?"], num_frames=FRAMES))
    report = pruning.last
    assert report is not None
    measured = cost_of(vlm_shape(model.config), pruning.adapter.host, pruning.pruner, report, 0)
    planned = cost_at(pruning, report.grids[0], 0.7)
    if name == "stts":  # where its survivors lie is known afterwards only
        assert planned.total == pytest.approx(measured.total, rel=0.02) and planned.llm == measured.llm
    else:
        assert planned == measured


def test_the_ratio_is_the_largest_that_fits(tiny: tuple[Any, Any]) -> None:
    pruning, grid = stts.pruning(tiny[0], "visionzip"), Grid(FRAMES, 4, 4)
    for wanted in (0.9, 0.5, 0.123):
        target = cost_at(pruning, grid, wanted).total
        ratio = equal_flops_ratio(pruning, grid, target)
        assert wanted <= ratio and cost_at(pruning, grid, ratio).total == target, "the same number of tokens"
        assert cost_at(pruning, grid, min(1.0, ratio + 1e-4)).total > target
    assert equal_flops_ratio(pruning, grid, 2 * cost_at(pruning, grid, 1.0).total) == 1.0
    with pytest.raises(
        ValueError, match=r"at least about \d+\.\d % of dense \(tower \d+\.\d %\), and 1\.0 % are asked"
    ):
        equal_flops_ratio(pruning, grid, cost_at(pruning, grid, 1.0).total // 100)
    inside = stts.pruning(tiny[0], "fastv", retention_ratio=0.9)
    assert equal_flops_ratio(inside, grid, cost_at(inside, grid, 0.8).total) == pytest.approx(0.8, abs=0.02)


@pytest.fixture(scope="module")
def config(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    folder = tmp_path_factory.mktemp("match")
    model, processor = load_vlm(tiny_folder)
    torch.manual_seed(0)
    pruning = stts.pruning(model, "stts", prune_block=3)  # late: the tower saves little, so that others can match it
    return CompareConfig(
        model=save_pruned(folder / "model", model, processor, pruning),
        data=write_shapes(folder / "data", sizes={"test": 2}, progress=False) / "test.jsonl",
        out=folder / "out",
        pruners=("stts", "random", "fastv"),
        retention_ratios=(0.7, 0.3),
        num_frames=FRAMES,
        batch_size=3,
        max_new_tokens=1,
        match="both",
    )


@pytest.fixture(scope="module")
def result(config: CompareConfig) -> ComparisonResult:
    made = run_compare(config, progress=False)
    assert made is not None
    return made


def test_rows_at_equal_flops_stand_below_those_at_equal_tokens(result: ComparisonResult) -> None:
    by_name = {(row.method, row.retention_configured): row for row in result.rows if not row.equal_flops_to}
    matched = [row for row in result.rows if row.equal_flops_to]
    assert [(row.method, row.equal_flops_to) for row in matched] == [
        (method, f"stts@{ratio}") for ratio in ("0.7", "0.3") for method in ("random", "fastv")
    ]
    for row in matched:
        like = by_name["stts", float(row.equal_flops_to.removeprefix("stts@"))]
        if row.reason is not None:
            assert "of dense" in row.reason
            continue
        assert row.flops["exact"]["total"] == pytest.approx(like.flops["exact"]["total"], rel=0.03)
        assert row.retention_configured != like.retention_configured
    assert any(row.reason is None for row in matched)
    text = render_text(result)
    assert "FLOPs, stts@0.7" in text and "Rows with equal FLOPs" in text


def test_phases_of_every_method_stand_in_the_table(result: ComparisonResult, config: CompareConfig) -> None:
    for row in result.rows:
        if row.reason is None:
            parts = [row.time_ms[name] for name in ("vit", "prune", "connect", "prefill")]
            assert row.time_ms["ttft"] > 0 and min(parts) >= 0
            assert row.time_ms["ttft_e2e"] > row.time_ms["ttft"] and row.peak_gib is None
    assert "ttft_e2e" in render_text(result)


def test_only_equal_flops(config: CompareConfig, tmp_path: Path) -> None:
    made = run_compare(replace(config, match="flops", retention_ratios=(0.7,), out=tmp_path / "out"), progress=False)
    assert made is not None
    assert [(row.method, bool(row.equal_flops_to)) for row in made.rows] == [
        ("dense", False), ("stts", False), ("random", True), ("fastv", True),
    ]  # fmt: skip


def test_a_reference_that_is_not_there_is_refused(config: CompareConfig) -> None:
    with pytest.raises(ValueError, match=r"--match_to 'tango' is not among --pruners"):
        replace(config, match_to="tango")
    with pytest.raises(ValueError, match="--match 'time' must be one of"):
        replace(config, match="time")  # type: ignore[arg-type]
