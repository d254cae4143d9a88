"""The LightningModule: a stock VLM under a pruner, the sum of its named losses, and the optimizer over its parts.

It knows no method: what a pruner adds to the loss arrives by name, and `loss_weights` says what each name weighs.

Shape suffixes:  B = rows,  L = text length"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn

from stts.budget import plan
from stts.data.collate import IGNORED, Batch
from stts.models.load import load_pruner, load_vlm, pruner_settings, save_pruned
from stts.models.pruning import Pruning
from stts.pruners.base import Positions

PARTS = ("llm", "vit", "connector", "scorer")
_UNUSED = (".vision_tower.post_layernorm.", ".vision_tower.head.")  # behind the features that VLMs read: no gradient


class VideoFinetune(pl.LightningModule):
    """Fine-tunes a VLM, its pruner, or both.

    Raises ValueError for settings outside the ranges given below, before anything is loaded.

    Args:
        model: Hugging Face folder or hub id of a supported family.
        pruner: registry name, or 'package.module:Class'; 'none' trains on every token.
        retention_ratio: fraction of visual tokens the LLM sees, in (0, 1]: kept, not removed.
        pruner_options: options of the pruner.
        positions: of surviving tokens in the LLM: 'compact' renumbers, 'original' keeps their places; null: as the
            pruner declares.
        loss_weights: weight of each loss by name; a loss without a weight stops the run at step 0.
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
    """

    def __init__(
        self,
        model: str,
        pruner: str = "none",
        retention_ratio: float = 0.5,
        pruner_options: dict[str, Any] | None = None,
        positions: Positions | None = None,
        loss_weights: dict[str, float] | None = None,
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
    ) -> None:
        super().__init__()
        rates = dict(zip(PARTS, (llm_lr, vit_lr, connector_lr, scorer_lr), strict=True))
        self.learning_rates = {part: rate for part, rate in rates.items() if rate}
        _check(self.learning_rates, warmup_steps, min_lr_ratio)
        self.loss_weights = {"answer": 1.0, "temporal": 0.5} if loss_weights is None else dict(loss_weights)
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.warmup_steps, self.min_lr_ratio = warmup_steps, min_lr_ratio
        self.max_grad_norm, self.clip_per_part = max_grad_norm, clip_per_part
        self.gradient_checkpointing = gradient_checkpointing

        self.model, self.processor = load_vlm(model)
        options = dict(pruner_options or {})
        self.pruning = Pruning(self.model, pruner, retention_ratio=retention_ratio, positions=positions, **options)
        self.pruning.check_trainable()
        self.scorer = self.pruning.module  # registered, so that checkpoints and devices include it
        settings = pruner_settings(model)
        if self.scorer is not None and settings is not None and settings["pruner"] == pruner:
            trained = load_pruner(model, self.model, pruner, options)
            assert isinstance(trained, nn.Module)
            self.scorer.load_state_dict(trained.state_dict())
        for name, parameter in self.named_parameters():
            unused = any(part in name for part in _UNUSED)
            parameter.requires_grad_(part_of(name) in self.learning_rates and not unused)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(f"nothing would learn: every rate of the parts present is 0 or null in {rates}; set one")
        self._family_counts: dict[str, list[int]] = {}
        self._answer_losses: list[tuple[float, int]] = []
        self._started, self._attached = time.perf_counter(), False

    # --- one step ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self._forward(batch)
        # Indexing, not .get(): a loss without a weight must fail on step 0, not train silently at zero.
        unknown = sorted(set(losses) - set(self.loss_weights))
        if unknown:
            raise ValueError(
                f"the pruner gives the losses {unknown}, which model.loss_weights={self.loss_weights} does not name; "
                "add a weight for each (0 to leave it out on purpose)"
            )
        total = torch.stack([self.loss_weights[name] * value for name, value in losses.items()]).sum()
        if not torch.isfinite(total):
            raise ValueError(
                f"the loss is not finite at step {self.global_step}: "
                f"{ {name: value.item() for name, value in losses.items()} }, samples {list(batch.uids)}; look at "
                "these samples, lower the learning rates or train in fp32"
            )
        self._log_step(batch, losses)
        return total * 0.0 if batch.blank else total  # every rank runs every module, also when all its files were bad

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        """One model call; losses by name, unweighted."""
        self.pruning.last = None
        self.pruning.describe(batch.video_uids, batch.timestamps_s)
        out = self.model(**batch.inputs, use_cache=False)
        report = self.pruning.last
        return {"answer": out.loss, **(report.losses if report is not None else {})}

    def _log_step(self, batch: Batch, losses: Mapping[str, Tensor]) -> None:
        if batch.blank:
            return
        values: dict[str, Any] = {f"train/{name}_loss": value.detach() for name, value in losses.items()}
        now, report = time.perf_counter(), self.pruning.last
        if report is not None and report.llm_padded:
            values["tokens_per_s"] = report.llm_tokens / max(now - self._started, 1e-9)
            values["pad_waste"] = 1 - report.llm_tokens / report.llm_padded
        self._started = now
        if report is not None and report.grids:
            values["retention_measured"] = report.retention_measured
            values["kept_per_frame"] = sum(report.num_kept) / sum(grid.t for grid in report.grids)
        self.log_dict(values, batch_size=len(batch.uids))

    # --- validation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
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
        self.log_dict(values, rank_zero_only=True)

    def tokens_per_video(self, num_frames: int) -> int:
        """LLM tokens of a video after pruning, newlines included, as planned: known before the forward pass, because
        training uses exact budgets."""
        grid, host = self.pruning.adapter.grid(num_frames), self.pruning.adapter.host
        whole = self.processor._get_num_multimodal_tokens(video_sizes=[(num_frames, 1, 1)])["num_video_tokens"][0]
        sites = [stage.site for stage in self.pruning.pruner.stages]
        planned = plan(sites, self.pruning.retention_ratio, [grid], host.llm_layers)
        kept = planned[-1][0].num_kept if planned else grid.num_groups
        return int(whole - grid.num_groups + kept)

    # --- the optimizer -----------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that learn, by part; parts without any are left out."""
        found: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                found[part_of(name)].append(parameter)
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
        optimizer = torch.optim.AdamW(groups, betas=self.betas, eps=self.eps, fused=True)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine(step, total, self.warmup_steps, self.min_lr_ratio)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        parts = self.parts()
        if self.max_grad_norm is not None and not self.clip_per_part:
            torch.nn.utils.clip_grad_norm_([p for group in parts.values() for p in group], self.max_grad_norm)
        for part, parameters in parts.items():
            limit = self.max_grad_norm if self.max_grad_norm is not None and self.clip_per_part else math.inf
            self.log(f"{part}_grad_norm", torch.nn.utils.clip_grad_norm_(parameters, limit), batch_size=1)

    # --- start and end -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """On for the whole run: activation checkpointing calls blocks again in the backward pass."""
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):  # clips by itself, with one norm for all parts
            self.trainer.gradient_clip_val = self.max_grad_norm
        if self.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.pruning.attach()
        self._attached = True

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
        """Write the model and its pruner as an ordinary Hugging Face folder, whole or not at all."""
        self.pruning.detach()  # the switched-on attention must not end up in config.json
        try:
            return save_pruned(path, self.model, self.processor, self.pruning)
        finally:
            if self._attached:
                self.pruning.attach()


def part_of(name: str) -> str:
    """Which part a parameter of `VideoFinetune` belongs to, by the names that Hugging Face families share."""
    if name.startswith("scorer."):
        return "scorer"
    if "multi_modal_projector" in name or "image_newline" in name or ".merger" in name:
        return "connector"
    return "vit" if ".vision_tower." in name or ".visual." in name else "llm"


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
