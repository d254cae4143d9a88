"""What one sees of a run while it trains: throughput, pictures of what is kept, and where both are written.

Logged values have these names in every logger (CSV, W&B, TensorBoard); "this rank" is rank 0, whose log it is:

    train/<name>_loss       a loss before its weight, over all ranks and batches of the optimizer step
    <part>_grad_norm        gradient norm of llm, vit, connector or scorer, before clipping
    lr/<group>              learning rate
    retention_configured    ratio asked for in this step, where it varies (train/retention.py)
    retention_measured      equivalent retention: visual tokens the LLM saw / all of them, this rank's last batch
    kept_per_frame          groups kept per frame (Qwen: temporal patch of two), this rank's last batch
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

import os
import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn
from transformers.video_processing_utils import BaseVideoProcessor

from stts.data.collate import Batch
from stts.metrics.cost import VlmShape
from stts.models.pruning.report import Report

from .module import VideoFinetune, part_of

# --- throughput ------------------------------------------------------------------------------------------------------

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
    kernel computes again, and attention inside image tiles, the scorer and Molmo2's connector, are left out."""

    def __init__(self, module: VideoFinetune) -> None:
        self.pruning = module.pruning
        self.shape = VlmShape.from_config(module.model.config)
        self.on = self.in_backward = False
        self.lengths: dict[str, int] = {}
        self.linear: defaultdict[str, _Linear] = defaultdict(_Linear)
        self.handles = []
        head = module.model.get_output_embeddings()
        for name, layer in module.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d)):
                part = "head" if layer is head else part_of(f"{name}.weight")
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

    def note_lengths(self, batch: Batch) -> None:
        """Prompt lengths, read between forward and backward pass: the loss check has just waited for the device."""
        lengths = batch.inputs["attention_mask"].sum(1).tolist()
        self.lengths = dict(zip(batch.uids, lengths, strict=True))

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
                whole = kept is None or drop_after is None or block <= drop_after
                squares = grid.t * vit.patches**2 if whole else sum(n * n for n in kept or ())
                if block in vit.windowed:
                    squares = squares * sum(n * n for n in vit.windows) // vit.patches**2
                total += 4 * squares * vit.width
        return total

    def _llm(self, batch: Batch, report: Report) -> float:
        llm = self.shape.llm
        lost = [groups - kept for groups, kept in zip(report.num_groups, report.num_kept, strict=True)]
        dropped = dict(zip(batch.video_uids, lost, strict=False))  # none of a blank batch
        squares = sum((self.lengths[uid] - dropped.get(uid, 0)) ** 2 for uid in batch.uids)
        return 4.0 * llm.layers * llm.heads * llm.head_dim * squares

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
        self.meter.on, self._batch = True, batch

    def on_before_backward(self, *_: Any) -> None:
        assert self.meter is not None
        self.meter.note_lengths(self._batch)
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


# --- pictures --------------------------------------------------------------------------------------------------------

_TILE = 128  # pixels per frame in the picture, at least
_COLUMNS, _MOST_FRAMES = 8, 32
_DARK = 0.2
_LINE = 14  # height of a caption


class Overlays(pl.Callback):
    """Every N optimizer steps a picture of the first video of rank 0's batch: what was kept, and the scores behind it.

    Written to `<out>/overlays/step-00000100.png`, and to W&B and TensorBoard where they are on, as `overlay`."""

    def __init__(self, out: str | Path, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1; leave the callback out for none")
        self.folder, self.every_n_steps = Path(out) / "overlays", every_n_steps
        self._step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        step, report = trainer.global_step, pl_module.pruning.last
        if not trainer.is_global_zero or step == self._step or step % self.every_n_steps:
            return
        self._step = step
        if batch.blank or report is None or not report.grids:
            return  # nothing was shown in this batch; the next picture comes in its turn
        frames = first_frames(batch.inputs, pl_module.processor.video_processor)
        picture = draw_overlay(frames, report, title=f"step {step}   {batch.video_uids[0]}")
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"step-{step:08d}.png"
        picture.save(file.with_suffix(".tmp"), format="png")
        os.replace(file.with_suffix(".tmp"), file)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("overlay", [picture])
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("overlay", np.asarray(picture), step, dataformats="HWC")


def first_frames(inputs: Mapping[str, Any], processor: BaseVideoProcessor) -> NDArray[np.uint8]:
    """(T, H, W, 3) frames of the first video as the tower saw them, from what the processor made.

    LLaVA: frames, of one video after another. Qwen: patches over two frames each, in the order of merge units.
    Molmo2: patches of frames."""
    pixels = inputs["pixel_values_videos"]
    if "video_grid_thw" in inputs:
        t, h, w = inputs["video_grid_thw"][0].tolist()
        m, pair, p = processor.merge_size, processor.temporal_patch_size, processor.patch_size
        patches = pixels[: t * h * w].view(t, h // m, w // m, m, m, 3, pair, p, p)
        frames = patches.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * pair, 3, h * p, w * p)
    elif "video_grids" in inputs:
        p = processor.patch_size
        side = processor.size["height"] // p
        patches = pixels[: int(inputs["video_grids"][0, 0])].view(-1, side, side, p, p, 3)
        frames = patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, side * p, side * p)
    else:
        frames = pixels[0]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    shown = frames.detach().float().cpu() * std + mean
    return (255 * shown.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()


def draw_overlay(frames: NDArray[np.uint8], report: Report, title: str = "", video: int = 0) -> Image.Image:
    """Frames in reading order, each above its scores.

    Dropped groups are darkened. Scores are coloured by rank, purple (the lowest of the video) to yellow (the highest):
    one far above the rest would else leave all others alike. What was gone before the stage that scored is lowest.
    Where the pruner gave none, there are frames alone. Of more than 32 frames evenly spread ones are shown. Several
    frames may share a temporal cell (Qwen)."""
    grid = report.grids[video]
    cells = grid.num_groups
    alive = np.zeros(cells, bool)
    alive[report.index[video].cpu().numpy()] = True
    kept = alive.reshape(grid.t, grid.h, grid.w)
    given = report.scores[video]
    scores = None
    if given is not None:
        value = given.detach().float().cpu().numpy()
        rank = np.unique(np.where(np.isnan(value), -np.inf, value), return_inverse=True)[1]  # equal scores, equal rank
        scores = (rank / max(1, rank.max())).reshape(grid.t, grid.h, grid.w)
    shown = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), _MOST_FRAMES)).round().astype(int))
    side = -(-_TILE // frames.shape[2]) * frames.shape[2], -(-_TILE // frames.shape[2]) * frames.shape[1]
    width, height = side[0] + 4, (side[1] + 2) * (1 if scores is None else 2) + _LINE + 4
    columns = min(_COLUMNS, len(shown))
    picture = Image.new("RGB", (max(columns * width, 320), -(-len(shown) // columns) * height + 2 * _LINE), "white")
    pen = ImageDraw.Draw(picture)
    caption = f"{title}   kept {kept.sum()} of {cells} groups ({kept.mean():.1%})"
    if scores is not None:
        caption += "   below: scores by rank, purple lowest, yellow highest"
    pen.text((2, 2), caption, fill="black")
    for number, frame in enumerate(shown):
        cell = frame * grid.t // len(frames)
        x, y = number % columns * width + 2, number // columns * height + 2 * _LINE
        pen.text((x, y), f"{frame}: {kept[cell].sum()}/{grid.per_frame}", fill="black")
        light = _DARK + (1 - _DARK) * kept[cell]
        image = Image.fromarray(frames[frame]).resize(side, Image.Resampling.NEAREST)
        factor = _spread(light, image.height, image.width)[..., None]
        picture.paste(Image.fromarray((np.asarray(image) * factor).astype(np.uint8)), (x, y + _LINE))
        if scores is not None:
            heat = colormaps["viridis"](_spread(scores[cell], image.height, image.width))[..., :3]
            picture.paste(Image.fromarray((255 * heat).astype(np.uint8)), (x, y + _LINE + side[1] + 2))
    return picture


def _spread(cells: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """(h, w) cells drawn over (height, width) pixels."""
    rows, columns = (np.arange(n) * size // n for n, size in zip((height, width), cells.shape, strict=True))
    return cells[rows[:, None], columns]


# --- loggers ---------------------------------------------------------------------------------------------------------

_PACKAGES = {"csv": (), "wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}


def make_loggers(names: str | Sequence[str], out: Path) -> list[Logger]:
    """Loggers by name ("csv,wandb", or a list of names) that write below `out`. They log the same names and values.

    W&B follows its own environment variables (WANDB_MODE=offline, WANDB_PROJECT, ...). ValueError for an unknown name,
    and for a package that is not installed."""
    chosen = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    unknown = sorted(set(chosen) - set(_PACKAGES))
    if unknown or len(set(chosen)) < len(chosen):
        raise ValueError(f"--logger {','.join(chosen)}: expected each of {', '.join(_PACKAGES)} at most once")
    loggers: list[Logger] = []
    for name in chosen:
        packages = _PACKAGES[name]
        if packages and not any(find_spec(package) for package in packages):
            raise ValueError(
                f"--logger {name} needs a package that is not installed: pip install {packages[0]}, or leave it out"
            )
        if name == "csv":
            loggers.append(CSVLogger(out, name="log"))
        elif name == "wandb":
            loggers.append(WandbLogger(name=out.name, save_dir=out, project=os.environ.get("WANDB_PROJECT", "stts")))
        else:
            loggers.append(TensorBoardLogger(out, name="tensorboard"))
    return loggers
