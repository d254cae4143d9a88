"""Checkpoints of DeepSpeed read by another number of ranks or another ZeRO stage, through its universal format: a file
for each parameter and each of its optimizer states, whole, from which every rank takes its piece."""

from __future__ import annotations

import io
import shutil
from argparse import Namespace
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TAG = "checkpoint"
"""Folder inside a checkpoint of Lightning's that holds the files of all ranks."""


def is_cut(state: Path) -> bool:
    """Whether ZeRO-3 wrote this checkpoint."""
    return any((state / TAG).glob("zero_pp_rank_*_model_states.pt"))


def convert(state: Path, out: Path, *, to_cut: bool) -> None:
    """Write the checkpoint `state` to the folder `out`, in the universal format as ZeRO-3 reads it (`to_cut`), or as
    ZeRO 1 and 2 do. Call it on one rank.

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
            f"DeepSpeed cannot convert {state} for another number of ranks or another stage ({type(error).__name__}: "
            f"{error}); use the strategy and the number of ranks that wrote it"
        ) from error
    if not (out / TAG / "zero" / "optimizer_state.pt").exists():
        raise ValueError(
            f"DeepSpeed wrote no optimizer state to {out}; use the strategy and the number of ranks that wrote {state}"
        )
    if is_cut(state) != to_cut:
        (_for_cut if to_cut else _for_whole)(out / TAG)


def _for_cut(folder: Path) -> None:
    """From ZeRO 1 or 2 to 3, which has one count of steps for all parameters, and names files of rank 0 otherwise."""
    file = folder / "zero" / "optimizer_state.pt"
    common = torch.load(file, weights_only=False)
    step = torch.load(next((folder / "zero").glob("*/step.pt")), weights_only=False)
    common["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": common["param_groups"]}
    torch.save(common, file)
    shutil.copy2(folder / "mp_rank_00_model_states.pt", folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")


def _for_whole(folder: Path) -> None:
    """From ZeRO-3 to 1 or 2, which have a count of steps for each parameter, and a dictionary around each tensor."""
    import deepspeed

    file = folder / "zero" / "optimizer_state.pt"
    common = torch.load(file, weights_only=False)
    step = common.pop("optimizer_state_dict")["state"][0]["step"]
    torch.save(common | {"ds_version": deepspeed.__version__}, file)
    for parameter in (folder / "zero").iterdir():
        if parameter.is_dir():
            for state in parameter.glob("*.pt"):
                torch.save({"param": torch.load(state, weights_only=False)}, state)
            torch.save(step, parameter / "step.pt")
    shutil.copy2(folder / "zero_pp_rank_0_mp_rank_00_model_states.pt", folder / "mp_rank_00_model_states.pt")


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
