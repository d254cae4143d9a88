"""The benchmark of the pruners runs, and what it reports adds up."""

from __future__ import annotations

import json

from tests.scripts import load_script


def test_stages_are_timed_beside_their_plain_loops(tmp_path, capsys):
    bench = load_script("benchmarks/pruners")
    path = tmp_path / "rows.json"
    assert bench.main(["--quick", "--pruners", "novelty", "adatp", "fastv", "--repeats", "1", "--json", str(path)]) == 0
    rows = {row["pruner"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["novelty", "adatp", "fastv"]
    assert rows["novelty"]["naive_ms"] is None and rows["novelty"]["kept"] == 78  # 0.2 of 8 frames of 7x7
    assert rows["adatp"]["stage"] == "Cut (our reconstruction)" and rows["adatp"]["same"] == 1
    assert rows["fastv"]["ratio"] == rows["fastv"]["naive_ms"] / rows["fastv"]["ms"]
    table = capsys.readouterr().out
    assert "8 frames of 7x7 tokens" in table and "100.0 %" in table
