"""Throughput of a run, and the list of all logged values.

Logged values have these names in every logger (CSV, W&B, TensorBoard); "this rank" is rank 0, whose log it is:

    train/<name>_loss       a loss before its weight, over all ranks and batches of the optimizer step
    <part>_grad_norm        gradient norm of llm, vit, connector or scorer, before clipping
    lr/<group>              learning rate
    retention_configured    ratio asked for in this step, where it varies (train/retention.py)
    retention_measured      equivalent retention: visual tokens the LLM saw / all of them, this rank's last batch
    kept_per_frame          groups kept per frame (per temporal patch, where a family has them), this rank's last batch
    tokens_per_s            LLM tokens of this rank's last batch, text included, after pruning, per second since the one
                            before
    pad_waste               share of the LLM's slots that were padding, this rank's last batch
    step_s                  seconds from the end of the optimizer step before, loading included, validation excluded
    tflops_per_s            10^12 FLOPs per second of this rank: what its device computed in the step / step_s. Forward
                            and backward of tower, scorer, connector and LLM, and what checkpointing computes again
    mfu                     model FLOPs utilisation: the same without what is computed again / the device's peak. Absent
                            where the peak is unknown: CPUs, devices outside the table; `--peak_tflops` fills in
    skipped                 samples left out so far, this rank
    val/...                 accuracy (whole answers, teacher forcing), by question family too, and answer loss per token
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from stts.data.collate import Batch
from stts.models.families.base import vlm_shape
from stts.models.pruning.report import Report

from .module import VideoFinetune
from .parts import part_of

PEAK_TFLOPS = {
    r"\bH200 NVL\b": 835.5,
    r"\bH200\b": 989.5,
    r"\bH100 PCIe\b": 756.5,
    r"\bH100 NVL\b": 835.5,
    r"\bH100\b": 989.5,
    r"\bA100\b": 312.0,
}
"""Dense bf16 on tensor cores by device name, first match: NVIDIA's data sheets, which print twice this, with sparsity
(A100: both)."""


def peak_tflops(device: str) -> float | None:
    """10^12 FLOPs per second that this device could do in bf16; None where it is not known, or is a slice of one."""
    if "MIG" in device:
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(name, device)), None)


@dataclass
class _Linear:
    """FLOPs of the linear layers of one part."""

    forward: float = 0.0
    with_grad: float = 0.0
    """Of `forward`: in layers that take part in the backward pass."""
    backward: float = 0.0
    again: float = 0.0
    """Computed a second time, for the backward pass."""


class FlopMeter:
    """FLOPs of training batches, one multiply-add = 2; norms, softmax, rotary and embedding look-up are not counted.

    Linear layers and patch embeddings report the rows they saw, so pruning, LoRA, images and frozen parts count as they
    are: the backward pass costs a forward pass for each of input and weight that has a gradient. Attention comes from
    lengths, causal as full (as in `stts/metrics/cost.py`), twice its forward cost in the backward pass; what a fused
    kernel computes again, and attention inside image tiles, the scorer and connectors, are left out."""

    def __init__(self, module: VideoFinetune) -> None:
        self.pruning = module.pruning
        self.shape = vlm_shape(module.model.config)
        self.on = self.in_backward = False
        self.linear: defaultdict[str, _Linear] = defaultdict(_Linear)
        self.handles = []
        head = module.model.get_output_embeddings()
        for name, layer in module.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                part = "head" if layer is head else part_of(f"{name}.weight", self.pruning.adapter)
                learns = layer.weight.requires_grad  # asked here: under ZeRO-3 touching a weight gathers it
                self.handles.append(layer.register_forward_hook(self._hook(part, learns)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _hook(self, part: str, learns: bool) -> Any:
        def count(layer: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
            if not self.on:
                return
            flops, linear = 2.0 * out.numel() * _fan_in(layer), self.linear[part]
            if self.in_backward:
                linear.again += flops
                return
            linear.forward += flops
            linear.with_grad += flops * out.requires_grad
            linear.backward += flops * (args[0].requires_grad + learns)

        return count

    def read(self, batch: Batch, report: Report | None) -> tuple[float, float]:
        """FLOPs of the batch that just ran, and those that were computed again; begins anew."""
        forward = sum(linear.forward + linear.backward for linear in self.linear.values())
        again = sum(linear.again for linear in self.linear.values())
        if report is not None:
            for part, attention in (("vit", self._tower(report)), ("llm", self._llm(batch, report))):
                linear = self.linear[part]
                forward += attention * (1 + 2 * linear.with_grad / max(linear.forward, 1.0))
                again += attention if linear.again else 0.0
            forward += self._free_stages(report)
        self.linear.clear()
        return forward, again

    def _tower(self, report: Report) -> float:
        drop_after = next((s.site.drop_after for s in self.pruning.pruner.stages if s.site.kind == "vit"), None)
        total = 0
        for video, grid in enumerate(report.grids):
            vit = self.shape.at(grid).vit
            kept = report.kept_patches[video] if report.kept_patches else None
            for block in range(self.pruning.adapter.host.vit_depth):
                is_dense, more = kept is None or drop_after is None or block <= drop_after, vit.class_tokens
                squares = grid.t * (vit.patches + more) ** 2 if is_dense else sum((n + more) ** 2 for n in kept or ())
                if block in vit.windowed:
                    squares = squares * sum(n * n for n in vit.windows) // vit.patches**2
                total += 4 * squares * vit.width
        return total

    def _llm(self, batch: Batch, report: Report) -> float:
        llm = self.shape.llm
        lost = [groups - kept for groups, kept in zip(report.num_groups, report.num_kept, strict=True)]
        dropped = dict(zip(batch.video_uids, lost, strict=False))  # none of a blank batch
        rows = zip(batch.uids, batch.lengths, strict=True)
        squares = sum((length - dropped.get(uid, 0)) ** 2 for uid, length in rows)
        attention = 4.0 * llm.attention_layers * llm.heads * llm.head_dim * squares
        if llm.linear is None:
            return attention
        tokens = sum(length - dropped.get(uid, 0) for uid, length in zip(batch.uids, batch.lengths, strict=True))
        return attention + 6.0 * len(llm.linear.layers) * llm.linear.value * llm.linear.head_dim * tokens

    def _free_stages(self, report: Report) -> float:
        """Training-free stages: a choice without gradient, by their own account."""
        host, total = self.pruning.adapter.host, 0.0
        for stage, row in zip(self.pruning.pruner.stages, report.stage_kept, strict=False):
            if not isinstance(stage, nn.Module):
                width = host.vit_width if stage.site.kind == "vit" else host.llm_width
                total += sum(stage.flops(grid, width, kept) for grid, kept in zip(report.grids, row, strict=False))
        return total


def _fan_in(layer: nn.Linear | nn.Conv2d | nn.Conv3d) -> int:
    """Multiply-adds per output value, by the layer's shape: its weight may be cut over ranks."""
    if isinstance(layer, nn.Linear):
        return layer.in_features
    return layer.in_channels // layer.groups * int(np.prod(layer.kernel_size))


class Throughput(pl.Callback):
    """Logs `step_s`, `tflops_per_s` and `mfu`; see the top of this file."""

    def __init__(self, peak: float | None = None) -> None:
        """peak: 10^12 FLOPs per second of the device; None: from the table."""
        if peak is not None and peak <= 0:
            raise ValueError(f"peak_tflops={peak} must be above 0, or null to look the device up")
        self.peak = peak
        self.meter: FlopMeter | None = None
        self._flops = self._again = self._since = self._pause = 0.0
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        device = trainer.strategy.root_device
        if self.peak is None and device.type == "cuda":
            self.peak = peak_tflops(torch.cuda.get_device_name(device))
        self.meter = FlopMeter(pl_module)
        self._since, self._step = time.perf_counter(), trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.meter is not None:
            self.meter.remove()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        assert self.meter is not None
        self.meter.on = True

    def on_before_backward(self, *_: Any) -> None:
        assert self.meter is not None
        self.meter.in_backward = True

    def on_after_backward(self, *_: Any) -> None:
        assert self.meter is not None
        self.meter.in_backward = False

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        assert self.meter is not None
        self.meter.on = False
        flops, again = self.meter.read(batch, pl_module.pruning.last)
        self._flops, self._again = self._flops + flops, self._again + again
        if trainer.global_step == self._step:
            return
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        values = {"step_s": seconds, "tflops_per_s": (self._flops + self._again) / seconds / 1e12}
        if self.peak is not None:
            values["mfu"] = self._flops / seconds / 1e12 / self.peak
        pl_module.log_dict(values, batch_size=1)
        self._flops, self._again, self._since, self._step = 0.0, 0.0, now, trainer.global_step

    def on_validation_start(self, *_: Any) -> None:
        self._pause = time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        self._since += time.perf_counter() - self._pause
