"""How parameters are spread over ranks: FSDP2, DeepSpeed's ZeRO (`zero.py`), or Lightning's DDP.

Importing this module makes `trainer.strategy: deepspeed_stage_2` (and `deepspeed`, `_stage_1`, `_stage_3`,
`_stage_2_offload`, `_stage_3_offload`) and `fsdp2` mean the classes here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from .frozen import whole_state
from .zero import DeepSpeed


class FSDP2(ModelParallelStrategy):
    """Parameters, gradients and optimizer states cut over all ranks, layer by layer (torch's `fully_shard`).

    **Differs** from Lightning's: every rank takes its own data; tensor parallelism is not offered."""

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


DeepSpeed.register_strategies(StrategyRegistry)
StrategyRegistry.register("fsdp2", FSDP2, override=True)


def cut(root: nn.Module, layers: Iterable[nn.Module], mesh: DeviceMesh, precision: str, entries: Sequence[str]) -> None:
    """FSDP2: each layer is gathered when it runs, the rest of `root` while one of its methods `entries` runs."""
    low = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if precision == "bf16-mixed" else {}
    policy = MixedPrecisionPolicy(**low, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for name in entries:
        register_fsdp_forward_method(root, name)


def widen(module: nn.Module, strategy: Strategy, precision: str) -> None:
    """Hold what learns in fp32, in place, whatever the checkpoint's files hold: at usual rates AdamW's steps are
    smaller than the last bit of a bf16 weight, and would be lost. DeepSpeed keeps fp32 copies of its own."""
    if isinstance(strategy, DeepSpeed) or precision.endswith(("16-true", "64-true")):
        return
    everything = precision == "32-true" or isinstance(strategy, FSDP2)  # which cuts parameters of one dtype only
    for parameter in module.parameters():
        if parameter.requires_grad or everything:
            parameter.data = parameter.data.float()


def check_holds(strategy: Strategy) -> None:
    """ValueError for a strategy under which a step cannot leave a part of the parameters alone."""
    if isinstance(strategy, DeepSpeed) and strategy.offload_optimizer:
        raise ValueError(
            "retention_ratio.dense_trains=scorer does not go with an offloaded optimizer, which keeps gradients of the "
            "step before; use trainer.strategy=deepspeed_stage_2 or _stage_3, or dense_trains=everything"
        )


def _is_ddp(strategy: Strategy) -> bool:
    return isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeed)  # which Lightning derives from it


def sync_gradients(strategy: Strategy, on: bool) -> None:
    """Whether DDP averages gradients over ranks in the backward pass; it waits for one of every parameter there."""
    if _is_ddp(strategy):
        wrapper: Any = strategy.model
        wrapper.require_backward_grad_sync = on


def average_gradients(strategy: Strategy, parameters: Sequence[nn.Parameter]) -> None:
    """In place of DDP, in one collective: every rank must call it, and has a gradient of each of these parameters."""
    if _is_ddp(strategy):
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        row = torch.cat([grad.flatten() for grad in grads])
        torch.distributed.all_reduce(row)
        for grad, mean in zip(
            grads, (row / torch.distributed.get_world_size()).split([g.numel() for g in grads]), strict=True
        ):
            grad.copy_(mean.view_as(grad))


def is_cut(strategy: Strategy) -> bool:
    """Whether a rank holds only a part of each parameter."""
    return isinstance(strategy, FSDP2) or (isinstance(strategy, DeepSpeed) and strategy.zero_stage_3)


def whole_tensors(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The state of a module whose parameters are cut, in host memory; empty on ranks that do not `keep` it.

    Gathered one by one, so that no device holds the whole model; every rank must call it. Tied tensors stay one."""
    state: dict[str, Tensor] = {}
    by_id: dict[int, Tensor] = {}
    for name, value in whole_state(module).items():
        if id(value) not in by_id:
            with _gathered(value):
                tensor = value.full_tensor() if isinstance(value, DTensor) else value
                by_id[id(value)] = tensor.detach().to("cpu", copy=True) if keep else torch.empty(0)
        state[name] = by_id[id(value)]
    return state if keep else {}


def _gathered(value: Tensor) -> AbstractContextManager[Any]:
    if not hasattr(value, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([value])
    return gathered


def adamw(trainer: pl.Trainer, groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """torch's fused AdamW; DeepSpeed's own where the states live in host memory.

    Not fused under 16-mixed: a fused step unscales gradients itself, behind the back of norms and clipping, which would
    see them 65536 times too large."""
    strategy = trainer.strategy
    if not (isinstance(strategy, DeepSpeed) and strategy.offload_optimizer):
        return AdamW(groups, fused=str(trainer.precision) != "16-mixed", **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return optimizer
