"""What `stts plan` reads from the configuration of a training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser
from transformers import PretrainedConfig

from stts.models.checkpoints.load import recorded_options
from stts.models.families.published import config_of

from .cli import ReadingCLI, read_config
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
    frame_size: tuple[int, int]
    """Pixels of the files, height and width; only where the family's resolution is free."""
    video_size: Mapping[str, int] | None
    batch_size: int
    max_tokens: int
    text_tokens: int
    """Of a conversation without its video."""
    answer_tokens: int
    num_workers: int = 0
    """Loader processes per rank."""
    gpu_gib: float = 80.0
    """Memory of one GPU."""


class PlanCLI(ReadingCLI):
    """The parser of `stts fit` with the questions of `stts plan`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.prog = "stts plan"
        parser.usage = "stts plan --config FILE.yaml [--gpus N] [--gpu_gib G] [options of stts fit]"
        parser.add_argument("--gpus", type=int, default=0, help="GPUs in all; 0: devices x nodes of the config")
        parser.add_argument("--gpu_gib", type=float, default=80.0, help="memory of one GPU")
        parser.add_argument("--model_config", type=Path | None, help="config.json of a model that is not here")
        parser.add_argument("--frame_size", type=str, default="720x1280", help="of the video files, height x width")
        parser.add_argument("--text_tokens", type=int, default=128, help="of a conversation without its video")
        parser.add_argument("--answer_tokens", type=int, default=32, help="how many of them are answers")


def read_run(argv: Sequence[str]) -> Run:
    """The run that a config describes. ValueError for settings `stts fit` would refuse, and for unknown models."""
    config = read_config(argv, PlanCLI)
    if config["gpus"] < 0 or config["gpu_gib"] <= 0:
        raise ValueError(f"--gpus {config['gpus']} and --gpu_gib {config['gpu_gib']} must be above 0")
    height, _, width = config["frame_size"].partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"--frame_size {config['frame_size']} must be HEIGHTxWIDTH in pixels, such as 720x1280")
    model, data, trainer = config["model"], config["data"], config["trainer"]
    rates = {part: model[f"{part}_lr"] for part in PARTS if model[f"{part}_lr"]}
    lora = model["lora"]
    if lora is not None and not isinstance(lora, Lora):
        lora = Lora(**dict(lora))
    shapes = data["kind"] == "shapes"
    return Run(
        config=config_of(model["model"], config["model_config"]),
        pruner=model["pruner"],
        pruner_options=_options(model),
        retention_ratio=make_retention(_plain(model["retention_ratio"])).highest,
        rates=rates,
        lora=lora,
        checkpointing=model["gradient_checkpointing"],
        precision=str(trainer["precision"] or "32-true"),
        strategy=read_strategy(trainer["strategy"]),
        gpus=config["gpus"] or _devices(trainer),
        accumulate=trainer["accumulate_grad_batches"],
        num_frames=data["shapes"]["num_sampled"] if shapes else data["num_frames"],
        frame_size=(int(height), int(width)),
        video_size=_plain(model["video_size"]),
        batch_size=data["batch_size"],
        max_tokens=data["max_tokens"],
        text_tokens=config["text_tokens"],
        answer_tokens=config["answer_tokens"],
        num_workers=data["num_workers"],
        gpu_gib=config["gpu_gib"],
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
