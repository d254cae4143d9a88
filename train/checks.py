"""Settings of Lightning that this project overrides: each is refused by name, with what to set in its place."""

from __future__ import annotations

import math

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging

_REFUSED = {
    GradientAccumulationScheduler: "batches are counted into optimizer steps before they run; set one number with "
    "trainer.accumulate_grad_batches",
    StochasticWeightAveraging: "exported folders and validation would hold other weights; leave it out",
    WeightAveraging: "exported folders would hold the weights that are not averaged; leave it out",
}


def check_trainer(trainer: pl.Trainer) -> None:
    """ValueError for a setting that would be ignored, or would train something else than it says."""
    if trainer.gradient_clip_val is not None:
        raise ValueError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} is not used; set model.max_grad_norm, a limit for "
            "each part of the model, or for all together with model.clip_per_part=false"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in _REFUSED.items():
            if isinstance(callback, kind):
                raise ValueError(f"the callback {type(callback).__name__} is not supported: {reason}")


def total_steps(trainer: pl.Trainer) -> int:
    """Optimizer steps of the run. ValueError where they are not known: the learning rate falls over all of them."""
    total = float(trainer.estimated_stepping_batches)
    if not math.isfinite(total):
        raise ValueError(
            "the number of optimizer steps is not known (trainer.max_steps=-1 without trainer.max_epochs), and the "
            "learning rate falls over all of them; set trainer.max_steps; trainer.max_time may end the run earlier"
        )
    return int(total)
