"""The plan against runs: states to the byte, activations by what autograd holds, FLOPs by torch's own counter."""

from __future__ import annotations

import atexit
import gc
import shutil
import tempfile
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import stts.cli
from stts.data.collate import Batch, Collator
from stts.data.shapes.clips import ShapesConfig, ShapesFrames
from stts.models.families.base import TinySizes
from stts.models.families.published import config_of
from stts.models.families.tiny import write_tiny
from stts_train.lora import Lora
from stts_train.module import VideoFinetune
from stts_train.parts import PARTS
from stts_train.plan import advise, describe, make_plan
from stts_train.plan_cli import read_run
from stts_train.plan_config import Run, read_strategy
from tests.models.checkpoints.test_checkpoints import CHECKPOINTS

ROOT = Path(__file__).parents[2]
ALL = dict.fromkeys(PARTS, 1e-3)
NAMES = {
    "llava_onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
    "qwen2_5_vl": "Qwen/Qwen2.5-VL-7B-Instruct",
    "qwen3_vl": "Qwen/Qwen3-VL-8B-Instruct",
    "molmo2": "allenai/Molmo2-4B",
}


def recipe(name: str, *argv: str, gpus: int = 8) -> Run:
    """The run of a recipe of this repository."""
    return read_run(["--config", str(ROOT / "configs" / f"{name}_stts.yaml"), "--gpus", str(gpus), *argv])


@cache
def _tiny(family: str) -> Path:
    """Folder of a model wide enough for its blocks to outweigh the rest."""
    folder = Path(tempfile.mkdtemp(prefix="stts-plan-"))
    atexit.register(shutil.rmtree, folder)
    return write_tiny(folder / family, config_of(NAMES[family]), sizes=TinySizes(width=128, mlp=512))


def tiny_run(
    family: str, rates: dict[str, float], pruner: str = "stts", **settings: Any
) -> tuple[VideoFinetune, Batch, Run]:
    """A module, a batch of two clips, and the plan's view of both."""
    folder = _tiny(family)
    named = {f"{part}_lr": rates.get(part, 0) for part in PARTS}
    module = VideoFinetune(str(folder), pruner, warmup_steps=0, **named, **settings)
    clips = ShapesFrames("train", 2, 0, ShapesConfig(num_sampled=8))
    batch = Collator(module.processor, training=True)([clips[0], clips[1]])
    assert batch is not None
    with module.pruning, torch.no_grad():
        module.train()._forward(batch)
    report = module.pruning.last
    assert report is not None
    marks = module.pruning.adapter.marks_per_frame * report.grids[0].t
    free = hasattr(module.model.config.vision_config, "spatial_merge_size")
    run = Run(
        config=config_of(str(folder)), pruner=pruner, pruner_options={}, retention_ratio=0.5, rates=rates,
        lora=settings.get("lora"), checkpointing=settings.get("gradient_checkpointing", False), precision="32-true",
        strategy=read_strategy("auto"), gpus=1, accumulate=1, num_frames=8, frame_size=(48, 48),
        video_size=dict(module.processor.video_processor.size) if free else None, batch_size=2, max_tokens=0,
        text_tokens=(report.llm_tokens - sum(report.num_kept)) // 2 - marks, answer_tokens=2,
    )  # fmt: skip
    return module, batch, run


class Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def held_for_backward(module: VideoFinetune, batch: Batch) -> int:
    """Bytes of the storages that autograd holds when the forward pass is done, parameters left out."""
    refs: list[weakref.ref[Held]] = []

    def pack(tensor: torch.Tensor) -> Held:
        held = Held(tensor)
        refs.append(weakref.ref(held))
        return held

    module.train()
    if module.gradient_checkpointing:
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module.model.disable_input_require_grads()
    with module.pruning, torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        losses = module._forward(batch)
    gc.collect()
    storages = [held.tensor.untyped_storage() for ref in refs if (held := ref()) is not None]
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    assert losses
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}.values())


@pytest.mark.parametrize(
    ("rates", "lora"),
    [(ALL, None), ({"scorer": 1e-3}, None), ({"llm": 1e-3}, Lora(rank=4))],
    ids=["all", "scorer", "lora"],
)
@pytest.mark.parametrize("family", NAMES)
def test_states_are_right_to_the_byte(family: str, rates: dict[str, float], lora: Lora | None) -> None:
    if lora is not None:
        pytest.importorskip("peft")
    module, batch, run = tiny_run(family, rates, lora=lora)
    sizes: dict[str, int] = {}

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            sizes["gradients"] = sum(p.grad.nbytes for p in pl_module.parameters() if p.grad is not None)

    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    loader: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    trainer = pl.Trainer(accelerator="cpu", logger=False, max_steps=1, callbacks=[Look()], **quiet)
    trainer.fit(module, loader)
    sizes["weights"] = sum(parameter.nbytes for parameter in module.parameters())
    states = trainer.optimizers[0].state.values()
    sizes["optimizer"] = sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))
    made = make_plan(run)
    assert sizes == {name: made.memory[name] for name in sizes}
    assert made.memory["copies and buckets"] == 0, "one process in fp32"
    if rates == {"scorer": 1e-3}:
        scorer = sum(parameter.numel() for parameter in module.pruning.module.parameters())
        assert sizes["optimizer"] == 8 * scorer and sizes["gradients"] == 4 * scorer


@pytest.mark.parametrize(
    ("pruner", "rates", "low", "high"),
    [
        ("none", ALL, 0.75, 1.1),  # below 0.95 where q, k, v stay views of one tensor (Qwen), which CUDA kernels copy
        # frames of unequal length are padded by the CPU's kernel, once more for q, k, v: a flash kernel does not
        ("stts", ALL, 0.65, 1.15),
        ("stts", {"scorer": 1e-3}, 0.6, 1.25),  # the connector is counted as if it learned
    ],
    ids=["dense", "stts", "scorer"],
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", NAMES)
def test_activations_are_near_what_autograd_holds(
    family: str, checkpointing: bool, pruner: str, rates: dict[str, float], low: float, high: float
) -> None:
    """Estimate / measured. A block that is recomputed lives later, so it is not among what the forward pass leaves."""
    module, batch, run = tiny_run(family, rates, pruner, gradient_checkpointing=checkpointing)
    memory = make_plan(run).memory
    names = {name for name in memory if "activations" in name} | {"logits"}
    names |= {"pixels"} if "vit" in rates else set()  # else they are in memory, but nobody's gradient needs them
    assert low <= sum(memory[name] for name in names) / held_for_backward(module, batch) <= high


def test_a_frozen_tower_keeps_nothing_also_under_checkpointing() -> None:
    """transformers makes embeddings require gradients for reentrant checkpointing; that would run the whole tower
    backwards for nothing."""
    module, batch, run = tiny_run("llava_onevision", {"llm": 1e-3}, "none", gradient_checkpointing=True)
    seen: list[bool] = []
    tower = module.model.model.vision_tower.embeddings
    tower.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    loader: Any = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    pl.Trainer(accelerator="cpu", logger=False, max_steps=1, **quiet).fit(module, loader)
    assert seen and not any(seen) and make_plan(run).memory["tower activations"] == 0


@pytest.mark.parametrize("rates", [ALL, {"scorer": 1e-3}], ids=["all", "scorer"])
@pytest.mark.parametrize("family", NAMES)
def test_flops_are_near_what_torch_counts(family: str, rates: dict[str, float]) -> None:
    """Forward and backward. torch counts what its kernels do; the plan leaves out small products (rotary tables, the
    temporal target), and counts attention of survivors without padding."""
    module, batch, run = tiny_run(family, rates)
    module.train()
    with module.pruning, FlopCounterMode(display=False) as counter:
        torch.stack(list(module._forward(batch).values())).sum().backward()
    assert 0.85 <= sum(make_plan(run).flops.values()) / counter.get_total_flops() <= 1.15


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [
        ("molmo2_4b", "allenai/Molmo2-4B"),
        ("llava_onevision_7b", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        ("qwen2_5_vl_7b", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("qwen3_vl_8b", "Qwen/Qwen3-VL-8B-Instruct"),
    ],
)
def test_recipes_fit_eight_gpus_of_80_gb_and_count_every_parameter(name: str, checkpoint: str) -> None:
    run = recipe(name)
    made = make_plan(run)
    model = sum(made.parameters.learning[p] + made.parameters.frozen[p] for p in PARTS if p != "scorer")
    assert model == CHECKPOINTS[checkpoint].parameters
    assert made.total < 80e9 * 0.9
    everything = sum(made.parameters.learning.values())
    frozen = sum(made.parameters.frozen.values())
    assert made.memory["optimizer"] == -(-12 * everything // 8), "fp32 weights and moments, cut over eight ranks"
    cuts = 8 if run.strategy.cuts[0] else 1
    assert run.strategy.deepspeed and made.memory["weights"] == -(-2 * (everything + frozen) // cuts)


def test_what_each_strategy_cuts() -> None:
    run = recipe("molmo2_4b", gpus=64)
    number = sum(make_plan(run).parameters.learning.values())
    expected = {  # bytes per parameter of weights, gradients, optimizer; over 64 ranks where cut
        "ddp": (4 * number, 4 * number, 8 * number),
        "deepspeed_stage_1": (2 * number, 2 * number, -(-12 * number // 64)),
        "deepspeed_stage_2": (2 * number, -(-2 * number // 64), -(-12 * number // 64)),
        "deepspeed_stage_3": (-(-2 * number // 64), -(-2 * number // 64), -(-12 * number // 64)),
        "deepspeed_stage_3_offload": (0, -(-2 * number // 64), 0),
        "fsdp2": (-(-4 * number // 64), -(-4 * number // 64), -(-8 * number // 64)),
    }
    for name, sizes in expected.items():
        made = make_plan(replace(run, strategy=read_strategy(name)))
        assert tuple(made.memory[kind] for kind in ("weights", "gradients", "optimizer")) == sizes, name
        assert made.host == (-(-12 * number // 64) + -(-2 * number // 64) if "offload" in name else 0)


def test_what_does_not_fit_is_said_with_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--config", str(ROOT / "configs" / "qwen3_vl_8b_stts.yaml"), "--gpus", "1", "--gpu_gib", "80"]
    assert stts.cli.main([*argv, "--trainer.strategy", "ddp"]) == 1
    shown = capsys.readouterr().out
    assert "it does not fit" in shown and "  fits" in shown and "model.lora: {rank: 16}" in shown
    assert stts.cli.main([*argv, "--gpus", "64"]) == 0
    assert "it fits" in capsys.readouterr().out


def test_advice_is_tried_and_fewer_frames_shrink_the_row() -> None:
    run = recipe("molmo2_4b")
    changes = dict(advise(run, 0))
    whole = make_plan(run)
    assert changes["data.num_frames: 32"] < 0.8 * whole.total
    assert changes["llm_lr, vit_lr, connector_lr: 0 (train the scorer alone)"] < whole.total
    assert "model.gradient_checkpointing: true" not in changes, "it is on"
    assert "trainer.strategy: deepspeed_stage_3_offload" in changes
    adapters = dict(advise(replace(run, lora=Lora()), 0))
    assert "trainer.strategy: deepspeed_stage_3_offload" in adapters
    # frames are halved once: 64 x 81 x 0.5 + 64 x 7 + 128 = 3168 tokens, then 32 x 81 x 0.5 + 32 x 7 + 128 = 1648
    assert whole.tokens["sample, with text"] == 3168
    assert make_plan(replace(run, num_frames=32)).tokens["sample, with text"] == 1648


def test_tokens_of_free_resolutions_are_those_of_the_processor() -> None:
    """720 x 1280 at 256 tokens for a pair of frames: 12 x 21 of 28 pixels; Qwen3-VL's limit is for the whole video."""
    assert make_plan(recipe("qwen2_5_vl_7b")).tokens["video, dense"] == 32 * 12 * 21
    assert make_plan(recipe("qwen3_vl_8b")).tokens["video, dense"] == 32 * 12 * 21
    with pytest.raises(ValueError, match=r"set model\.video_size"):
        make_plan(replace(recipe("qwen3_vl_8b"), video_size=None))


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--config", str(ROOT / "configs" / "molmo2_4b_stts.yaml"), "--model.model", "nobody/nothing"]
    assert stts.cli.main(argv) == 2
    assert "'nobody/nothing'" in capsys.readouterr().err


def test_an_impossible_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "molmo2_4b_stts.yaml")
    assert stts.cli.main(["plan", "--config", config, "--gpu_gib", "0"]) == 2
    assert "must be above 0" in capsys.readouterr().err


def test_batches_that_workers_hold_ready_are_counted() -> None:
    """16 bits a value under bf16-mixed: 8 workers with 4 batches each of so many samples, frames and patches."""
    run = recipe("molmo2_4b", "--data.num_workers", "8")
    made = make_plan(run)
    vision = run.config.vision_config
    patches = (vision.image_size[0] // vision.patch_size) * (vision.image_size[1] // vision.patch_size)
    sample = 2 * run.num_frames * patches * 3 * vision.patch_size**2
    samples = made.memory["pixels"] // sample
    assert run.precision == "bf16-mixed" and made.memory["pixels"] == samples * sample
    assert made.ready == 8 * 4 * samples * sample
    assert "8 workers x 4 batches of pixels" in describe(run, made)
    assert make_plan(replace(run, num_workers=0)).ready == 0
