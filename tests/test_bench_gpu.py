"""The GPU benchmark on a CPU: its rival computes what the release computes, and no cell is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import stts
from tests.scripts import load_script

CPU = torch.device("cpu")
bench = load_script("bench_gpu")


def setting(**changes: Any) -> Any:
    return bench.Setting(**{"device": CPU, "tiny": True, "warm_up": 0, "repeats": 1, "new_tokens": 2} | changes)


@pytest.fixture(scope="module", params=[bench.MOLMO2, bench.QWEN3, bench.LLAVA])
def model(request: Any) -> Any:
    return bench.build(request.param, CPU, tiny=True)


def test_weights_and_tables_are_all_filled(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = type(model).to_empty
    monkeypatch.setattr(type(model), "to_empty", lambda self, **given: _spoil(stock(self, **given)))
    name = next(name for name in (bench.MOLMO2, bench.QWEN3, bench.LLAVA) if _family(name) == model.config.model_type)
    again = bench.build(name, CPU, tiny=True)
    for key, tensor in [*again.named_parameters(), *again.named_buffers()]:
        assert tensor.isfinite().all(), key
    for (key, a), (_, b) in zip(again.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(a, b), key


def _family(name: str) -> str:
    return str(bench.PUBLISHED[name]["model_type"])


def _spoil(model: Any) -> Any:
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else -1)
    return model


def test_rows_and_ours_keep_the_same_and_say_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = bench.inputs_of(model, 6, tiny=True, training=False)
    pruned = stts.pruning(model, "stts", retention_ratio=0.5)
    layouts: list[Any] = []
    stock = bench.rival_layout
    monkeypatch.setattr(bench, "rival_layout", lambda keep: layouts.append((keep, stock(keep))) or layouts[-1][1])
    with torch.no_grad(), pruned:
        ours = model(**inputs, use_cache=False, logits_to_keep=1).logits
        index = pruned.last.index
        with bench.rival_scheme():
            rows = model(**inputs, use_cache=False, logits_to_keep=1).logits
    assert all(torch.equal(a, b) for a, b in zip(pruned.last.index, index, strict=True))
    [(keep_FN, layout)] = layouts
    refilled = int((layout.row_FN >= 0).sum() - keep_FN.sum())
    tolerance = 1e-5 if refilled == 0 else 0.1 * float(ours.std())  # a frame alone in its row sees dropped patches
    torch.testing.assert_close(rows, ours, atol=tolerance, rtol=1e-4)
    again = stts.models.pruning.run_tower
    assert again is not bench.rival_tower, "the stock loop is back"


def test_flops_of_dense_are_those_of_the_whole_video(model: Any) -> None:
    cell = bench.Cell("a/b", "inference", 4, bench.DENSE, 1.0)
    inputs = bench.inputs_of(model, 4, tiny=True, training=False)
    dense = bench.forward_flops(model, None, inputs, cell)
    assert dense["kept"] == 1.0
    with stts.pruning(model, "stts", retention_ratio=0.5) as pruned:
        half = bench.forward_flops(model, pruned, inputs, cell)
    assert half["tokens"] == dense["tokens"] and half["kept"] == pytest.approx(0.5, abs=0.1)
    assert 0.3 < half["flops"] / dense["flops"] < 1


def test_a_cell_without_memory_is_recorded_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fake(model: Any, cell: Any, setting: Any) -> dict[str, Any]:
        asked.append(cell.way)
        if cell.way == "stts":
            raise torch.OutOfMemoryError("no")
        if cell.way == "rows":
            raise RuntimeError("kernel")
        return {"total_ms": 2.0, "flops": 8}

    monkeypatch.setattr(bench, "training", fake)
    monkeypatch.setattr(bench, "build", lambda *_: None)
    cells = [bench.Cell("a/b", "training", 4, way, 0.5) for way in ("stts", "rows", "later")]
    found: dict[str, Any] = {}
    saved: list[int] = []
    assert bench.run_cells(cells, setting(), found, lambda: saved.append(len(found)), float("inf")) == 0
    assert asked == ["stts", "rows", "later"] and saved == [1, 2, 3]
    assert found[cells[0].key]["error"] == "out of memory" and "RuntimeError: kernel" in found[cells[1].key]["error"]
    assert "out of memory" in bench.report(found, cells)
    assert bench.run_cells(cells, setting(), {}, lambda: None, 0.0) == 3, "no time left: nothing is started"


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"device": "x", "cells": {"a": {"total_ms": 1.0}, "b": {"error": "out of memory"}}}))
    assert bench.read_earlier(file, {"device": "x"}) == {"a": {"total_ms": 1.0}}
    with pytest.raises(ValueError, match="give another --json file"):
        bench.read_earlier(file, {"device": "y"})


def test_counts_of_launches_and_waits() -> None:
    x = torch.arange(6.0)
    with bench.Launches() as counted:
        (x.view(2, 3) + 1).sum()
        x[x > 2]
        x.nonzero()
        _ = x.max().item()
    assert counted.launches >= 6 and counted.syncs == 3


def test_the_kernel_check_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert bench.check(CPU)
    assert "WRONG" not in capsys.readouterr().out
    stock = bench.packed_attention
    monkeypatch.setattr(bench, "packed_attention", lambda *a, **k: 1.02 * stock(*a, **k))
    assert not bench.check(CPU)


@pytest.mark.slow
def test_every_path_runs_without_a_gpu(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--tiny", "--json", str(file)]
    assert bench.main(arguments) == 0
    content = json.loads(file.read_text())
    cells = content["cells"]
    assert len(cells) == 12 + 21 and not any("error" in cell for cell in cells.values())
    for cell in cells.values():
        assert cell["total_ms"] > 0 and cell["share"] == pytest.approx(cell["ratio"] / cell["ceiling"])
    out = capsys.readouterr().out
    assert "nothing about speed" in out and "/ dense prefill" in out
    before = file.stat().st_mtime_ns
    assert bench.main(arguments) == 0  # nothing is measured twice
    assert json.loads(file.read_text())["cells"] == cells and file.stat().st_mtime_ns > before
    assert bench.main(["--device", "cpu", "--tiny", "--profile"]) == 0
    assert "target: below 3 %" in capsys.readouterr().out
