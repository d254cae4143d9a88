"""`stts fit` and `stts compare` on every family beside LLaVA: from files to exported folder to table, and lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import stts_train.cli as cli
from stts.data.collate import Batch, Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts.data.shapes.clips import ShapesConfig, ShapesFrames
from stts.data.shapes.files import write_shapes
from stts.eval.compare import CompareConfig, run_compare
from stts.models.checkpoints.load import load_pruner, load_vlm, pruner_settings
from stts.models.families.base import adapter_class
from stts_train.lengths import largest_grid, num_placed_tokens
from stts_train.module import VideoFinetune
from stts_train.parts import part_of
from tests.families import FAMILIES, write_family

RATES = {"llm_lr": 1e-3, "vit_lr": 1e-3, "connector_lr": 1e-3, "scorer_lr": 1e-3, "warmup_steps": 0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files") / "shapes"
    return write_shapes(out, sizes={"train": 4, "val": 2}, config=ShapesConfig(num_sampled=8), progress=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained; nothing writes to them."""
    out = tmp_path_factory.mktemp("families")
    return {family: write_family(family, out / family) for family in FAMILIES}


def run_fit(folder: Path, files: Path, out: Path, pruner: str, **data: Any) -> None:
    """Two steps of one video, through the console entry."""
    config = {
        "seed_everything": 0,
        "out": str(out),
        "model": {"model": str(folder), "pruner": pruner, **RATES},
        "data": {
            "train": str(files / "train.jsonl"), "val": str(files / "val.jsonl"), "num_frames": 5, "batch_size": 1,
            "val_batch_size": 2, "num_workers": 0, **data,
        },
        "trainer": {
            "accelerator": "cpu", "max_steps": 2, "limit_val_batches": 1, "val_check_interval": 2,
            "check_val_every_n_epoch": None, "num_sanity_val_steps": 0, "enable_model_summary": False,
        },
    }  # fmt: skip
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    assert cli.fit(["--config", str(file)]) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_fit_then_compare(family: str, folders: dict[str, Path], files: Path, tmp_path: Path) -> None:
    run_fit(folders[family], files, tmp_path / "novelty", "novelty")
    run_fit(folders[family], files, tmp_path / "stts", "stts", batch_size=0, max_tokens=30_000)
    before, _ = load_vlm(folders[family])
    for name in ("novelty", "stts"):
        folder = tmp_path / name / "model"
        settings = pruner_settings(folder)
        assert settings is not None and settings["pruner"] == name
        model, _ = load_vlm(folder)
        load_pruner(folder, model)
        moved = {
            part_of(n, adapter_class(family))
            for n, p in model.named_parameters()
            if not torch.equal(p, before.get_parameter(n))
        }
        assert moved == {"llm", "vit", "connector"}

    config = CompareConfig(
        model=tmp_path / "stts" / "model", data=files / "val.jsonl", out=tmp_path / "compare",
        pruners=("stts", "novelty", "fastv"), retention_ratios=(0.6,), num_frames=5, batch_size=2, limit=2,
    )  # fmt: skip
    result = run_compare(config, progress=False)
    assert [cell.reason for cell in result.cells] == [None] * 4, "dense and three pruners"
    for record in result.records:
        dense, *pruned = (record.outcomes[cell.key] for cell in result.cells)
        for outcome in pruned:
            assert outcome.retention == pytest.approx(0.6, abs=0.02)
            assert outcome.cost.llm < dense.cost.llm
        assert pruned[0].cost.vit < dense.cost.vit and pruned[0].cost.connector < dense.cost.connector
        assert [outcome.cost.vit for outcome in pruned[1:]] == [dense.cost.vit] * 2


def batch_of(module: VideoFinetune, num_samples: int = 2) -> Batch:
    clips = ShapesFrames("train", num_samples, 0, ShapesConfig(num_sampled=8))
    batch = Collator(module.processor, training=True)([clips[i] for i in range(num_samples)])
    assert batch is not None
    return batch


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_that_should_learn_has_a_gradient_and_its_part(family: str, folders: dict[str, Path]) -> None:
    module = VideoFinetune(str(folders[family]), "stts", **RATES).train()
    names = dict(module.named_parameters())
    with module.pruning:
        losses = module._forward(batch_of(module))
        torch.stack([module.losses.weights[name] * value for name, value in losses.items()]).sum().backward()
    without = {name for name, p in names.items() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert without == set()
    frozen = {name for name, p in names.items() if not p.requires_grad}
    assert frozen == set()
    qwen = family.startswith("qwen")
    connector = "model.model.visual." if qwen else "model.model.multi_modal_projector."
    for name in names:
        part = part_of(name, adapter_class(family))
        assert (part == "scorer") == name.startswith("scorer.")
        assert (part == "llm") == (".language_model." in name or ".lm_head." in name)
        if part == "connector":
            assert name.startswith(connector) and (not qwen or "merger" in name)


def late(num_frames: int, height: int, width: int) -> Example:
    """A video whose times have as many digits as lengths are planned for."""
    messages = (Message("user", "<video>\nwhich colour flashed ?"), Message("assistant", "red"))
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    return Example(
        Sample("a", messages), frames, np.linspace(9000.5, 9000.5 + num_frames - 1, num_frames), duration_s=9999.0
    )


@pytest.mark.parametrize("num_frames", [1, 4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_length_of_a_sample_is_known_before_its_file_is_opened(
    family: str, num_frames: int, folders: dict[str, Path]
) -> None:
    module = VideoFinetune(str(folders[family]), "novelty", retention_ratio=0.5, **RATES)
    collator = Collator(module.processor, training=True)
    # Units of 8 pixels and at most 64 of a frame (Qwen2.5-VL), or that for each frame of the video (Qwen3-VL).
    pixels = 64 * 8 * 8 * (num_frames + num_frames % 2 if family == "qwen3_vl" else 1)
    free = family.startswith("qwen")
    if free:
        module.processor.video_processor.size["longest_edge"] = pixels
    planned = module.tokens_per_video(num_frames)
    for height, width in ((128, 128), (40, 400), (300, 80), (48, 48)):
        item = late(num_frames, height, width)
        batch = collator([item])
        assert batch is not None
        with module.pruning, torch.no_grad():
            module.train()._forward(batch)
        report = module.pruning.last
        assert report is not None
        [text] = collator.num_text_tokens([item.sample])
        [grid] = report.grids
        whole = num_placed_tokens(module.processor, grid, num_frames)
        assert report.llm_tokens == text + whole - grid.num_groups + report.num_kept[0], "exact for a known grid"
        assert report.llm_tokens <= text + planned
        if free:
            assert grid.per_frame <= largest_grid(module.processor, grid, num_frames).per_frame <= 80
        else:
            assert report.llm_tokens == text + planned, "one resolution"
