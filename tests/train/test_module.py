"""The LightningModule on a tiny model: it learns, every part has its own rate, and bad losses stop the run by name."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from stts.data.collate import Batch, Collator
from stts.data.datasets import Skipped
from stts.data.shapes.clips import ShapesConfig, ShapesFrames
from stts.models.checkpoints.load import load_pruner, load_vlm, pruner_settings
from stts_train.module import VideoFinetune
from stts_train.parts import PARTS, cosine, part_of

FAST = {"llm_lr": 1e-3, "vit_lr": 1e-3, "connector_lr": 1e-3, "scorer_lr": 1e-3, "warmup_steps": 0}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def batch_for(module: VideoFinetune, num_samples: int = 3) -> Batch:
    clips = ShapesFrames("train", num_samples, 0, ShapesConfig(num_sampled=8))
    batch = Collator(module.processor, training=True)([clips[i] for i in range(num_samples)])
    assert batch is not None
    return batch


def fit(module: VideoFinetune, batches: Iterable[Batch], **settings: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"accelerator": "cpu", "logger": False, "max_epochs": 1, **quiet, **settings}
    trainer = pl.Trainer(**options)
    trainer.fit(module, DataLoader(list(batches), batch_size=None))
    return trainer


def loss_of(module: VideoFinetune, batch: Batch) -> float:
    with module.pruning, torch.no_grad():
        return sum(module.losses.weights[name] * loss.item() for name, loss in module._forward(batch).items())


@pytest.mark.parametrize("pruner", ["none", "stts", "novelty"])
def test_training_on_a_repeated_batch_lowers_its_loss(tiny_folder: Path, pruner: str) -> None:
    module = VideoFinetune(str(tiny_folder), pruner, **FAST)
    batch = batch_for(module)
    before = loss_of(module.train(), batch)
    trainer = fit(module, [batch] * 3)
    assert loss_of(module.train(), batch) < before - 0.1
    logged = {name for name in trainer.callback_metrics if not name.endswith("_grad_norm")}
    extra = {"train/temporal_loss"} if pruner == "stts" else set()
    assert logged == {
        "train/answer_loss", "retention_measured", "kept_per_frame", "tokens_per_s", "pad_waste", *extra,
    }  # fmt: skip
    assert ("scorer_grad_norm" in trainer.callback_metrics) == (pruner == "stts")
    assert trainer.callback_metrics["retention_measured"] == pytest.approx(1.0 if pruner == "none" else 0.5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_parameter_that_should_learn_has_a_gradient(tiny_folder: Path, checkpointing: bool) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", gradient_checkpointing=checkpointing, **FAST)
    seen: dict[str, bool] = {}

    class Look(pl.Callback):
        def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.update({n: p.grad is not None and bool(p.grad.any()) for n, p in pl_module.named_parameters()})

    fit(module, [batch_for(module)], callbacks=[Look()])
    wanted = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert {name for name, has in seen.items() if has} == wanted
    assert set(seen) - wanted == {f"model.model.vision_tower.post_layernorm.{n}" for n in ("weight", "bias")}


def test_a_part_without_a_rate_is_frozen(tiny_folder: Path) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", **{**FAST, "llm_lr": 0, "vit_lr": None})
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    fit(module, [batch_for(module)] * 2)
    family = module.pruning.adapter
    changed = {part_of(n, family) for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"connector", "scorer"}
    assert all(p.grad is None for n, p in module.named_parameters() if part_of(n, family) in ("llm", "vit"))


def test_optimizer_groups_have_their_own_rates(tiny_folder: Path) -> None:
    rates = {"llm_lr": 1e-5, "vit_lr": 2e-5, "connector_lr": 3e-5, "scorer_lr": 4e-5}
    module = VideoFinetune(str(tiny_folder), "stts", weight_decay=0.1, warmup_steps=1, **rates)
    trainer = fit(module, [batch_for(module)], max_steps=1)
    groups = trainer.optimizers[0].param_groups
    assert {g["name"]: g["initial_lr"] for g in groups if "no_decay" not in g["name"]} == {
        part: rates[f"{part}_lr"] for part in PARTS
    }
    assert all((g["weight_decay"] == 0) == ("no_decay" in g["name"]) for g in groups)
    assert all((p.ndim > 1) == (g["weight_decay"] > 0) for g in groups for p in g["params"])
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in module.parameters())


def test_clipping_is_per_part_or_global(tiny_folder: Path) -> None:
    for per_part, expected in ((True, math.sqrt(4) * 1e-3), (False, 1e-3)):
        module = VideoFinetune(str(tiny_folder), "stts", max_grad_norm=1e-3, clip_per_part=per_part, **FAST)
        norms: list[float] = []

        class Look(pl.Callback):
            def __init__(self, norms: list[float]) -> None:
                self.norms = norms

            def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
                grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
                self.norms.append(torch.stack([g.norm() for g in grads]).norm().item() if grads else 0.0)

        fit(module, [batch_for(module)] * 2, callbacks=[Look(norms)])
        assert norms[-1] == pytest.approx(expected, rel=1e-3)


def test_cosine_schedule() -> None:
    rates = [cosine(step, 10, 2, 0.1) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.55) and rates[10] == pytest.approx(0.1)


def test_a_loss_without_a_weight_stops_at_step_0(tiny_folder: Path) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", loss_weights={"answer": 1.0}, **FAST)
    with pytest.raises(ValueError, match=r"losses \['temporal'\], which model.loss_weights"):
        fit(module, [batch_for(module)])


def test_a_loss_that_is_not_finite_names_the_samples(tiny_folder: Path) -> None:
    module = VideoFinetune(str(tiny_folder), **FAST)
    batch = batch_for(module)
    batch.inputs["pixel_values_videos"][1] = float("nan")
    with pytest.raises(ValueError, match=f"not finite at step 0.*{batch.uids[1]}"):
        fit(module, [batch])


def test_a_batch_of_skipped_files_changes_nothing_but_runs_everything(tiny_folder: Path) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", **FAST)
    before = [parameter.detach().clone() for parameter in module.parameters()]
    blank = Collator(module.processor, training=True).blank([Skipped("x", "broken")])
    calls: list[int] = []
    assert module.scorer is not None
    module.scorer.register_forward_hook(lambda *_: calls.append(1))
    trainer = fit(module, [blank])
    assert calls == [1], "every rank calls the scorer once"
    assert all(torch.equal(now, old) for now, old in zip(module.parameters(), before, strict=True))
    assert "train/answer_loss" not in trainer.callback_metrics


def test_validation_counts_whole_answers(tiny_folder: Path) -> None:
    module = VideoFinetune(str(tiny_folder), **FAST)
    batch = batch_for(module, 4)
    with torch.no_grad(), module.pruning:
        guess_BL = module.model.eval()(**batch.inputs, use_cache=False).logits.argmax(-1)
    labels_BL = batch.inputs["labels"]
    asked_BL = labels_BL[:, 1:] != -100
    labels_BL[:2, 1:][asked_BL[:2]] = guess_BL[:2, :-1][asked_BL[:2]]  # rows 0 and 1 are right
    place = asked_BL[2].nonzero()[0]
    labels_BL[2:, 1:][asked_BL[2:]] = guess_BL[2:, :-1][asked_BL[2:]]
    labels_BL[2, place + 1] = (labels_BL[2, place + 1] + 1) % 10  # one wrong token of two
    labels_BL[3, place + 1] = (labels_BL[3, place + 1] + 1) % 10
    options = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu"}
    [values] = pl.Trainer(**options).validate(module, DataLoader([batch], batch_size=None), verbose=False)
    assert values["val/accuracy"] == 0.5
    families = {sample.meta["family"] for sample in batch.samples}
    assert {f"val/accuracy/{family}" for family in families} | {"val/accuracy", "val/answer_loss"} == set(values)


def test_export_reloads_with_its_scorer_and_goes_on_from_it(tiny_folder: Path, tmp_path: Path) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", retention_ratio=0.4, pruner_options={"prune_block": 1}, **FAST)
    fit(module, [batch_for(module)])
    folder = module.export(tmp_path / "model")
    assert pruner_settings(folder) == {
        "pruner": "stts", "options": {"prune_block": 1}, "retention_ratio": 0.4, "positions": "compact", "exact": True,
        "family": "llava_onevision", "base": str(tiny_folder),
    }  # fmt: skip
    model, _ = load_vlm(folder)
    scorer = load_pruner(folder, model)
    again = VideoFinetune(str(folder), "stts", pruner_options={"prune_block": 1}, **FAST)
    assert isinstance(scorer, torch.nn.Module) and module.scorer is not None and again.scorer is not None
    for name, value in module.scorer.state_dict().items():
        assert torch.equal(value, scorer.state_dict()[name]) and torch.equal(value, again.scorer.state_dict()[name])
    for name, value in module.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_tokens_are_known_before_the_forward_pass(tiny_folder: Path) -> None:
    for pruner in ("none", "stts", "novelty"):
        module = VideoFinetune(str(tiny_folder), pruner, retention_ratio=0.3, **FAST)
        batch = batch_for(module, 2)
        text = (batch.inputs["input_ids"] != module.processor.video_token_id) & batch.inputs["attention_mask"].bool()
        with module.train().pruning:
            module._forward(batch)
        assert module.pruning.last is not None
        assert module.pruning.last.llm_tokens == int(text.sum()) + 2 * module.tokens_per_video(8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"llm_lr": -1.0}, "must not be negative"),
        ({"min_lr_ratio": 2.0}, r"in \[0, 1\]"),
        ({"llm_lr": 0, "vit_lr": 0, "connector_lr": 0}, "nothing would learn"),
        ({"retention_ratio": 1.5}, "retention_ratio=1.5"),
        ({"pruner": "stss"}, "unknown pruner 'stss'"),
    ],
)
def test_bad_settings_are_refused(tiny_folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoFinetune(**{"model": str(tiny_folder), **settings})
