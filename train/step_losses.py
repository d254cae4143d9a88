"""The losses of one optimizer step: named, weighted by their share of the step, summed over ranks and batches.

A loss is one of three kinds. The answer loss is always there. A pruner's stages return theirs by name in
`Kept.losses`. A `StepLoss` is computed from the batch and the forward pass: `model.step_losses` in a config lists them,
and docs/add_a_loss.md shows how to write one.

Shape suffixes:  B = rows,  A = places where some row has an answer,  V = vocabulary"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stts.data.collate import Batch, Step
from stts.models.pruning.report import Report

MeanOver = Literal["answer tokens", "videos"]
Weight = float | dict[str, float]
"""Of a loss: a number, or a ramp {from: 0.1, to: 2.0, steps: 1000} over so many optimizer steps, then `to`."""


@dataclass(frozen=True)
class TrainingPass:
    """One forward pass of a training step, with gradients, as a `StepLoss` sees it."""

    module: Any
    """The `VideoFinetune` in training: `.model`, `.pruning`, `.scorer`, `.global_step`, `.run_model`."""
    batch: Batch
    labels_BA: Tensor
    """int64 (B, A): the token due at each place, `IGNORED` where a row has no answer there."""
    logits_BAV: Tensor
    """(B, A, V): what the model predicts at these places."""
    report: Report | None
    """What the pruner did, per video; None where the stock code ran without visual input."""


class StepLoss(ABC):
    """A loss of a training step beside the answer loss and the losses of stages.

    A subclass sets `name` and `mean_over` and computes the loss in `__call__`. Every rank calls it in every batch,
    including blank ones (their share of the step is 0), so it must run the same modules whatever the batch holds."""

    name: ClassVar[str]
    """Of the logged value, `train/<name>_loss`, and in `loss_weights`."""
    mean_over: ClassVar[MeanOver] = "answer tokens"
    """What the value is a mean over; decides how much each batch of a step weighs."""

    def __init__(self, weight: float = 1.0) -> None:
        """weight: of this loss in the total; at least 0."""
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{type(self).__name__}: weight={weight} must be a number >= 0; 0 only logs the loss")
        self.weight = weight

    def during(self, module: Any, batch: Batch) -> AbstractContextManager[Any]:
        """Entered before the forward pass of a training batch and left after the losses are computed: the place for
        hooks on the model. Default: nothing."""
        return nullcontext()

    @abstractmethod
    def __call__(self, now: TrainingPass) -> Tensor:
        """The loss of this batch before its weight: a scalar, fp32, finite."""


class StepLosses:
    """Sums up the losses of an optimizer step, over its batches and all ranks.

    weights: of the answer loss and of what stages return, by name. extra: losses computed from the pass.
    ValueError for an extra loss whose name is taken."""

    def __init__(self, weights: Mapping[str, Weight], extra: Sequence[StepLoss] = ()) -> None:
        names = [loss.name for loss in extra]
        if twice := sorted({name for name in names if names.count(name) > 1 or name in weights}):
            raise ValueError(
                f"model.step_losses has the names {names} and model.loss_weights {sorted(weights)}: {twice} stand "
                "there twice; list each loss once, and give the weight of a step loss in its init_args"
            )
        self.weights: dict[str, Weight] = {**weights, **{loss.name: loss.weight for loss in extra}}
        for name, weight in self.weights.items():
            _check_weight(name, weight)
        self.extra = list(extra)
        self._mean_over: dict[str, MeanOver] = {"answer": "answer tokens"}
        self._mean_over |= {loss.name: loss.mean_over for loss in extra}
        self.values: dict[str, float] = {}
        """Of the step so far, over all ranks, by name, before their weights."""
        self.num_tokens = self.num_videos = 0.0
        """Of the whole step, over all ranks: answer tokens, videos."""
        self._uids: list[str] = []

    def add(self, batch: Batch, losses: Mapping[str, Tensor], device: torch.device, step: int) -> Tensor:
        """The part of the step's total that this batch gives: sum over names of weight * share * loss.

        ValueError for a loss without a weight, and, on every rank, for one that is not finite."""
        # Indexing, not .get(): a loss without a weight must fail on step 0, not train silently at zero.
        if unknown := sorted(set(losses) - set(self.weights)):
            raise ValueError(
                f"the pruner gives the losses {unknown}, which model.loss_weights={self.weights} does not name; "
                "add a weight for each (0 to leave it out on purpose)"
            )
        shares = self._shares(batch, device)
        parts = {name: shares[self._mean_over.get(name, "videos")] * value for name, value in losses.items()}
        self._uids += batch.uids
        names = sorted(self.weights)  # the same on every rank, whatever its batch gave
        values = sum_over_ranks([parts[name].detach() if name in parts else 0.0 for name in names], device)
        self.check_finite("loss", dict(zip(names, values, strict=True)), step)
        for name, value in zip(names, values, strict=True):
            if name in parts:
                self.values[name] = self.values.get(name, 0.0) + value
        return torch.stack([weight_at(self.weights[name], step) * value for name, value in parts.items()]).sum()

    def _shares(self, batch: Batch, device: torch.device) -> dict[MeanOver, float]:
        """How much this batch is of the whole optimizer step, over all ranks and accumulated batches: of its answer
        tokens, and of its videos. A blank batch has a share of 0.

        A step's answer loss is then the mean over its answer tokens, however ranks and batches share them; a mean of
        means would weigh a token of a short answer more. Losses of stages are means over the videos of their batch."""
        step = batch.step or Step(batch.num_answer_tokens, batch.num_videos, 1, 0)
        if step.place == 0:
            self.num_tokens, self.num_videos = sum_over_ranks([step.num_tokens, step.num_videos], device)
            self.values, self._uids = {}, []
        return {
            "answer tokens": batch.num_answer_tokens / max(self.num_tokens, 1.0),
            "videos": batch.num_videos / max(self.num_videos, 1.0),
        }

    def check_finite(self, what: str, values: Mapping[str, float], step: int) -> None:
        """ValueError with the samples of all ranks. The values must be equal on every rank: then all of them stop.

        A rank that stopped alone would leave the others waiting for it."""
        if all(math.isfinite(value) for value in values.values()):
            return
        uids: list[Any] = [self._uids]
        if (ranks := world_size()) > 1:
            uids = [None] * ranks
            torch.distributed.all_gather_object(uids, self._uids)
        raise ValueError(
            f"the {what} is not finite at step {step}: {dict(values)}, samples {[uid for rank in uids for uid in rank]}"
            "; look at these samples, lower the learning rates or train in fp32"
        )


def weight_at(weight: Weight, step: int) -> float:
    """The weight of a loss in optimizer step `step`, from 0."""
    if not isinstance(weight, Mapping):
        return weight
    return weight["from"] + (weight["to"] - weight["from"]) * min(step / weight["steps"], 1.0)


def _check_weight(name: str, weight: Weight) -> None:
    if isinstance(weight, Mapping) and (set(weight) != {"from", "to", "steps"} or not weight["steps"] >= 1):
        raise ValueError(
            f"model.loss_weights.{name}={dict(weight)} must be a number, or a ramp {{from: 0.1, to: 2.0, steps: 1000}} "
            "of at least 1 optimizer step"
        )


def world_size() -> int:
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def sum_over_ranks(values: Sequence[float | Tensor], device: torch.device) -> list[float]:
    """One collective, in which every rank takes part."""
    row = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
    if world_size() > 1:
        torch.distributed.all_reduce(row)
    return row.tolist()
