"""What is changed inside DeepSpeed's ZeRO optimizers: the order in which gradients are added up, and a norm of its own
for each part. Read from DeepSpeed 0.19.8; `tests/train/test_zero.py` fails when a name used here goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .parts import part_of_group


class GradientOrder:
    """Hands finished gradients to ZeRO in one order on every rank.

    ZeRO puts gradients into buckets as the backward pass finishes them, and adds up the buckets of all ranks by
    position (stage 3 by parameter, but what shares a bucket is decided by the order too). A rank with images alone
    finishes the newline before the word embedding, one with videos the other way round: ZeRO 1 and 2 then add the
    gradient of one to that of the other, without an error (seen in DeepSpeed 0.19.8). Here a gradient that comes early
    waits for its turn. The order is that of rank 0's first backward pass; during that pass it is about the reverse of
    the model's. Parameters that the step does not train (`requires_grad` is off) are left out.

    ValueError where another parameter got no gradient: buckets would shift on that rank, again without an error."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.number = {id(parameter): number for number, parameter in enumerate(parameters.values())}
        backwards = sorted(range(len(self.names)), key=lambda number: -number)
        self.order = sorted(backwards, key=lambda number: self.names[number].startswith("scorer."))  # in the tower
        self.known = False
        self.arrived: list[int] = []
        self.waiting: dict[int, tuple[Any, ...]] = {}
        self.due: list[int] = []
        self.turn = 0
        self.begin = optimizer.backward_prologue
        self.give = optimizer.reduce_ready_partitions_and_remove_grads
        self.end = optimizer.overlapping_partition_gradients_reduce_epilogue
        optimizer.backward_prologue = self.start
        optimizer.reduce_ready_partitions_and_remove_grads = self.arrive
        optimizer.overlapping_partition_gradients_reduce_epilogue = self.finish

    def start(self) -> None:
        """Before each backward pass. Stage 1 ends only those that end an optimizer step."""
        self.arrived, self.waiting, self.turn = [], {}, 0
        self.due = [number for number in self.order if self.parameters[number].requires_grad]
        self.begin()

    def arrive(self, *given: Any) -> None:
        number = self.number[id(given[0])]
        self.arrived.append(number)
        self.waiting[number] = given
        while self.turn < len(self.due) and self.due[self.turn] in self.waiting:
            self.give(*self.waiting.pop(self.due[self.turn]))
            self.turn += 1

    def finish(self) -> None:
        """After a backward pass: every gradient has had its turn."""
        if missing := sorted(set(self.due) - set(self.arrived)):
            raise ValueError(
                f"{len(missing)} parameters got no gradient on rank {torch.distributed.get_rank()}, the first is "
                f"{self.names[missing[0]]}; ZeRO needs one for each that learns, on every rank: freeze its part, or "
                "use it in every forward pass"
            )
        if not self.known and len(self.due) == len(self.order):
            arrived = [self.arrived]
            torch.distributed.broadcast_object_list(arrived)
            self.order, self.known = arrived[0], True
        self.end()


class PartNorms:
    """Gradient norms of each part of the model, and clipping by them, inside the optimizer of ZeRO 1, 2 or 3.

    ZeRO computes a norm for each of its groups of parameters, joins them, and scales the gradients of each group by the
    joint norm. Here the norms of the groups of one part are joined as well, and its groups are scaled by that norm. No
    gradient is read a second time, and no collective is added.

    optimizer: of the engine. per_part: clip each part by its own norm; False: all by the joint one."""

    def __init__(self, optimizer: Any, *, per_part: bool) -> None:
        self.optimizer, self.per_part = optimizer, per_part
        self._is_stage_3 = hasattr(optimizer, "sub_group_to_group_id")
        self._of_groups: list[Any] = []
        self._group = 0
        self._by_part: dict[str, Tensor] = {}
        self._clip = optimizer.unscale_and_clip_grads
        for name in ("get_grad_norm_direct", "complete_grad_norm_calculation_for_cpu_offload"):
            setattr(optimizer, name, self._recorded(getattr(optimizer, name)))
        joint = "_get_norm_groups" if self._is_stage_3 else "scaled_global_norm"
        setattr(optimizer, joint, self._joined(getattr(optimizer, joint)))
        optimizer.unscale_and_clip_grads = self._clip_group

    @property
    def norms(self) -> dict[str, Tensor]:
        """Of the step just taken, by part, before clipping, of unscaled gradients: fp32 scalars, not finite where a
        gradient was not. Equal on all ranks."""
        return {part: norm / self._scale for part, norm in self._by_part.items()}

    def _recorded(self, norm_of: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            norm = norm_of(*args, **kwargs)
            self._of_groups.append(norm)
            return norm

        return record

    def _joined(self, join: Any) -> Any:
        def joined(*args: Any, **kwargs: Any) -> Any:
            self._of_groups, self._group = [], 0
            self._scale = float(self.optimizer.loss_scale)
            total = join(*args, **kwargs)
            squares: dict[str, Tensor] = {}
            for number, norm in enumerate(self._of_groups):
                norm = torch.as_tensor(norm, dtype=torch.float32)
                norm = torch.where(norm < 0, torch.nan, norm)  # -1 stands for a norm that is not finite
                part = self._part(number)
                squares[part] = squares[part] + norm**2 if part in squares else norm**2
            self._by_part = {part: square.sqrt() for part, square in squares.items()}
            return total

        return joined

    def _part(self, group: int) -> str:
        if self._is_stage_3:
            group = self.optimizer.sub_group_to_group_id[group]
        return part_of_group(self.optimizer.optimizer.param_groups[group]["name"])

    def _clip_group(self, gradients: Any, total_norm: Any) -> None:
        """ZeRO 1 and 2 hand over the gradients of one group after the other, ZeRO 3 the number of a group."""
        number = gradients if self._is_stage_3 else self._group
        self._group += 1
        self._clip(gradients, self._by_part[self._part(number)] if self.per_part else total_norm)
