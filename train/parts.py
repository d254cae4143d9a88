"""The parts of a model that learn at rates of their own (LLM, tower, connector, scorer), and the rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

from stts.models.families.base import Adapter

from .lora import MARK, Lora

PARTS = ("llm", "vit", "connector", "scorer")
Family = Adapter | type[Adapter]


def learns(name: str, rates: Mapping[str, float], lora: Lora | None, family: Family) -> bool:
    """Whether a parameter of `VideoFinetune` is trained: its part has a rate, and something reads what it makes."""
    part = part_of(name, family)
    whole = part != "llm" or lora is None or MARK in name
    return part in rates and whole and not is_unused(name, family)


def part_of(name: str, family: Family) -> str:
    """Which part a parameter of `VideoFinetune` belongs to."""
    return "scorer" if name.startswith("scorer.") else family.part_of(name)


def is_unused(name: str, family: Family) -> bool:
    """Whether nothing reads what this parameter makes, so that it gets no gradient."""
    return any(unused in name for unused in family.unused)


def cosine(step: int, total: int, warmup: int, lowest: float) -> float:
    """Factor on the peak rate: (step + 1) / warmup while warming up, then a half cosine to `lowest` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def _check(rates: Mapping[str, float], warmup_steps: int, min_lr_ratio: float) -> None:
    if any(rate < 0 for rate in rates.values()):
        raise ValueError(f"learning rates {dict(rates)} must not be negative; 0 or null freezes a part")
    if warmup_steps < 0 or not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"warmup_steps={warmup_steps} must be >= 0 and min_lr_ratio={min_lr_ratio} in [0, 1]")
