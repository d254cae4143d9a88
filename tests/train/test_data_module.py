"""Which samples share a batch, and that a run killed in mid-epoch goes on to the same losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from stts.data.shapes import ShapesConfig
from stts.data.shapes_files import write_shapes
from stts_train.data_module import Order, Phase, VideoData
from stts_train.module import VideoFinetune

SHAPES = ShapesConfig(num_sampled=8)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    return write_shapes(out, sizes={"train": 4, "val": 2}, config=ShapesConfig(num_sampled=8), progress=False)


def test_an_epoch_shows_every_sample_once_in_a_new_order() -> None:
    order = Order(23, 4, seed=1)
    first, again, second = order.batches(0), order.batches(0), order.batches(1)
    assert first == again != second
    assert [len(batch) for batch in first] == [4] * 5, "what does not fill a batch is dropped"
    assert len({sample for batch in first for sample in batch}) == 20


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_batches_evenly(world_size: int) -> None:
    ranks = [Order(22, 2, rank=rank, world_size=world_size).batches(3) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [sample for batches in ranks for batch in batches for sample in batch]
    assert len(seen) == len(set(seen)) == 22 // (2 * world_size) * 2 * world_size
    whole = [Order(22, 4, shuffle=False, drop_last=False, rank=r, world_size=world_size) for r in range(world_size)]
    shown = [sample for order in whole for batch in order.batches(0) for sample in batch]
    assert sorted(shown) == list(range(22)), "validation leaves nothing out"
    assert len({len(order.batches(0)) for order in whole}) == 1, "ranks that run out get empty batches"


def test_token_budget_batches() -> None:
    lengths = tuple(int(n) for n in np.random.default_rng(0).integers(5, 60, 3000))
    batches = Order(3000, 0, lengths=lengths, max_tokens=128).batches(0)
    sizes = [sum(lengths[sample] for sample in batch) for batch in batches]
    assert max(sizes) <= 128 and np.mean(sizes) > 0.95 * 128, "full, and never over"
    assert sorted(sample for batch in batches for sample in batch) == list(range(3000))


class Losses(pl.Callback):
    """Keeps the loss and samples of every step; `die_at` kills the run like a signal would."""

    def __init__(self, die_at: int = -1) -> None:
        self.die_at = die_at
        self.seen: dict[int, tuple[float, tuple[str, ...]]] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.die_at:
            raise RuntimeError("killed")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.seen[trainer.global_step] = (outputs["loss"].item(), batch.uids)


def run(model: Path, out: Path, data: dict[str, Any], losses: Losses, resume: str | None = None) -> None:
    rates = dict.fromkeys(("llm_lr", "vit_lr", "connector_lr", "scorer_lr"), 1e-3)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=7,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        callbacks=[losses, ModelCheckpoint(out, every_n_train_steps=3, save_last=True)],
    )
    torch.manual_seed(0)
    module = VideoFinetune(str(model), "stts", warmup_steps=2, **rates)
    trainer.fit(module, datamodule=VideoData(**data), ckpt_path=resume, weights_only=True)


@pytest.mark.parametrize(("kind", "num_workers"), [("shapes", 2), ("jsonl", 0)])
def test_a_killed_run_resumes_to_the_same_losses(
    tiny_folder: Path, files: Path, tmp_path: Path, kind: str, num_workers: int
) -> None:
    """Batches of 2: the checkpoint is at step 3, inside an epoch; step 7 lies in a later one."""
    source = {"phases": [Phase(4), Phase(6, ["direction"])]} if kind == "shapes" else {"train": files / "train.jsonl"}
    source = {name: str(value) if isinstance(value, Path) else value for name, value in source.items()}
    data = {"kind": kind, "shapes": SHAPES, "batch_size": 2, "num_frames": 8, "num_workers": num_workers, **source}
    straight, killed, resumed = Losses(), Losses(die_at=5), Losses()
    run(tiny_folder, tmp_path / "a", data, straight)
    with pytest.raises(RuntimeError, match="killed"):
        run(tiny_folder, tmp_path / "b", data, killed)
    run(tiny_folder, tmp_path / "b", {**data, "num_workers": 1}, resumed, str(tmp_path / "b" / "last.ckpt"))
    assert list(straight.seen) == list(range(1, 8)) and list(resumed.seen) == [4, 5, 6, 7]
    assert {**killed.seen, **resumed.seen} == straight.seen
    if kind == "shapes":
        families = [{uid.rsplit("-", 1)[1] for uid in straight.seen[step][1]} for step in (3, 4, 5)]
        assert families == [{"direction"}] * 3, "phases follow each other"


def test_max_tokens_packs_jsonl_rows(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    data = {"train": str(files / "train.jsonl"), "batch_size": 0, "max_tokens": 220, "num_frames": 8, "num_workers": 0}
    used: list[int] = []

    class Look(Losses):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            super().on_train_batch_end(trainer, module, outputs, batch)
            used.append(module.pruning.last.llm_tokens)

    look = Look()
    run(tiny_folder, tmp_path, data, look)
    assert max(used) <= 220 and min(len(uids) for _, uids in look.seen.values()) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs data.train"),
        ({"kind": "shapes"}, "needs data.phases"),
        ({"train": "x.jsonl"}, "no JSONL file at x.jsonl"),
        ({"train": "x.jsonl", "max_tokens": 100}, "give one and set the other to 0"),
        ({"train": "x.jsonl", "batch_size": 0}, "give one and set the other to 0"),
        ({"kind": "shapes", "phases": [Phase(4)], "batch_size": 0, "max_tokens": 9}, "use data.batch_size"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoData(**settings)
