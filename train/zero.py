"""DeepSpeed ZeRO as a strategy of Lightning's, on CPU and CUDA alike."""

from __future__ import annotations

import math
import os
import shutil
import sys
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from stts.data.collate import Batch

from .checkpoints import UNFINISHED
from .zero_config import check_zero, fill_in, read_deepspeed_json
from .zero_engine import GradientOrder, PartNorms
from .zero_resume import TAG, convert, is_cut, repair, settings_of_groups


class _Precision(DeepSpeedPrecision):
    """Converts pixels and nothing else; a loss is shared between the batches of a step once.

    Lightning 2.6 divides it by their number, and so does DeepSpeed: gradients of a step of two batches would be half of
    what they are under other strategies, clipped by half the norm."""

    def convert_input(self, data: Batch) -> Batch:
        return data.with_pixels(super().convert_input)

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, model, optimizer, *args, scale_wrt_gas=False, **kwargs)


class DeepSpeed(DeepSpeedStrategy):
    """ZeRO 0 to 3. Rank 0's parameters are broadcast and cut when training starts, so whatever `from_pretrained` loaded
    and the scorer drew is what every rank trains; each rank holds the whole model in host memory until then.

    Args:
        config: a DeepSpeed JSON file, or its contents; then no other argument is given. See `zero_config.py`.
        stage: 0 shares nothing, 1 optimizer states, 2 gradients too, 3 parameters too.
        offload_optimizer: keep optimizer states in host memory (needs a C++ compiler).
        offload_parameters: keep parameters in host memory (stage 3).
        persistence_threshold: parameters of fewer elements are not cut (stage 3).
        timeout: how long a rank waits for the others before it ends, as "0:30:00".
        options: other arguments of Lightning's DeepSpeedStrategy, such as buffer sizes or nvme_path.

    **Differs** from Lightning's: runs on CPU ranks over gloo too; of a batch only pixels are cast, of the model only
    parameters (with rotary frequencies in bf16, late tokens turn by whole radians more or less than in the exported
    model); gradients are summed in one order on all ranks, whatever their batches hold; each part of the model may
    have a gradient norm of its own; stage 3 gives up every parameter behind its module (`stage3_max_reuse_distance`
    is 0 where no file says otherwise)."""

    def __init__(
        self,
        config: str | dict[str, Any] | None = None,
        stage: int | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        persistence_threshold: int = 100_000,
        timeout: timedelta = default_pg_timeout,
        options: dict[str, Any] | None = None,
        **connector: Any,
    ) -> None:
        if find_spec("deepspeed") is None:
            raise ValueError("DeepSpeed is not installed: pip install 'stts-video[train]', or use trainer.strategy=ddp")
        # Operators are built with ninja on first use; an environment that was not activated is not on the path.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        self._file: dict[str, Any] | None = None
        if config is not None:
            if stage is not None or offload_optimizer or offload_parameters or options:
                raise ValueError(
                    f"config={config} says how DeepSpeed runs; leave out stage, offload_optimizer, offload_parameters "
                    "and options, or the file"
                )
            self._file = read_deepspeed_json(config)
            super().__init__(config=self._file, timeout=timeout, **connector)
        else:
            stage = 2 if stage is None else stage
            if stage not in (0, 1, 2, 3):
                raise ValueError(f"stage={stage} is not a stage of ZeRO; use 0, 1, 2 or 3")
            if offload_parameters and stage != 3:
                raise ValueError(f"offload_parameters needs stage 3, where parameters are cut; got stage {stage}")
            super().__init__(
                stage=stage,
                offload_optimizer=offload_optimizer,
                offload_parameters=offload_parameters,
                timeout=timeout,
                **(options or {}),
                **connector,
            )
            self._zero["stage3_param_persistence_threshold"] = persistence_threshold
            check_zero("trainer.strategy", self._zero)
        # Stage 3 keeps a parameter that is read again within so many elements (DeepSpeed: 1e9), and to know that walks
        # after every module over all modules within that distance: the whole tower, in time that grows with its square.
        # What comes again so soon are the last layers alone, as backward begins.
        self._zero.setdefault("stage3_max_reuse_distance", 0)
        self.clip_per_part = False
        """Clip the gradients of each part by its own norm; set before training starts."""
        self.part_norms: PartNorms | None = None

    @property
    def _zero(self) -> dict[str, Any]:
        assert isinstance(self.config, dict)
        section: dict[str, Any] = self.config["zero_optimization"]
        return section

    @property
    def stage(self) -> int:
        return int(self._zero["stage"])

    @property
    def offload_optimizer(self) -> bool:
        return (self._zero.get("offload_optimizer") or {}).get("device", "none") != "none"

    def _format_config(self) -> None:
        module: Any = self.lightning_module
        if self._file is not None and module is not None:
            self.config = fill_in(
                self._file,
                accumulate=module.trainer.accumulate_grad_batches,
                ranks=self.world_size,
                batch_size=getattr(module.trainer.datamodule, "batch_size", 0),
                max_grad_norm=module.max_grad_norm,
                precision=str(module.trainer.precision),
                llm_width=module.pruning.adapter.host.llm_width,
            )
        assert isinstance(self.config, dict)
        self.config.setdefault("train_micro_batch_size_per_gpu", 1)  # for its log of throughput, which is not shown
        super()._format_config()

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
        if hasattr(optimizer, "reduce_ready_partitions_and_remove_grads"):
            if self.world_size > 1:
                GradientOrder(optimizer, learning)
            self.part_norms = PartNorms(optimizer, per_part=self.clip_per_part)
        elif self.clip_per_part:
            raise ValueError(
                f"DeepSpeed stage {self.stage} holds no gradients by part; set model.clip_per_part=false, or use "
                "trainer.strategy=ddp (stage 0 cuts nothing either)"
            )

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Also one that another number of ranks or another ZeRO stage wrote, which is converted beside it first."""
        state = Path(checkpoint_path)
        ranks = len(list(state.glob(f"{TAG}/*_mp_rank_00_optim_states.pt")))
        is_alike = ranks == self.world_size and is_cut(state) == (self.stage == 3)  # 1 and 2 cut states alike
        if is_alike or self.stage == 0:
            return super().load_checkpoint(checkpoint_path, weights_only)
        converted = state.parent.with_name(f"{UNFINISHED}for-stage-{self.stage}-{self.world_size}-ranks")
        if self.is_global_zero:
            shutil.rmtree(converted, ignore_errors=True)
            convert(state, converted, to_cut=self.stage == 3)
            (converted / "latest_universal").write_text(TAG)
        self.barrier()
        engine, optimizer = self.deepspeed_engine, self.deepspeed_engine.optimizer.optimizer
        before = settings_of_groups(optimizer)
        engine._config.load_universal_checkpoint = True
        try:
            checkpoint = super().load_checkpoint(converted, weights_only)
        finally:
            engine._config.load_universal_checkpoint = False
        repair(optimizer, before, checkpoint)
        self.barrier()
        if self.is_global_zero:
            shutil.rmtree(converted)
        return checkpoint

    def grad_norms(self) -> dict[str, Tensor]:
        """Gradient norms of the step just taken, before clipping, by part; `all` where the engine computes one alone,
        at stage 0 with clipping. Not finite where a gradient was not."""
        if self.part_norms is not None:
            return self.part_norms.norms
        norm = self.deepspeed_engine.get_global_grad_norm()
        return {} if norm is None else {"all": torch.as_tensor(float(norm) if norm >= 0 else math.nan)}

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
