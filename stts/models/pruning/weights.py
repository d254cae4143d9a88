"""The files of a trained pruner: its settings, `stts.json`, and what it learned, `scorer.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stts.pruners.base import HostInfo, Positions, Pruner
from stts.pruners.registry import make_pruner

PRUNER_FILE = "stts.json"
WEIGHTS_FILE = "scorer.safetensors"
ADAPTER_FILE = "adapter_config.json"
"""Of peft, beside `adapter_model.safetensors`."""
_SETTINGS = ("pruner", "options", "retention_ratio", "positions")


def own_files(path: str | Path) -> Path:
    """The local folder with what we wrote; for a hub id a download of just that. It may hold nothing of ours."""
    if Path(path).exists():
        return Path(path)
    try:
        return Path(
            snapshot_download(str(path), allow_patterns=[PRUNER_FILE, WEIGHTS_FILE, "config.json", "adapter_*"])
        )
    except (OSError, ValueError):
        return Path(path)  # no such repository, or no way to it: loading the model says so


def pruner_settings(path: str | Path) -> dict[str, Any] | None:
    """What `save_pruned` wrote about pruner and training in this folder or hub id, or None where it did not."""
    file = own_files(path) / PRUNER_FILE
    if not file.is_file():
        return None
    settings: dict[str, Any] = json.loads(file.read_text())
    if lacking := [name for name in _SETTINGS if name not in settings]:
        raise ValueError(f"{file} lacks {lacking}; expected a file written by `stts fit` or `stts export`")
    return settings


def recorded_options(path: str | Path, name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of the pruner `name`: those that the folder records for it, where it does, with `options` on top."""
    saved = pruner_settings(path)
    return {**(saved["options"] if saved is not None and saved["pruner"] == name else {}), **(options or {})}


def load_weights(path: str | Path, model: PreTrainedModel, name: str, pruner: Pruner) -> None:
    """Give a pruner that learns the weights in this folder, and put it in eval mode; nothing to do for others.

    ValueError: there are none for it, they were trained on another family, or tensors differ in name or shape."""
    if not isinstance(pruner, nn.Module):
        return
    path = own_files(path)
    settings = pruner_settings(path)
    if settings is None or settings["pruner"] != name:
        have = f"weights of {settings['pruner']!r}" if settings else f"no {PRUNER_FILE}"
        raise ValueError(
            f"pruner {name!r} learns, but {path} has {have}: its scores would be random. "
            f"Train it first: `stts fit --config configs/shapes_stts.yaml --model.pruner {name}`"
        )
    family = settings.get("family", model.config.model_type)
    if family != model.config.model_type:
        raise ValueError(
            f"the scorer in {path} was trained on family {family!r}, this model is {model.config.model_type!r}; "
            f"load it on its base {settings.get('base')!r}"
        )
    if not (Path(path) / WEIGHTS_FILE).is_file():
        raise ValueError(f"{path} has {PRUNER_FILE} but no {WEIGHTS_FILE}; copy the whole folder")
    fill(pruner, load_file(Path(path) / WEIGHTS_FILE), f"{path}/{WEIGHTS_FILE}")
    pruner.eval()


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load `tensors` into the module. ValueError unless names and shapes are the same, with every difference."""
    own = module.state_dict()
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"{source} does not fit: {'; '.join(wrong)}; was it made for another model or other options?")
    module.load_state_dict(tensors)


@dataclass(frozen=True)
class Named:
    """A pruner made by its name."""

    pruner: Pruner
    options: Mapping[str, Any]
    positions: Positions | None = None
    """Those it was trained with, where it was."""
    is_random: bool = False
    """It learns, and no weights were found for it."""


def load_named(
    name: str, model: PreTrainedModel, host: HostInfo, options: Mapping[str, Any], weights: str | Path | None
) -> Named:
    """The pruner `name`; one that learns with weights and recorded options of the folder or hub id `weights` (None:
    where the model was loaded from, if there are some). ValueError for weights that are named and do not fit."""
    pruner = make_pruner(name, host, **options)
    if not isinstance(pruner, nn.Module):
        return Named(pruner, options)
    source = str(weights or model.name_or_path)
    settings = (pruner_settings(source) if source else None) or {}
    if settings.get("pruner") != name and weights is None:
        return Named(pruner, options, is_random=True)
    options = recorded_options(source, name, options)
    pruner = make_pruner(name, host, **options)
    load_weights(source, model, name, pruner)
    return Named(pruner, options, settings.get("positions"))
