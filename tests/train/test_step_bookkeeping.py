"""What a step waits for: one collective of ours and one wait for the device per optimizer step, none per batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stts.data.collate import Batch, Step
from stts_train import step_losses
from stts_train.step_losses import StepLosses
from tests.train.test_module import FAST, VideoFinetune, batch_for


class Waits(TorchDispatchMode):
    """Counts operators that make the host wait for a device."""

    NAMES = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(function) in self.NAMES
        return function(*args, **(kwargs or {}))


def test_one_collective_and_one_wait_per_step(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps of three batches, as one of two ranks sees them; the first step of an epoch asks once more."""
    rows: list[torch.Tensor] = []

    def reduce(row: torch.Tensor) -> torch.Tensor:
        rows.append(row)
        return row

    monkeypatch.setattr(step_losses, "sum_over_ranks", reduce)
    monkeypatch.setattr(step_losses, "world_size", lambda: 2)
    module = VideoFinetune(str(tiny_folder), "stts", **FAST)
    batch = batch_for(module, 1)
    counts = [Step.of([batch] * 3, is_first=True), Step.of([batch] * 3, is_first=False)]
    losses = StepLosses({"answer": 1.0, "temporal": 0.5})
    cpu, seen = torch.device("cpu"), []
    for number, step in enumerate(counts):
        for count in step:
            is_last = count.place == 2 and number == 0
            known = {"has_next": True, "next_tokens": count.num_tokens, "next_videos": 3} if is_last else {}
            told = _with(batch, Step(**{**vars(count), **known}))
            values = {"answer": torch.tensor(2.0), "temporal": torch.tensor(1.0)}
            with Waits() as waits:
                losses.add(told, values, cpu, number)
            seen.append((len(rows), waits.count))
        before = len(rows)
        assert losses.is_complete
        assert losses.close(cpu, [torch.tensor(9.0)]) == [9.0] and len(rows) == before + 1
        assert losses.values == pytest.approx({"answer": 2.0, "temporal": 1.0})
    assert [count for count, _ in seen] == [1, 1, 1, 2, 2, 2], "the second step knew its counts from the first"
    assert [waits for _, waits in seen[1:]] == [0] * 5, "no batch waits for the device"


def _with(batch: Batch, step: Step) -> Batch:
    from dataclasses import replace

    return replace(batch, step=step)
