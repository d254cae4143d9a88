"""The losses of one optimizer step: named, weighted by their share of the step, summed over ranks and batches.

A loss is one of three kinds. The answer loss is always there. A pruner's stages return theirs by name in
`Kept.losses`. A `StepLoss` is computed from the batch and the forward pass: `model.step_losses` in a config lists them,
and docs/add_a_loss.md shows how to write one.

Shape suffixes beside those of `stts.tokens`: B = rows, A = places where some row has an answer, V = vocabulary."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
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
    """Of the logged value, `train/<name>_loss`."""
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

    All that ranks must tell each other travels in one collective at the end of the step (`close`), and the host waits
    for the device once, there. What the ranks need to know before the step, its number of answer tokens and videos,
    travelled with the step before; only the first step of an epoch asks for it in a collective of its own.

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
        """Of the step that was closed last, over all ranks, by name, before their weights; empty for a blank step."""
        self.other_values: dict[str, float] = {}
        """Of that step: numbers that stages gave for the log, means over its videos."""
        self.stop_requested = False
        """Set by a signal handler: this process was told to stop."""
        self.stop = False
        """Whether any rank had been told to stop when the last step was closed. Equal on all ranks."""
        self._sums: dict[str, Tensor] = {}
        self._late: list[tuple[str, float, Tensor]] = []
        self._known: tuple[float, ...] | None = None
        self._totals: tuple[float, ...] = (0.0, 0.0)
        self._step: Step | None = None
        self._uids: list[str] = []

    def add(
        self,
        batch: Batch,
        losses: Mapping[str, Tensor],
        device: torch.device,
        at: int,
        late: Mapping[str, Sequence[Tensor]] = MappingProxyType({}),
    ) -> Tensor:
        """The part of the step's total that this batch gives: sum over names of weight * share * loss. `at`: number of
        the optimizer step, from 0, for weights that follow a ramp. late: the scalars per
        video that will hold a value once the backward pass has made it, of losses and of other numbers to log.

        ValueError for a loss without a weight."""
        # Indexing, not .get(): a loss without a weight must fail on step 0, not train silently at zero.
        if unknown := sorted(set(losses) - set(self.weights)):
            raise ValueError(
                f"the pruner gives the losses {unknown}, which model.loss_weights={self.weights} does not name; "
                "add a weight for each (0 to leave it out on purpose)"
            )
        step = batch.step or Step.of([batch])[0]
        if step.place == 0:
            self._begin(step, device)
        self._step = step
        # How much this batch is of the whole optimizer step, over all ranks and accumulated batches. A step's answer
        # loss is then the mean over its answer tokens, however ranks and batches share them; a mean of means would
        # weigh a token of a short answer more. A blank batch has a share of 0.
        tokens, videos = self._totals
        shares = {"answer tokens": step.own_tokens / max(tokens, 1.0), "videos": step.own_videos / max(videos, 1.0)}
        parts = {name: shares[self._mean_over.get(name, "videos")] * value for name, value in losses.items()}
        for name, value in parts.items():
            part = value.detach().float()
            self._sums[name] = self._sums[name] + part if name in self._sums else part
        for name, held in late.items():
            self._late += [(name, shares["videos"] / len(held), value) for value in held]
        self._uids += batch.uids
        weights = {name: weight_at(self.weights[name], at) for name in parts}
        return torch.stack([weights[name] * value for name, value in parts.items()]).sum()

    def _begin(self, step: Step, device: torch.device) -> None:
        known, self._known = self._known, None
        if world_size() == 1:
            known = float(step.num_tokens), float(step.num_videos)
        elif step.is_first or known is None:  # the step before knew nothing of this one
            row = torch.tensor([step.num_tokens, step.num_videos], dtype=torch.float64, device=device)
            known = tuple(sum_over_ranks(row).tolist())
        self._totals, self._sums, self._uids = known, {}, []

    def close(self, device: torch.device, squares: Sequence[Tensor] = ()) -> list[float]:
        """At the end of the step, on every rank: sum up, in one collective, and wait for the device, once.

        Returns `squares`, scalars, summed over ranks. `values` and `stop` are those of the step afterwards."""
        step = self._step
        assert step is not None, "close() follows add()"
        own = [step.next_tokens, step.next_videos, float(self.stop_requested)]
        for name, share, late in self._late:
            self._sums[name] = self._sums.get(name, 0.0) + share * late.float()
        self._late = []
        names = sorted({*self.weights, *self._sums})  # equal on all ranks, which take steps of one kind
        sums = [self._sums.get(name, 0.0) for name in names]
        row = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in (*own, *sums, *squares)])
        tokens, videos, stop, *rest = sum_over_ranks(row).tolist()
        self._known = (tokens, videos) if step.has_next else None
        self.stop = stop > 0
        values = dict(zip(names, rest, strict=False))
        logged = {name: values[name] for name in self._sums} if self._totals[0] else {}
        self.values = {name: value for name, value in logged.items() if name in self.weights}
        self.other_values = {name: value for name, value in logged.items() if name not in self.weights}
        return rest[len(names) :]

    @property
    def is_complete(self) -> bool:
        """Whether the batch that was added last ends its optimizer step."""
        return self._step is not None and self._step.place + 1 == self._step.num_batches

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
    """Number of ranks; 1 where torch.distributed is not in use."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def sum_over_ranks(row: Tensor) -> Tensor:
    """`row`, summed in place over ranks: one collective, in which every rank takes part."""
    if world_size() > 1:
        torch.distributed.all_reduce(row)
    return row
