"""The parts of a model that learn at rates of their own (LLM, tower, connector, scorer), and the rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from stts.models.families.base import Adapter

from .lora import MARK, Lora

PARTS = ("llm", "vit", "connector", "scorer")
Family = Adapter | type[Adapter]


def learns(name: str, rates: Mapping[str, float], lora: Lora | None, family: Family) -> bool:
    """Whether a parameter of `VideoFinetune` is trained: its part has a rate, and something reads what it makes."""
    part = part_of(name, family)
    is_adapted = part == "llm" and lora is not None and MARK not in name
    return part in rates and not is_adapted and not is_unused(name, family)


def part_of(name: str, family: Family) -> str:
    """Which part a parameter of `VideoFinetune` belongs to."""
    return "scorer" if name.startswith("scorer.") else family.part_of(name)


def is_unused(name: str, family: Family) -> bool:
    """Whether nothing reads what this parameter makes, so that it gets no gradient."""
    return any(unused in name for unused in family.unused)


def learning_parts(
    named_parameters: Iterable[tuple[str, nn.Parameter]], family: Family
) -> dict[str, list[nn.Parameter]]:
    """The parameters that learn, by part, in the order of `PARTS`; parts without any are left out."""
    parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            parts[part_of(name, family)].append(parameter)
    return {part: parameters for part, parameters in parts.items() if parameters}


def parameter_groups(
    parts: Mapping[str, list[nn.Parameter]], rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for AdamW, two of each part: matrices with weight decay, biases and norms without."""
    groups = []
    for part, parameters in parts.items():
        for decays in (True, False):
            chosen = [parameter for parameter in parameters if (parameter.ndim > 1) == decays]
            name, decay = (part, weight_decay) if decays else (f"{part}_no_decay", 0.0)
            if chosen:
                groups.append({"params": chosen, "lr": rates[part], "weight_decay": decay, "name": name})
    return groups


def part_of_group(name: str) -> str:
    """Of a group that `parameter_groups` named."""
    return name.removesuffix("_no_decay")


def cosine(step: int, total: int, warmup: int, lowest: float) -> float:
    """Factor on the peak rate: (step + 1) / warmup while warming up, then a half cosine to `lowest` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def check_rates(rates: Mapping[str, float], warmup_steps: int, min_lr_ratio: float) -> None:
    """ValueError for values outside their ranges."""
    if any(rate < 0 for rate in rates.values()):
        raise ValueError(f"learning rates {dict(rates)} must not be negative; 0 or null freezes a part")
    if warmup_steps < 0 or not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"warmup_steps={warmup_steps} must be >= 0 and min_lr_ratio={min_lr_ratio} in [0, 1]")
