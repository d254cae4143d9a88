"""Pictures of what a training step keeps, written to the logger and to files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from transformers.video_processing_utils import BaseVideoProcessor

from stts.data.collate import Batch
from stts.files import staged
from stts.report.overlay import draw_overlay

from .parts import Family


class Overlays(pl.Callback):
    """Every N optimizer steps a picture of the first video of rank 0's batch: what was kept, and the scores behind it.

    Written to `<out>/overlays/step-00000100.png`, and to W&B and TensorBoard where they are on, as `overlay`; to W&B
    also as a table `overlays` with the name of the video and the share that was kept."""

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
        frames = first_frames(batch.inputs, pl_module.processor.video_processor, pl_module.pruning.adapter)
        picture = draw_overlay(frames, report, title=f"step {step}   {batch.video_uids[0]}")
        with staged(self.folder / f"step-{step:08d}.png") as file:
            picture.save(file, format="png")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                logger.log_image("overlay", [picture])
                row = [step, batch.video_uids[0], report.retention_per_video[0], wandb.Image(picture)]
                logger.log_table("overlays", ["step", "video", "kept", "overlay"], [row])
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("overlay", np.asarray(picture), step, dataformats="HWC")


def first_frames(inputs: Mapping[str, Any], processor: BaseVideoProcessor, family: Family) -> NDArray[np.uint8]:
    """(T, H, W, 3) frames of the first video as the tower saw them, from what the processor made."""
    frames = family.frames_of(inputs, processor)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    shown = frames.detach().float().cpu() * std + mean
    return (255 * shown.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()
