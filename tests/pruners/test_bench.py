"""The benchmark of the pruners runs, and what it reports adds up."""

from __future__ import annotations

import json

import torch

from tests.scripts import load_script


def test_stages_are_timed_beside_their_plain_loops(tmp_path, capsys):
    bench = load_script("benchmarks/pruners")
    path = tmp_path / "rows.json"
    names = ["novelty", "adatp", "fastv", "tango"]
    asked = ["--quick", "--loops", "--pruners", *names, "--repeats", "1", "--json", str(path)]
    assert bench.main(asked) == 0
    rows = {row["pruner"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == names
    assert rows["novelty"]["naive_ms"] is None and rows["novelty"]["kept"] == 78  # 0.2 of 8 frames of 7x7
    assert rows["adatp"]["stage"] == "Cut (our reconstruction)" and rows["adatp"]["authors_ms"] is None
    assert rows["fastv"]["same"] == rows["tango"]["same"] == 1 and rows["fastv"]["naive_ms"] > 0
    assert rows["fastv"]["waits"] == 1  # is the attention finite?
    table = capsys.readouterr().out
    assert "8 frames of 7x7 tokens" in table and "100.0 %" in table


def test_launches_and_waits_are_counted():
    counting = load_script("benchmarks/counting")
    x = torch.arange(6.0)
    assert counting.counted(lambda: x.view(2, 3).T + 1) == (1, 0)
    for call in (lambda: x[x > 2], lambda: (x > 2).nonzero(), lambda: x.tolist(), lambda: bool((x > 2).any())):
        assert counting.counted(call)[1] == 1
    assert counting.counted(lambda: (x > 2).nonzero_static(size=3))[1] == 0
    assert counting.counted(lambda: x[torch.tensor([0, 1])])[1] == 0
