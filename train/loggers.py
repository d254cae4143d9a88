"""CSV, W&B and TensorBoard loggers by name, which go on where a resumed run goes on."""

from __future__ import annotations

import csv
import io
import os
import secrets
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment

from stts.files import write_whole

_PACKAGES = {"csv": (), "wandb": ("wandb",), "tensorboard": ("tensorboard", "tensorboardX")}


class _Rows(ExperimentWriter):
    """Goes on in the file that an earlier start of the run wrote, behind the step that this one goes on from; without
    one it is Lightning's, which deletes a file that is there."""

    def __init__(self, log_dir: str, first_step: int) -> None:
        self._first_step = first_step
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if not file.is_file():
            return
        with file.open(newline="") as lines:
            rows = csv.DictReader(lines)
            self.metrics_keys = list(rows.fieldnames or [])
            kept = [row for row in rows if int(row["step"]) < self._first_step]
        text = io.StringIO()
        writer = csv.DictWriter(text, self.metrics_keys, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_whole(file, text.getvalue())


class CsvLog(CSVLogger):
    """`<out>/log/version_N/metrics.csv`, one file for a run however often it stops and goes on."""

    def __init__(self, out: Path, version: int | None, first_step: int) -> None:
        super().__init__(out, name="log", version=version)
        self._first_step = first_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if not isinstance(self._experiment, ExperimentWriter):
            self._experiment = _Rows(self.log_dir, self._first_step)
        return self._experiment


def make_loggers(
    names: str | Sequence[str],
    out: Path,
    *,
    config: Mapping[str, Any] | None = None,
    run_id: str = "",
    version: int | None = None,
    first_step: int = 0,
) -> list[Logger]:
    """Loggers by name ("csv,wandb", or a list of names) that write below `out`. They log the same names and values.

    config: settings of the run, kept by W&B. run_id: of the W&B run to go on with; "": a new one. version: of the
    folders of CSV and TensorBoard to go on with, where rows of the steps from `first_step` on, counted from 0, are left
    out, since the resumed run makes them again; None: new ones, of one number.

    W&B follows its own environment variables (WANDB_MODE=offline, WANDB_PROJECT, ...). ValueError for an unknown name,
    and for a package that is not installed."""
    chosen = [name.strip() for name in (names.split(",") if isinstance(names, str) else names) if name.strip()]
    unknown = sorted(set(chosen) - set(_PACKAGES))
    if unknown or len(set(chosen)) < len(chosen):
        raise ValueError(f"--logger {','.join(chosen)}: expected each of {', '.join(_PACKAGES)} at most once")
    version = _next_version(out) if version is None else version
    loggers: list[Logger] = []
    for name in chosen:
        packages = _PACKAGES[name]
        if packages and not any(find_spec(package) for package in packages):
            raise ValueError(
                f"--logger {name} needs a package that is not installed: pip install {packages[0]}, or leave it out"
            )
        if name == "csv":
            loggers.append(CsvLog(out, version, first_step))
        elif name == "wandb":
            project = os.environ.get("WANDB_PROJECT", "stts")
            run_id = run_id or secrets.token_hex(4)
            loggers.append(WandbLogger(name=out.name, save_dir=out, id=run_id, project=project, config=config))
        else:
            loggers.append(TensorBoardLogger(out, name="tensorboard", version=version, purge_step=first_step))
    return loggers


def _next_version(out: Path) -> int:
    """One above all that are there: a run has one number in every folder of logs."""
    numbers = [folder.name.removeprefix("version_") for folder in out.glob("*/version_*")]
    return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def run_id_of(loggers: Sequence[Logger]) -> str:
    """Of the W&B run among them, by which a resumed run goes on with it; "" without one."""
    return next((str(logger.version) for logger in loggers if isinstance(logger, WandbLogger)), "")


def version_of(loggers: Sequence[Logger]) -> int | None:
    """Of the folders of CSV and TensorBoard among them; None without either."""
    own = [logger.version for logger in loggers if isinstance(logger, CsvLog | TensorBoardLogger)]
    return next((version for version in own if isinstance(version, int)), None)
