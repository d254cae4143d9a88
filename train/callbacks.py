"""What happens around training: a line of progress, a list of skipped files, the exported model folders."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from stts.data.collate import Batch
from stts.data.datasets import Skipped

from .checkpoints import EXPORTED
from .console import TIE, print_rank_zero, print_wrapped


class ProgressLines(pl.Callback):
    """One line every `every_n_steps` optimizer steps, at the first and the last one, and one per validation, so that a
    log file tells the story. The time left is that of the steps at the speed since the line before.

    Also logs the learning rate of every group."""

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self._since, self._step, self._first = time.perf_counter(), 0, 1

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since, self._step = time.perf_counter(), trainer.global_step
        self._first = self._step + 1

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        if step == self._step or (step % self.every_n_steps and step not in (self._first, total)):
            return
        rates = {f"lr/{group['name']}": group["lr"] for group in trainer.optimizers[0].param_groups}
        pl_module.log_dict(rates, batch_size=1)
        seconds = (time.perf_counter() - self._since) / (step - self._step)
        self._since, self._step = time.perf_counter(), step
        values = trainer.callback_metrics
        losses = " ".join(f"{name[6:]}{TIE}{values[name].item():.4f}" for name in values if name.startswith("train/"))
        kept = f" kept{TIE}{values['retention_measured'].item():.3f}" if "retention_measured" in values else ""
        left = f"  {_span(seconds * (total - step))}{TIE}left" if step < total < float("inf") else ""
        print_wrapped(
            f"step {step}/{total:.0f}  {losses}{kept}  lr{TIE}{max(rates.values()):.2e}  {seconds:.3f}{TIE}s/step{left}"
        )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        if values and not trainer.sanity_checking:
            shown = "  ".join(f"{name[4:]}{TIE}{value.item():.4f}" for name, value in values.items())
            print_wrapped(f"validation at step {trainer.global_step}:  {shown}")


def _span(seconds: float) -> str:
    """As a clock shows it: 4:05, or 12:30:00."""
    minutes, hours = round(seconds) // 60 % 60, round(seconds) // 3600
    return f"{hours}:{minutes:02}:{round(seconds) % 60:02}" if hours else f"{minutes}:{round(seconds) % 60:02}"


class SkipList(pl.Callback):
    """Collects what the data set skipped: counted in the log, listed with its reason in `<out>/skipped.txt`."""

    def __init__(self, out: str | Path) -> None:
        self.file = Path(out) / "skipped.txt"
        self.reasons: dict[str, str] = {}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self._note(trainer, batch.skipped)
        if batch.skipped:
            pl_module.log("skipped", float(len(self.reasons)), batch_size=1)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._note(trainer, batch.skipped)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Rows that could not be parsed belong to no batch: rank 0 lists them by file and line."""
        data = getattr(trainer, "datamodule", None)
        if trainer.is_global_zero:
            faults = [fault for file in getattr(data, "files", ()) for fault in file.samples.left_out]
            self._note(trainer, [Skipped(*fault.partition(": ")[::2]) for fault in faults])

    def _note(self, trainer: pl.Trainer, items: Sequence[Skipped]) -> None:
        fresh = [item for item in items if item.uid not in self.reasons]
        for item in fresh:
            self.reasons[item.uid] = item.reason
        if fresh:
            file = (
                self.file.with_name(f"skipped-rank{trainer.global_rank}.txt") if trainer.world_size > 1 else self.file
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as lines:
                lines.writelines(f"{item.uid}\t{item.reason}\n" for item in fresh)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.reasons:
            rank_zero_warn(f"{len(self.reasons)} samples were skipped on rank 0; see {self.file.parent}/skipped*.txt")

    def state_dict(self) -> dict[str, Any]:
        return {"reasons": self.reasons}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.reasons = state_dict["reasons"]


class Export(pl.Callback):
    """Writes ordinary Hugging Face folders: `<out>/best` at each best validation accuracy, `<out>/model` at the end.

    Every rank takes part, because parameters may be cut over them; rank 0 writes."""

    def __init__(self, out: str | Path) -> None:
        self.out, self.best = Path(out), -1.0

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("val/accuracy")
        if trainer.sanity_checking or accuracy is None or accuracy.item() <= self.best:
            return
        self.best = accuracy.item()
        self._write(pl_module, EXPORTED[0])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.interrupted:
            self._write(pl_module, EXPORTED[1])

    def _write(self, pl_module: Any, name: str) -> None:
        print_rank_zero(f"wrote {pl_module.export(self.out / name)}")

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
