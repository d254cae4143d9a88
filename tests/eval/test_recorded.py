"""What a folder records of its training is what every verb runs, where a setting is left out; what is given counts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stts.data.shapes.files import write_shapes
from stts.eval.compare import CompareConfig, run_compare
from stts.eval.evaluate import render, run_eval
from stts.eval.results.table import render_text
from stts.eval.run_config import EvalConfig
from stts.eval.scale import ScaleConfig, run_scale
from stts.models.checkpoints.hub import PrunedVLM, export, load_chat
from stts.models.checkpoints.load import load_vlm, pruner_settings, save_pruned
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.models.pruning.context import Pruning
from stts.report.visualize import look
from stts_train.module import VideoFinetune

# Each differs from what counts where nothing is recorded.
RATIO = 0.25
OPTIONS = {"prune_block": 1}
FRAMES: dict[str, Any] = {"num_frames": 5, "sampler": "interior", "max_fps": 3.0}
SAME = {"positions": "original", "exact": False}


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), sizes={"test": 1}, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trained")
    model, processor = load_vlm(write_small_vlm(path / "stock"))
    pruning = Pruning(model, "stts", retention_ratio=RATIO, positions="original", exact=False, **OPTIONS)
    return save_pruned(path / "model", model, processor, pruning, trained=FRAMES)


def settings(clips: Path, folder: Path, out: Path) -> dict[str, Any]:
    return {"model": folder, "data": clips / "test.jsonl", "out": out, "limit": 1, "max_new_tokens": 1}


def test_every_setting_of_a_run_may_be_recorded(folder: Path, clips: Path, tmp_path: Path) -> None:
    config, notes = CompareConfig(**settings(clips, folder, tmp_path)).as_recorded()
    expected = FRAMES | SAME
    assert {name: getattr(config, name) for name in expected} == expected
    assert notes == (
        "As the folder of the model records: num_frames 5, sampler interior, max_fps 3.0, exact False, "
        "positions original.",
    )
    given = {"num_frames": 3, "sampler": "bins_left", "max_fps": 9.0, "exact": True, "positions": "compact"}
    again, notes = CompareConfig(**settings(clips, folder, tmp_path), **given).as_recorded()
    assert {name: getattr(again, name) for name in given} == given and notes == (), "what is given counts"
    stock, notes = CompareConfig(**settings(clips, folder.with_name("stock"), tmp_path)).as_recorded()
    assert (stock.num_frames, stock.sampler, stock.max_fps, stock.exact, stock.positions) == (
        16,
        None,
        None,
        True,
        None,
    )
    assert notes == (), "a stock folder records nothing"


def test_compare(folder: Path, clips: Path, tmp_path: Path) -> None:
    config = CompareConfig(
        **settings(clips, folder, tmp_path / "out"), pruners=("stts", "novelty"), retention_ratios=(RATIO,)
    )
    result = run_compare(config, progress=False)
    assert result is not None
    assert {name: result.config[name] for name in FRAMES | SAME} == FRAMES | SAME
    assert [cell.positions for cell in result.cells] == ["", "original", "original"], "of every method"
    assert {outcome.num_frames for record in result.records for outcome in record.outcomes.values()} == {5}
    shown = render_text(result)
    assert "5 frames (interior)" in shown and "Positions of surviving tokens: original.\n" in shown
    assert "As the folder of the model records: num_frames 5" in shown
    # behind block 1 the tower runs on a quarter: with the default option it would run on all up to block 4
    share = result.rows[1].flops["exact"]["vit"] / result.rows[0].flops["exact"]["vit"]
    assert share < 0.7
    declared = run_compare(
        replace(config, model=folder.with_name("stock"), pruners=("novelty", "random-vit"), out=tmp_path / "declared"),
        progress=False,
    )
    assert declared is not None and "Positions of surviving tokens: compact.\n" in render_text(declared)


def test_eval(folder: Path, clips: Path, tmp_path: Path) -> None:
    made = run_eval(EvalConfig(**settings(clips, folder, tmp_path / "out")), progress=False)
    assert made is not None
    own, task = made["stts"], made["configs"]["jsonl"]
    assert (own["pruner"], own["retention_ratio"], own["positions"]) == ("stts", RATIO, "original")
    assert {name: own["identity"][name] for name in FRAMES | SAME} == FRAMES | SAME
    assert (task["num_frames"], task["sampler"]) == (5, "interior")
    assert "As the folder of the model records: num_frames 5" in render(made)
    dense = run_eval(EvalConfig(**settings(clips, folder, tmp_path / "dense"), pruner="none"), progress=False)
    assert dense is not None and dense["stts"]["pruner"] == "none" and dense["configs"]["jsonl"]["num_frames"] == 5


def test_scale(folder: Path, clips: Path, tmp_path: Path) -> None:
    config = ScaleConfig(
        **settings(clips, folder, tmp_path / "out"), pruners=("stts",), retention_ratios=(RATIO,), multiples=(1, 2)
    )
    result = run_scale(config, progress=False)
    assert result is not None
    expected = FRAMES | SAME | {"num_frames": [5, 10]}
    assert {name: result.config[name] for name in expected} == expected
    assert {cell.positions for cell in result.cells if cell.kind != "unpruned"} == {"original"}
    assert any(note.startswith("As the folder of the model records: sampler interior") for note in result.notes)


def test_visualize(folder: Path, clips: Path) -> None:
    video = next((clips / "test").glob("*.mp4"))
    view = look(video, question="which colour flashed ?", model=folder, max_new_tokens=1)
    assert (view.cell.method, view.cell.retention_configured, view.cell.positions) == ("stts", RATIO, "original")
    assert len(view.times_s) == 5 and view.times_s[0] > 0, "`interior` leaves the ends out"
    assert look(video, question="?", model=folder, positions="compact", max_new_tokens=1).cell.positions == "compact"


def test_chat_and_with_it_lmms_eval(folder: Path) -> None:
    chat = load_chat(folder)
    pruning = chat.pruning
    assert {name: getattr(chat, name) for name in FRAMES} == FRAMES
    assert {name: getattr(pruning, name) for name in SAME} == SAME
    assert (pruning.name, pruning.options, pruning.retention_ratio) == ("stts", OPTIONS, RATIO)
    other = load_chat(folder, "novelty", 0.5, num_frames=3)
    assert (other.num_frames, other.sampler, other.pruning.positions) == (3, "interior", "original")


def test_a_copy_and_a_scorer_alone_still_say_all(folder: Path, tmp_path: Path) -> None:
    settings = pruner_settings(folder)
    assert settings is not None and FRAMES.items() <= settings.items() and SAME.items() <= settings.items()
    copy = PrunedVLM.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert pruner_settings(copy) == settings
    stock, processor = load_vlm(folder.with_name("stock"))
    pruning = Pruning(stock, "stts", retention_ratio=RATIO, positions="original", exact=False, **OPTIONS)
    processor.video_processor.size = type(processor.video_processor.size)(height=112, width=112)
    alone = save_pruned(tmp_path / "alone", stock, processor, pruning, scorer_only=True, trained=FRAMES)
    merged = export(alone, tmp_path / "merged", merge=True)
    for path in (alone, merged):
        own = pruner_settings(path)
        assert own is not None and FRAMES.items() <= own.items()
    vlm = PrunedVLM.from_pretrained(alone)
    assert dict(vlm.processor.video_processor.size) == {"height": 112, "width": 112}, "not what the base says"
    assert dict(load_vlm(merged)[1].video_processor.size) == {"height": 112, "width": 112}


def test_fit_goes_on_as_trained(folder: Path, tmp_path: Path) -> None:
    module = VideoFinetune(str(folder), "stts", retention_ratio=RATIO)
    assert (module.pruning.positions, module.pruning.options) == ("original", OPTIONS)
    other = VideoFinetune(str(folder), "novelty", retention_ratio=RATIO)
    assert (other.pruning.positions, other.pruning.options) == ("original", {})
    given = VideoFinetune(
        str(folder), "stts", retention_ratio=RATIO, positions="compact", pruner_options={"answer_gradient": False}
    )
    assert (given.pruning.positions, given.pruning.options) == ("compact", OPTIONS | {"answer_gradient": False})


def test_a_folder_with_old_settings_still_reads(folder: Path, clips: Path, tmp_path: Path) -> None:
    """One that was written before frames were recorded."""
    shutil.copytree(folder, tmp_path / "old")
    model, processor = load_vlm(folder)
    save_pruned(tmp_path / "old", model, processor, Pruning(model, "novelty", retention_ratio=RATIO))
    config, notes = CompareConfig(**settings(clips, tmp_path / "old", tmp_path / "out")).as_recorded()
    assert (config.num_frames, config.positions) == (16, "compact")
    assert notes == ("As the folder of the model records: exact True, positions compact.",)
