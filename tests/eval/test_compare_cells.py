"""`stts compare`: which pruners a cell can hold, at which budgets, and what is said of those that it cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import stts
from stts.eval.compare import CompareConfig
from stts.eval.results.table import BEFORE, DENSE
from stts.metrics.cost import video_cost
from stts.models.checkpoints.load import load_vlm, save_pruned
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.models.families.base import vlm_shape
from stts.pruners.registry import PRUNERS
from tests.conftest import TINY
from tests.eval.test_compare import CELLS, CLIPS, FRAMES, flops, row_of, run
from tests.eval.test_compare import clips as clips
from tests.eval.test_compare import config as config
from tests.eval.test_compare import data as data
from tests.models.pruning.test_signals import write_siglip

PRUNERS_OF_A_USER = """
from dataclasses import dataclass, replace
from stts.pruners.simple import Uniform
from stts.tokens import Site

class Late(Uniform):
    label = "a sketch"
    site = Site("llm", layer=1)

class Generous(Uniform):  # its own count: two more a frame
    count_known = False
    def prune(self, video, budget):
        extra = 0 if budget.exact else 2 * video.grid.t
        return super().prune(video, replace(budget, num_kept=budget.num_kept + extra))
    def flops(self, grid, width, num_kept):
        return width * num_kept

@dataclass(frozen=True)
class Picky(Uniform):
    refuses: str = ""
    def prune(self, video, budget):
        if video.uid.startswith(self.refuses):
            raise ValueError(f"{video.uid} is not to my taste")
        return super().prune(video, budget)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruners `mine:Late`, `mine:Generous`, `mine:Picky`."""
    (tmp_path / "mine.py").write_text(PRUNERS_OF_A_USER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.mark.usefixtures("mine")
def test_a_cell_that_cannot_be_says_why(config: CompareConfig) -> None:
    result = run(config, pruners=("mine:Late", "uniform"), retention_ratios=(0.5, 0.3))
    late = row_of(result, "mine:Late (a sketch)", 0.3)
    assert (
        late.accuracy is None and late.reason is not None and "lowest reachable value is just above 0.33" in late.reason
    )
    assert row_of(result, "mine:Late (a sketch)", 0.5).accuracy is not None
    assert row_of(result, "uniform", 0.3).accuracy is not None, "the others go on"
    table = (config.out / "comparison.md").read_text()
    assert "| mine:Late (a sketch) | 0.3 | - | - |" in table and late.reason in table


@pytest.mark.usefixtures("mine")
def test_a_cut_inside_the_llm_counts_every_layer(config: CompareConfig, tiny: tuple[Any, Any]) -> None:
    result = run(config, pruners=("mine:Late", "uniform"))
    late, uniform = row_of(result, "mine:Late (a sketch)", 0.5), row_of(result, "uniform", 0.5)
    dense = FRAMES * CELLS  # half of 3 x 96 tokens: 96 before the cut, then 24 in both layers behind it
    cost = video_cost(vlm_shape(tiny[0].config), num_frames=FRAMES, llm_tokens=[dense, 24, 24])
    assert (late.retention_measured, late.retention_at_entry, late.kept_per_frame) == (0.5, 1.0, CELLS / 2)
    assert flops(late)["llm"] == cost.llm and cost.llm > flops(uniform)["llm"]
    assert (late.kind, uniform.kind) == ("inside the LLM", "before the LLM")
    assert result.records[0].outcomes["mine:Late@0.5"].num_kept == dense
    assert "mine:Late (a sketch) drop tokens inside the LLM" in (config.out / "comparison.md").read_text()


@pytest.mark.usefixtures("mine")
def test_a_pruner_that_refuses_a_video_does_not_stop_the_others(config: CompareConfig) -> None:
    last = sorted({row["id"] for row in map(json.loads, config.data.read_text().splitlines())})[-1]
    options = {"mine:Picky": {"refuses": last.rsplit("-", 1)[0]}}
    result = run(config, pruners=("mine:Picky", "uniform"), pruner_options=options)
    picky = row_of(result, "mine:Picky", 0.5)
    assert picky.accuracy is None and picky.reason is not None
    assert picky.reason.startswith("stopped at sample") and picky.reason.endswith("is not to my taste")
    assert row_of(result, "uniform", 0.5).num_samples == 3 * CLIPS
    assert run(config, pruners=("mine:Picky", "uniform"), pruner_options=options) == result, "as written"


@pytest.mark.usefixtures("mine")
def test_a_refusal_is_remembered_when_a_run_goes_on(config: CompareConfig) -> None:
    first = json.loads(config.data.read_text().splitlines()[0])["id"].rsplit("-", 1)[0]
    changes = {"pruners": ("mine:Picky",), "pruner_options": {"mine:Picky": {"refuses": first}}}
    straight = run(config, **changes, out=config.out.with_name("straight"))
    last = sorted((config.data.parent / "test").iterdir())[-1]
    whole = last.read_bytes()
    last.write_bytes(b"stops the run")
    with pytest.raises(ValueError, match="not readable as a video"):
        run(config, **changes)
    last.write_bytes(whole)
    resumed = run(config, **changes)
    assert resumed.cells == straight.cells and resumed.records == straight.records
    assert row_of(resumed, "mine:Picky", 0.5).reason is not None


@pytest.mark.usefixtures("mine")
def test_without_exact_the_count_is_the_methods_own(config: CompareConfig) -> None:
    own = run(config, pruners=("mine:Generous", "uniform"), exact=False, limit=3)
    row = row_of(own, "mine:Generous", 0.5)
    assert (row.retention_measured, row.kept_per_frame) == ((CELLS / 2 + 2) / CELLS, CELLS / 2 + 2)
    assert flops(row)["pruner"] == TINY["llm_width"] * FRAMES * (CELLS / 2 + 2)
    assert row_of(own, "uniform", 0.5).retention_measured == 0.5
    assert "budgets are not equal" in (config.out / "comparison.md").read_text()
    whole = run(config, pruners=("mine:Generous",), retention_ratios=(1.0,), limit=3, out=config.out.with_name("whole"))
    assert flops(row_of(whole, "mine:Generous", 1.0))["pruner"] == 0, "a stage that is skipped costs nothing"


def test_an_option_that_the_pruner_lacks_stops_the_run(config: CompareConfig) -> None:
    with pytest.raises(ValueError, match=r"'random' does not take the options \['colour', 'seed'\]"):
        run(config, pruner_options={"random": {"colour": 1}})


def test_every_pruner_can_be_compared_at_one_budget(config: CompareConfig) -> None:
    result = run(config, model=Path("stts/assets/shapes_vlm"), pruners=("all",), limit=3)
    # Not the learned ones, for which this folder has no weights; dense stands in for `none`.
    names = {cell.method for cell in result.cells} - {DENSE}
    assert names == set(PRUNERS) - {"none", "stts", "visionselector", "cacovid"}
    assert not any(cell.reason for cell in result.cells)
    for row in result.rows[1:]:
        assert row.retention_measured == pytest.approx(0.5, abs=0.02), row.method
    assert any(row.method == "adatp (our reconstruction)" for row in result.rows)


def test_a_siglip_checkpoint_makes_the_signals(config: CompareConfig, tmp_path: Path) -> None:
    siglip = write_siglip(tmp_path / "siglip")
    methods: dict[str, Any] = {"pruners": ("tango", "adatp"), "limit": 3}
    plain = run(config, **methods)
    given = run(config, **methods, siglip=siglip, out=config.out.with_name("given"))
    assert "no pooling head" in row_of(plain, "tango", 0.5).signals["probe"]
    assert row_of(given, "tango", 0.5).signals["probe"] == f"attention of the pooling head of {siglip}, mean over heads"
    adatp = row_of(given, "adatp (our reconstruction)", 0.5)
    assert adatp.signals["text"] == f"text tower of {siglip}", "the question is passed on"
    table = (config.out / "comparison.md").read_text()
    assert "Signal text of adatp (our reconstruction): none: no aligned text tower (global debiasing off)." in table
    with pytest.raises(ValueError, match="has a vision tower of width 64"):
        run(config, **methods, siglip=write_siglip(tmp_path / "wide", width=64), out=config.out.with_name("never"))


def test_the_default_pruners_are_in_the_registry(config: CompareConfig) -> None:
    default = CompareConfig(model=config.model, data=config.data, out=config.out)  # checks the names
    assert len(default.pruners) >= 6


def test_a_learned_pruner_brings_its_weights_or_is_refused(config: CompareConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would be random"):
        run(config, pruners=("stts",))
    small = write_small_vlm(tmp_path / "small")  # six blocks: room for a drop inside the tower
    model, processor = load_vlm(small)
    pruning = stts.pruning(model, "stts", retention_ratio=0.5, prune_block=1)
    trained = save_pruned(tmp_path / "trained", model, processor, pruning)
    result = run(config, model=trained, pruners=("stts", "random-vit"), baseline_model=small)
    row, other = row_of(result, "stts", 0.5), row_of(result, "random-vit", 0.5)
    dense = row_of(result, DENSE)
    assert row.retention_measured == other.retention_measured == 0.5
    assert flops(other)["pruner"] == 0 < flops(row)["pruner"]
    assert flops(row)["vit"] < flops(dense)["vit"]
    assert flops(row)["connector"] < flops(dense)["connector"], "dropped patches do not reach the connector"
    official = {"stts": {"compat": "official"}, "random-vit": {"prune_block": 1}}
    again = run(config, model=trained, pruners=("stts", "random-vit"), pruner_options=official, out=tmp_path / "again")
    for name in official:  # the option that stts was trained with stays, the one given to random-vit counts
        shallow = flops(row_of(again, name, 0.5))["vit"]
        assert shallow < 0.95 * flops(other)["vit"], "behind block 1, its own default is block 3"
    before = [record.outcomes[BEFORE].prediction for record in result.records]
    assert before == [record.outcomes[DENSE].prediction for record in result.records], "the same weights here"
