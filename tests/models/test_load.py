"""Folders: what is written is what is read, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import stts
from stts.models.load import WEIGHTS_FILE, load_pruner, load_vlm, pruner_settings, save_pruned
from stts.models.small import write_small_vlm
from tests.conftest import TINY, make_inputs


def test_the_small_vlm_is_a_function_of_its_seed(tmp_path: Path) -> None:
    one, two, other = (write_small_vlm(tmp_path / name, None, seed=seed, **TINY) for name, seed in
                       (("one", 0), ("two", 0), ("other", 1)))  # fmt: skip
    for file in one.iterdir():
        assert (two / file.name).read_bytes() == file.read_bytes(), file.name
    assert (other / "model.safetensors").read_bytes() != (one / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="not empty"):
        write_small_vlm(one, None, **TINY)


def test_a_learned_pruner_comes_back_as_it_was(tiny: Any, tmp_path: Path) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ["v which is red ?"])
    torch.manual_seed(3)
    pruning = stts.pruning(model, "stts", retention_ratio=0.3, prune_block=1, positions="original")
    assert pruning.module is not None
    pruning.module.eval()
    with pruning, torch.no_grad():
        before = model(**inputs).logits
    folder = save_pruned(tmp_path / "model", model, processor, pruning)
    assert pruner_settings(folder) == {
        "pruner": "stts", "options": {"prune_block": 1}, "retention_ratio": 0.3, "positions": "original",
    }  # fmt: skip
    again, _ = load_vlm(folder)
    with stts.pruning(again, load_pruner(folder, again), retention_ratio=0.3, positions="original"), torch.no_grad():
        assert torch.equal(again(**inputs).logits, before)
    with pytest.raises(ValueError, match="would be random"):
        load_pruner(tmp_path, model, "stts")


def test_what_does_not_fit_is_refused(tiny_folder: Path, tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_vlm(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    weights = load_file(broken / "model.safetensors")
    weights.pop(next(key for key in weights if "fc1.weight" in key))
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="would stay random"):
        load_vlm(broken)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match="'qwen2' has no adapter; supported: llava_onevision"):
        load_vlm(foreign)
    model, processor = tiny
    folder = save_pruned(tmp_path / "model", model, processor, stts.pruning(model, "stts"))
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="made for another model"):
        load_pruner(folder, model)
