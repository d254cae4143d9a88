"""Checkpoints that a killed run goes on from: whole or not there at all, whatever strategy wrote them.

`<out>/checkpoints/step-00000500/` holds `state` (a file, or a folder of shards: the strategy's affair) and `run.json`
(what the run was). It is written under a temporary name and renamed, so a folder with that name is complete."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from .console import print_from_handler
from .frozen import frozen_dtype
from .loggers import run_id_of, version_of

FOLDER = "checkpoints"
EXPORTED = ("best", "model")
"""Folders of a run's models, which `Export` writes."""
UNFINISHED = ".unfinished-"


class Stopped(Exception):
    """The run was told to stop (SIGTERM, or Ctrl-C), saved itself, and can go on."""


@dataclass(frozen=True)
class Saved:
    """One complete checkpoint."""

    folder: Path
    step: int
    """Optimizer steps done."""
    ranks: int
    per_step: int
    """Batches per rank and optimizer step (trainer.accumulate_grad_batches)."""
    strategy: str
    settings: dict[str, Any]
    """What of the config decides the losses; see `settings_of`."""
    log_id: str = ""
    """Of the W&B run that it was logged to; "" without one."""
    log_version: int | None = None
    """Of the folders of its CSV and TensorBoard logs."""
    base: str = ""
    """Fingerprint of the frozen weights, which are those of the model that the run started from; "" without any."""
    base_dtype: str = ""
    """See `frozen.frozen_dtype`."""
    shapes: str = ""
    """See `frozen.learning_shapes`."""

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @classmethod
    def read(cls, folder: Path) -> Saved:
        """ValueError for anything that this module did not write to its end."""
        try:
            facts = json.loads((folder / "run.json").read_text())
            return cls(folder, **facts)
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"no checkpoint at {folder}: expected a folder such as <out>/{FOLDER}/step-00000500 ({error})"
            ) from error


def newest(out: Path) -> Saved | None:
    """The complete checkpoint with the most steps, or None."""
    complete = [Saved.read(folder) for folder in (out / FOLDER).glob("step-*") if folder.is_dir()]
    return max(complete, key=lambda saved: saved.step, default=None)


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a run's config that decides its losses. Not in it: paths of the run itself, how often it reports and
    saves, loader processes, and the ranks and batches per step it runs on (those are compared when a checkpoint is
    loaded)."""
    trainer = ("precision", "max_steps", "max_epochs", "limit_train_batches")
    return {
        "seed_everything": config["seed_everything"],
        "model": config["model"],
        "data": {name: value for name, value in config["data"].items() if name != "num_workers"},
        "trainer": {name: config["trainer"][name] for name in trainer},
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the settings that are not equal."""
    names: list[str] = []
    for name in sorted({*old, *new}):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            names.append(f"{prefix}{name}")
    return names


def choose(resume: str | None, out: Path, settings: Mapping[str, Any]) -> tuple[Saved | None, str]:
    """The checkpoint to go on from, or None to start, and a line that says why.

    'auto': the newest in `out`, if it was written with these settings. 'last': the newest whatever its settings.
    A path: that one. None: start. ValueError when 'last' or a path finds nothing."""
    if resume not in (None, "auto", "last"):
        return Saved.read(Path(resume)), ""
    saved = newest(out) if resume else None
    if resume == "last" and saved is None:
        raise ValueError(f"--resume last finds no checkpoint in {out / FOLDER}; leave it out to start from the model")
    if saved is None or resume == "last":
        return saved, ""
    if changed := differences(saved.settings, settings):
        return None, (
            f"{saved.folder} was written with other settings ({', '.join(changed)}): starting anew, older checkpoints "
            f"and models are set aside beside {out / FOLDER}. To go on from it under the new settings: --resume last"
        )
    return saved, f"going on from {saved.folder}"


def check_model(saved: Saved, module: Any) -> None:
    """ValueError unless what learns has the checkpoint's names and shapes, and what is frozen is what it leaves out."""
    model, pruner = saved.settings["model"]["model"], saved.settings["model"]["pruner"]
    if saved.shapes and saved.shapes != module.shapes:
        raise ValueError(
            f"{saved.folder} was written for the model {model} with the pruner {pruner}, and what learns in this run "
            f"({module.model.name_or_path}, {module.pruning.name}) has other names or shapes; use the same model, "
            "pruner, rates that are 0 and lora, or another --out to start anew"
        )
    if saved.base and saved.base != module.base:
        raise ValueError(
            f"{saved.folder} holds what learns alone, and {module.model.name_or_path} has other weights than the model "
            "that its run started from, whose frozen weights it needs; put that one back at this place, or, to export, "
            "name it with --base_model"
        )


_ELSEWHERE = "or start another run (another --out) from the model that `stts export` makes of it"


def check_size(saved: Saved, ranks: int, per_step: int) -> None:
    """ValueError unless a run on so many ranks makes optimizer steps of the same batches."""
    size = saved.ranks * saved.per_step
    if size != ranks * per_step:
        fitting = [str(number) for number in range(1, size + 1) if size % number == 0]
        raise ValueError(
            f"{saved.folder} was written with {size} batches in an optimizer step ({saved.ranks} rank(s) x "
            f"{saved.per_step}), this run has {ranks * per_step} ({ranks} x {per_step}), which would be other steps. "
            f"Use {' or '.join(fitting)} ranks with trainer.accumulate_grad_batches={size} / ranks, {_ELSEWHERE}"
        )


def check_fits(saved: Saved, trainer: pl.Trainer) -> None:
    """ValueError unless this run makes optimizer steps of the same batches, and its strategy can read the state."""
    check_size(saved, trainer.world_size, trainer.accumulate_grad_batches)
    strategy = strategy_name(trainer)
    if _ALIKE.get(saved.strategy, saved.strategy) != _ALIKE.get(strategy, strategy):
        raise ValueError(
            f"{saved.folder} was written under strategy {saved.strategy}, this run uses {strategy}, which cuts the "
            f"state in another way; use the same strategy, {_ELSEWHERE}"
        )


_ALIKE = {"SingleDeviceStrategy": "DDPStrategy"} | {f"DeepSpeed stage {stage}": "DeepSpeed" for stage in (1, 2, 3)}
"""Strategies that read each other's state: two that write everything into one file, and stages, which are converted."""


def rescale(checkpoint: dict[str, Any], factor: Fraction) -> None:
    """Change, in place, what a checkpoint counts in batches of a rank: there are `factor` times as many in this run.

    `trainer.save_checkpoint` runs between two optimizer steps, so every count stays a whole number."""
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.batch_progress"]
    for scope in ("total", "current"):
        progress[scope] = {name: int(count * factor) for name, count in progress[scope].items()}
    for loader in loops["state_dict"].get("combined_loader", []):
        loader["position"] = int(loader["position"] * factor)


def strategy_name(trainer: pl.Trainer) -> str:
    """Equal for two runs whose checkpoints are interchangeable."""
    strategy = trainer.strategy
    stage = getattr(strategy, "stage", None)
    return type(strategy).__name__ + ("" if stage is None else f" stage {stage}")


class Checkpoints(Checkpoint):
    """Saves every `every_n_steps` optimizer steps (0: never in between), at each best validation accuracy, at the end,
    and on SIGTERM or Ctrl-C, where all ranks stop together after the step they are in; keeps the newest `keep` and the
    best."""

    def __init__(
        self, out: Path, settings: Mapping[str, Any], every_n_steps: int, keep: int, resumed: Saved | None
    ) -> None:
        if keep < 1 or every_n_steps < 0:
            raise ValueError(f"keep_checkpoints={keep} must be at least 1, checkpoint_every={every_n_steps} at least 0")
        self.folder, self.settings = out / FOLDER, settings
        self.every_n_steps, self.keep, self.resumed = every_n_steps, keep, resumed
        self.best = -1.0
        self._step, self._before = 0, signal.getsignal(signal.SIGINT)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Clear what an earlier run left: unfinished folders, and, when this one starts anew, its checkpoints and the
        models exported from it, so that `best` and `model` are of one run. The model this one starts from stays."""
        if trainer.is_global_zero:
            for folder in self.folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(folder)
            if self.resumed is None:
                _set_aside(self.folder.parent, Path(pl_module.model.name_or_path).resolve())
        trainer.strategy.barrier()

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._step, self._before = trainer.global_step, signal.getsignal(signal.SIGINT)

        def stop(number: int, _: Any) -> None:
            pl_module.losses.stop_requested = True
            signal.signal(signal.SIGINT, self._before)  # once more ends the process at once
            if number == signal.SIGINT:
                print_from_handler("saving after this step; Ctrl-C again ends the run at once, without saving")

        # In place of Lightning's handler, which starts a collective in the middle of whatever the rank is doing.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        signal.signal(signal.SIGINT, self._before)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self._step:  # between two batches of one step
            return
        self._step, stop = trainer.global_step, pl_module.losses.stop  # of any rank, equal on all
        if stop or (self.every_n_steps and self._step % self.every_n_steps == 0):
            self._save(trainer, pl_module, f"step-{self._step:08d}")
        if stop:
            # Lightning logs a step behind all hooks of its end, which the exception cuts short
            trainer._logger_connector.update_train_step_metrics()
            raise Stopped(f"stopped at step {self._step}; the same command goes on from there")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val/accuracy")
        if trainer.sanity_checking or accuracy is None:
            return
        if accuracy.item() > self.best:
            self.best = accuracy.item()
            self._save(trainer, pl_module, f"best-{trainer.global_step:08d}")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer, pl_module, f"step-{trainer.global_step:08d}")

    def _save(self, trainer: pl.Trainer, pl_module: Any, name: str) -> None:
        """On every rank at once; nothing to do when this step is saved already."""
        done, unfinished = self.folder / name, self.folder / f"{UNFINISHED}{name}"
        if trainer.strategy.broadcast(done.exists()):
            return
        if trainer.is_global_zero:
            unfinished.mkdir(parents=True)
        trainer.strategy.barrier()
        trainer.save_checkpoint(unfinished / "state")  # returns when every rank has written its part
        if trainer.is_global_zero:
            facts = {
                "step": trainer.global_step,
                "ranks": trainer.world_size,
                "per_step": trainer.accumulate_grad_batches,
                "strategy": strategy_name(trainer),
                "settings": self.settings,
                "log_id": run_id_of(trainer.loggers),
                "log_version": version_of(trainer.loggers),
                "base": pl_module.base,
                "base_dtype": frozen_dtype(pl_module),
                "shapes": pl_module.shapes,
            }
            (unfinished / "run.json").write_text(json.dumps(facts, indent=2) + "\n")
            _to_disk(unfinished)
            unfinished.rename(done)
            self._prune()

    @rank_zero_only
    def _prune(self) -> None:
        steps, best = (sorted(self.folder.glob(f"{kind}-*")) for kind in ("step", "best"))
        for folder in [*steps[: -self.keep], *best[:-1]]:
            gone = folder.rename(folder.with_name(f"{UNFINISHED}{folder.name}"))  # never half of one under its name
            shutil.rmtree(gone)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.resumed is not None:
            rescale(checkpoint, Fraction(trainer.accumulate_grad_batches, self.resumed.per_step))

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def _set_aside(out: Path, start: Path) -> None:
    """Rename what an earlier run left in `out`, all with the same number; `start`: a folder that is read from."""
    names = [name for name in (FOLDER, *EXPORTED) if (out / name).is_dir() and any((out / name).iterdir())]
    number = 1
    while any((out / f"{name}-{number}").exists() for name in (FOLDER, *EXPORTED)):
        number += 1
    for name in names:
        if (out / name).resolve() not in (start, *start.parents):
            (out / name).rename(out / f"{name}-{number}")


def _to_disk(folder: Path) -> None:
    """A rename can reach the disk before the contents do; then a power cut leaves a complete name on empty files."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
