"""The model in training as an ordinary Hugging Face folder, its parameters cut over ranks or not.

From a checkpoint, without training: `export.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from stts.models.checkpoints.load import save_pruned

from .frozen import whole_state
from .lora import merge
from .strategies import is_cut, whole_tensors


def export_live(module: Any, path: Path, trainer: pl.Trainer | None) -> Path:
    """Write a `VideoFinetune` to `path`, whole or not at all; LoRA's additions are added to the weights.

    trainer: the one that trains it now, or None. Where it has cut the parameters every rank must call this; rank 0
    writes."""
    writes, tensors = trainer is None or trainer.is_global_zero, None
    if trainer is not None and is_cut(trainer.strategy):
        tensors = whole_tensors(module, keep=writes)
    if writes and module.lora is not None:
        tensors = merge(whole_state(module) if tensors is None else tensors, module.lora)
    # The switched-on attention must not end up in config.json. On every rank: where the hooks stand among DeepSpeed's
    # decides in which order parameters are gathered.
    module.pruning.detach()
    module.pruning.retention_ratio = module.retention.target
    try:
        if writes:
            save_pruned(path, module.model, module.processor, module.pruning, tensors=tensors, trained=module.trained)
        return path
    finally:
        if trainer is not None:
            module.pruning.attach()
