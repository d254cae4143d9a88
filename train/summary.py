"""Before the first step: what learns, on how many ranks, how much a step is, and what memory is planned."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl

from .checkpoints import strategy_name
from .console import print_wrapped
from .parts import PARTS, part_of
from .plan import GIB, make_plan
from .plan_config import run_of


class Summary(pl.Callback):
    """Prints parameters per part, strategy, ranks, batches and tokens per optimizer step, and memory as `stts plan`
    counts it, with its own assumptions on files and texts.

    settings: of the run, as parsed."""

    def __init__(self, settings: Any) -> None:
        self.settings, self.parameters, self.memory = settings, "", ""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Counts parameters here, while every rank still holds all of them."""
        learning, frozen = dict.fromkeys(PARTS, 0), 0
        for name, parameter in pl_module.named_parameters():
            if parameter.requires_grad:
                learning[part_of(name, pl_module.pruning.adapter)] += parameter.numel()
            else:
                frozen += parameter.numel()
        parts = [f"{part} {_short(number)}" for part, number in learning.items() if number]
        self.parameters = f"training {', '.join(parts)} parameters ({_short(frozen)} frozen)"
        if trainer.is_global_zero:  # before the pruner's attention is switched on in the config
            config = copy.deepcopy(pl_module.model.config)
            run = run_of(self.settings, config, gpus=trainer.world_size)
            size = getattr(pl_module.processor.video_processor, "size", None)  # of frames of free resolution
            planned = make_plan(replace(run, video_size=dict(size) if size else None))
            host = planned.host + planned.ready
            self.memory = f"memory planned per rank: {planned.total / GIB:.3g} GiB"
            self.memory += f", {host / GIB:.3g} on the host" if host else ""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        ranks, per_step = trainer.world_size, trainer.accumulate_grad_batches
        each = f"at most {data.max_tokens} tokens" if data.max_tokens else f"{data.batch_size} samples"
        total = (data.max_tokens or data.batch_size) * ranks * per_step
        unit = "tokens" if data.max_tokens else "samples"
        lines = (
            self.parameters,
            f"a step is {ranks} x {per_step} batches of {each}: {total:,} {unit}",
            f"{strategy_name(trainer)} on {ranks} rank(s), {trainer.precision}; {self.memory}",
        )
        for line in lines:
            print_wrapped(line)


def _short(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
