"""CSV, W&B and TensorBoard loggers by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

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
