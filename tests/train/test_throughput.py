"""What one sees of a run: FLOPs against torch's own counter, pictures by their pixels, loggers by what they wrote."""

from __future__ import annotations

import csv
import importlib.util
import re
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import stts_train.cli as cli
from stts.models.checkpoints.load import load_vlm
from stts.models.families.base import adapter_class
from stts.models.pruning.report import Report
from stts.report.overlay import draw_overlay
from stts.tokens import Grid
from stts_train.loggers import make_loggers
from stts_train.module import VideoFinetune
from stts_train.overlays import Overlays, first_frames
from stts_train.retention import Sampled
from stts_train.throughput import FlopMeter, Throughput, peak_tflops
from tests.families import FAMILIES, write_family
from tests.models.families import qwen_tiny
from tests.models.families.molmo2_tiny import SIDE, write_molmo2
from tests.train.test_module import FAST, batch_for, fit
from tests.train.test_retention import loader

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# --- throughput ------------------------------------------------------------------------------------------------------


def measure(module: VideoFinetune, num_samples: int = 1) -> tuple[float, float, float]:
    """FLOPs of one batch: ours, of that computed again, and torch's count of everything."""
    batch = batch_for(module, num_samples)
    if module.gradient_checkpointing:
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    meter = FlopMeter(module)
    # attention in plain matrix products: torch counts no fused kernel of CPUs
    with module.train().pruning, sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as theirs:
        meter.on = True
        losses = module._forward(batch)
        meter.in_backward = True
        torch.stack(list(losses.values())).sum().backward()
    ours, again = meter.read(batch, module.pruning.last)
    meter.remove()
    return ours, again, float(theirs.get_total_flops())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_are_those_that_torch_counts(tiny_folder: Path, checkpointing: bool) -> None:
    ours, again, theirs = measure(VideoFinetune(str(tiny_folder), gradient_checkpointing=checkpointing, **FAST))
    assert ours + again == pytest.approx(theirs, rel=1e-9)
    assert (again > 0.2 * ours) == checkpointing


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_every_family_are_those_that_torch_counts(family: str, tmp_path: Path) -> None:
    ours, again, theirs = measure(VideoFinetune(str(write_family(family, tmp_path / family)), **FAST))
    assert again == 0 and ours == pytest.approx(theirs, rel=1e-3 if family == "molmo2" else 1e-9)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_pruned_flops_are_those_that_torch_counts_less_its_padding(tiny_folder: Path, checkpointing: bool) -> None:
    """On CPU frames of unequal length attend padded, which is no work of the model's, and the scorer attends too."""
    ours, again, theirs = measure(VideoFinetune(str(tiny_folder), "stts", gradient_checkpointing=checkpointing, **FAST))
    assert 0.94 * theirs < ours + again < theirs


def test_fewer_tokens_cost_less_and_frozen_parts_need_no_backward(tiny_folder: Path) -> None:
    dense, half = (measure(VideoFinetune(str(tiny_folder), "stts", ratio, **FAST))[0] for ratio in (1.0, 0.5))
    assert half < 0.9 * dense
    frozen = VideoFinetune(str(tiny_folder), "none", **{**FAST, "vit_lr": 0, "connector_lr": 0})
    ours, _, theirs = measure(frozen)
    assert ours == pytest.approx(theirs, rel=0.02)


def test_logged_rates_are_flops_over_time_and_peak(tiny_folder: Path) -> None:
    module = VideoFinetune(str(tiny_folder), "none", **FAST)
    flops, again, _ = measure(module)
    trainer = fit(module, [batch_for(module, 1)] * 4, accumulate_grad_batches=2, callbacks=[Throughput(peak=0.5)])
    values = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert again == 0
    assert values["tflops_per_s"] * values["step_s"] * 1e12 == pytest.approx(2 * flops, rel=1e-5), "two batches a step"
    assert values["mfu"] == pytest.approx(values["tflops_per_s"] / 0.5)
    assert not any(layer._forward_hooks for layer in module.modules() if isinstance(layer, torch.nn.Linear))


def test_without_a_known_peak_there_is_no_mfu(tiny_folder: Path) -> None:
    module = VideoFinetune(str(tiny_folder), **FAST)
    values = fit(module, [batch_for(module, 1)], callbacks=[Throughput()]).callback_metrics
    assert "mfu" not in values and values["tflops_per_s"] > 0
    with pytest.raises(ValueError, match="peak_tflops=-1"):
        Throughput(-1)


def test_validation_is_no_part_of_a_step(tiny_folder: Path) -> None:
    module, meter = VideoFinetune(str(tiny_folder), **FAST), Throughput()
    meter._since = 0.0
    meter.on_validation_start()
    before = meter._pause
    meter.on_validation_end()
    assert 0 < meter._since < 10 and before > 0
    batch, look = batch_for(module, 1), Steps()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, max_steps=2, num_sanity_val_steps=0, enable_progress_bar=False,
        val_check_interval=1, enable_model_summary=False, enable_checkpointing=False, callbacks=[meter, look],
    )  # fmt: skip
    trainer.fit(module, loader([batch] * 2), loader([batch]))
    assert len(set(look.seen)) == 1, "the FLOPs of a validation pass are not counted either"


class Steps(pl.Callback):
    """FLOPs of each step, recovered from what was logged."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        values = trainer.callback_metrics
        self.seen.append(round((values["tflops_per_s"] * values["step_s"]).item() * 1e6))


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_known_by_name_and_never_guessed(device: str, peak: float | None) -> None:
    assert peak_tflops(device) == peak


# --- pictures --------------------------------------------------------------------------------------------------------


def report_of(grid: Grid, index: list[int], scores: torch.Tensor | None) -> Report:
    return Report([grid], [torch.tensor(index)], [scores])


def test_dropped_groups_are_dark_and_scores_are_coloured() -> None:
    grid = Grid(2, 2, 2)
    scores = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 0.5])
    frames = np.full((2, 64, 64, 3), 200, np.uint8)
    picture = np.asarray(draw_overlay(frames, report_of(grid, [0, 1, 2, 3, 7], scores)))
    top, left = 2 * 14 + 14, 2  # captions, then frame 0 at 128 x 128 pixels, its scores below, frame 1 at its right
    right = left + 132
    assert (picture[top : top + 128, left : left + 128] == 200).all(), "frame 0 is kept whole"
    assert (picture[top : top + 64, right : right + 128] == 40).all(), "a fifth of 200"
    assert (picture[top + 64 : top + 128, right + 64 : right + 128] == 200).all()
    heat = picture[top + 130 : top + 258]
    purple, yellow = (68, 1, 84), (253, 231, 36)  # the ends of viridis
    assert tuple(heat[10, left + 10]) == purple and tuple(heat[10, left + 100]) == yellow
    assert tuple(heat[100, right + 100]) not in (purple, yellow)


def test_a_pruner_without_scores_gives_frames_alone() -> None:
    frames = np.full((2, 64, 64, 3), 200, np.uint8)
    with_scores = draw_overlay(frames, report_of(Grid(2, 2, 2), [0], torch.rand(8)))
    alone = draw_overlay(frames, report_of(Grid(2, 2, 2), [0], None))
    assert with_scores.height - alone.height == 130
    late = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, torch.nan])  # the last cell was gone before the stage that scored
    purple = np.asarray(draw_overlay(frames, report_of(Grid(2, 2, 2), [0], late)))
    lowest = np.asarray(draw_overlay(frames, report_of(Grid(2, 2, 2), [0], late.nan_to_num(-1.0))))
    assert (purple == lowest).all()


def test_long_videos_show_32_frames_and_shared_cells_are_shown_twice() -> None:
    long = draw_overlay(np.zeros((200, 64, 64, 3), np.uint8), report_of(Grid(200, 1, 1), [0], None))
    assert long.width == 8 * 132 and long.height == 4 * (128 + 2 + 14 + 4) + 28
    frames = np.full((4, 64, 64, 3), 200, np.uint8)
    shared = np.asarray(draw_overlay(frames, report_of(Grid(2, 1, 1), [1], None)))
    assert [int(shared[60, 2 + 132 * frame + 60].max()) for frame in range(4)] == [40, 40, 200, 200]


def test_frames_are_those_the_tower_saw(tiny_folder: Path, tmp_path: Path) -> None:
    """Every family's own processor, there and back, on frames that it need not resize."""
    llava = load_vlm(tiny_folder)[1]
    qwens = [qwen_tiny.make(family, tmp_path)[1] for family in ("qwen2_5_vl", "qwen3_vl")]
    molmo2 = load_vlm(write_molmo2(tmp_path))[1]
    sides = [(56, 56), (24, 40), (24, 40), (SIDE * 14, SIDE * 14)]
    families = ("llava_onevision", "qwen2_5_vl", "qwen3_vl", "molmo2")
    for family, processor, (height, width) in zip(families, [llava, *qwens, molmo2], sides, strict=True):
        maker = processor.video_processor
        rng = np.random.default_rng(0)
        videos = [rng.integers(0, 256, (4, height, width, 3), dtype=np.uint8) for _ in range(2)]
        inputs = maker(videos=videos, do_sample_frames=False, return_tensors="pt")
        assert np.array_equal(first_frames(inputs, maker, adapter_class(family)), videos[0]), family


def test_overlays_are_written_every_n_steps(tiny_folder: Path, tmp_path: Path) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", 0.3, **FAST)
    fit(module, [batch_for(module)] * 10, accumulate_grad_batches=2, callbacks=[Overlays(tmp_path, 2)])
    files = sorted((tmp_path / "overlays").iterdir())
    assert [file.name for file in files] == ["step-00000002.png", "step-00000004.png"]
    with Image.open(files[0]) as picture:
        assert picture.size == (8 * (168 + 4), 2 * (168 + 2) + 18 + 28)  # 56 pixels three times


# --- loggers ---------------------------------------------------------------------------------------------------------


def test_loggers_are_chosen_by_name(tmp_path: Path) -> None:
    assert [type(logger).__name__ for logger in make_loggers("csv,wandb", tmp_path)] == ["CsvLog", "WandbLogger"]
    assert [type(logger).__name__ for logger in make_loggers(["csv"], tmp_path)] == ["CsvLog"]
    for wrong in ("mlflow", "csv,csv", ["csv", "comet"]):
        with pytest.raises(ValueError, match="expected each of csv, wandb, tensorboard at most once"):
            make_loggers(wrong, tmp_path)


@pytest.mark.skipif(
    any(map(importlib.util.find_spec, ("tensorboard", "tensorboardX"))), reason="TensorBoard is installed"
)
def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--logger tensorboard needs a package that is not installed: pip install"):
        make_loggers("csv,tensorboard", tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="W&B is not installed")
def test_wandb_offline_and_csv_hold_the_same_values(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    module = VideoFinetune(str(tiny_folder), "stts", **FAST)
    loggers = make_loggers("csv,wandb", tmp_path)
    callbacks = [Throughput(peak=1.0), Overlays(tmp_path, 2)]
    fit(module, [batch_for(module)] * 2, logger=loggers, log_every_n_steps=1, callbacks=callbacks)
    import wandb

    theirs = {name: value for name, value in dict(loggers[1].experiment.summary).items() if is_logged(name)}
    wandb.finish()
    [metrics] = (tmp_path / "log").glob("*/metrics.csv")
    ours: dict[str, float] = {}
    for row in csv.DictReader(metrics.open()):
        ours |= {name: float(value) for name, value in row.items() if value and is_logged(name)}
    assert theirs.keys() - {"overlay", "overlays"} == ours.keys()
    assert ours == pytest.approx({name: theirs[name] for name in ours})
    assert {"train/answer_loss", "train/temporal_loss", "tflops_per_s", "mfu", "step_s", "scorer_grad_norm"} <= set(
        ours
    )
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    [written] = folder.glob("*.wandb")
    until = time.monotonic() + 60  # another process writes it, and `finish` does not wait for that
    while (missing := [n for n in ours if n.encode() not in written.read_bytes()]) and time.monotonic() < until:
        time.sleep(0.1)
    assert missing == [], "in the file that `wandb sync` would send"
    assert list(folder.glob("files/media/images/overlay*.png"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="W&B is not installed")
def test_a_resumed_run_goes_on_in_its_own_logs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, through the command line. W&B: one id, the settings, a table of overlays, and nobody's key in any file.
    CSV and TensorBoard: every step once, in the run's own folder, also of a start that died behind its checkpoint."""
    key = "0123456789abcdef" * 2 + "01234567"
    for name, value in {"MODE": "offline", "SILENT": "true", "API_KEY": key}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    argv = ["--config", str(ROOT / "configs" / "shapes_tiny.yaml"), "--model.model", str(tiny_folder)]
    argv += ["--out", str(tmp_path / "out"), "--overlay_every", "1", "--checkpoint_every", "1"]
    has_board = importlib.util.find_spec("tensorboard") is not None
    local = "csv,tensorboard" if has_board else "csv"
    argv += ["--logger", f"wandb,{local}"]
    argv += ["--data.phases=[{num_clips: 8}]", "--data.batch_size=2", "--data.num_val_clips=0", "--data.num_workers=0"]
    argv += ["--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--model.warmup_steps=0"]
    import wandb

    for steps in (1, 2):
        assert cli.fit([*argv, f"--trainer.max_steps={steps}", "--resume", "last" if steps > 1 else "auto"]) == 0
        wandb.finish()
        if steps == 1:  # it dies in the second step, behind the checkpoint of the first
            for logger in make_loggers(local, tmp_path / "out", version=0, first_step=1):
                logger.log_metrics({"train/answer_loss": 99.0}, step=1)
                logger.save()
                logger.finalize("failed")
    [metrics] = (tmp_path / "out" / "log").glob("*/metrics.csv")
    rows = [row for row in csv.DictReader(metrics.open()) if row["train/answer_loss"]]
    assert [row["step"] for row in rows] == ["0", "1"] and rows[1]["train/answer_loss"] != "99.0"
    if has_board:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        [board] = (tmp_path / "out" / "tensorboard").iterdir()
        events = EventAccumulator(str(board)).Reload().Scalars("train/answer_loss")
        seen = [(event.step, pytest.approx(event.value)) for event in events]
        assert seen == [(int(row["step"]), float(row["train/answer_loss"])) for row in rows]
    folders = sorted((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and len({folder.name.rpartition("-")[2] for folder in folders}) == 1, "under one id"
    wanted = [
        b"llm_grad_norm",
        b"train/temporal_loss",
        b"retention_measured",
        b"pad_waste",
        b"overlays",
        b"scorer_lr",
    ]
    until = time.monotonic() + 60
    for folder in folders:
        [written] = folder.glob("*.wandb")
        while (missing := [n for n in wanted if n not in written.read_bytes()]) and time.monotonic() < until:
            time.sleep(0.1)
        assert missing == [], folder
        assert list(folder.glob("files/media/table/overlays*.json"))
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert not [file for file in files if key.encode() in file.read_bytes()]


def test_the_command_line_chooses_what_is_watched(tiny_folder: Path, tmp_path: Path) -> None:
    argv = ["--config", str(ROOT / "configs" / "shapes_tiny.yaml"), "--model.model", str(tiny_folder)]
    argv += ["--out", str(tmp_path), "--logger", "csv,wandb", "--overlay_every", "2", "--peak_tflops", "1"]
    argv += ["--model.retention_ratio", "{low: 0.2, high: 0.6, spacing: log}"]
    made = cli.make_cli(argv)
    assert [type(logger).__name__ for logger in made.trainer.loggers] == ["CsvLog", "WandbLogger"]
    watching = {type(callback).__name__: callback for callback in made.trainer.callbacks}
    assert watching["Overlays"].every_n_steps == 2 and watching["Throughput"].peak == 1.0
    assert made.model.retention == Sampled(low=0.2, high=0.6, spacing="log")


def test_a_wrong_logger_stops_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config", str(ROOT / "configs" / "shapes_tiny.yaml"), "--model.model", str(tiny_folder)]
    assert cli.fit([*argv, "--out", str(tmp_path / "out"), "--logger", "mlflow"]) == 2
    assert "--logger mlflow: expected each of csv, wandb, tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def is_logged(name: str) -> bool:
    """Not one of the loggers' own columns."""
    return not re.match("_|trainer/|epoch|step$", name)


# --- gradients -------------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_names_the_samples_before_it_is_used(tiny_folder: Path) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", **FAST)
    batch, before = batch_for(module), [p.detach().clone() for p in module.parameters()]
    weight = next(p for name, p in module.named_parameters() if name.endswith("layers.1.self_attn.q_proj.weight"))
    weight.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(ValueError, match=f"the gradient is not finite at step 0.*{batch.uids[1]}"):
        fit(module, [batch])
    assert all(torch.equal(now, old) for now, old in zip(module.parameters(), before, strict=True))
