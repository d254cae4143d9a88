"""Load and save stock Hugging Face VLMs beside their pruner.

The stock class is loaded as it is, never a subclass: transformers skips its own key mapping for subclasses, and weights
stay silently random. What we learn lives in its own safetensors file: `save_pretrained` renames attached modules.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from stts.models.base import check_family, host_info
from stts.pruners.base import Pruner
from stts.pruners.registry import make_pruner

if TYPE_CHECKING:
    from stts.models.pruning import Pruning

PRUNER_FILE = "stts.json"
WEIGHTS_FILE = "scorer.safetensors"


def load_vlm(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A stock model in eval mode and its processor, from a local folder or a hub id.

    ValueError: the folder has no model, the family has no adapter, or the file lacks or adds a tensor."""
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; expected a Hugging Face model folder (see `stts init`)")
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(
            f"model {str(path)!r} is neither a local folder nor reachable on the hub; check the path ({error})"
        ) from error
    check_family(config.model_type)
    model, info = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True)
    wrong = {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if wrong:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {wrong}; these weights would stay random")
    return model.eval(), AutoProcessor.from_pretrained(path)


def pruner_settings(path: str | Path) -> dict[str, Any] | None:
    """What `save_pruned` wrote about the pruner, or None for a folder without one."""
    file = Path(path) / PRUNER_FILE
    return json.loads(file.read_text()) if file.is_file() else None


def load_pruner(
    path: str | Path, model: PreTrainedModel, name: str | None = None, options: Mapping[str, Any] | None = None
) -> Pruner:
    """The pruner `name` for this model (default: the one the folder was trained with), with its trained weights.

    ValueError when the pruner learns but the folder holds no weights for it."""
    settings = pruner_settings(path)
    name = name or (settings["pruner"] if settings else "none")
    trained = settings is not None and settings["pruner"] == name
    if options is None:
        options = settings["options"] if settings is not None and trained else {}
    pruner = make_pruner(name, host_info(model), **options)
    if isinstance(pruner, nn.Module):
        if not trained:
            have = f"weights of {settings['pruner']!r}" if settings else f"no {PRUNER_FILE}"
            raise ValueError(
                f"pruner {name!r} learns, but {path} has {have}: its scores would be random. "
                f"Train it first: `stts fit --config configs/shapes_stts.yaml --model.pruner {name}`"
            )
        weights = load_file(Path(path) / WEIGHTS_FILE)
        wrong = pruner.load_state_dict(weights, strict=False)
        if wrong.missing_keys or wrong.unexpected_keys:
            raise ValueError(f"{path}/{WEIGHTS_FILE}: {wrong}; was it made for another model or other options?")
        pruner.eval()
    return pruner


def save_pruned(path: str | Path, model: PreTrainedModel, processor: ProcessorMixin, pruning: Pruning | None) -> Path:
    """Write model, processor and pruner to a folder that appears whole or not at all; an older one is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        staged = Path(scratch) / "new"
        model.save_pretrained(staged)
        processor.save_pretrained(staged)
        if pruning is not None and pruning.name is not None and pruning.pruner.stages:
            settings = {
                "pruner": pruning.name,
                "options": dict(pruning.options),
                "retention_ratio": pruning.retention_ratio,
                "positions": pruning.positions,
            }
            (staged / PRUNER_FILE).write_text(json.dumps(settings, indent=2) + "\n")
            if pruning.module is not None:
                tensors = {key: value.detach().cpu().contiguous() for key, value in pruning.module.state_dict().items()}
                save_file(tensors, staged / WEIGHTS_FILE)
        if path.exists():
            os.replace(path, Path(scratch) / "old")
        os.replace(staged, path)
        shutil.rmtree(Path(scratch) / "old", ignore_errors=True)
    return path
