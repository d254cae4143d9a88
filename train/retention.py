"""Elastic retention: which fraction of visual tokens each optimizer step keeps.

`model.retention_ratio` in a config is one of

    0.5                                                  the same in every step
    {low: 0.1, high: 0.7}                                drawn anew for every step: one checkpoint, many budgets
    {from: 1.0, to: 0.3, steps: 200, shape: cosine}      from dense to the target
    {target: 0.25, dense_first: 80, dense_every: 10}     dense steps amid pruned ones, for a teacher that needs them;
                                                         dense_trains: scorer leaves the VLM alone in these

The ratio is a pure function of the settings and the number of the optimizer step. So all ranks and all batches of a
step agree without asking each other, and a resumed run goes on with the ratios it would have had."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from stts.budget import check_ratio

Setting = float | dict[str, Any]
"""What a config may say."""
Spacing = Literal["uniform", "log"]
Shape = Literal["linear", "cosine"]
DenseTrains = Literal["everything", "scorer"]


class Retention(Protocol):
    """A rule for the ratio of every step."""

    @property
    def target(self) -> float:
        """Used for validation and written to exported folders."""
        ...

    @property
    def highest(self) -> float:
        """No step keeps more. Rows are packed for this one: their lengths are planned once, before the first step, so
        no row overflows, and the samples of a row do not depend on the step that meets it."""
        ...

    @property
    def record(self) -> dict[str, Any] | None:
        """For stts.json: how the ratio varied in training; None where it did not."""
        ...

    def at(self, step: int) -> float:
        """The ratio of optimizer step `step`, from 0."""
        ...


@dataclass(frozen=True)
class Fixed:
    """The same ratio in every step."""

    target: float

    def __post_init__(self) -> None:
        check_ratio(self.target)

    @property
    def highest(self) -> float:
        return self.target

    @property
    def record(self) -> dict[str, Any] | None:
        return None

    def at(self, step: int) -> float:
        return self.target


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """A ratio between `low` and `high`, drawn anew for every step."""

    low: float
    high: float
    spacing: Spacing = "uniform"
    """uniform: all ratios alike; log: their logarithms, so that low ones are met more often."""
    eval_ratio: float | None = None
    """For validation and export; None: the geometric middle of the range."""
    seed: int = 0

    def __post_init__(self) -> None:
        for value in (self.low, self.high):
            check_ratio(value)
        check_ratio(self.target)
        if not self.low < self.high:
            raise ValueError(f"retention_ratio: low={self.low} must be below high={self.high}; swap them?")
        if self.spacing not in get_args(Spacing):
            raise ValueError(f"retention_ratio: spacing={self.spacing!r} must be one of {get_args(Spacing)}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"retention_ratio: seed={self.seed!r} must be a whole number >= 0")

    @property
    def target(self) -> float:
        return round(math.sqrt(self.low * self.high), 4) if self.eval_ratio is None else self.eval_ratio

    @property
    def highest(self) -> float:
        return self.high

    @property
    def record(self) -> dict[str, Any] | None:
        return {"low": self.low, "high": self.high, "spacing": self.spacing}

    def at(self, step: int) -> float:
        share = float(np.random.default_rng(np.random.SeedSequence([self.seed, step])).random())
        if self.spacing == "uniform":
            return self.low + (self.high - self.low) * share
        return min(self.high, self.low * (self.high / self.low) ** share)


@dataclass(frozen=True, kw_only=True)
class Scheduled:
    """From one ratio to another in `steps` optimizer steps, then that one."""

    start: float
    target: float
    steps: int
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        for value in (self.start, self.target):
            check_ratio(value)
        if not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"retention_ratio: steps={self.steps!r} must be a whole number of optimizer steps >= 1")
        if self.shape not in get_args(Shape):
            raise ValueError(f"retention_ratio: shape={self.shape!r} must be one of {get_args(Shape)}")

    @property
    def highest(self) -> float:
        return max(self.start, self.target)

    @property
    def record(self) -> dict[str, Any] | None:
        return {"from": self.start, "to": self.target, "steps": self.steps, "shape": self.shape}

    def at(self, step: int) -> float:
        progress = min(1.0, step / self.steps)
        left = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.target + (self.start - self.target) * left


@dataclass(frozen=True, kw_only=True)
class WithDense:
    """Another rule, with dense steps: the first `dense_first`, then every `dense_every`-th."""

    pruned: Retention
    dense_first: int = 0
    dense_every: int = 0
    """0: none after the first."""
    dense_trains: DenseTrains = "everything"
    """everything: dense steps train what the others train. scorer: they train the scorer alone; the tower then has no
    backward pass, and no gradient of a weight of the VLM is computed. For AdamW it is a step of rate 0 with gradient 0,
    whatever shares out the optimizer's states."""

    def __post_init__(self) -> None:
        for name, value in (("dense_first", self.dense_first), ("dense_every", self.dense_every)):
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"retention_ratio: {name}={value!r} must be a whole number of optimizer steps >= 0")
        if not self.dense_first and not self.dense_every:
            raise ValueError("retention_ratio: dense_first and dense_every are both 0; give one, or the target alone")
        if self.dense_trains not in get_args(DenseTrains):
            raise ValueError(
                f"retention_ratio: dense_trains={self.dense_trains!r} must be one of {get_args(DenseTrains)}"
            )

    @property
    def target(self) -> float:
        return self.pruned.target

    @property
    def highest(self) -> float:
        return 1.0

    @property
    def record(self) -> dict[str, Any] | None:
        pruned = self.pruned.record or self.pruned.target
        steps = {name: getattr(self, name) for name in ("dense_first", "dense_every", "dense_trains")}
        return {"target": pruned, **steps}

    def is_dense(self, step: int) -> bool:
        return step < self.dense_first or (self.dense_every > 0 and step % self.dense_every == 0)

    def at(self, step: int) -> float:
        return 1.0 if self.is_dense(step) else self.pruned.at(step)


def holds_vlm(rule: Retention, step: int | None = None) -> bool:
    """Whether optimizer step `step` (None: any step of the run) trains the scorer alone."""
    if not isinstance(rule, WithDense) or rule.dense_trains == "everything":
        return False
    return step is None or rule.is_dense(step)


def make_retention(setting: Setting) -> Retention:
    """The rule a config asks for. ValueError for unknown names, missing ones, and values outside their range."""
    if not isinstance(setting, Mapping):
        return Fixed(setting)
    if "target" in setting:
        if unknown := sorted(set(setting) - {"target", "dense_first", "dense_every", "dense_trains"}):
            raise ValueError(
                f"retention_ratio={dict(setting)}: {unknown} unknown beside target; known: dense_first, dense_every, "
                "dense_trains"
            )
        steps = {name: value for name, value in setting.items() if name != "target"}
        return WithDense(pruned=make_retention(setting["target"]), **steps)
    ranged = "low" in setting or "high" in setting
    needed = {"low", "high"} if ranged else {"from", "to", "steps"}
    known = needed | ({"spacing", "eval_ratio", "seed"} if ranged else {"shape"})
    if not needed <= set(setting) <= known:
        raise ValueError(
            f"retention_ratio={dict(setting)} must be a number, a range such as {{low: 0.1, high: 0.7}} (optional: "
            "spacing, eval_ratio, seed), a schedule such as {from: 1.0, to: 0.3, steps: 200} (optional: shape), or one "
            "of these with dense steps, such as {target: 0.25, dense_first: 80, dense_every: 10}"
        )
    names = {"from": "start", "to": "target"}  # `from` is a word of Python's
    kind: Callable[..., Retention] = Sampled if ranged else Scheduled
    return kind(**{names.get(name, name): value for name, value in setting.items()})
