"""`stts compare --trained`: several fine-tuned models in one table, beside pruners on the model they began as."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stts
from stts.data.shapes.files import write_shapes
from stts.eval.compare import CompareConfig, run_compare
from stts.eval.results.footnotes import interval, notes_on
from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import DENSE
from stts.metrics.accuracy import paired_difference
from stts.models.checkpoints.load import load_vlm, save_pruned
from stts.models.checkpoints.shapes_vlm import write_small_vlm

FRAMES, RATIOS = 2, (0.5, 0.25)


def trained(path: Path, seed: int, pruner: str, **options: Any) -> str:
    """A model of its own weights, as `stts fit` leaves it."""
    model, processor = load_vlm(write_small_vlm(path.with_name(f"start-{seed}"), seed=seed))
    pruning = stts.pruning(model, pruner, retention_ratio=0.25, positions="original", **options)
    save_pruned(path, model, processor, pruning, trained={"num_frames": FRAMES, "sampler": "interior"})
    return str(path)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    folder = tmp_path_factory.mktemp("trained")
    write_shapes(folder / "data", sizes={"test": 2}, progress=False, files="png")
    return CompareConfig(
        model=write_small_vlm(folder / "before"),
        trained={
            "stts": trained(folder / "a", 1, "stts", prune_block=1),
            "evs-tuned": trained(folder / "b", 2, "evs"),
        },
        data=folder / "data" / "test.jsonl",
        out=folder / "out",
        pruners=("evs", "random"),
        retention_ratios=RATIOS,
        batch_size=3,
        max_new_tokens=2,
    )


def run(config: CompareConfig, **changes: Any) -> ComparisonResult:
    result = run_compare(replace(config, **changes), progress=False)
    assert result is not None
    return result


def said(result: ComparisonResult, cell: str) -> list[str]:
    return [record.outcomes[cell].prediction for record in result.records]


def test_every_model_answers_as_it_does_alone(config: CompareConfig) -> None:
    result = run(config)
    expected = [(DENSE, 1.0), *((name, r) for r in RATIOS for name in ("stts", "evs-tuned", "evs", "random"))]
    assert [(row.method, row.retention_configured) for row in result.rows] == expected
    for name, pruner in (("stts", "stts"), ("evs-tuned", "evs")):
        out = config.out.with_name(f"{name} alone")
        alone = run(config, model=config.trained[name], trained={}, pruners=(pruner,), retention_ratios=(0.5,), out=out)
        assert said(result, f"{name}@0.5") == said(alone, f"{pruner}@0.5")
    without = {"trained": {}, "num_frames": FRAMES, "sampler": "interior", "positions": "original"}
    before = run(config, **without, out=config.out.with_name("before alone"))
    assert said(result, DENSE) == said(before, DENSE) and said(result, "evs@0.25") == said(before, "evs@0.25")
    assert said(result, "evs@0.25") != said(result, "evs-tuned@0.25"), "other weights"
    assert result.frames == [FRAMES] and {cell.positions for cell in result.cells[1:]} == {"original"}

    assert ComparisonResult.from_json(result.to_json()) == result
    [folders] = [note for note in notes_on(result) if note.startswith("Fine-tuned")]
    assert all(path in folders for path in config.trained.values())
    [note] = [note for note in notes_on(result) if note.startswith("stts minus evs-tuned")]
    for ratio in RATIOS:
        ours, theirs = (
            [record.outcomes[f"{name}@{ratio}"].correct for record in result.records] for name in ("stts", "evs-tuned")
        )
        found = paired_difference(ours, theirs, [record.video for record in result.records])
        assert f"{interval(found.value, found.low, found.high, '+')} at {ratio:g}" in note


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trained": {"evs": "a"}}, "names of other rows"),
        ({"trained": {DENSE: "a"}}, "names of other rows"),
        ({"trained": {"mine": "./nowhere"}}, "--trained: mine './nowhere' is no folder"),
        ({"match": "flops", "match_to": "random"}, "--match tokens"),
        ({"pruner_options": {"other": {}}}, "evs-tuned"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(config: CompareConfig, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(config, **changes)


def test_folders_that_do_not_fit_are_refused(config: CompareConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="records no pruner"):
        run(config, trained={"mine": str(config.model)}, out=out)
    wider = write_small_vlm(tmp_path / "wider", llm_width=64)
    with pytest.raises(ValueError, match=r"--trained .* another architecture"):
        run(config, trained={"mine": str(wider)}, out=out)
    model, processor = load_vlm(config.model)
    more = save_pruned(tmp_path / "c", model, processor, stts.pruning(model, "evs"), trained={"num_frames": 8})
    with pytest.raises(ValueError, match=f"num_frames 8, another of these folders with {FRAMES}"):
        run(config, trained={**config.trained, "mine": str(more)}, out=out)
