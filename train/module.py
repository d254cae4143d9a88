"""The LightningModule: a stock VLM under a pruner, the sum of its named losses, and the optimizer over its parts.

It names no method: what a pruner adds to the loss arrives by name and is weighted in `loss_weights`; losses computed
from the batch and the forward pass are listed in `step_losses`.

Shape suffixes beside those of `stts.tokens`: B = rows, L = text length, A = places where some row has an answer, V =
vocabulary."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from stts.data.collate import Batch
from stts.models.checkpoints.load import (
    as_recorded,
    load_vlm,
    recorded_options,
    resize_videos,
)
from stts.models.pruning.context import Pruning
from stts.pruners.base import Positions

from .checks import check_trainer, total_steps
from .clipping import fill_gradients, grad_squares, scale_grads
from .frozen import fingerprint, learning_shapes, leave_out_frozen
from .lengths import planned_tokens
from .live_export import export_live
from .lora import Lora, add_lora
from .loss import answer_loss
from .parts import PARTS, check_rates, cosine, learning_parts, learns, parameter_groups, part_of_group
from .precision import exact_conversions
from .retention import Setting, holds_vlm, make_retention
from .step_losses import StepLoss, StepLosses, TrainingPass, Weight
from .strategies import FSDP2, DeepSpeed, adamw, average_gradients, check_holds, cut, sync_gradients, widen
from .validation import Validation


class VideoFinetune(pl.LightningModule):
    """Fine-tunes a VLM, its pruner, or both.

    Raises ValueError for settings outside the ranges given below, before anything is loaded.

    Args:
        model: Hugging Face folder or hub id of a supported family.
        pruner: registry name, 'package.module:Class' or 'file.py:Class'; 'none' trains on every token.
        retention_ratio: fraction of visual tokens the LLM sees, in (0, 1]: kept, not removed. Or one per step: a range
            {low, high} to draw from, a schedule {from, to, steps, shape}, or dense steps amid others {target,
            dense_first, dense_every, dense_trains}; see train/retention.py.
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
        check_rates(self.learning_rates, warmup_steps, min_lr_ratio)
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
            self.model, pruner, retention_ratio=self.retention.target, positions=positions, untrained=True, **options
        )
        self.pruning.check_trainable()
        self.trained: dict[str, Any] = {"retention_trained": self.retention.record}
        """What exported folders record of the training beside the pruner's settings (`load.TRAINED`)."""
        self.scorer = self.pruning.module  # registered, so that checkpoints and devices include it
        self.lora = lora if "llm" in self.learning_rates else None
        if self.lora is not None:
            add_lora(self.pruning.adapter.language_model, self.lora)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(learns(name, self.learning_rates, self.lora, self.pruning.adapter))
        if holds_vlm(self.retention) and "scorer" not in self.parts():
            raise ValueError(
                f"retention_ratio={retention_ratio} trains the scorer alone in dense steps, but pruner={pruner!r} at "
                f"scorer_lr={scorer_lr} has none that learns; use pruner='stts', a rate, or leave dense_trains out"
            )
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"nothing would learn: every rate of the parts present is 0 or null in {rates}; set one")
        self._seed = 0
        self._held: list[nn.Parameter] = []  # that learn, but not in the present batch
        self.base, self.shapes = fingerprint(self), learning_shapes(self)
        """Of the frozen weights, and of the others, which checkpoints hold alone."""
        leave_out_frozen(self)
        self._validation = Validation()
        self._started, self._attached = time.perf_counter(), False

    # --- one step ----------------------------------------------------------------------------------------------------

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # What a stage draws is then a function of the batch, so a resumed run draws what it would have drawn.
        place = 0 if batch.step is None else batch.step.place
        torch.manual_seed(hash((self._seed, self.global_step, place, self.global_rank)))
        if holds_vlm(self.retention, self.global_step):
            self._held = [p for part, group in self.parts().items() if part != "scorer" for p in group]
            for parameter in self._held:
                parameter.requires_grad_(False)
            sync_gradients(self.trainer.strategy, not self._held)

    def on_after_backward(self) -> None:
        if self._held:
            for parameter in self._held:
                parameter.requires_grad_(True)
            self._held = []
            sync_gradients(self.trainer.strategy, True)
            if self.losses.is_complete:
                average_gradients(self.trainer.strategy, self.parts()["scorer"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.pruning.retention_ratio = self.retention.at(self.global_step)
        losses = self._forward(batch)
        late = {} if self.pruning.last is None else self.pruning.last.late_values
        total = self.losses.add(batch, losses, self.device, self.global_step, late)
        self._log_batch(batch)
        # Ranks are averaged, and so are the batches of a step: what each contributes to the sum is scaled up before.
        return total * self.trainer.world_size * (1 if batch.step is None else self.trainer.accumulate_grad_batches)

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of one batch by name, before their weights."""
        with ExitStack() as hooks:
            for loss in self.losses.extra:
                hooks.enter_context(loss.during(self, batch))
            now = self.run_model(batch)
            objective, losses = ("log_prob", {}) if now.report is None else (now.report.objective, now.report.losses)
            losses = {"answer": answer_loss(now.logits_BAV, now.labels_BA, objective=objective), **losses}
            return losses | {loss.name: loss(now) for loss in self.losses.extra}

    def run_model(self, batch: Batch, retention_ratio: float | None = None) -> TrainingPass:
        """One model call. `retention_ratio`: for this call alone, which then leaves no trace in `pruning`.

        The head runs where an answer is due and nowhere else: over a whole video its logits would take more memory than
        all layers together (10,000 tokens of 152,000 words: 6 GB in fp32, several times)."""
        self.pruning.describe(batch.video_uids, batch.timestamps_s)
        inputs = dict(batch.inputs)
        labels_BL, place_A = inputs.pop("labels")[:, 1:], batch.answer_places
        with nullcontext() if retention_ratio is None else self.pruning.aside(retention_ratio):
            logits_BAV = self.model(**inputs, use_cache=False, logits_to_keep=place_A).logits
            return TrainingPass(self, batch, labels_BL[:, place_A], logits_BAV, self.pruning.last)

    def _log_batch(self, batch: Batch) -> None:
        """What this rank saw; losses of the whole step are logged at its end."""
        now, report = time.perf_counter(), self.pruning.last
        values: dict[str, Any] = {}
        if batch.blank:
            return
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
        self._validation = Validation()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._validation.add(self.run_model(batch))

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self._validation.values(), sync_dist=True)  # equal on every rank already

    def tokens_per_video(self, num_frames: int) -> int:
        """LLM tokens of a video after pruning, newlines, frame marks and times included; see `planned_tokens`."""
        return planned_tokens(self.processor, self.pruning, self.retention.highest, num_frames)

    # --- the optimizer -----------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that learn, by part; parts without any are left out."""
        return learning_parts(self.named_parameters(), self.pruning.adapter)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.parts(), self.learning_rates, self.weight_decay)
        optimizer = adamw(self.trainer, groups, betas=self.betas, eps=self.eps)
        total = total_steps(self.trainer)

        def factor(part: str, step: int) -> float:
            is_held = part != "scorer" and holds_vlm(self.retention, step)
            return 0.0 if is_held else cosine(step, total, self.warmup_steps, self.min_lr_ratio)

        factors: list[Callable[[int], float]] = [partial(factor, part_of_group(group["name"])) for group in groups]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """End of a step where gradients are held by torch. ValueError where a loss or a gradient is not finite."""
        if isinstance(self.trainer.strategy, DeepSpeed):
            return  # which clips by itself: see `optimizer_step`
        parts = self.parts()
        if holds_vlm(self.retention, self.global_step):
            fill_gradients(parts)
        squares = self.losses.close(self.device, grad_squares(parts))
        norms = {part: math.sqrt(square) for part, square in zip(parts, squares, strict=True)}
        self._end_step(norms)
        scale_grads(parts, norms, math.inf if self.max_grad_norm is None else self.max_grad_norm, self.clip_per_part)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        strategy = self.trainer.strategy
        if isinstance(strategy, DeepSpeed) and self.losses.is_complete:
            norms = strategy.grad_norms()
            # equal on all ranks: the sum over ranks is their mean times the number of ranks
            shares = [norm.to(self.device) / self.trainer.world_size for norm in norms.values()]
            self._end_step(dict(zip(norms, self.losses.close(self.device, shares), strict=True)))

    def _end_step(self, norms: dict[str, float]) -> None:
        self.losses.check_finite("loss", self.losses.values, self.global_step)
        if not str(self.trainer.precision).startswith("16"):  # fp16: an overflow is met by rescaling
            self.losses.check_finite(
                "gradient", {f"{part}_grad_norm": norm for part, norm in norms.items()}, self.global_step
            )
        values = {f"train/{name}_loss": value for name, value in self.losses.values.items()}
        values |= {f"train/{name}": value for name, value in self.losses.other_values.items()}
        self.log_dict(values | {f"{part}_grad_norm": norm for part, norm in norms.items()}, batch_size=1)

    # --- start and end -----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FSDP2):
            layers = [layer for layer in self.modules() if isinstance(layer, GradientCheckpointingLayer)]
            assert self.device_mesh is not None
            ranks = self.device_mesh["data_parallel"]  # the mesh itself has two axes: torch would copy over the first
            cut(self, layers, ranks, self.trainer.precision, ("training_step", "validation_step"))

    def setup(self, stage: str) -> None:
        """On for the whole run: activation checkpointing calls blocks again in the backward pass."""
        strategy = self.trainer.strategy
        check_trainer(self.trainer)
        exact_conversions(strategy.precision_plugin)
        widen(self, strategy, str(self.trainer.precision))
        self.trained |= getattr(getattr(self.trainer, "datamodule", None), "frames", {})
        self.pruning.run_all_modules(self.trainer.world_size > 1)
        if holds_vlm(self.retention):
            check_holds(strategy)
        if isinstance(strategy, DeepSpeed):
            self.trainer.gradient_clip_val = self.max_grad_norm
            strategy.exclude_frozen_parameters = True
            strategy.clip_per_part = self.clip_per_part and self.max_grad_norm is not None
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # hooks for reentrant checkpointing: they would carry gradients through parts that are frozen
            self.model.disable_input_require_grads()
        self.pruning.attach()
        self._attached = True

    def on_fit_start(self) -> None:
        self.model.train()  # `from_pretrained` hands out a model in eval mode, and Lightning keeps modes as they are
        if self.scorer is not None:
            self.scorer.train()

    def on_train_start(self) -> None:
        self._seed = torch.initial_seed()
        self._started = time.perf_counter()

    def on_validation_end(self) -> None:
        self._started = time.perf_counter()  # validation is no part of a step's time

    def teardown(self, stage: str) -> None:
        self.pruning.detach()
        self._attached = False

    def export(self, path: str | Path) -> Path:
        """Write the model and its pruner as an ordinary Hugging Face folder, whole or not at all.

        Where parameters are cut every rank must call it; rank 0 writes."""
        return export_live(self, Path(path), self.trainer if self._attached else None)
