"""Several runs of `stts fit`, one after the other in the same processes.

`main` takes a JSON file with a list of argument lists. Each run starts with a line "== its folder"."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import stts  # noqa: F401  (before lightning)

# isort: split
import lightning.pytorch as pl
import torch
from torch.distributed.tensor import DTensor

from stts.models.families.tiny import write_tiny
from stts_train import checkpoints, dry_run
from stts_train.cli import fit
from stts_train.console import print_rank_zero
from tests.conftest import make_inputs


class KeepLogits(pl.Callback):
    """At the end writes `<out>/live.pt`: what the live model says, pruned and dense, cut over ranks or not, and which
    share of its parameters this rank holds between two steps."""

    QUESTION, FRAMES = "v what colour ?", 8

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.eval()
        held = held_share(pl_module)
        if hasattr(pl_module, "unshard"):
            pl_module.unshard()
        inputs = live_inputs(pl_module.processor, next(p.dtype for p in pl_module.parameters()))
        with torch.no_grad():
            pruned = pl_module.model(**inputs).logits
            pl_module.pruning.detach()
            dense = pl_module.model(**inputs).logits
            pl_module.pruning.attach()
        if trainer.is_global_zero:
            torch.save({"pruned": pruned, "dense": dense, "held": held}, Path(trainer.default_root_dir) / "live.pt")


def held_share(module: torch.nn.Module) -> float:
    parameters = list(module.parameters())
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    held += sum(p.ds_tensor.numel() for p in parameters if hasattr(p, "ds_tensor") and not p.numel())
    return held / sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


class WaitForSignal(pl.Callback):
    """Within step 6 rank 0 waits until it has been told to stop."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        while trainer.global_step == 5 and trainer.is_global_zero and not pl_module.losses.stop_requested:
            time.sleep(0.01)


class StopInSteps(pl.Callback):
    """Every rank is told to stop within these steps, as by a signal."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        pl_module.losses.stop_requested |= trainer.global_step + 1 in self.steps


class WaitInStep6(pl.Callback):
    """Rank 1 says that it is in the middle of step 6, and waits for its end, where the environment asks for it."""

    def on_before_backward(self, trainer: pl.Trainer, *_: Any) -> None:
        if "WAIT_IN_STEP_6" in os.environ and trainer.global_step == 5 and trainer.global_rank == 1:
            print("in the middle of step 6, process", os.getpid(), flush=True)
            signal.pause()


class DieInSave(pl.Callback):
    """Leaves half of every file of the checkpoint of step 8, says so, and waits for its end."""

    def on_train_start(self, *_: Any) -> None:
        whole = checkpoints._to_disk

        def half(folder: Path) -> None:
            if not folder.name.endswith("8"):
                return whole(folder)
            for file in folder.rglob("*"):
                if file.is_file():
                    os.truncate(file, file.stat().st_size // 2)
            print("half written", flush=True)
            signal.pause()

        checkpoints._to_disk = half


def live_inputs(processor: Any, dtype: torch.dtype) -> Any:
    inputs = make_inputs(processor, [KeepLogits.QUESTION], num_frames=KeepLogits.FRAMES)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(dtype)
    return inputs


def write_on_every_rank(*args: Any) -> Path:
    """The model of a rehearsal, which each rank writes for itself: after an earlier run in the same processes, whose
    group is still there, transformers would write on rank 0 alone."""
    with patch("torch.distributed.is_initialized", return_value=False):
        return write_tiny(*args)


def main(argv: list[str]) -> int:
    dry_run.write_tiny = write_on_every_rank
    for words in json.loads(Path(argv[0]).read_text()):
        print_rank_zero(f"== {next(word for word in words if word.startswith('--out='))}")
        if code := fit(words):
            return code
    return 0
