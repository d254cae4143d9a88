"""Every config in the repository: rehearsed end to end, and the recipes against the checkpoints they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

import stts
import stts.cli
from stts.data.collate import Collator
from stts.data.shapes.clips import ShapesConfig, ShapesFrames
from stts.models.checkpoints.load import load_vlm
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.models.families.base import make_adapter
from stts.models.families.published import PUBLISHED, config_of
from stts.models.families.tiny import write_tiny
from stts_train.cli import fit, read_config
from tests.models.checkpoints.test_checkpoints import CHECKPOINTS
from tests.train.launch import needs_deepspeed, run_all

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = {
    "molmo2_4b_stts": "allenai/Molmo2-4B",
    "llava_onevision_7b_stts": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "qwen2_5_vl_7b_stts": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl_8b_stts": "Qwen/Qwen3-VL-8B-Instruct",
    "qwen3_5_stts": "Qwen/Qwen3.5-9B",
    "internvl3_stts": "OpenGVLab/InternVL3-8B-hf",
}


def read(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    return settings


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_can_be_rehearsed(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stts").symlink_to(ROOT / "stts")
    write_small_vlm(tmp_path / "models" / "small")
    write_small_vlm(tmp_path / "models" / "wide", image_size=96)
    before = sorted(tmp_path.rglob("*"))
    assert fit(["--config", str(config), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "step 2/2  answer_loss" in shown and "validation at step 2" in shown and "rehearsed, and removed" in shown
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


@pytest.mark.slow
@needs_deepspeed
def test_recipes_can_be_rehearsed_on_two_ranks_with_their_strategies(tmp_path: Path) -> None:
    """ZeRO-2, and ZeRO-3 where the LLM sees a pruned row and where it sees padded ones. The others are rehearsed above,
    and test_orders_of_kinds.py trains every family under ZeRO-3."""
    once = ["--dry-run", "--trainer.accumulate_grad_batches=1"]  # the batches of a step are rehearsed above
    tried = ("molmo2_4b_stts", "llava_onevision_7b_stts", "qwen3_5_stts")
    files = {name: ROOT / "configs" / f"{name}.yaml" for name in tried}
    recipes = [[f"--config={file}", f"--out={tmp_path / name}", *once] for name, file in files.items()]
    output = run_all(recipes, tmp_path)
    for name, shown in zip(tried, output.split("== --out=")[1:], strict=True):
        stage = 2 if name.startswith("molmo2") else 3
        assert f"DeepSpeed stage {stage} on 2 rank(s), bf16-mixed" in shown, name
        for line in ("step 2/2  answer_loss", "validation at step 2", "rehearsed, and removed"):
            assert line in shown, name
        assert not (tmp_path / name).exists()


def test_a_rehearsal_says_what_is_missing_and_fails_as_the_run_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "qwen3_vl_8b_stts.yaml")
    argv = ["--config", config, "--dry-run", "--trainer.accumulate_grad_batches", "1"]
    assert fit([*argv, "--model.gradient_checkpointing", "false"]) == 0
    assert "data/train.jsonl (missing)" in capsys.readouterr().out
    assert fit([*argv, "--model.pruner_options", "{prune_block: 7}"]) == 2
    assert "expected 0 to 6" in capsys.readouterr().err, "as for the real tower"
    assert fit([*argv, "--model.model", "nobody/nothing"]) == 2
    assert "--model_config" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_suits_its_checkpoint(name: str) -> None:
    settings = read(name)["model"]
    assert settings["model"] == RECIPES[name]
    facts = CHECKPOINTS[settings["model"]]
    assert settings["pruner_options"]["prune_block"] <= facts.largest_prune_block
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config_of(settings["model"]))
        pruning = stts.pruning(model, "stts", retention_ratio=settings["retention_ratio"], **settings["pruner_options"])
    assert pruning.positions == ("original" if "qwen" in name else "compact")
    free = make_adapter(model).host.patches_per_frame == 0
    assert free == ("video_size" in settings), "free resolutions are bounded, fixed ones have no bounds"


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_where_its_values_come_from(name: str) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    head = text[: text.index("seed_everything")]
    tags = set(re.findall(r"\[(\w+)\]", head))
    model, data, trainer = (text[text.index(f"\n{part}:") :].split("\n\n")[0] for part in ("model", "data", "trainer"))
    plain = {"model", "pruner", "kind", "train", "val", "batch_size", "accelerator", "check_val_every_n_epoch"}
    plain |= {"log_every_n_steps", "num_sanity_val_steps", "enable_model_summary", "data", "trainer", "video_size"}
    for line in (model + data + trainer).splitlines():
        key, _, rest = line.strip().partition(":")
        if rest and not line.lstrip().startswith("#") and key not in plain:
            assert set(re.findall(r"# .*?\[(\w+)\]", line)) & tags, line
    assert head.count("# ") >= 4 and "stts plan --config" in head and "--dry-run" in head


def test_the_release_s_values_are_in_its_recipe() -> None:
    """arXiv 2603.18004, README of allenai/STTS, and the training script of its code base."""
    given = read("molmo2_4b_stts")
    model, data, trainer = given["model"], given["data"], given["trainer"]
    assert (model["llm_lr"], model["vit_lr"], model["connector_lr"]) == (1e-5, 5e-6, 5e-6)
    assert (model["betas"], model["eps"], model["weight_decay"]) == ([0.9, 0.95], 1e-6, 0.0)
    assert (model["warmup_steps"], model["min_lr_ratio"], model["max_grad_norm"]) == (200, 0.1, 1.0)
    assert (data["num_frames"], data["max_fps"], data["max_tokens"]) == (64, 2.0, 9686)
    assert (trainer["max_steps"], trainer["devices"]) == (6250, 8)
    assert trainer["devices"] * trainer["accumulate_grad_batches"] == 64, "packed rows a step"


def test_reading_a_config_loads_nothing() -> None:
    given = read_config(["--config", str(ROOT / "configs" / "qwen3_vl_8b_stts.yaml"), "--data.num_frames", "32"])
    assert given["data"]["num_frames"] == 32 and given["model"]["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shrunk_checkpoint_keeps_what_decides_whether_a_run_is_possible(name: str, tmp_path: Path) -> None:
    real = config_of(name)
    model, processor = load_vlm(write_tiny(tmp_path / "small", real))
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e6
    with torch.device("meta"):
        whole = make_adapter(AutoModelForImageTextToText.from_config(real))
    small = make_adapter(model)
    for what in ("family", "vit_depth", "lowest_tap", "patches_per_group", "mrope", "newline_per_row"):
        assert getattr(small.host, what) == getattr(whole.host, what), what
    assert small.taps() == whole.taps()
    clips = ShapesFrames("train", 2, 0, ShapesConfig(num_sampled=8))
    batch = Collator(processor, training=True)([clips[0], clips[1]])
    assert batch is not None
    unknown = processor.tokenizer.unk_token_id
    answers = batch.inputs["labels"][batch.inputs["labels"] != -100]
    assert (answers != unknown).all(), "it knows the words of ShapesQA"
    with torch.no_grad():
        assert model(**batch.inputs).loss.isfinite()


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(ValueError, match="not an empty folder"):
        write_tiny(tmp_path / "full", config_of("allenai/Molmo2-4B"))
