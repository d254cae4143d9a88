"""`stts fit --config x.yaml --dry-run`: the same settings, rehearsed in seconds before a GPU is booked.

The model becomes a tiny random one of its family (`stts/models/families/tiny.py`), the data a few drawn ShapesQA
clips, the machine one CPU process, the run two optimizer steps with validation and export. Everything else is as the
config says: pruner and its options, losses, rates, LoRA, checkpointing, precision. Nothing is written to `out`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stts.models.families.published import config_of
from stts.models.families.tiny import write_tiny

STEPS, _BATCH, _FRAMES = 2, 2, 8


def rehearsal(argv: Sequence[str], config: Any, scratch: Path) -> list[str]:
    """Arguments of the rehearsal of a run: its own, and what replaces model, data and machine.

    ValueError for a model of which neither folder nor shapes are known."""
    model, trainer = config["model"], config["trainer"]
    small = write_tiny(scratch / "model", config_of(model["model"]))
    per_step = min(2, trainer["accumulate_grad_batches"])
    batches = STEPS * per_step
    precision = str(trainer["precision"] or "32-true")
    replaced = {
        "out": scratch / "out",
        "resume": "null",
        "progress_every": 1,
        "checkpoint_every": 0,
        "model.model": small,
        "data.kind": "shapes",
        "data.phases": f"[{{num_clips: {_BATCH * batches}}}]",
        "data.shapes.num_sampled": _FRAMES,
        "data.num_val_clips": _BATCH,
        "data.batch_size": _BATCH,
        "data.max_tokens": 0,
        "data.val_batch_size": _BATCH,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.num_nodes": 1,
        "trainer.strategy": "auto",
        "trainer.precision": precision if precision.startswith(("bf16", "32", "64")) else "32-true",
        "trainer.accumulate_grad_batches": per_step,
        "trainer.max_steps": STEPS,
        "trainer.max_epochs": 1,
        "trainer.val_check_interval": batches,
        "trainer.check_val_every_n_epoch": "null",
        "trainer.num_sanity_val_steps": 0,
        "trainer.log_every_n_steps": 1,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
    }
    return [*argv, *(f"--{name}={value}" for name, value in replaced.items())]


def not_rehearsed(config: Any) -> str:
    """What a rehearsal leaves out, with the files that are not there."""
    data, trainer = config["data"], config["trainer"]
    strategy = trainer["strategy"]
    if not isinstance(strategy, str):
        strategy = strategy["class_path"].rpartition(".")[2]
    train = data.get("train")
    sources = [source["path"] for source in train] if isinstance(train, list) else [train]
    files = [file for file in (*sources, data.get("val")) if file] if data["kind"] != "shapes" else []
    named = [f"{file}{'' if Path(str(file)).exists() else ' (missing)'}" for file in files]
    return "left out: " + ", ".join(
        [f"the weights of {config['model']['model']}", *named, f"trainer.strategy={strategy}"]
    )
