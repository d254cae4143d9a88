"""How parameters are spread over ranks: DeepSpeed ZeRO and FSDP2 beside Lightning's DDP, on CPU and CUDA alike.

Importing this module makes `trainer.strategy: deepspeed_stage_2` (and `deepspeed`, `_stage_1`, `_stage_3`,
`_stage_2_offload`, `_stage_3_offload`) and `fsdp2` mean the classes here."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer

from stts.data.collate import Batch


class _Precision(DeepSpeedPrecision):
    """Converts pixels and nothing else: a timestamp in bf16 would be seconds off."""

    def convert_input(self, data: Batch) -> Batch:
        pixels = {name: value for name, value in data.inputs.items() if name.startswith("pixel_values")}
        return replace(data, inputs=data.inputs | super().convert_input(pixels))


class _OneOrder:
    """Hands finished gradients to ZeRO in one order on every rank.

    ZeRO puts gradients into buckets as the backward pass finishes them, and adds up the buckets of all ranks by
    position (stage 3 by parameter, but what shares a bucket is decided by the order too). A rank with images alone
    finishes the newline before the word embedding, one with videos the other way round: ZeRO 1 and 2 then add the
    gradient of one to that of the other, without an error (seen in DeepSpeed 0.19.8). Here a gradient that comes early
    waits for its turn. The order is that of rank 0's first backward pass; during that pass it is about the reverse of
    the model's.

    ValueError where a parameter got no gradient: buckets would shift on that rank, again without an error."""

    def __init__(self, optimizer: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        self.names = list(parameters)
        self.number = {id(parameter): number for number, parameter in enumerate(parameters.values())}
        backwards = sorted(range(len(self.names)), key=lambda number: -number)
        self.order = sorted(backwards, key=lambda number: self.names[number].startswith("scorer."))  # in the tower
        self.known = False
        self.arrived: list[int] = []
        self.waiting: dict[int, tuple[Any, ...]] = {}
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
        self.begin()

    def arrive(self, *given: Any) -> None:
        number = self.number[id(given[0])]
        self.arrived.append(number)
        self.waiting[number] = given
        while self.turn < len(self.order) and self.order[self.turn] in self.waiting:
            self.give(*self.waiting.pop(self.order[self.turn]))
            self.turn += 1

    def finish(self) -> None:
        """After a backward pass: every gradient has had its turn."""
        if missing := sorted(set(self.order) - set(self.arrived)):
            raise ValueError(
                f"{len(missing)} parameters got no gradient on rank {torch.distributed.get_rank()}, the first is "
                f"{self.names[missing[0]]}; ZeRO needs one for each that learns, on every rank: freeze its part, or "
                "use it in every forward pass"
            )
        if not self.known:
            arrived = [self.arrived]
            torch.distributed.broadcast_object_list(arrived)
            self.order, self.known = arrived[0], True
        self.end()


class DeepSpeed(DeepSpeedStrategy):
    """ZeRO 0 to 3. Rank 0's parameters are broadcast and cut when training starts, so whatever `from_pretrained` loaded
    and the scorer drew is what every rank trains; each rank holds the whole model in host memory until then.

    Args:
        stage: 0 shares nothing, 1 optimizer states, 2 gradients too, 3 parameters too.
        offload_optimizer: keep optimizer states in host memory (needs a C++ compiler).
        offload_parameters: keep parameters in host memory (stage 3).
        persistence_threshold: parameters of fewer elements are not cut (stage 3).
        options: other arguments of Lightning's DeepSpeedStrategy, such as buffer sizes or nvme_path.

    **Differs** from Lightning's: runs on CPU ranks over gloo too; of a batch only pixels are cast, of the model only
    parameters (with rotary frequencies in bf16, late tokens turn by whole radians more or less than in the exported
    model); gradients are summed in one order on all ranks, whatever their batches hold."""

    def __init__(
        self,
        stage: int = 2,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        persistence_threshold: int = 100_000,
        options: dict[str, Any] | None = None,
        **connector: Any,
    ) -> None:
        if stage not in (0, 1, 2, 3):
            raise ValueError(f"stage={stage} is not a stage of ZeRO; use 0, 1, 2 or 3")
        if offload_parameters and stage != 3:
            raise ValueError(f"offload_parameters needs stage 3, where parameters are cut; got stage {stage}")
        if find_spec("deepspeed") is None:
            raise ValueError("DeepSpeed is not installed: pip install 'stts-video[train]', or use trainer.strategy=ddp")
        # Operators are built with ninja on first use; an environment that was not activated is not on the path.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        super().__init__(
            stage=stage,
            offload_optimizer=offload_optimizer,
            offload_parameters=offload_parameters,
            **(options or {}),
            **connector,
        )
        assert isinstance(self.config, dict)
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = persistence_threshold
        self.stage, self.offload_optimizer = stage, offload_optimizer

    @property
    def root_device(self) -> torch.device:
        device = super().root_device
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed asks for an index

    @property
    def precision_plugin(self) -> Precision:
        assert self._precision_plugin is not None
        return self._precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, chosen: Precision | None) -> None:
        self._precision_plugin = chosen
        if isinstance(chosen, DeepSpeedPrecision):
            self._precision_plugin = _Precision(chosen.precision)  # type: ignore[arg-type]  # checked by Lightning

    def setup_environment(self) -> None:
        from deepspeed.accelerator import get_accelerator

        _name_locks()

        if isinstance(self.accelerator, CPUAccelerator):
            if get_accelerator().device_name() != "cpu":
                raise ValueError("DeepSpeed has chosen the GPU of this machine; set DS_ACCELERATOR=cpu to train on CPU")
            self.accelerator.setup_device(torch.device("cpu"))
            self.setup_distributed()
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _initialize_deepspeed_train(self, model: nn.Module) -> None:
        learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        exact = {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}
        super()._initialize_deepspeed_train(model)
        for name, buffer in exact.items():
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(self.root_device))
        optimizer = self.optimizers[0]
        if hasattr(optimizer, "reduce_ready_partitions_and_remove_grads") and self.world_size > 1:
            _OneOrder(optimizer, learning)

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        names: dict[str, dict[str, Any]] = {"deepspeed": {}}
        names |= {f"deepspeed_stage_{stage}": {"stage": stage} for stage in (1, 2, 3)}
        names["deepspeed_stage_2_offload"] = {"stage": 2, "offload_optimizer": True}
        names["deepspeed_stage_3_offload"] = {"stage": 3, "offload_optimizer": True, "offload_parameters": True}
        for name, settings in names.items():
            strategy_registry.register(name, cls, override=True, **settings)


@rank_zero_only
def _name_locks() -> None:
    """torch waits without a word for a build of operators to end, for ever if it was killed."""
    from torch.utils.cpp_extension import get_default_build_root  # imports setuptools

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        name = lock.parent.name
        print(f"waiting for the build of {name}; if no other process compiles it, delete {lock}", flush=True)


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


def check_frozen(strategy: Strategy, frozen: Sequence[str]) -> None:
    """ValueError for ZeRO-3 on several ranks where parameters named `frozen` do not learn.

    It gathers parameters module by module, and every rank must ask for the same ones. With a frozen tower, ranks whose
    batches differ in kind do not, and wait for one another for ever (seen in DeepSpeed 0.19.8)."""
    if isinstance(strategy, DeepSpeed) and strategy.stage == 3 and strategy.world_size > 1 and frozen:
        raise ValueError(
            f"DeepSpeed stage 3 would hang on batches of different kinds where parts are frozen ({len(frozen)} "
            f"parameters, the first is {frozen[0]}); use trainer.strategy=fsdp2 or deepspeed_stage_2, or let every "
            "part learn"
        )


def engine_norm(trainer: pl.Trainer) -> float | None:
    """Gradient norm of the step just taken, before clipping, where DeepSpeed holds the gradients; nan: not finite.

    None for other strategies, and at stage 0 without clipping, where its engine computes none."""
    if not isinstance(trainer.strategy, DeepSpeed):
        return None
    norm = trainer.strategy.deepspeed_engine.get_global_grad_norm()
    if norm is None:
        return None
    return math.nan if norm < 0 else float(norm)  # the engine's word for inf and nan is -1


def is_cut(strategy: Strategy) -> bool:
    """Whether a rank holds only a part of each parameter."""
    return isinstance(strategy, FSDP2) or (isinstance(strategy, DeepSpeed) and strategy.zero_stage_3)


def whole_tensors(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """The state of a module whose parameters are cut, in host memory; empty on ranks that do not `keep` it.

    Gathered one by one, so that no device holds the whole model; every rank must call it. Tied tensors stay one."""
    whole: dict[str, Tensor] = {}
    made: dict[int, Tensor] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in made:
            with _gathered(value):
                tensor = value.full_tensor() if isinstance(value, DTensor) else value
                made[id(value)] = tensor.detach().to("cpu", copy=True) if keep else torch.empty(0)
        whole[name] = made[id(value)]
    return whole if keep else {}


def _gathered(value: Tensor) -> AbstractContextManager[Any]:
    if not hasattr(value, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([value])
    return gathered


def adamw(strategy: Strategy, groups: list[dict[str, Any]], **settings: Any) -> Optimizer:
    """torch's fused AdamW; DeepSpeed's own where the states live in host memory."""
    if not (isinstance(strategy, DeepSpeed) and strategy.offload_optimizer):
        return AdamW(groups, fused=True, **settings)
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    made: Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return made
