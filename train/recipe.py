"""`stts fit --model.model M --data.train x.jsonl`: the recipe of M's family, fitted to the rows and this machine.

The recipes are configs/*_stts.yaml; a wheel has them beside this file. What a command line gives stays as it is. What
it leaves out is the recipe's, except what the recipe means for other machines or other data: devices and strategy,
batches of a step, steps, warm-up, validation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, PretrainedConfig

from stts.models.families.published import PUBLISHED, config_of

SMALL, _SMALL_WIDTH = "shapes_stts.yaml", 512
"""For language models narrower than this, such as the small VLM of the quick start: far larger rates."""
EPOCHS, _STEPS_AN_EPOCH = 3, 10
_FAR_ABOVE = 10
_RATES = ("llm_lr", "vit_lr", "connector_lr", "scorer_lr")


def recipes_folder() -> Path:
    """Of the checkout, or of the wheel."""
    here = Path(__file__).parent
    return next(folder for folder in (here / "configs", here.parent / "configs") if (folder / SMALL).is_file())


def recipe_of(config: PretrainedConfig) -> Path:
    """The YAML file for a model of this family and size. ValueError for a family without one."""
    small = recipes_folder() / SMALL
    starts = {}
    for path in sorted(recipes_folder().glob("*_stts.yaml")):
        start = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["model"]
        if start in PUBLISHED:
            starts[PUBLISHED[start]["model_type"]] = path
    if config.model_type not in starts:
        raise ValueError(
            f"no recipe for family {config.model_type!r}; known: {', '.join(starts)}; write a YAML and give it with "
            "--config"
        )
    return small if config.get_text_config().hidden_size < _SMALL_WIDTH else starts[config.model_type]


def find_config(model: str) -> PretrainedConfig:
    """The config of a folder or hub id; only a hub id that is neither known nor in the cache is asked for online."""
    try:
        return config_of(model)
    except ValueError as unknown:
        if Path(model).exists() or model.count("/") != 1:
            raise
        try:
            return AutoConfig.from_pretrained(model)
        except OSError as error:
            raise ValueError(f"--model.model {model!r}: {str(error).splitlines()[0]}") from unknown


@dataclass(frozen=True)
class Machine:
    """Where a run starts."""

    devices: int
    """Of one node."""
    nodes: int
    is_gpu: bool

    @classmethod
    def started(cls) -> Machine | None:
        """What torchrun has started; None without it."""
        if "LOCAL_WORLD_SIZE" not in os.environ:
            return None
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = max(1, int(os.environ.get("WORLD_SIZE", local)) // local)
        return cls(local, nodes, torch.cuda.device_count() > 0)

    @classmethod
    def here(cls) -> Machine:
        """As torchrun says, where it does; else all GPUs of this machine, or one process on its CPU."""
        gpus = torch.cuda.device_count()
        return cls.started() or cls(max(1, gpus), 1, gpus > 0)

    @property
    def ranks(self) -> int:
        return self.devices * self.nodes


def value_of(words: Sequence[str], option: str) -> str | None:
    """What the words give an option, the last time; None: nothing."""
    found = None
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option:
            found = value if equals else words[place + 1] if place + 1 < len(words) else ""
    return found


def for_machine(words: Sequence[str], recipe: Mapping[str, Any], machine: Machine) -> dict[str, str]:
    """Options that put the recipe on this machine, and out and validation where the words name none."""
    trainer = recipe["trainer"]
    name = Path(value_of(words, "--model.model") or "").name
    options = {
        "--out": f"runs/{name}_{recipe['model']['pruner']}",
        "--data.val": "null",
        "--trainer.accelerator": "gpu" if machine.is_gpu else "cpu",
        "--trainer.devices": str(machine.devices),
        "--trainer.num_nodes": str(machine.nodes),
        "--data.num_workers": str(min(recipe["data"]["num_workers"], max(1, (os.cpu_count() or 1) - 1))),
    }
    if machine.ranks == 1 and "strategy" in trainer:
        options["--trainer.strategy"] = "auto"
    elif machine.ranks > 1 and not machine.is_gpu:
        options["--trainer.strategy"] = "ddp"
    elif machine.ranks > 1 and find_spec("deepspeed") is None:
        options["--trainer.strategy"] = "fsdp2"
    return {option: value for option, value in options.items() if value_of(words, option) is None}


def for_rows(
    words: Sequence[str], recipe: Mapping[str, Any], ranks: int, num_rows: int, samples_per_batch: int
) -> dict[str, str]:
    """Options that fit steps to the rows: `EPOCHS` of them and at most the recipe's steps; batches of a step as many as
    the recipe's, but never so many that an epoch is shorter than ten steps."""
    trainer, model = recipe["trainer"], recipe["model"]
    per_step = max(1, int(trainer.get("devices", 1)) * int(trainer.get("accumulate_grad_batches", 1)) // ranks)
    batches = max(1, num_rows // (samples_per_batch * ranks))
    accumulate = int(value_of(words, "--trainer.accumulate_grad_batches") or 0)
    accumulate = accumulate or max(1, min(per_step, batches // _STEPS_AN_EPOCH))
    steps = min(int(trainer["max_steps"]), max(1, math.ceil(EPOCHS * batches / accumulate)))
    steps = int(value_of(words, "--trainer.max_steps") or steps)
    options = {
        "--trainer.accumulate_grad_batches": str(accumulate),
        "--trainer.max_steps": str(steps),
        "--model.warmup_steps": str(min(int(model["warmup_steps"]), max(1, steps // 10))),
        "--trainer.log_every_n_steps": str(max(1, min(int(trainer["log_every_n_steps"]), steps, batches // 2))),
        "--progress_every": str(max(1, min(int(recipe["progress_every"]), steps // 10))),
    }
    if value_of(words, "--data.val") is not None:
        options["--trainer.val_check_interval"] = str(accumulate * max(1, steps // 5))
    return {option: value for option, value in options.items() if value_of(words, option) is None}


def high_rates(model: Mapping[str, Any]) -> list[str]:
    """A line for every learning rate far above that of the recipe for this model; [] where there is none to compare
    with. Adapters (LoRA) take larger rates than weights, so theirs are left alone."""
    try:
        recipe = recipe_of(config_of(str(model["model"])))
    except ValueError:
        return []
    own = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]
    lines = []
    for name in _RATES:
        given = model[name] or 0.0
        if given >= _FAR_ABOVE * own[name] and not (name == "llm_lr" and model["lora"] is not None):
            lines.append(
                f"warning: model.{name}={given:g} is {given / own[name]:.0f} times that of configs/{recipe.name} "
                f"({own[name]:g}), the recipe for this model; such a rate can destroy a pretrained model"
            )
    return lines
