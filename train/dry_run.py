"""`stts fit --config x.yaml --dry-run`: the same settings, rehearsed in seconds before a GPU is booked.

The model becomes a tiny random one of its family (`stts/models/families/tiny.py`), the data a few drawn ShapesQA
clips, the machine one CPU process, the run two optimizer steps with validation and export. Everything else is as the
config says: pruner and its options, losses, rates, LoRA, checkpointing, precision. Nothing is written to `out`.

Where torchrun has started several processes, the rehearsal takes all of them, and the strategy of the config. Of the
run's own data, where it is there, all rows are parsed and two decoded (`row_check.py`)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stts.models.families.published import config_of
from stts.models.families.tiny import write_tiny

from .console import TIE
from .row_check import sources_of

STEPS, _BATCH, _FRAMES = 2, 2, 8
_CUT_FROM = 100  # elements: by DeepSpeed's default, stage 3 would leave every parameter of a tiny model whole


def ranks() -> int:
    """Processes that torchrun has started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


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
        "data.phases": f"[{{num_clips: {_BATCH * batches * ranks()}}}]",
        "data.shapes.num_sampled": _FRAMES,
        "data.num_val_clips": _BATCH * ranks(),
        "data.batch_size": _BATCH,
        "data.max_tokens": 0,
        "data.val_batch_size": _BATCH,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.devices": ranks(),
        "trainer.num_nodes": 1,
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
    return [*argv, *(f"--{name}={value}" for name, value in replaced.items()), *_strategy(trainer["strategy"])]


def _strategy(chosen: Any) -> list[str]:
    if ranks() == 1:
        return ["--trainer.strategy=auto"]
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would take a GPU that it sees
    if not isinstance(chosen, str) or not chosen.startswith("deepspeed_stage_3"):
        return []
    settings: dict[str, Any] = {"stage": 3, "persistence_threshold": _CUT_FROM}
    if chosen.endswith("offload"):
        settings |= {"offload_optimizer": True, "offload_parameters": True}
    return [
        "--trainer.strategy=stts_train.strategies.DeepSpeed",
        f"--trainer.strategy.init_args={json.dumps(settings)}",
    ]


def not_rehearsed(config: Any) -> str:
    """What a rehearsal leaves out, with the files that are not there."""
    data, trainer = config["data"], config["trainer"]
    strategy = trainer["strategy"]
    if not isinstance(strategy, str):
        strategy = strategy["class_path"].rpartition(".")[2]
    files = [file for file in (*(source["path"] for source in sources_of(data)), data.get("val")) if file]
    missing = {file: "" if Path(str(file)).exists() else f"{TIE}(missing)" for file in files}
    named = [f"{file}{missing[file]}" for file in files if data["kind"] != "shapes"]
    machine = [f"trainer.strategy={strategy}"] if ranks() == 1 else []
    return "left out: " + ", ".join([f"the weights of {config['model']['model']}", *named, *machine])
