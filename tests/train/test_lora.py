"""LoRA on the LLM and training the scorer alone: what learns, what stays, and what is exported."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

import stts
import stts.cli
import stts_train.cli as cli
from stts.data.collate import Batch, Collator
from stts.data.shapes.clips import ShapesConfig, ShapesFrames
from stts.models.checkpoints.load import load_vlm
from stts.models.families.published import config_of
from stts.models.families.tiny import write_tiny
from stts_train.export import _export_adapter
from stts_train.lora import Lora, merge
from stts_train.module import VideoFinetune
from stts_train.parts import part_of
from tests.conftest import make_inputs
from tests.train.launch import ROOT

FAST = {"llm_lr": 1e-2, "vit_lr": 0, "connector_lr": 0, "scorer_lr": 1e-2, "warmup_steps": 0}
FAMILIES = ("llava-hf/llava-onevision-qwen2-7b-ov-hf", "Qwen/Qwen3-VL-8B-Instruct", "allenai/Molmo2-4B")


def batch_for(module: VideoFinetune) -> Batch:
    clips = ShapesFrames("train", 2, 0, ShapesConfig(num_sampled=8))
    batch = Collator(module.processor, training=True)([clips[0], clips[1]])
    assert batch is not None
    return batch


def fit(module: VideoFinetune, batch: Batch, steps: int = 3, **settings: Any) -> None:
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", logger=False, max_steps=steps, max_epochs=9, **quiet, **settings)
    loader: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_exported_adapter_is_part_of_stock_weights(name: str, precision: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = write_tiny(tmp_path / "small", config_of(name))
    stock, _ = load_vlm(folder)
    module = VideoFinetune(str(folder), "stts", lora=Lora(rank=4), gradient_checkpointing=True, **FAST)
    batch = batch_for(module)
    fit(module, batch, precision=precision)
    moved = {n for n, p in module.named_parameters() if p.requires_grad}
    family = module.pruning.adapter
    assert {part_of(n, family) for n in moved} == {"llm", "scorer"}
    assert all(".lora_" in n for n in moved if part_of(n, family) == "llm") and any(".lora_B." in n for n in moved)

    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    again, _ = load_vlm(module.export(tmp_path / "out"))
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters()), "exporting changes nothing"
    assert type(again) is type(stock)
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
    changed = {n for n, p in again.named_parameters() if not torch.equal(p, stock.get_parameter(n))}
    assert changed and all(n.rpartition("_proj")[1] and "language_model" in n for n in changed)
    with torch.no_grad():
        ours, merged = (m.eval()(**batch.inputs).logits for m in (module.model, again))
        first = stock.eval()(**batch.inputs).logits
    torch.testing.assert_close(ours, merged, rtol=1e-4, atol=1e-4)
    assert (ours - first).abs().max() > 0.01, "it learned something"


def test_merging_by_hand() -> None:
    """W = [[1, 2], [3, 4]], A = [[1, 0]], B = [[0], [1]], alpha / rank = 2: the second row gains [2, 0]."""
    tensors = {
        "model.q_proj.base_layer.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        "model.q_proj.base_layer.bias": torch.tensor([5.0, 6.0]),
        "model.q_proj.lora_A.default.weight": torch.tensor([[1.0, 0.0]]),
        "model.q_proj.lora_B.default.weight": torch.tensor([[0.0], [1.0]]),
        "model.norm.weight": torch.tensor([7.0]),
    }
    whole = merge(tensors, Lora(rank=1, alpha=2))
    assert {name: tensor.tolist() for name, tensor in whole.items()} == {
        "model.q_proj.weight": [[1, 2], [5, 4]], "model.q_proj.bias": [5, 6], "model.norm.weight": [7],
    }  # fmt: skip


def test_the_scorer_alone_learns_from_the_answers_through_frozen_parts(tiny_folder: Path) -> None:
    rates = FAST | {"llm_lr": 0}
    module = VideoFinetune(str(tiny_folder), "stts", loss_weights={"answer": 1.0, "temporal": 0.0}, **rates)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    states: list[int] = []

    class Look(pl.Callback):
        def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            states.append(sum(state["exp_avg"].numel() for state in trainer.optimizers[0].state.values()))

    fit(module, batch_for(module), callbacks=[Look()])
    assert module.scorer is not None
    assert states == [sum(parameter.numel() for parameter in module.scorer.parameters())]
    family = module.pruning.adapter
    changed = {part_of(n, family) for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"scorer"}
    assert all(p.grad is None for n, p in module.named_parameters() if part_of(n, family) != "scorer")


def test_adapters_are_fp32_on_weights_of_any_dtype(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = write_tiny(tmp_path / "small", config_of(FAMILIES[1]))
    model, processor = load_vlm(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "low")
    processor.save_pretrained(tmp_path / "low")
    module = VideoFinetune(str(tmp_path / "low"), "stts", lora=Lora(rank=2), **FAST)
    fit(module, batch_for(module), steps=1, precision="bf16-mixed")
    family = module.pruning.adapter
    kinds = {(part_of(n, family), p.requires_grad, p.dtype) for n, p in module.named_parameters()}
    assert kinds == {
        ("llm", True, torch.float32), ("llm", False, torch.bfloat16), ("vit", False, torch.bfloat16),
        ("connector", False, torch.bfloat16), ("scorer", True, torch.float32),
    }  # fmt: skip


def test_what_learns_is_held_in_fp32(tmp_path: Path) -> None:
    """At a rate of 1e-5 a bf16 weight near 1 would never move."""
    folder = write_tiny(tmp_path / "small", config_of(FAMILIES[0]))
    model, processor = load_vlm(folder, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "low")
    processor.save_pretrained(tmp_path / "low")
    rates = {"llm_lr": 1e-5, "vit_lr": 1e-5, "connector_lr": 0, "scorer_lr": 1e-5, "warmup_steps": 0}
    module = VideoFinetune(str(tmp_path / "low"), "stts", **rates)
    norm = module.model.model.language_model.norm.weight
    assert norm.dtype == torch.bfloat16 and (norm == 1).all()
    fit(module, batch_for(module), precision="bf16-mixed")
    assert norm.dtype == torch.float32 and (norm != 1).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rank": 0}, "rank=0"), ({"targets": ()}, "not empty"), ({"alpha": 0.0}, "alpha=0.0")],
)
def test_impossible_adapters_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**settings)


def test_an_unknown_target_is_named(tiny_folder: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"'att_proj'.*q_proj"):
        VideoFinetune(str(tiny_folder), "stts", lora=Lora(targets=("att_proj",)), **FAST)


def test_an_adapter_in_place_of_a_model_is_named_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    argv = [f"--config={ROOT / 'configs' / 'shapes_tiny.yaml'}", f"--model.model={tmp_path}"]
    assert cli.fit([*argv, f"--out={tmp_path / 'out'}"]) == 2
    assert "holds an adapter of peft for the base 'some/base', no model; merge" in capsys.readouterr().err


def test_a_checkpoint_is_exported_as_an_adapter_that_peft_loads(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And as a whole model; all three give the same logits. The checkpoint holds nothing that is frozen."""
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    argv = [f"--config={ROOT / 'configs' / 'shapes_tiny.yaml'}", f"--model.model={tiny_folder}", f"--out={out}"]
    argv += ["--model.lora={rank: 4}", "--model.llm_lr=1e-2", "--model.vit_lr=0", "--model.connector_lr=0"]
    argv += ["--trainer.max_steps=2", "--data.phases=[{num_clips: 8}]", "--data.num_val_clips=0"]
    argv += ["--data.num_workers=0", "--trainer.accelerator=cpu", "--model.warmup_steps=0"]
    assert cli.fit(argv) == 0
    [checkpoint] = (out / "checkpoints").iterdir()
    state = torch.load(checkpoint / "state", weights_only=True)["state_dict"]
    assert state and all(".lora_" in name or name.startswith("scorer.") for name in state)

    assert stts.cli.main(["export", "--adapter", str(checkpoint), str(tmp_path / "adapter")]) == 0
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "stts.json", "scorer.safetensors", "README.md"}
    base, processor = load_vlm(tiny_folder)
    inputs = make_inputs(processor, ["v what colour ?"])
    vlm = stts.PrunedVLM.from_pretrained(tmp_path / "adapter")
    whole = stts.PrunedVLM.from_pretrained(out / "model")
    with torch.no_grad():
        before = base(**inputs).logits
        adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
        dense = adapted(**inputs).logits
        torch.testing.assert_close(vlm(**inputs).logits, whole(**inputs).logits, rtol=1e-5, atol=1e-5)
        vlm.detach(), whole.detach()
        torch.testing.assert_close(dense, whole.model(**inputs).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vlm.model(**inputs).logits, dense, rtol=1e-5, atol=1e-5)
    assert (dense - before).abs().max() > 1e-3, "it learned something"
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "adapter")).base_model_name_or_path == str(tiny_folder)

    assert stts.cli.main(["export", "--merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged, _ = load_vlm(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, dense, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    with pytest.raises(ValueError, match="stts export --merge FOLDER OUT"):
        load_vlm(tmp_path / "adapter")
    with safe_open(tiny_folder / "model.safetensors", "pt") as file:
        other = {name: file.get_tensor(name) + 1 for name in file.keys()}  # noqa: SIM118  (it is no mapping)
    shutil.copytree(tiny_folder, tmp_path / "other")
    save_file(other, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    argv = ["export", "--base_model", str(tmp_path / "other"), str(checkpoint), str(tmp_path / "wrong")]
    assert stts.cli.main(argv) == 2
    assert "has other weights than the model that its run started from" in capsys.readouterr().err


def test_an_adapter_is_not_all_of_a_run_that_trains_more(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    module = VideoFinetune(str(tiny_folder), "stts", lora=Lora(rank=2), **FAST | {"vit_lr": 1e-3})
    with pytest.raises(ValueError, match="this one trains llm, vit, scorer; export the whole model"):
        _export_adapter(module, tmp_path / "out")
    assert not (tmp_path / "out").exists()
