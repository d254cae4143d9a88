"""Messages of other libraries that no user of `stts` can act on: silenced by name, one by one."""

from __future__ import annotations

import logging
import re
import warnings

_WARNINGS = (
    "LightningCLI's args parameter",  # `stts fit` hands over its own
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning 2.6 on torch 2.13
    "Total length of `list` across ranks is zero",  # no validation asked for
    "`gradient_checkpointing_enable` is deprecated",  # transformers 5.23; the new name is not in 5.5
    "Since DeepSpeed handles gradient clipping internally",  # Lightning, of a hook that does not clip there
    "The given NumPy array is not writable",  # torch, of images that transformers only reads
    "When saving the DeepSpeed Stage 3 checkpoint",  # Lightning, of a single file: `stts export` writes it
    r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated",  # DeepSpeed 0.19 on torch 2.13
    "Distutils was imported before Setuptools",  # torch's compiler of DeepSpeed's operators
    "Setuptools is replacing distutils",  # the same
)
_LOGGED = (  # as patterns of the beginning
    "\N{ELECTRIC LIGHT BULB} Tip:",  # Lightning, of its own products
    "`weights_only` was not set",  # Lightning, of loaders that get it from us where it matters
    r"(\[rank: \d+\] )?Seed set to",  # Lightning; `seed_everything` is in the run's config.yaml
    "GPU available: False",  # the same; a GPU that is there and not used is told
    "TPU available: False",
    "Initializing distributed:",  # the same, on every rank; the first line of a run says how many there are
    "-+\ndistributed_backend=",
    r"`Trainer\.fit` stopped: `max_(steps|epochs)=",  # the last step is told, and what was written
    "Setting accelerator to CPU",  # DeepSpeed
    "MPU is not provided",  # DeepSpeed, of checkpoints of models that are cut by rows too
)
_LOGGERS = (
    "lightning.fabric.utilities.distributed",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",
    "lightning.pytorch.utilities.rank_zero",
    "DeepSpeed",
)


class _ByName(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not any(re.match(pattern, record.getMessage()) for pattern in _LOGGED)


def silence() -> None:
    """Silence them in this process. Harmless when called again."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(one, _ByName) for one in logger.filters):
            logger.addFilter(_ByName())
