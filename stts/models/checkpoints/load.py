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
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from stts.files import staged
from stts.models.checkpoints.card import model_card
from stts.models.families.base import adapter_class, check_transformers, host_info
from stts.models.pruning.context import Pruning
from stts.models.pruning.weights import ADAPTER_FILE as ADAPTER_FILE
from stts.models.pruning.weights import PRUNER_FILE as PRUNER_FILE
from stts.models.pruning.weights import WEIGHTS_FILE as WEIGHTS_FILE
from stts.models.pruning.weights import fill as fill
from stts.models.pruning.weights import load_weights as load_weights
from stts.models.pruning.weights import own_files as own_files
from stts.models.pruning.weights import pruner_settings as pruner_settings
from stts.models.pruning.weights import recorded_options as recorded_options
from stts.progress import WORTH_A_BAR, no_bars
from stts.pruners.base import Pruner
from stts.pruners.registry import PRUNERS, make_pruner

CARD_FILE = "README.md"
TRAINED = ("num_frames", "sampler", "max_fps", "retention_trained")
"""What a folder records of its training beside the pruner's settings."""


def check_no_run(path: str | Path) -> None:
    """ValueError for the folder of a run of `stts fit`, whose model lies in it."""
    if not (Path(path) / "config.json").is_file() and (Path(path) / "checkpoints").is_dir():
        inside = [Path(path) / name for name in ("model", "best") if (Path(path) / name / "config.json").is_file()]
        use = f"its model is {inside[0]}" if inside else f"export one of {path}/checkpoints with `stts export`"
        raise ValueError(f"{path} is the folder of a run of `stts fit`; {use}")


def load_vlm(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A stock model in eval mode and its processor, from a local folder or a hub id.

    ValueError: the folder has no model, the family has no adapter, or the file lacks, adds or reshapes a tensor."""
    check_transformers()
    if (adapter_file := Path(path) / ADAPTER_FILE).is_file() and not (Path(path) / "config.json").is_file():
        base = json.loads(adapter_file.read_text(encoding="utf-8")).get("base_model_name_or_path")
        merge = (
            "`stts export --merge FOLDER OUT`"
            if (Path(path) / PRUNER_FILE).is_file()
            else "PeftModel.from_pretrained(base_model, adapter).merge_and_unload().save_pretrained(folder), with the "
            "processor of the base beside it"
        )
        raise ValueError(
            f"{path} holds an adapter of peft for the base {base!r}, no model; merge the two first: {merge}"
        )
    if Path(path).exists() and not (Path(path) / "config.json").is_file():
        check_no_run(path)
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
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) or WORTH_A_BAR + 1  # of a hub id: any
    with no_bars(size):
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


def as_recorded(path: str | Path, **settings: Any) -> dict[str, Any]:
    """`settings`, each that is None replaced by what the folder or hub id records under its name, if it does."""
    saved = pruner_settings(path) or {}
    return {name: saved.get(name) if value is None else value for name, value in settings.items()}


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
    states = None if tensors is None else {part: _below(part, tensors) for part in ("model", "scorer")}
    path, base = Path(path), absolute(model.name_or_path if base is None else base)
    with staged(path) as part:
        part.mkdir()
        if not scorer_only:
            with no_bars(model.get_memory_footprint()):
                model.save_pretrained(part, state_dict=None if states is None else states["model"])
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
                state = pruning.module.state_dict() if states is None else states["scorer"]
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
