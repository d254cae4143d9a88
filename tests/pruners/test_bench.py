"""The benchmark of the pruners runs, and what it reports adds up."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from stts.budget import plan
from stts.pruners.check import HOST, example_video
from stts.pruners.registry import PRUNERS, make_pruner
from stts.tokens import Grid, Site
from tests.scripts import load_script

PLAIN = {"random", "uniform", "novelty", "random-vit", "easy", "heuristic"}
"""Rules without authors, and two whose release fails."""


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "none" and name not in PLAIN])
def test_the_authors_way_keeps_the_same_tokens(name):
    """Every stage that is not a plain rule has a rival, which keeps what ours keeps by the release's own counts."""
    torch.manual_seed(0)
    bench = load_script("benchmarks/pruners")
    host = replace(HOST, llm_width=256, vit_width=256, vit_heads=4, llm_heads=4, llm_kv_heads=2, patches_per_frame=729)
    for stage in make_pruner(name, host, **bench.OPTIONS.get(name, {})).stages[
        :3
    ]:  # AdaTP: cuts that differ in their layer
        if isinstance(stage, torch.nn.Module):
            stage.eval()
        in_llm, grid = stage.site.kind == "llm", Grid(14, 8, 8)
        for seed in (0, 1):
            video = example_video(stage, grid, seed=seed, width=256)
            place = grid if stage.site.kind == "vit" else Grid(1, 1, video.num_groups)
            site = Site("pre_llm") if in_llm else stage.site
            [[budget]] = plan([site], 0.5 if in_llm else 0.2, [place], 2, exact=False)
            with torch.no_grad():
                [kept] = stage([video], [budget])
                theirs_K = bench.RIVALS[type(stage).__name__](video, budget, stage)
            assert torch.isin(theirs_K, kept.index_K).all()
            assert len(theirs_K) == len(kept.index_K) or name in ("framefusion", "dart")


def test_stages_are_timed_beside_their_plain_loops(tmp_path, capsys):
    bench = load_script("benchmarks/pruners")
    path = tmp_path / "rows.json"
    names = ["novelty", "adatp", "fastv", "tango"]
    asked = ["--quick", "--loops", "--pruners", *names, "--repeats", "1", "--json", str(path)]
    assert bench.main(asked) == 0
    rows = {row["pruner"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == names
    assert rows["novelty"]["naive_ms"] is None and rows["novelty"]["kept"] == 78  # 0.2 of 8 frames of 7x7
    assert rows["adatp"]["stage"] == "Cut (our reconstruction)" and rows["novelty"]["authors_ms"] is None
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
