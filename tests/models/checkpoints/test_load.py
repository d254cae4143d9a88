"""Folders: what is written is what is read, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import stts
from stts.models.checkpoints.load import PRUNER_FILE, WEIGHTS_FILE, load_pruner, load_vlm, pruner_settings, save_pruned
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.models.families.base import check_transformers
from tests.conftest import TINY, make_inputs


def test_the_small_vlm_is_a_function_of_its_seed(tmp_path: Path) -> None:
    one, two, other = (write_small_vlm(tmp_path / name, None, seed=seed, **TINY) for name, seed in
                       (("one", 0), ("two", 0), ("other", 1)))  # fmt: skip
    for file in one.iterdir():
        assert (two / file.name).read_bytes() == file.read_bytes(), file.name
    assert (other / "model.safetensors").read_bytes() != (one / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="not an empty folder"):
        write_small_vlm(one, None, **TINY)


def test_a_small_vlm_begins_with_another_of_a_different_frame_size(tiny_folder: Path, tmp_path: Path) -> None:
    same = write_small_vlm(tmp_path / "same", image_size=56, seed=5, start=tiny_folder, **TINY)
    for name, tensor in load_file(tiny_folder / "model.safetensors").items():
        assert torch.equal(load_file(same / "model.safetensors")[name], tensor), name
    larger = write_small_vlm(tmp_path / "larger", image_size=112, start=tiny_folder, **TINY)
    narrow, wide = (
        next(t for n, t in load_file(folder / "model.safetensors").items() if "position_embedding" in n)
        for folder in (same, larger)
    )
    assert wide.shape == (14 * 14, 32)
    means = wide.view(7, 2, 7, 2, 32).mean((1, 3)).flatten(0, 1)
    assert torch.nn.functional.cosine_similarity(means, narrow).min() > 0.9
    with pytest.raises(ValueError, match="give the widths"):
        write_small_vlm(tmp_path / "wider", start=tiny_folder, **{**TINY, "vit_width": 64})


def test_a_learned_pruner_comes_back_as_it_was(tiny: Any, tiny_folder: Path, tmp_path: Path) -> None:
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
        "exact": True, "family": "llava_onevision", "base": str(tiny_folder),
    }  # fmt: skip
    again, _ = load_vlm(folder)
    with stts.pruning(again, load_pruner(folder, again), retention_ratio=0.3, positions="original"), torch.no_grad():
        assert torch.equal(again(**inputs).logits, before)
    with pytest.raises(ValueError, match="would be random"):
        load_pruner(tmp_path, model, "stts")


def test_a_folder_without_a_model_of_a_known_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_vlm(tmp_path)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ValueError, match=r"'qwen2' has no adapter; supported: .*llava_onevision.*add_a_family"):
        load_vlm(foreign)


def edited(folder: Path, file: str, change: Any) -> Path:
    """A copy of the folder in which `change` was called with the tensors of one file."""
    copy = folder.with_name(f"{folder.name}-{len(list(folder.parent.iterdir()))}")
    shutil.copytree(folder, copy)
    tensors = load_file(copy / file)
    change(tensors)
    save_file(tensors, copy / file, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(fc1(w)), "'missing_keys': .*fc1.weight.*would stay random"),
        (lambda w: w.update(more=torch.ones(1)), "'unexpected_keys': .'more'"),
        (lambda w: w.update({fc1(w): torch.ones(4, 32)}), r"'mismatched_keys'.*\[4, 32\].*\[48, 32\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_class_is_refused(
    tiny_folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    with pytest.raises(ValueError, match=f"class of family 'llava_onevision'.*{message}"):
        load_vlm(edited(tmp_path / "model", "model.safetensors", change))


def fc1(weights: dict[str, torch.Tensor]) -> str:
    return next(name for name in weights if "layers.0.mlp.fc1.weight" in name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("scorer.mlp.2.bias"), "missing scorer.mlp.2.bias"),
        (lambda w: w.update(more=torch.ones(1)), "unexpected more"),
        (lambda w: w.update({"scorer.mlp.2.bias": torch.ones(2)}), r"scorer.mlp.2.bias is \(2,\), expected \(1,\)"),
    ],
)
def test_scorer_weights_that_do_not_fit_are_refused(tiny: Any, tmp_path: Path, change: Any, message: str) -> None:
    model, processor = tiny
    folder = save_pruned(tmp_path / "model", model, processor, stts.pruning(model, "stts"))
    with pytest.raises(ValueError, match=f"{message}; was it made for another model"):
        load_pruner(edited(folder, WEIGHTS_FILE, change), model)


def test_settings_that_do_not_fit_are_refused(tiny: Any, tmp_path: Path) -> None:
    model, processor = tiny
    folder = save_pruned(tmp_path / "model", model, processor, stts.pruning(model, "stts"))
    settings = pruner_settings(folder)
    assert settings is not None

    def wrong(**changes: Any) -> Path:
        (folder / PRUNER_FILE).write_text(json.dumps(settings | changes))
        return folder

    with pytest.raises(ValueError, match="trained on family 'qwen3_vl', this model is 'llava_onevision'"):
        load_pruner(wrong(family="qwen3_vl"), model)
    with pytest.raises(ValueError, match="wants to run 'os:system'"):
        load_pruner(wrong(pruner="os:system", options={"command": "true"}), model)
    (folder / PRUNER_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"lacks .'pruner', 'options'"):
        load_pruner(folder, model)
    wrong()
    (folder / WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=f"no {WEIGHTS_FILE}"):
        load_pruner(folder, model)


def test_versions_of_transformers_outside_the_tested_range() -> None:
    check_transformers("5.17.0.dev0")
    with pytest.raises(ValueError, match=r"5\.9\.1 is too old; install transformers >= 5\.17, < 6\.0"):
        check_transformers("5.9.1")
    with pytest.warns(UserWarning, match=r"6\.0\.1 was not tested"):
        check_transformers("6.0.1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers("6.0.1")  # said once
