"""The seam for losses of a training step: named in a config, weighted by their share of the step; distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import stts_train.cli as cli
from stts.data.collate import IGNORED
from stts_train.distillation import Distillation, divergence
from stts_train.module import VideoFinetune
from stts_train.step_losses import StepLoss, StepLosses, TrainingPass, weight_at
from tests.train.launch import RATES, ROOT, logged
from tests.train.test_module import FAST, batch_for, fit


class Brightness(StepLoss):
    """Of the docs page: nothing but the batch, as a mean over videos."""

    name = "brightness"
    mean_over = "videos"

    def __call__(self, now: TrainingPass) -> Tensor:
        pixels: Tensor = now.batch.inputs["pixel_values_videos"]
        return pixels.float().mean() + 0 * now.logits_BAV.float().sum()


def test_divergence_and_its_gradient_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    logits_BAV = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    teacher_BAV = torch.randn(2, 5, 11, dtype=torch.float64)
    labels_BA = torch.randint(0, 11, (2, 5))
    labels_BA[0, 3:] = IGNORED
    loss = divergence(logits_BAV, teacher_BAV, labels_BA, temperature=2.0, chunk=3)
    loss.backward()

    p_BAV, q_BAV = ((x / 2.0).softmax(-1) for x in (teacher_BAV, logits_BAV.detach()))
    due_BA = labels_BA != IGNORED
    expected = 4.0 * (p_BAV * (p_BAV / q_BAV).log()).sum(-1)[due_BA].mean()
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=1e-6)
    # dL/dlogit = T (q - p) / N at answer tokens, 0 elsewhere
    gradient = torch.where(due_BA[..., None], 2.0 * (q_BAV - p_BAV) / due_BA.sum(), 0.0)
    assert logits_BAV.grad is not None
    torch.testing.assert_close(logits_BAV.grad, gradient, rtol=1e-4, atol=1e-6)


def test_distillation_measures_the_distance_to_the_dense_model(tiny_folder: Path) -> None:
    """The dense logits are those of the stock model; the pruned pass and its report are left as they were."""
    module = VideoFinetune(str(tiny_folder), "novelty", retention_ratio=0.3, step_losses=[Distillation()], **FAST)
    batch = batch_for(module)
    inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
    with torch.no_grad():
        dense_BLV = module.model.train()(**inputs).logits
    with module.train().pruning:
        losses = module._forward(batch)
        now = module.run_model(batch)
    labels_BL = batch.inputs["labels"][:, 1:]
    expected = F.kl_div(
        now.logits_BAV[now.labels_BA != IGNORED].log_softmax(-1),
        dense_BLV[:, :-1][labels_BL != IGNORED].log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    torch.testing.assert_close(losses["distillation"], expected, rtol=1e-4, atol=1e-6)
    assert losses["distillation"] > 1e-4
    assert module.pruning.last is not None and module.pruning.last.retention_measured == pytest.approx(0.3, abs=0.05)
    assert module.pruning.retention_ratio == 0.3


def test_without_pruning_there_is_nothing_to_distil(tiny_folder: Path) -> None:
    module = VideoFinetune(str(tiny_folder), "none", step_losses=[Distillation()], **FAST)
    with module.train().pruning:
        assert module._forward(batch_for(module))["distillation"].item() == pytest.approx(0.0, abs=1e-6)


def test_the_pruned_model_learns_from_distillation_alone(tiny_folder: Path) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"loss_weights": {"answer": 0.0, "temporal": 0.0}, "gradient_checkpointing": True}
    module = VideoFinetune(
        str(tiny_folder), "stts", retention_ratio=0.3, step_losses=[Distillation(2.0)], **settings, **FAST
    )
    seen: list[float] = []
    batch = batch_for(module)
    for _ in range(2):
        trainer = fit(module, [batch] * 3)
        seen.append(trainer.callback_metrics["train/distillation_loss"].item())
        norms = {n: v for n, v in trainer.callback_metrics.items() if n.endswith("_grad_norm")}
        assert set(norms) == {f"{part}_grad_norm" for part in ("llm", "vit", "connector", "scorer")}
        assert all(norm > 0 for norm in norms.values()), "the gradient reaches every part, the scorer included"
    assert seen[1] < seen[0]


def test_a_config_names_a_loss_in_one_line(tiny_folder: Path, tmp_path: Path) -> None:
    argv = [f"--config={ROOT / 'configs' / 'shapes_tiny.yaml'}", f"--model.model={tiny_folder}", f"--out={tmp_path}"]
    argv += [*RATES, "--data.phases=[{num_clips: 8}]", "--data.batch_size=2", "--data.num_val_clips=0"]
    argv += ["--data.num_workers=0", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--checkpoint_every=0"]
    argv += ["--trainer.accelerator=cpu", "--model.retention_ratio=0.3", "--progress_every=1"]
    added = [
        "{class_path: stts_train.distillation.Distillation, init_args: {weight: 0.5, temperature: 2.0}}",
        f"{{class_path: {__name__}.Brightness, init_args: {{weight: 0}}}}",
    ]
    assert cli.fit([*argv, f"--model.step_losses=[{', '.join(added)}]"]) == 0
    assert all(value > 0 for value in logged(tmp_path, "train/distillation_loss"))
    assert len(logged(tmp_path, "train/brightness_loss")) == 2


def test_a_weight_may_follow_a_ramp() -> None:
    ramp = {"from": 0.1, "to": 2.1, "steps": 4.0}
    assert [round(weight_at(ramp, step), 6) for step in (0, 1, 4, 9)] == [0.1, 0.6, 2.1, 2.1]
    assert weight_at(0.5, 3) == 0.5
    for wrong in ({"from": 0.1, "to": 1.0}, {"from": 0.1, "to": 1.0, "steps": 0}):
        with pytest.raises(ValueError, match=r"loss_weights\.sharpen=.*steps: 1000"):
            StepLosses({"answer": 1.0, "sharpen": wrong})


def test_names_are_given_once() -> None:
    with pytest.raises(ValueError, match=r"\['distillation'\] stand there twice"):
        StepLosses({"answer": 1.0}, [Distillation(), Distillation()])
    with pytest.raises(ValueError, match="stand there twice"):
        StepLosses({"answer": 1.0, "distillation": 2.0}, [Distillation()])
    with pytest.raises(ValueError, match="weight=-1"):
        Distillation(-1)
    with pytest.raises(ValueError, match="temperature=0"):
        Distillation(temperature=0)


def test_a_stage_that_is_soft_in_training_sees_every_token_there(tiny_folder: Path, tmp_path: Path) -> None:
    argv = [f"--config={ROOT / 'configs' / 'shapes_tiny.yaml'}", f"--model.model={tiny_folder}", f"--out={tmp_path}"]
    argv += ["--model.llm_lr=0", "--model.vit_lr=0", "--model.connector_lr=0", "--model.scorer_lr=1e-2"]
    argv += ["--data.phases=[{num_clips: 8}]", "--data.batch_size=2", "--data.num_val_clips=0", "--data.num_workers=0"]
    argv += ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1", "--checkpoint_every=0", "--progress_every=1"]
    argv += ["--trainer.accelerator=cpu", "--model.retention_ratio=0.3", "--model.pruner=visionselector"]
    argv += ["--model.pruner_options={std: 0.1}"]
    argv += ["--model.loss_weights={answer: 1.0, sharpen: {from: 0.1, to: 2.0, steps: 2}}"]
    assert cli.fit(argv) == 0
    losses = logged(tmp_path, "train/sharpen_loss")
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert set(logged(tmp_path, "retention_measured")) == {1.0}
