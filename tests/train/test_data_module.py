"""Which samples share a batch, and that a run killed in mid-epoch goes on to the same losses."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from stts.data.mixture import Mixture, Source
from stts.data.shapes.clips import ShapesConfig
from stts.data.shapes.files import write_shapes
from stts_train import lengths
from stts_train.batches import Order, Phase
from stts_train.callbacks import SkipList
from stts_train.data_module import VideoData
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


@pytest.mark.parametrize(("world_size", "most"), [(2, 0.005), (8, 0.01), (32, 0.02)])
def test_ranks_hold_about_equally_many_tokens_in_every_step(world_size: int, most: float) -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(1500), 0.6, 8_000).astype(np.int32), 50, 8192)
    ranks = [
        Order(8_000, 0, lengths=lengths, max_tokens=8192, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shown = [order.batches(1) for order in ranks]
    tokens = np.array([[lengths[batch].sum() for batch in batches] for batches in shown])  # (ranks, steps)
    assert tokens.max() <= 8192 and tokens.mean() > 0.96 * 8192
    spread = 1 - tokens.min(0) / tokens.max(0)
    assert spread.mean() < most
    dealt = rng.permutation(tokens.reshape(-1)).reshape(tokens.shape)
    assert spread.mean() < (1 - dealt.min(0) / dealt.max(0)).mean() / 2, "than if batches were dealt as they come"
    samples = Counter(sample for batches in shown for batch in batches for sample in batch)
    assert set(samples.values()) == {1}, "nothing twice"
    assert len(samples) > 8_000 - 6 * world_size, "and of the rest no more than a step"
    sizes = tokens.sum(0)
    assert abs(np.corrcoef(np.arange(len(sizes)), sizes)[0, 1]) < 0.5, "full steps do not all come first"


def test_weights_hold_in_batches_of_tokens_and_of_samples() -> None:
    mixture = Mixture((300, 1700), (3, 1))  # 1500 and 500 of 2000
    lengths = np.random.default_rng(0).integers(5, 60, 2000)
    for settings in ({"batch_size": 4}, {"batch_size": 0, "lengths": lengths, "max_tokens": 128}):
        for epoch in range(2):
            ranks = [Order(2000, rank=rank, world_size=2, mixture=mixture, **settings) for rank in range(2)]
            shown = [sample for order in ranks for batch in order.batches(epoch) for sample in batch]
            assert len(shown) > 1980 and sum(sample < 300 for sample in shown) == pytest.approx(1500, abs=20)


def test_the_order_of_many_samples_fits_in_little_memory() -> None:
    """80,000 samples, one of 8 ranks; a list of all batches would be 8 times as large."""
    lengths = np.random.default_rng(0).integers(200, 3000, 80_000).astype(np.int32)
    order = Order(80_000, 0, lengths=lengths, max_tokens=8192, world_size=8, mixture=Mixture((60_000, 20_000), (1, 1)))
    tracemalloc.start()
    batches = order.batches(0)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(len(batch) for batch in batches) == pytest.approx(10_000, rel=0.02) and kept < 2e6


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


def run(
    model: Path, out: Path, data: dict[str, Any], losses: Losses, resume: str | None = None, *more: pl.Callback
) -> None:
    rates = dict.fromkeys(("llm_lr", "vit_lr", "connector_lr", "scorer_lr"), 1e-3)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=7,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        callbacks=[losses, ModelCheckpoint(out, every_n_train_steps=3, save_last=True), *more],
    )
    torch.manual_seed(0)
    module = VideoFinetune(str(model), "stts", warmup_steps=2, **rates)
    trainer.fit(module, datamodule=VideoData(**data), ckpt_path=resume, weights_only=True)


@pytest.mark.parametrize(("kind", "num_workers"), [("shapes", 2), ("jsonl", 0)])
def test_a_killed_run_resumes_to_the_same_losses(
    tiny_folder: Path, files: Path, tmp_path: Path, kind: str, num_workers: int
) -> None:
    """Batches of 2: the checkpoint is at step 3, inside an epoch; step 7 lies in a later one."""
    source: dict[str, Any] = (
        {"phases": [Phase(4), Phase(6, ["direction"])]} if kind == "shapes" else {"train": files / "train.jsonl"}
    )
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


class Tell(pl.Callback):
    """SIGTERM to every loader worker once it has read something: as schedulers tell all processes of a job."""

    told = 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        for worker in multiprocessing.active_children():
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGTERM)
            self.told += 1

    on_validation_batch_start = on_train_batch_end


def test_loader_workers_outlive_the_signal_that_stops_a_run(tiny_folder: Path, tmp_path: Path) -> None:
    """It has yet to finish its step, or its validation, before it saves."""
    data = {"kind": "shapes", "shapes": SHAPES, "phases": [Phase(8)], "num_val_clips": 6, "val_batch_size": 1}
    seen, tell = Losses(), Tell()
    run(tiny_folder, tmp_path, {**data, "batch_size": 2, "num_workers": 1}, seen, None, tell)
    assert list(seen.seen) == list(range(1, 8)) and tell.told > 14, "also those of validation"


@pytest.mark.parametrize(
    "packing", [{"batch_size": 2}, {"batch_size": 0, "max_tokens": 220}], ids=["samples", "tokens"]
)
def test_a_killed_mixture_resumes_to_the_same_losses(
    tiny_folder: Path, files: Path, tmp_path: Path, packing: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()]
    (tmp_path / "b.json").write_text(json.dumps(rows[:6]))
    train = [
        Source(str(files / "train.jsonl"), weight=1),
        Source(str(tmp_path / "b.json"), weight=2, limit="random:3", root=str(files)),
    ]
    data: dict[str, Any] = {"train": train, "num_frames": 8, "num_workers": 0, "cache_gib": 0.01, **packing}
    straight, killed, resumed = Losses(), Losses(die_at=5), Losses()
    run(tiny_folder, tmp_path / "a", data, straight)
    with pytest.raises(RuntimeError, match="killed"):
        run(tiny_folder, tmp_path / "b", data, killed)
    again = {**data, "num_workers": 2, "cache_gib": 0}
    run(tiny_folder, tmp_path / "b", again, resumed, str(tmp_path / "b" / "last.ckpt"))
    assert list(resumed.seen) == [4, 5, 6, 7] and {**killed.seen, **resumed.seen} == straight.seen
    out = capsys.readouterr().out
    assert f"data: 5 samples per epoch of the 12 rows of {files}/train.jsonl" in out
    assert f"data: 10 samples per epoch of the 3 rows of {tmp_path}/b.json" in out
    seen = Counter(uid.split(":")[0] for step in straight.seen.values() for uid in step[1])
    assert set(seen) == {str(files / "train.jsonl"), str(tmp_path / "b.json")}, "uids tell the source"


def test_the_cache_is_reported_once_per_epoch(
    tiny_folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 questions about 4 clips in batches of 4: three steps an epoch. The first epoch decodes each clip once."""
    data = {"train": str(files / "train.jsonl"), "batch_size": 4, "num_frames": 8, "num_workers": 1, "cache_gib": 0.01}
    run(tiny_folder, tmp_path, data, Losses())
    lines = [line for line in capsys.readouterr().out.splitlines() if "frame cache" in line]
    assert [line.partition(" came")[0] for line in lines] == ["epoch 0: 8 of 12 videos", "epoch 1: 12 of 12 videos"]


def test_skips_of_workers_are_counted_and_named(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (files / "train.jsonl").read_text().splitlines()[:6]]
    (tmp_path / "broken.mp4").write_bytes((files / rows[0]["video"]).read_bytes()[:300])
    for row in rows:
        (tmp_path / Path(row["video"]).name).write_bytes((files / row["video"]).read_bytes())
        row["video"] = Path(row["video"]).name
    rows[1]["video"], rows[4]["video"] = "broken.mp4", "gone.mp4"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "batch_size": 2, "num_frames": 8, "num_workers": 2}
    skips = SkipList(tmp_path / "out")
    run(tiny_folder, tmp_path / "out", {**data, "on_error": "skip"}, Losses(), None, skips)
    assert set(skips.reasons) == {rows[1]["id"], rows[4]["id"]}
    assert "broken.mp4" in skips.reasons[rows[1]["id"]] and "gone.mp4" in skips.reasons[rows[4]["id"]]
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 2, "once each, over several epochs"
    unread = {**rows[0], "id": "unread", "clip": [2.0, 2.0]}
    (tmp_path / "rows2.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, unread]))
    skips = SkipList(tmp_path / "out3")
    with pytest.warns(UserWarning, match="1 of 7 rows are left out"):
        run(tiny_folder, tmp_path / "out3", {**data, "train": str(tmp_path / "rows2.jsonl"), "on_error": "skip"},
            Losses(), None, skips)  # fmt: skip
    [place] = [name for name in skips.reasons if name.endswith("rows2.jsonl, line 7")]
    assert "key 'clip'" in skips.reasons[place] and len(skips.reasons) == 3
    with pytest.raises(ValueError, match=r"sample '.*broken\.mp4|sample '.*gone\.mp4"):
        run(tiny_folder, tmp_path / "out2", data, Losses())


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


def test_clips_of_2_s_to_5_min_fill_their_rows(tiny_folder: Path, tmp_path: Path) -> None:
    """At 2 frames a second and at most 24: 5 to 24 frames. Nothing is padded, and rows are filled by what the index
    tells of durations; without it each clip would be counted as long as the longest."""
    write_shapes(tmp_path, sizes={"train": 6, "long": 1}, seed=1, config=SHAPES, progress=False)
    rows = [json.loads(text) for name in ("train", "long") for text in (tmp_path / f"{name}.jsonl").open()]
    seconds = sorted(row["duration"] for row in rows)
    assert seconds[0] < 4 and seconds[-1] > 200

    class Look(Losses):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *_: Any) -> None:
            report = module.pruning.last
            used.append((report.llm_tokens, report.llm_padded))

    filled = []
    for told in (True, False):
        used: list[tuple[int, int]] = []
        for row in rows:
            row["duration"] = row.pop("duration") if told else None
        (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"train": str(tmp_path / "all.jsonl"), "batch_size": 0, "max_tokens": 900, "num_frames": 24}
        run(tiny_folder, tmp_path / str(told), {**data, "max_fps": 2.0, "num_workers": 0}, Look())
        tokens, slots = (sum(column) for column in zip(*used, strict=True))
        assert 1 - tokens / slots < 0.02 and max(slots for _, slots in used) <= 900
        filled.append(tokens / (900 * len(used)))
    assert filled[0] > 0.75 > filled[1] + 0.2


def test_tokens_are_counted_alike_in_workers(
    tiny_folder: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"train": str(files / "train.jsonl"), "batch_size": 0, "max_tokens": 220, "num_frames": 8}
    here, there = Losses(), Losses()
    run(tiny_folder, tmp_path / "a", {**data, "num_workers": 0}, here)
    monkeypatch.setattr(lengths, "_COUNTED_AT_ONCE", 5)  # 12 rows: three pieces
    run(tiny_folder, tmp_path / "b", {**data, "num_workers": 2}, there)
    assert here.seen == there.seen
    with pytest.raises(ValueError, match=r"^sample 'train-.*' alone has \d+ tokens, more than data\.max_tokens=30"):
        run(tiny_folder, tmp_path / "c", {**data, "num_workers": 2, "max_tokens": 30}, Losses())
    picture = {"id": "p", "image": "a.png", "conversations": [{"from": "human", "value": "what ?"}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(picture))
    with pytest.raises(ValueError, match=r"^sample 'p' has images"):
        run(tiny_folder, tmp_path / "d", {**data, "train": str(tmp_path / "p.jsonl")}, Losses())


def test_a_mixture_is_written_in_yaml(files: Path, tmp_path: Path) -> None:
    train = files / "train.jsonl"
    (tmp_path / "x.yaml").write_text(
        f"data:\n  train:\n  - {{path: {train}, weight: 3}}\n  - {{path: {train}, weight: 1, limit: 'first:10%'}}\n"
    )
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(VideoData, "data")
    data = parser.instantiate_classes(parser.parse_args(["--config", str(tmp_path / "x.yaml")])).data
    assert data.mixture == Mixture((12, 2), (3, 1)) and data.mixture.counts == (11, 3)
    plain = parser.instantiate_classes(parser.parse_args([f"--data.train={train}"])).data
    assert plain.mixture == Mixture((12,)) and plain.cache is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs data.train"),
        ({"train": []}, "needs data.train"),
        ({"train": "x.jsonl", "cache_gib": -1}, "data.cache_gib=-1"),
        ({"train": [Source("x.jsonl", 1), Source("y.jsonl")]}, "every source a weight"),
        ({"kind": "shapes"}, "needs data.phases"),
        ({"train": "x.jsonl"}, "no JSONL, JSON or Parquet file at x.jsonl"),
        ({"train": "x.jsonl", "max_tokens": 100}, "give one and set the other to 0"),
        ({"train": "x.jsonl", "batch_size": 0}, "give one and set the other to 0"),
        ({"kind": "shapes", "phases": [Phase(4)], "batch_size": 0, "max_tokens": 9}, "use data.batch_size"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoData(**settings)
