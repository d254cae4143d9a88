"""Load and save stock Hugging Face VLMs beside their pruner.

The stock class is loaded as it is, never a subclass: transformers skips its own key mapping for subclasses, and weights
stay silently random. What we learn lives in its own safetensors file: `save_pretrained` renames attached modules.

A folder of ours is complete (a stock folder, `stts.json`, `scorer.safetensors`) or holds a scorer alone: the last two,
and the name of the base whose weights it needs. `stts.json` records what the model was trained with; every verb reads
it through `as_recorded` and `recorded_options`, so that a setting left out is the one that was trained.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from stts.files import staged
from stts.models.checkpoints.card import model_card
from stts.models.families.base import adapter_class, check_transformers, host_info
from stts.pruners.base import Pruner
from stts.pruners.registry import PRUNERS, make_pruner

if TYPE_CHECKING:
    from stts.models.pruning.context import Pruning

PRUNER_FILE = "stts.json"
WEIGHTS_FILE = "scorer.safetensors"
CARD_FILE = "README.md"
_SETTINGS = ("pruner", "options", "retention_ratio", "positions")
TRAINED = ("num_frames", "sampler", "max_fps", "retention_trained")
"""What a folder records of its training beside the pruner's settings."""


def load_vlm(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A stock model in eval mode and its processor, from a local folder or a hub id.

    ValueError: the folder has no model, the family has no adapter, or the file lacks, adds or reshapes a tensor."""
    check_transformers()
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        settings = pruner_settings(path)
        if settings is None:
            raise ValueError(f"{path} has no config.json; expected a Hugging Face model folder (see `stts init`)")
        raise ValueError(
            f"{path} holds a scorer alone (no config.json), for the base {settings.get('base')!r}; load it with "
            "stts.PrunedVLM.from_pretrained, or make it complete: `stts export --merge FOLDER OUT`"
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except OSError as error:
        raise ValueError(
            f"model {str(path)!r} is neither a local folder nor reachable on the hub; check the path ({error})"
        ) from error
    except ValueError as error:
        if "llava_qwen" not in str(error):
            raise
        raise ValueError(
            f"{path} holds LLaVA-Video's original files, written for its authors' own code; make them a stock folder "
            "first: `stts export --from_llava_video FOLDER OUT`"
        ) from error
    adapter = adapter_class(config.model_type)
    model, info = AutoModelForImageTextToText.from_pretrained(
        path,
        dtype=dtype or "auto",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are listed, and refused below
    )
    wrong = {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    if wrong:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}, the class of family {config.model_type!r} in its "
            f"config.json: {wrong}; these weights would stay random"
        )
    processor = AutoProcessor.from_pretrained(path)
    adapter.prepare_processor(processor, config)
    return model.eval(), processor


def own_files(path: str | Path) -> Path:
    """The local folder with what we wrote; for a hub id a download of just that. It may hold nothing of ours."""
    if Path(path).exists():
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=[PRUNER_FILE, WEIGHTS_FILE, "config.json"]))
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


def as_recorded(path: str | Path, **settings: Any) -> dict[str, Any]:
    """`settings`, each that is None replaced by what the folder or hub id records under its name, if it does."""
    saved = pruner_settings(path) or {}
    return {name: saved.get(name) if value is None else value for name, value in settings.items()}


def recorded_options(path: str | Path, name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options of the pruner `name`: those that the folder records for it, where it does, with `options` on top."""
    saved = pruner_settings(path)
    return {**(saved["options"] if saved is not None and saved["pruner"] == name else {}), **(options or {})}


def recorded_pruner(path: str | Path, settings: Mapping[str, Any]) -> str:
    """The pruner a folder names. ValueError for code of others: a downloaded file must not choose what runs."""
    name: str = settings["pruner"]
    if name not in PRUNERS:
        raise ValueError(f"{path} wants to run {name!r}, which is not in the registry; if you trust it, pass its name")
    return name


def load_pruner(
    path: str | Path, model: PreTrainedModel, name: str | None = None, options: Mapping[str, Any] | None = None
) -> Pruner:
    """The pruner `name` for this model (default: the one the folder was trained with), with its trained weights and
    options; `options` come on top of those.

    ValueError when the pruner learns but the folder holds no weights for it."""
    settings = pruner_settings(path)
    name = name or (recorded_pruner(path, settings) if settings else "none")
    pruner = make_pruner(name, host_info(model), **recorded_options(path, name, options))
    load_weights(path, model, name, pruner)
    return pruner


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


def save_pruned(
    path: str | Path,
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pruning: Pruning | None,
    *,
    base: str | None = None,
    scorer_only: bool = False,
    public: bool = False,
    tensors: Mapping[str, Tensor] | None = None,
    trained: Mapping[str, Any] | None = None,
) -> Path:
    """Write model, processor and pruner to a folder that appears whole or not at all; an older one is replaced.

    base: checkpoint to name as what the model was started from (default: where it was loaded from). scorer_only: leave
    out model and processor; the caller knows that the weights are those of the base. public: do not name a base that is
    a local folder. tensors: written in place of the modules' own, where those are cut over ranks: "model.<name>" and
    "scorer.<name>". trained: what `TRAINED` names, where it is known."""
    given = None if tensors is None else {part: _below(part, tensors) for part in ("model", "scorer")}
    path, base = Path(path), absolute(model.name_or_path if base is None else base)
    with staged(path) as part:
        part.mkdir()
        if not scorer_only:
            model.save_pretrained(part, state_dict=None if given is None else given["model"])
            processor.save_pretrained(part)
        if pruning is not None and pruning.name is not None and pruning.pruner.stages:
            settings = {
                "pruner": pruning.name,
                "options": dict(pruning.options),
                "retention_ratio": pruning.retention_ratio,
                "positions": pruning.positions,
                "exact": pruning.exact,
                "family": model.config.model_type,
                "base": None if public and Path(base).exists() else base,
            }
            settings |= {name: value for name, value in (trained or {}).items() if value is not None}
            if scorer_only:  # the processor that comes with the base may have other limits
                settings["video_size"] = dict(processor.video_processor.size)
            (part / PRUNER_FILE).write_text(json.dumps(settings, indent=2) + "\n")
            (part / CARD_FILE).write_text(model_card(settings, pruning.pruner, scorer_only=scorer_only))
            if pruning.module is not None:
                state = pruning.module.state_dict() if given is None else given["scorer"]
                state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
                save_file(state, part / WEIGHTS_FILE)
    return path


def _below(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


def resize_videos(processor: Any, size: Mapping[str, int]) -> None:
    """Set the limits of a video processor. ValueError for other words than its own."""
    own = processor.video_processor.size
    names = set(dict(own))
    if set(size) != names:
        raise ValueError(f"video_size={dict(size)} must give {sorted(names)}, as this model's video processor does")
    processor.video_processor.size = type(own)(**size)


def absolute(path: str) -> str:
    """A local folder by its absolute path; a hub id, or what is not here, as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path
