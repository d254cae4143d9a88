"""A checkpoint of `stts fit` as an ordinary Hugging Face folder: the weights as they were at that step, whole.

stts export <out>/checkpoints/step-00000500 FOLDER"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from stts.files import staged
from stts.models.checkpoints.hub import check_empty, export
from stts.models.checkpoints.load import absolute, save_pruned

from .checkpoints import Saved, check_model
from .data_module import frames_of
from .frozen import DEEPSPEED_PREFIX, frozen_tensors, whole_state
from .lora import save_adapter
from .module import VideoFinetune


def export_checkpoint(
    folder: str | Path,
    out: str | Path,
    *,
    scorer_only: bool = False,
    adapter: bool = False,
    base_model: str | Path | None = None,
) -> Path:
    """Write a checkpoint of any strategy (DDP, ZeRO, FSDP2) and any number of ranks, on one process and a CPU.

    scorer_only: leave out the model, whose weights must be those of its base. adapter: leave it out, and write the
    adapter of a run with LoRA in peft's format, with the scorer beside it. base_model: where the model that the run
    started from lies now (default: where it lay then). Host memory holds the model twice.

    ZeRO-3's files are read by DeepSpeed as pickles, which can run code: of those, only export what you trained. All
    others are read as tensors alone.

    ValueError: `folder` is no checkpoint, `out` is not empty, or names or shapes are not those of the run's model."""
    saved = Saved.read(Path(folder))
    check_empty(Path(out))
    if adapter and scorer_only:
        raise ValueError("--adapter writes the scorer too; leave out --scorer_only")
    module = _module(saved, base_model)
    check_model(saved, module)
    tensors = frozen_tensors(module, saved.base_dtype) | read_weights(saved)
    states = whole_state(module)
    own, found = ({name: tuple(tensor.shape) for name, tensor in given.items()} for given in (states, tensors))
    if wrong := sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name)):
        name = wrong[0]
        raise ValueError(
            f"{saved.state} does not fit the model {module.model.name_or_path}: {len(wrong)} tensors differ, the first "
            f"is {name}, {found.get(name)} in the checkpoint and {own.get(name)} in the model; name the folder that "
            "the run started from with --base_model"
        )
    first: dict[int, str] = {}
    tensors = {name: tensors[first.setdefault(id(own), name)] for name, own in states.items()}  # tied ones are one
    module.load_state_dict(tensors, assign=True)  # of their own dtype
    if adapter:
        return _export_adapter(module, Path(out))
    if not scorer_only:
        return module.export(out)
    with tempfile.TemporaryDirectory() as scratch:
        return export(module.export(Path(scratch) / "whole"), out, scorer_only=True)


def _export_adapter(module: VideoFinetune, out: Path) -> Path:
    """ValueError unless the adapter and the scorer are all that has learned."""
    learning = set(module.learning_rates) - {"llm", "scorer"}
    if module.lora is None or learning:
        raise ValueError(
            "--adapter is for a run that trains low-rank additions (model.lora) and nothing else but the scorer; this "
            f"one trains {', '.join(module.learning_rates)}{'' if module.lora else ' without model.lora'}; export the "
            "whole model, without --adapter"
        )
    with staged(out) as part:
        save_pruned(part, module.model, module.processor, module.pruning, scorer_only=True, trained=module.trained)
        save_adapter(part, whole_state(module), module.lora, absolute(module.model.name_or_path))
    return out


def _module(saved: Saved, base_model: str | Path | None) -> VideoFinetune:
    """What was trained, before its training."""
    settings = dict(saved.settings["model"])
    if base_model is not None:
        settings["model"] = str(base_model)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(VideoFinetune, "model")
    module: VideoFinetune = parser.instantiate_classes(parser.parse_object({"model": settings})).model
    module.trained |= frames_of(saved.settings["data"])
    return module


def read_weights(saved: Saved) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name in `VideoFinetune`, in host memory, of its dtype while training."""
    if saved.strategy.startswith("FSDP2"):
        return _read_distributed(saved.state)
    if not saved.strategy.startswith("DeepSpeed"):
        tensors: dict[str, Tensor] = torch.load(saved.state, map_location="cpu", weights_only=True, mmap=True)[
            "state_dict"
        ]
        return tensors
    if saved.strategy.endswith("stage 3"):
        return _read_cut(saved)
    [file] = saved.state.glob("*/mp_rank_00_model_states.pt")
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["module"]
    return {name.removeprefix(DEEPSPEED_PREFIX): tensor for name, tensor in tensors.items()}


def _read_distributed(state: Path) -> dict[str, Tensor]:
    """torch's own format: each rank has written its part of every tensor."""
    kinds = FileSystemReader(state).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(kind.size, dtype=kind.properties.dtype)
        for name, kind in kinds.items()
        if name.startswith("state_dict.") and isinstance(kind, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, checkpoint_id=state, no_dist=True)
    return {name.removeprefix("state_dict."): tensor for name, tensor in tensors.items()}


def _read_cut(saved: Saved) -> dict[str, Tensor]:
    """ZeRO-3: put together from every rank's fp32 copy, by DeepSpeed, and rounded to what the model computed with."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    precision = str(saved.settings["trainer"]["precision"]).partition("-")[0]
    low = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision)
    with contextlib.redirect_stdout(io.StringIO()):
        parts = get_fp32_state_dict_from_zero_checkpoint(str(saved.state), lazy_mode=True)
    by_id: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():  # parts of tied tensors are one
        if id(part) not in by_id:
            tensor = part.contiguous()
            by_id[id(part)] = tensor.to(low) if low is not None and tensor.is_floating_point() else tensor
        tensors[name.removeprefix(DEEPSPEED_PREFIX)] = by_id[id(part)]
    return tensors
