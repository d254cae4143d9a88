"""The benchmark of the pruners runs, and what it reports adds up."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_pruners.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_pruners", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_pruners"] = module  # where its dataclass looks up its annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_pruners"]


def test_stages_are_timed_beside_their_plain_loops(bench, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert bench.main(["--quick", "--pruners", "novelty", "adatp", "fastv", "--repeats", "1", "--json", str(path)]) == 0
    rows = {row["pruner"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["novelty", "adatp", "fastv"]
    assert rows["novelty"]["naive_ms"] is None and rows["novelty"]["kept"] == 78  # 0.2 of 8 frames of 7x7
    assert rows["adatp"]["stage"] == "Cut (our reconstruction)" and rows["adatp"]["same"] == 1
    assert rows["fastv"]["ratio"] == rows["fastv"]["naive_ms"] / rows["fastv"]["ms"]
    table = capsys.readouterr().out
    assert "8 frames of 7x7 tokens" in table and "100.0 %" in table


def test_extra_memory_is_the_peak_beyond_what_was_there(bench):
    held = torch.ones(1 << 18)  # 1 MiB, there before

    def call() -> torch.Tensor:
        doubled = held * 2  # + 1 MiB
        once_more = doubled + 1  # + 1 MiB
        del doubled
        return once_more * 3  # the place of `doubled` again

    assert bench.extra_mib(call, held.device) == pytest.approx(2, abs=0.01)
