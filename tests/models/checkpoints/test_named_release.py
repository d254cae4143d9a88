"""Learned parts of other releases are read by their own tensor names, out of whole checkpoints and shards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stts.cli import main
from stts.models.checkpoints.hub import PrunedVLM
from stts.models.checkpoints.load import load_vlm
from stts.models.checkpoints.named_release import read_named
from stts.models.families.base import make_adapter
from stts.pruners.registry import make_pruner

PREFIXES = {"visionselector": "visual.", "cacovid": "model."}


def write_release(folder: Path, vlm: Path, pruner: str) -> dict[str, torch.Tensor]:
    """Two shards of a whole checkpoint in which the learned part lies under the prefix of its release."""
    torch.manual_seed(3)
    module = make_pruner(pruner, make_adapter(load_vlm(vlm)[0]).host)
    assert isinstance(module, torch.nn.Module)
    state = {name: torch.randn_like(value) for name, value in module.state_dict().items()}
    named = {PREFIXES[pruner] + name: value for name, value in state.items()}
    named["compression_policy.mode_selection.0.weight"] = torch.ones(2)  # a head that nothing uses
    names = sorted(named)
    folder.mkdir()
    for number, part in enumerate((names[::2], names[1::2])):
        rest = {f"language_model.{number}.weight": torch.ones(3)}
        save_file({name: named[name] for name in part} | rest, folder / f"model-{number}.safetensors")
    return state


@pytest.mark.parametrize("pruner", PREFIXES)
def test_a_release_becomes_a_folder_that_prunes(tiny_folder: Path, tmp_path: Path, pruner: str) -> None:
    state = write_release(tmp_path / "release", tiny_folder, pruner)
    argv = ["export", "--from_reference", str(tmp_path / "release"), "--pruner", pruner]
    assert main([*argv, "--base_model", str(tiny_folder), "--retention_ratio", "0.2", str(tmp_path / "out")]) == 0
    vlm = PrunedVLM.from_pretrained(tmp_path / "out")
    assert vlm.pruning.name == pruner and vlm.pruning.retention_ratio == 0.2 and vlm.pruning.module is not None
    loaded = vlm.pruning.module.state_dict()
    assert set(loaded) == set(state) and all(torch.equal(loaded[name], state[name]) for name in state)


def test_what_is_no_release_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    state = write_release(tmp_path / "release", tiny_folder, "visionselector")
    with pytest.raises(ValueError, match=r"lacks \['nothing\.weight'\]"):
        read_named(tmp_path / "release", [*state, "nothing.weight"])
    save_file({f"ema.{name}": value for name, value in state.items()}, tmp_path / "release" / "ema.safetensors")
    with pytest.raises(ValueError, match="under two prefixes"):
        read_named(tmp_path / "release", state)
    (tmp_path / "release" / "ema.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        read_named(tmp_path / "release", state)
    for wrong in (tmp_path / "gone", tmp_path / "model.bin"):
        with pytest.raises(ValueError, match="holds no safetensors"):
            read_named(wrong, state)
    argv = [
        "export",
        "--from_reference",
        str(tmp_path / "release"),
        "--pruner",
        "evs",
        "--base_model",
        str(tiny_folder),
    ]
    assert main([*argv, str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
