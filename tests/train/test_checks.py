"""Settings of Lightning's trainer: honoured, or refused by name; precision; files of DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision

from stts_train.checkpoints import rescale
from stts_train.module import VideoFinetune
from stts_train.plan_config import read_strategy
from stts_train.zero import DeepSpeed
from stts_train.zero_config import fill_in, read_deepspeed_json
from tests.train.launch import needs_deepspeed
from tests.train.test_module import FAST, batch_for, fit


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_clip_val": 1.0}, "trainer.gradient_clip_val=1.0 is not used; set model.max_grad_norm"),
        ({"callbacks": [GradientAccumulationScheduler({0: 2})]}, "GradientAccumulationScheduler is not supported"),
        ({"callbacks": [StochasticWeightAveraging(1e-3)]}, "StochasticWeightAveraging is not supported"),
        ({"callbacks": [WeightAveraging()]}, "WeightAveraging is not supported"),
        ({"max_epochs": -1, "max_time": "00:00:01:00"}, "number of optimizer steps is not known"),
    ],
    ids=["clip", "accumulation", "swa", "ema", "time"],
)
def test_what_would_be_ignored_is_refused(tiny_folder: Path, settings: dict[str, Any], message: str) -> None:
    module = VideoFinetune(str(tiny_folder), **FAST)
    with pytest.raises(ValueError, match=message):
        fit(module, [batch_for(module, 1)], **settings)


def test_fp16_norms_are_those_of_fp32(tiny_folder: Path) -> None:
    """A gradient scaler on the CPU: what is logged and clipped are gradients, not 65536 times as much."""
    norms: list[dict[str, float]] = []
    for scaled in (False, True):
        torch.manual_seed(0)
        module = VideoFinetune(str(tiny_folder), "stts", **FAST)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
        trainer = fit(module, [batch_for(module)], plugins=plugins)
        assert not scaled or scaler.get_scale() == 1024.0, "no overflow, the step was taken"
        norms.append({n: v.item() for n, v in trainer.callback_metrics.items() if n.endswith("_grad_norm")})
    assert len(norms[0]) == 4
    for name, norm in norms[0].items():
        assert norms[1][name] == pytest.approx(norm, rel=0.05), name


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_true_precisions_convert_parameters_and_pixels_alone(tiny_folder: Path, precision: Any) -> None:
    module = VideoFinetune(str(tiny_folder), "stts", gradient_checkpointing=True, **FAST)
    exact = {name: buffer.clone() for name, buffer in module.named_buffers()}
    before = module.model.get_input_embeddings().weight.detach().clone()
    trainer = fit(module, [batch_for(module)], precision=precision)
    dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}[precision]
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert all(torch.equal(buffer, exact[name]) for name, buffer in module.named_buffers())
    assert not torch.equal(module.model.get_input_embeddings().weight, before.to(dtype)), "it learned"
    assert torch.isfinite(trainer.callback_metrics["train/answer_loss"])


def test_a_checkpoint_counts_in_batches_of_this_run() -> None:
    from fractions import Fraction

    counts = {"ready": 10, "completed": 10}
    loops = {"epoch_loop.batch_progress": {"total": dict(counts), "current": dict(counts)}}
    loops["state_dict"] = {"combined_loader": [{"epoch": 1, "position": 6}]}
    checkpoint = {"loops": {"fit_loop": loops}}
    rescale(checkpoint, Fraction(1, 2))
    assert loops["epoch_loop.batch_progress"]["total"] == {"ready": 5, "completed": 5}
    assert loops["state_dict"]["combined_loader"] == [{"epoch": 1, "position": 3}]


RUN: dict[str, Any] = {
    "accumulate": 2, "ranks": 4, "batch_size": 3, "max_grad_norm": 1.0, "precision": "bf16-mixed", "llm_width": 64,
}  # fmt: skip


@needs_deepspeed
def test_a_deepspeed_file_is_filled_in(tmp_path: Path) -> None:
    """As Hugging Face's Trainer takes it."""
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"}
    zero |= {"stage3_prefetch_bucket_size": "auto", "offload_optimizer": {"device": "cpu"}}
    settings = {
        "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto", "loss_scale": 0}, "zero_optimization": zero,
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 3, "steps_per_print": 100,
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
    }  # fmt: skip
    file.write_text(json.dumps(settings))
    filled = fill_in(read_deepspeed_json(str(file)), **RUN)
    assert filled["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": 4096, "stage3_param_persistence_threshold": 640,
        "stage3_prefetch_bucket_size": 3686, "offload_optimizer": {"device": "cpu"},
    }  # fmt: skip
    assert filled["bf16"] == {"enabled": True} and "fp16" not in filled and filled["gradient_clipping"] == 1.0
    assert not {"optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps"} & set(filled)
    planned = read_strategy({"class_path": "stts_train.strategies.DeepSpeed", "init_args": {"config": str(file)}})
    assert planned.cuts == (True, True, True) and planned.offload_optimizer and not planned.offload_parameters


@needs_deepspeed
def test_an_offload_folder_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"trainer.strategy: .*nvme_path='/gone' is no folder"):
        DeepSpeed(stage=3, offload_parameters=True, options={"offload_params_device": "nvme", "nvme_path": "/gone"})


@needs_deepspeed
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimisation": {"stage": 2}}, r"\['zero_optimisation'\], which are not known"),
        ({"zero_optimization": {"stage": 2, "stag": 1}}, "not as DeepSpeed expects: stag"),
        ({"zero_optimization": {"stage": 4}}, "stage=4 is not a stage of ZeRO"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/gone"}}},
            "nvme_path='/gone' is no folder",
        ),
        ({"gradient_accumulation_steps": 8}, "gradient_accumulation_steps=8 .* contradicts trainer.accumulate"),
        ({"train_batch_size": 25}, "train_batch_size=25 .* by which it is 24"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5 .* contradicts model.max_grad_norm"),
        ({"fp16": {"enabled": True}}, "fp16.enabled=True .* contradicts trainer.precision=bf16-mixed"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}, r"optimizer.params=\{'lr': 0.001\}"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_deepspeed_file_that_contradicts_the_run_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill_in(read_deepspeed_json(settings), **RUN)
