"""What a plan of memory and work depends on, read from the settings of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from stts.models.checkpoints.load import recorded_options

from .lora import Lora
from .parts import PARTS
from .retention import make_retention
from .zero_config import read_deepspeed_json


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """What of the states a rank holds."""

    name: str
    cuts: tuple[bool, bool, bool]
    """Weights, gradients, optimizer states: cut over ranks?"""
    deepspeed: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a plan depends on."""

    config: PretrainedConfig
    pruner: str
    pruner_options: Mapping[str, Any]
    retention_ratio: float
    rates: Mapping[str, float]
    lora: Lora | None
    checkpointing: bool
    precision: str
    strategy: Strategy
    gpus: int
    accumulate: int
    num_frames: int
    video_size: Mapping[str, int] | None
    batch_size: int
    max_tokens: int
    num_workers: int = 0
    """Loader processes per rank."""
    frame_size: tuple[int, int] = (720, 1280)
    """Pixels of the files, height and width; only where the family's resolution is free."""
    text_tokens: int = 128
    """Of a conversation without its video."""
    answer_tokens: int = 32
    gpu_gib: float = 80.0
    """Memory of one GPU."""


def run_of(settings: Any, config: PretrainedConfig, *, gpus: int = 0, **assumed: Any) -> Run:
    """The run of these settings of `stts fit` on a model of this config.

    gpus: in all; 0: devices x nodes of the settings. assumed: fields of `Run` that no settings have, as `text_tokens`.
    """
    model, data, trainer = settings["model"], settings["data"], settings["trainer"]
    rates = {part: model[f"{part}_lr"] for part in PARTS if model[f"{part}_lr"]}
    lora = model["lora"]
    if lora is not None and not isinstance(lora, Lora):
        lora = Lora(**dict(lora))
    shapes = data["kind"] == "shapes"
    return Run(
        config=config,
        pruner=model["pruner"],
        pruner_options=_options(model),
        retention_ratio=make_retention(_plain(model["retention_ratio"])).highest,
        rates=rates,
        lora=lora,
        checkpointing=model["gradient_checkpointing"],
        precision=str(trainer["precision"] or "32-true"),
        strategy=read_strategy(trainer["strategy"]),
        gpus=gpus or _devices(trainer),
        accumulate=trainer["accumulate_grad_batches"],
        num_frames=data["shapes"]["num_sampled"] if shapes else data["num_frames"],
        video_size=_plain(model["video_size"]),
        batch_size=data["batch_size"],
        max_tokens=data["max_tokens"],
        num_workers=data["num_workers"],
        **assumed,
    )


def _options(model: Any) -> dict[str, Any]:
    options = dict(model["pruner_options"] or {})
    return recorded_options(model["model"], model["pruner"], options) if Path(model["model"]).is_dir() else options


def read_strategy(given: Any) -> Strategy:
    """From `trainer.strategy`: a name, or a class with its arguments."""
    name = given if isinstance(given, str) else str(given["class_path"]).rpartition(".")[2]
    options = {} if isinstance(given, str) else dict(given.get("init_args") or {})
    if name.lower().startswith("deepspeed"):
        if (file := options.get("config")) is not None:
            zero = read_deepspeed_json(_plain(file))["zero_optimization"]
            stage = zero["stage"]
            optimizer, parameters = (
                (zero.get(part) or {}).get("device", "none") != "none"
                for part in ("offload_optimizer", "offload_param")
            )
        else:
            digits = [int(letter) for letter in name if letter.isdigit()]
            stage = options.get("stage") if options.get("stage") is not None else (digits[0] if digits else 2)
            optimizer = name.endswith("offload") or bool(options.get("offload_optimizer"))
            parameters = (name.endswith("offload") and stage == 3) or bool(options.get("offload_parameters"))
        return Strategy(
            name=f"deepspeed stage {stage}{' offload' * optimizer}",
            cuts=(stage >= 3, stage >= 2, stage >= 1),
            deepspeed=True,
            offload_optimizer=optimizer,
            offload_parameters=parameters,
        )
    if name.lower() in ("fsdp2", "fsdp", "modelparallelstrategy", "fsdpstrategy"):
        return Strategy(name="fsdp2", cuts=(True, True, True))
    return Strategy(name="ddp", cuts=(False, False, False))


def _plain(value: Any) -> Any:
    """Parsed mappings as dicts."""
    return value.as_dict() if hasattr(value, "as_dict") else value


def _devices(trainer: Any) -> int:
    devices = trainer["devices"]
    return (devices if isinstance(devices, int) and devices > 0 else 1) * trainer["num_nodes"]
