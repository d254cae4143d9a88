"""CSV, W&B and TensorBoard loggers by name."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

_PACKAGES = {"csv": (), "wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}


def make_loggers(
    names: str | Sequence[str], out: Path, *, config: Mapping[str, Any] | None = None, run_id: str = ""
) -> list[Logger]:
    """Loggers by name ("csv,wandb", or a list of names) that write below `out`. They log the same names and values.

    config: settings of the run, kept by W&B. run_id: of the W&B run to go on with; "": a new one.

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
            project = os.environ.get("WANDB_PROJECT", "stts")
            run_id = run_id or secrets.token_hex(4)
            loggers.append(WandbLogger(name=out.name, save_dir=out, id=run_id, project=project, config=config))
        else:
            loggers.append(TensorBoardLogger(out, name="tensorboard"))
    return loggers


def run_id_of(loggers: Sequence[Logger]) -> str:
    """Of the W&B run among them, by which a resumed run goes on with it; "" without one."""
    return next((str(logger.version) for logger in loggers if isinstance(logger, WandbLogger)), "")
