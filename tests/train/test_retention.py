"""Elastic retention: one ratio per optimizer step, the same everywhere, never more tokens than were planned for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import stts
from stts.data.collate import Batch
from stts.data.shapes.clips import ShapesConfig
from stts.data.shapes.files import write_shapes
from stts.models.checkpoints.load import pruner_settings
from stts_train.data_module import VideoData
from stts_train.module import VideoFinetune
from stts_train.retention import Fixed, Sampled, Scheduled, make_retention
from tests.train.launch import run
from tests.train.test_module import FAST, batch_for, fit

RANGE = {"low": 0.1, "high": 0.7}
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def loader(batches: list[Batch]) -> Any:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a data set


class Ratios(pl.Callback):
    """The ratio of every batch, by optimizer step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        assert pl_module.pruning.last is not None
        ratio, measured = pl_module.pruning.retention_ratio, pl_module.pruning.last.retention_measured
        self.seen.append((self.step, ratio, measured))


# --- the rules -------------------------------------------------------------------------------------------------------


def test_a_number_is_the_same_in_every_step() -> None:
    rule = make_retention(0.3)
    assert rule == Fixed(0.3) and rule.record is None
    assert [rule.at(step) for step in (0, 7, 10**6)] == [0.3] * 3 and rule.target == rule.highest == 0.3


def test_a_linear_schedule_by_hand() -> None:
    rule = make_retention({"from": 1.0, "to": 0.2, "steps": 4, "shape": "linear"})
    assert [round(rule.at(step), 9) for step in range(6)] == [1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
    assert (rule.target, rule.highest) == (0.2, 1.0)


def test_a_cosine_schedule_by_hand() -> None:
    rule = make_retention({"from": 1.0, "to": 0.2, "steps": 4, "shape": "cosine"})
    # 0.2 + 0.8 (1 + cos(pi step / 4)) / 2; cos 45 degrees = 0.70710678
    assert [round(rule.at(step), 6) for step in range(6)] == [1.0, 0.882843, 0.6, 0.317157, 0.2, 0.2]


def test_a_schedule_may_rise() -> None:
    rule = Scheduled(start=0.2, target=0.6, steps=2)
    assert [round(rule.at(step), 9) for step in range(3)] == [0.2, 0.4, 0.6] and rule.highest == 0.6


@pytest.mark.parametrize(("spacing", "middle"), [("uniform", 0.4), ("log", math.sqrt(0.1 * 0.7))])
def test_a_range_is_drawn_evenly(spacing: Any, middle: float) -> None:
    rule = Sampled(low=0.1, high=0.7, spacing=spacing)
    drawn = torch.tensor([rule.at(step) for step in range(2000)], dtype=torch.float64)
    assert 0.1 <= drawn.min() < 0.105 and 0.68 < drawn.max() <= 0.7
    assert 0.47 < (drawn < middle).double().mean() < 0.53, "half of the draws lie on each side of the middle"


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    rule, again, other = (Sampled(low=0.1, high=0.7, seed=seed) for seed in (0, 0, 1))
    backwards = [again.at(step) for step in reversed(range(50))][::-1]  # no state: the order of asking is nothing
    assert [rule.at(step) for step in range(50)] == backwards
    assert all(rule.at(step) != other.at(step) for step in range(50))
    assert len({rule.at(step) for step in range(50)}) == 50


def test_a_range_is_evaluated_at_its_geometric_middle_unless_told() -> None:
    assert make_retention({"low": 0.1, "high": 0.4}).target == 0.2
    assert make_retention({**RANGE, "eval_ratio": 0.5}).target == 0.5
    assert make_retention(RANGE).highest == 0.7


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (0.0, "retention_ratio=0.0"),
        ({"low": 0.1}, "must be a number, a range such as"),
        ({"low": 0.1, "high": 0.5, "steps": 3}, "must be a number, a range such as"),
        ({"from": 1.0, "to": 0.3}, "must be a number, a range such as"),
        ({"low": 0.5, "high": 0.5}, "low=0.5 must be below high=0.5"),
        ({"low": 0, "high": 0.5}, "retention_ratio=0 must be in"),
        ({"low": "a", "high": 0.5}, "retention_ratio='a' must be a number"),
        ({**RANGE, "spacing": "linear"}, "spacing='linear' must be one of"),
        ({**RANGE, "eval_ratio": 2}, "retention_ratio=2 must be in"),
        ({**RANGE, "seed": -1}, "seed=-1"),
        ({"from": 1.0, "to": 0.3, "steps": 0}, "steps=0 must be a whole number"),
        ({"from": 1.0, "to": 0.3, "steps": 9, "shape": "step"}, "shape='step' must be one of"),
    ],
)
def test_bad_settings_name_the_fix(setting: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_retention(setting)


# --- in training -----------------------------------------------------------------------------------------------------


def test_batches_of_one_step_share_its_ratio(tiny_folder: Path) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", RANGE, **FAST)
    look = Ratios()
    fit(module, [batch_for(module)] * 6, accumulate_grad_batches=2, callbacks=[look])
    rule = make_retention(RANGE)
    assert [(step, ratio) for step, ratio, _ in look.seen] == [(n // 2, rule.at(n // 2)) for n in range(6)]
    assert all(measured == pytest.approx(ratio, abs=0.05) for _, ratio, measured in look.seen)
    assert module.trainer.callback_metrics["retention_configured"] == pytest.approx(rule.at(2))


def test_validation_and_export_use_the_target(tiny_folder: Path, tmp_path: Path) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", {**RANGE, "eval_ratio": 0.25}, **FAST)
    batch, seen = batch_for(module), []

    class Look(pl.Callback):
        def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            seen.append(pl_module.pruning.last.retention_measured)

    trainer = pl.Trainer(
        accelerator="cpu", logger=False, max_steps=2, num_sanity_val_steps=0, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[Look()],
    )  # fmt: skip
    trainer.fit(module, loader([batch] * 2), loader([batch]))
    assert seen == [pytest.approx(0.25, abs=0.01)]
    folder = module.export(tmp_path / "model")
    settings = pruner_settings(folder)
    assert settings is not None and settings["retention_ratio"] == 0.25
    assert settings["retention_trained"] == {"low": 0.1, "high": 0.7, "spacing": "uniform"}
    again = stts.PrunedVLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert pruner_settings(again) == settings | {"base": settings["base"]}, "a copy still says how it was trained"


def test_a_fixed_ratio_records_no_range(tiny_folder: Path, tmp_path: Path) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", 0.5, **FAST)
    assert "retention_trained" not in json.loads((module.export(tmp_path / "model") / "stts.json").read_text())


@pytest.mark.parametrize("ratio", [1.0, 0.99, 0.01, 1e-6])
def test_losses_and_gradients_stay_finite_at_the_ends(tiny_folder: Path, ratio: float) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", {"from": ratio, "to": 0.5, "steps": 10}, **FAST)
    module.train()
    module.pruning.retention_ratio = module.retention.at(0)
    with module.pruning:
        losses = module._forward(batch_for(module))
        torch.stack(list(losses.values())).sum().backward()
    assert set(losses) == {"answer", "temporal"} and all(bool(loss.isfinite()) for loss in losses.values())
    assert all(bool(p.grad.isfinite().all()) for p in module.parameters() if p.grad is not None)
    assert (losses["temporal"] == 0) == (ratio == 1.0), "nothing to choose, nothing to learn about the choice"
    assert module.pruning.last is not None
    kept, grid = module.pruning.last.num_kept[0], module.pruning.last.grids[0]
    assert kept == (grid.num_groups if ratio == 1.0 else max(grid.per_frame, kept)) <= grid.num_groups


# --- packing and resuming --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("elastic") / "shapes"
    write_shapes(out, sizes={"train": 6}, config=ShapesConfig(num_sampled=8), progress=False)
    return out


@pytest.mark.parametrize("setting", [RANGE, {"from": 1.0, "to": 0.3, "steps": 3}, {"from": 0.3, "to": 0.8, "steps": 3}])
def test_rows_never_hold_more_than_max_tokens(tiny_folder: Path, files: Path, setting: Any) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", setting, **FAST)
    longest = module.tokens_per_video(8) + 30
    data = VideoData(
        train=str(files / "train.jsonl"), num_frames=8, batch_size=0, max_tokens=2 * longest, num_workers=0
    )
    seen: list[tuple[int, int]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            seen.append((pl_module.pruning.last.llm_tokens, len(pl_module.pruning.last.grids)))

    trainer = pl.Trainer(
        accelerator="cpu", logger=False, max_steps=8, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False, callbacks=[Look()],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    assert len(seen) == 8 and max(tokens for tokens, _ in seen) <= 2 * longest
    assert max(videos for _, videos in seen) >= 2, "the budget is used, not only respected"


def test_a_run_resumed_midway_goes_on_with_the_same_ratios(tiny_folder: Path, tmp_path: Path) -> None:
    settings = {**FAST, "llm_lr": 0, "connector_lr": 0}

    class StopAt(pl.Callback):  # max_steps is part of the learning rates
        def __init__(self, step: int) -> None:
            self.step = step

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == self.step

    def run(last: int, **more: Any) -> tuple[VideoFinetune, list[tuple[int, float, float]], pl.Trainer]:
        torch.manual_seed(0)
        module, look = VideoFinetune(str(tiny_folder), "stts", RANGE, **settings), Ratios()
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, max_steps=6, enable_progress_bar=False, callbacks=[look, StopAt(last)],
            enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, loader([batch_for(module)] * 6), **more)
        return module, look.seen, trainer

    whole, seen, _ = run(6)
    _, first, stopped = run(3)
    stopped.save_checkpoint(tmp_path / "at3.ckpt")
    resumed, rest, _ = run(6, ckpt_path=tmp_path / "at3.ckpt", weights_only=True)
    assert first + rest == seen and len(rest) == 3
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.slow
def test_two_ranks_draw_the_same_ratios(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    """Each rank writes what it used; the command is the user's."""
    out = tmp_path / "out"
    argv: list[str | Path] = [
        "--config",
        ROOT / "configs" / "shapes_tiny.yaml",
        "--model.model",
        tiny_folder,
        "--out",
        out,
    ]
    argv += ["--model.retention_ratio", json.dumps(RANGE), "--data.batch_size", "2", "--trainer.max_steps", "4"]
    argv += ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.num_val_clips", "0"]
    argv += ["--trainer.callbacks+=tests.train.test_retention.WriteRatios", f"--trainer.callbacks.out={tmp_path}"]
    run(argv)
    rule = make_retention(RANGE)
    used = [[float(line) for line in (tmp_path / f"rank{rank}.txt").read_text().split()] for rank in (0, 1)]
    assert used[0] == used[1] == [rule.at(step) for step in range(4)]


class WriteRatios(pl.Callback):
    def __init__(self, out: str) -> None:
        self.out = Path(out)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        with (self.out / f"rank{trainer.global_rank}.txt").open("a") as lines:
            lines.write(f"{pl_module.pruning.retention_ratio!r}\n")
