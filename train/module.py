"""The LightningModule: a stock VLM under a pruner, the sum of its named losses, and the optimizer over its parts.

It names no method: what a pruner adds to the loss arrives by name and is weighted in `loss_weights`; losses computed
from the batch and the forward pass are listed in `step_losses`.

Shape suffixes:  B = rows,  L = text length,  A = places where some row has an answer,  V = vocabulary"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers.modeling_layers import GradientCheckpointingLayer

from stts.budget import plan
from stts.data.collate import IGNORED, Batch
from stts.models.checkpoints.load import (
    as_recorded,
    load_pruner,
    load_vlm,
    pruner_settings,
    recorded_options,
    resize_videos,
    save_pruned,
)
from stts.models.pruning.context import Pruning
from stts.pruners.base import Positions, soft_in_training

from .lengths import largest_grid, num_placed_tokens
from .lora import Lora, add_lora, merge
from .loss import answer_loss
from .parts import PARTS, _check, cosine, is_unused, learns, part_of
from .retention import Setting, make_retention
from .step_losses import StepLoss, StepLosses, TrainingPass, Weight
from .strategies import FSDP2, DeepSpeed, adamw, check_frozen, cut, engine_norm, is_cut, whole_tensors


class VideoFinetune(pl.LightningModule):
    """Fine-tunes a VLM, its pruner, or both.

    Raises ValueError for settings outside the ranges given below, before anything is loaded.

    Args:
        model: Hugging Face folder or hub id of a supported family.
        pruner: registry name, or 'package.module:Class'; 'none' trains on every token.
        retention_ratio: fraction of visual tokens the LLM sees, in (0, 1]: kept, not removed. Or one per step: a range
            {low, high} to draw from, or a schedule {from, to, steps, shape}; see train/retention.py.
        pruner_options: options of the pruner, on top of those that a trained `model` records for it.
        positions: of surviving tokens in the LLM: 'compact' renumbers, 'original' keeps their places; null: as a
            trained `model` records, else as the pruner declares.
        loss_weights: weight of each loss by name, or a ramp {from, to, steps}; a loss without a weight stops the run at
            step 0.
        step_losses: more losses, computed from the batch and the pass, as class_path and init_args; see
            docs/add_a_loss.md.
        llm_lr: peak learning rate of the language model; 0 or null freezes it, as for every part.
        vit_lr: of the vision tower.
        connector_lr: of the projector between them.
        scorer_lr: of the pruner's learned part, where it has one.
        weight_decay: on matrices only, never on biases and norms.
        betas: of AdamW.
        eps: of AdamW.
        warmup_steps: optimizer steps from 0 to the peak, linear.
        min_lr_ratio: share of the peak at which the cosine ends.
        max_grad_norm: gradients are scaled down to this norm; null: never.
        clip_per_part: one norm per part (a fresh scorer cannot drown the rest), else one norm for all.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        lora: train low-rank additions to the language model instead of its weights, at the rate `llm_lr`: rank, alpha,
            targets; null: the weights themselves. Exported folders hold ordinary weights, with the additions in them.
        video_size: what the processor resizes videos to, in its own words, where resolution is free: shortest_edge and
            longest_edge in pixels (of a frame or of all frames together, as the family counts); null: as the checkpoint
            says.
    """

    def __init__(
        self,
        model: str,
        pruner: str = "none",
        retention_ratio: Setting = 0.5,
        pruner_options: dict[str, Any] | None = None,
        positions: Positions | None = None,
        loss_weights: dict[str, Weight] | None = None,
        step_losses: list[StepLoss] | None = None,
        llm_lr: float | None = 1e-5,
        vit_lr: float | None = 5e-6,
        connector_lr: float | None = 5e-6,
        scorer_lr: float | None = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-6,
        warmup_steps: int = 200,
        min_lr_ratio: float = 0.1,
        max_grad_norm: float | None = 1.0,
        clip_per_part: bool = True,
        gradient_checkpointing: bool = False,
        lora: Lora | None = None,
        video_size: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        rates = dict(zip(PARTS, (llm_lr, vit_lr, connector_lr, scorer_lr), strict=True))
        self.learning_rates = {part: rate for part, rate in rates.items() if rate}
        _check(self.learning_rates, warmup_steps, min_lr_ratio)
        weights: dict[str, Weight] = {"answer": 1.0, "temporal": 0.5} if loss_weights is None else loss_weights
        self.losses = StepLosses(weights, step_losses or ())
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.warmup_steps, self.min_lr_ratio = warmup_steps, min_lr_ratio
        self.max_grad_norm, self.clip_per_part = max_grad_norm, clip_per_part
        self.gradient_checkpointing = gradient_checkpointing
        self.retention = make_retention(retention_ratio)

        self.model, self.processor = load_vlm(model)
        if video_size is not None:
            resize_videos(self.processor, video_size)
        options = recorded_options(model, pruner, pruner_options)
        positions = as_recorded(model, positions=positions)["positions"]
        self.pruning = Pruning(
            self.model,
            pruner,
            retention_ratio=self.retention.target,
            positions=positions,
            **options,
        )
        self.pruning.check_trainable()
        self.trained: dict[str, Any] = {"retention_trained": self.retention.record}
        """What exported folders record of the training beside the pruner's settings (`load.TRAINED`)."""
        self.scorer = self.pruning.module  # registered, so that checkpoints and devices include it
        settings = pruner_settings(model)
        if self.scorer is not None and settings is not None and settings["pruner"] == pruner:
            trained = load_pruner(model, self.model, pruner, options)
            assert isinstance(trained, nn.Module)
            self.scorer.load_state_dict(trained.state_dict())
        self.lora = lora if "llm" in self.learning_rates else None
        if self.lora is not None:
            add_lora(self.pruning.adapter.language_model, self.lora)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(learns(name, self.learning_rates, self.lora, self.pruning.adapter))
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"nothing would learn: every rate of the parts present is 0 or null in {rates}; set one")
        self._family_counts: dict[str, list[int]] = {}
        self._answer_losses: list[tuple[float, int]] = []
        self._started, self._attached = time.perf_counter(), False

    # --- one step ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.pruning.retention_ratio = self.retention.at(self.global_step)
        losses = self._forward(batch)
        total = self.losses.add(batch, losses, self.device, self.global_step)
        self._log_step(batch)
        # Ranks are averaged, and so are the batches of a step: what each contributes to the sum is scaled up before.
        return total * self.trainer.world_size * (1 if batch.step is None else self.trainer.accumulate_grad_batches)

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of one batch by name, before their weights."""
        with ExitStack() as hooks:
            for loss in self.losses.extra:
                hooks.enter_context(loss.during(self, batch))
            now = self.run_model(batch)
            losses = {"answer": answer_loss(now.logits_BAV, now.labels_BA)}
            losses |= now.report.losses if now.report is not None else {}
            return losses | {loss.name: loss(now) for loss in self.losses.extra}

    def run_model(self, batch: Batch, retention_ratio: float | None = None) -> TrainingPass:
        """One model call. `retention_ratio`: for this call alone, which then leaves no trace in `pruning`.

        The head runs where an answer is due and nowhere else: over a whole video its logits would take more memory than
        all layers together (10,000 tokens of 152,000 words: 6 GB in fp32, several times)."""
        self.pruning.describe(batch.video_uids, batch.timestamps_s)
        inputs = dict(batch.inputs)
        labels_BL = inputs.pop("labels")[:, 1:]
        place_A = (labels_BL != IGNORED).any(0).nonzero().flatten()
        with nullcontext() if retention_ratio is None else self.pruning.aside(retention_ratio):
            logits_BAV = self.model(**inputs, use_cache=False, logits_to_keep=place_A).logits
            return TrainingPass(self, batch, labels_BL[:, place_A], logits_BAV, self.pruning.last)

    def _log_step(self, batch: Batch) -> None:
        """Losses are those of the step so far, over all ranks; the rest is this rank's."""
        values: dict[str, Any] = {f"train/{name}_loss": value for name, value in self.losses.values.items()}
        if batch.blank:
            self.log_dict(values if self.losses.num_tokens else {}, batch_size=1)
            return
        now, report = time.perf_counter(), self.pruning.last
        if report is not None and report.llm_padded:
            values["tokens_per_s"] = report.llm_tokens / max(now - self._started, 1e-9)
            values["pad_waste"] = 1 - report.llm_tokens / report.llm_padded
        self._started = now
        if report is not None and report.grids:
            values["retention_measured"] = report.retention_measured
            if self.retention.record is not None:
                values["retention_configured"] = self.pruning.retention_ratio
            values["kept_per_frame"] = sum(report.num_kept) / sum(grid.t for grid in report.grids)
        self.log_dict(values, batch_size=len(batch.uids))

    # --- validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.pruning.retention_ratio = self.retention.target
        self._family_counts, self._answer_losses = {}, []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Teacher forcing: an answer is right when the argmax at every one of its tokens is right."""
        labels_BL = batch.inputs["labels"][:, 1:]
        self.pruning.describe(batch.video_uids, batch.timestamps_s)
        out = self.model(**batch.inputs, use_cache=False)
        if batch.blank:
            return
        asked_BL = labels_BL != IGNORED
        right_B = ((out.logits[:, :-1].argmax(-1) == labels_BL) | ~asked_BL).all(1).tolist()
        num_tokens = int(asked_BL.sum())
        self._answer_losses.append((out.loss.item() * num_tokens, num_tokens))
        for sample, right in zip(batch.samples, right_B, strict=True):
            count = self._family_counts.setdefault(str(sample.meta.get("family", "other")), [0, 0])
            count[0] += right
            count[1] += 1

    def on_validation_epoch_end(self) -> None:
        counts = _gather(self._family_counts, self._answer_losses)
        values = {f"val/accuracy/{family}": right / seen for family, (right, seen) in sorted(counts[0].items())}
        seen, tokens = sum(seen for _, seen in counts[0].values()), sum(number for _, number in counts[1])
        if seen:
            values["val/accuracy"] = sum(right for right, _ in counts[0].values()) / seen
            values["val/answer_loss"] = sum(loss for loss, _ in counts[1]) / tokens
        self.log_dict(values, sync_dist=True)  # equal on every rank already

    def tokens_per_video(self, num_frames: int) -> int:
        """LLM tokens of a video after pruning, with newlines, frame marks and times, as planned: known before the
        forward pass, because training uses exact budgets.

        Where resolution is free, of the largest frame that the processor's limits allow, at times late in a
        long video: an upper bound, and a loose one unless `size` in the processor's config is set for training."""
        grid, host = self.pruning.adapter.grid(num_frames), self.pruning.adapter.host
        if host.patches_per_frame == 0:
            grid = largest_grid(self.processor, grid, num_frames)
        whole = num_placed_tokens(self.processor, grid, num_frames)
        sites = [stage.site for stage in self.pruning.pruner.stages]
        planned = plan(sites, self.retention.highest, [grid], host.llm_layers)
        kept = planned[-1][0].num_kept if planned else grid.num_groups
        if any(soft_in_training(stage) for stage in self.pruning.pruner.stages):
            kept = grid.num_groups
        return int(whole - grid.num_groups + kept)

    # --- the optimizer -----------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that learn, by part; parts without any are left out."""
        found: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                found[part_of(name, self.pruning.adapter)].append(parameter)
        return {part: parameters for part, parameters in found.items() if parameters}

    def configure_optimizers(self) -> Any:
        groups = []
        for part, parameters in self.parts().items():
            for decay in (True, False):
                chosen = [parameter for parameter in parameters if (parameter.ndim > 1) == decay]
                if chosen:
                    groups.append(
                        {
                            "params": chosen,
                            "lr": self.learning_rates[part],
                            "weight_decay": self.weight_decay if decay else 0.0,
                            "name": part if decay else f"{part}_no_decay",
                        }
                    )
        optimizer = adamw(self.trainer.strategy, groups, betas=self.betas, eps=self.eps)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine(step, total, self.warmup_steps, self.min_lr_ratio)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """ValueError where gradients are not finite. DeepSpeed, which holds them itself: see `optimizer_step`."""
        if isinstance(self.trainer.strategy, DeepSpeed):
            return
        limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
        grads = {part: [p.grad for p in group if p.grad is not None] for part, group in self.parts().items()}
        norms = {part: get_total_norm(group) for part, group in grads.items()}
        values = {f"{part}_grad_norm": _number(norm) for part, norm in norms.items()}
        self._check_gradient(values)
        self.log_dict(values, batch_size=1)
        for group, norm in zip(grads.values(), values.values(), strict=True):
            norm = norm if self.clip_per_part else math.hypot(*values.values())
            if norm > limit:
                torch._foreach_mul_(group, limit / norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        norm = engine_norm(self.trainer)
        if norm is not None:
            self._check_gradient({"grad_norm": norm})
            self.log("grad_norm", norm, batch_size=1)

    def _check_gradient(self, norms: Mapping[str, float]) -> None:
        if not self.trainer.precision.startswith("16"):  # fp16: an overflow is met by rescaling
            self.losses.check_finite("gradient", norms, self.global_step)

    # --- start and end -----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FSDP2):
            layers = [layer for layer in self.modules() if isinstance(layer, GradientCheckpointingLayer)]
            assert self.device_mesh is not None
            cut(self, layers, self.device_mesh, self.trainer.precision, ("training_step", "validation_step"))

    def setup(self, stage: str) -> None:
        """On for the whole run: activation checkpointing calls blocks again in the backward pass."""
        used = [(n, p) for n, p in self.named_parameters() if not is_unused(n, self.pruning.adapter)]
        check_frozen(self.trainer.strategy, [name for name, parameter in used if not parameter.requires_grad])
        self._widen()
        self.trained |= getattr(getattr(self.trainer, "datamodule", None), "frames", {})
        self.pruning.run_all_modules(self.trainer.world_size > 1)
        if isinstance(self.trainer.strategy, DeepSpeed):
            self.trainer.gradient_clip_val = self.max_grad_norm
            if self.max_grad_norm is not None and self.clip_per_part:
                rank_zero_warn(
                    "DeepSpeed clips with one norm for all parts; set model.clip_per_part=false to say so in the config"
                )
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # hooks for reentrant checkpointing: they would carry gradients through parts that are frozen
            self.model.disable_input_require_grads()
        self.pruning.attach()
        self._attached = True

    def _widen(self) -> None:
        """Hold what learns in fp32, whatever the checkpoint's files hold: at usual rates AdamW's steps are smaller than
        the last bit of a bf16 weight, and would be lost. DeepSpeed keeps fp32 copies of its own."""
        strategy, precision = self.trainer.strategy, str(self.trainer.precision)
        if isinstance(strategy, DeepSpeed) or precision.endswith(("16-true", "64-true")):
            return
        everything = precision == "32-true" or isinstance(strategy, FSDP2)  # which cuts parameters of one dtype only
        for parameter in self.parameters():
            if parameter.requires_grad or everything:
                parameter.data = parameter.data.float()

    def on_fit_start(self) -> None:
        self.model.train()  # `from_pretrained` hands out a model in eval mode, and Lightning keeps modes as they are
        if self.scorer is not None:
            self.scorer.train()

    def on_train_start(self) -> None:
        self._started = time.perf_counter()

    def on_validation_end(self) -> None:
        self._started = time.perf_counter()  # validation is no part of a step's time

    def teardown(self, stage: str) -> None:
        self.pruning.detach()
        self._attached = False

    def export(self, path: str | Path) -> Path:
        """Write the model and its pruner as an ordinary Hugging Face folder, whole or not at all.

        Where parameters are cut every rank must call it; rank 0 writes."""
        path, tensors, writes = Path(path), None, not self._attached or self.trainer.is_global_zero
        if self._attached and is_cut(self.trainer.strategy):
            tensors = whole_tensors(self, keep=writes)
        if writes and self.lora is not None:
            tensors = merge(self.state_dict() if tensors is None else tensors, self.lora)
        # The switched-on attention must not end up in config.json. On every rank: where the hooks stand among
        # DeepSpeed's decides in which order parameters are gathered.
        self.pruning.detach()
        self.pruning.retention_ratio = self.retention.target
        try:
            if writes:
                save_pruned(path, self.model, self.processor, self.pruning, tensors=tensors, trained=self.trained)
            return path
        finally:
            if self._attached:
                self.pruning.attach()


def _number(norm: Tensor) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _gather(
    families: dict[str, list[int]], losses: Sequence[tuple[float, int]]
) -> tuple[dict[str, list[int]], list[tuple[float, int]]]:
    """Counts of all ranks together; families may differ between ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return families, list(losses)
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, (families, list(losses)))
    merged: dict[str, list[int]] = {}
    for part, _ in parts:
        for family, (right, seen) in part.items():
            count = merged.setdefault(family, [0, 0])
            count[0] += right
            count[1] += seen
    return merged, [loss for _, part in parts for loss in part]
