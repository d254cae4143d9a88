"""Checkpoints of DeepSpeed read by another number of ranks, through its universal format: a file for each parameter and
each of its optimizer states, whole, from which every rank takes its piece."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

TAG = "checkpoint"
"""Folder inside a checkpoint of Lightning's that holds the files of all ranks."""
_CONVERT = "import stts; from deepspeed.checkpoint import ds_to_universal as u; u.main(u.parse_arguments())"


def convert(state: Path, out: Path) -> None:
    """Write the checkpoint `state` to the folder `out`, in the universal format. Call it on one rank.

    In a process of its own, since the conversion forks. ValueError with its last words where it fails."""
    options = ["--input_folder", state / TAG, "--output_folder", out / TAG, "--inject_missing_state"]
    options += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run([sys.executable, "-c", _CONVERT, *map(str, options)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"DeepSpeed cannot convert {state} for another number of ranks; use the number that wrote it. Its last "
            f"words: {done.stderr[-500:]}"
        )
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
