"""Checkpoints of DeepSpeed read by another number of ranks, through its universal format: a file for each parameter and
each of its optimizer states, whole, from which every rank takes its piece."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from torch import Tensor

TAG = "checkpoint"
"""Folder inside a checkpoint of Lightning's that holds the files of all ranks."""


def convert(state: Path, out: Path) -> None:
    """Write the checkpoint `state` to the folder `out`, in the universal format. Call it on one rank.

    ValueError with DeepSpeed's reason where it fails. DeepSpeed reads the files as pickles, which can run code."""
    from deepspeed.checkpoint import ds_to_universal

    folders = {"input_folder": str(state / TAG), "output_folder": str(out / TAG)}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}  # more would be forked
    options = Namespace(**folders, **workers, keep_temp_folder=False, strict=True, inject_missing_state=True)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # its progress
            ds_to_universal.main(options)
    except Exception as error:
        raise ValueError(
            f"DeepSpeed cannot convert {state} for another number of ranks ({type(error).__name__}: {error}); use the "
            "number that wrote it"
        ) from error
    if not (out / TAG / "zero" / "optimizer_state.pt").exists():
        raise ValueError(f"DeepSpeed wrote no optimizer state to {out}; use the number of ranks that wrote {state}")


def repair(optimizer: Any, before: list[dict[str, Any]], checkpoint: Mapping[str, Any]) -> None:
    """Undo what DeepSpeed 0.19.8 does at stage 3 while it loads: every group of parameters gets the settings of the
    first one, and all of them count their steps in one tensor, which then counts each step once per group.

    before: `settings_of_groups` before loading. Rates are those of the checkpoint's schedule."""
    [schedule] = checkpoint["lr_schedulers"]
    for group, settings, rate in zip(optimizer.param_groups, before, schedule["_last_lr"], strict=True):
        group.update(settings, lr=rate)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def settings_of_groups(optimizer: Any) -> list[dict[str, Any]]:
    """All but the parameters."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
