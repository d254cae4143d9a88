"""What ZeRO needs of us and of DeepSpeed: one order of modules whatever a batch holds, and the names that we read."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch

from stts.data.collate import Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts_train.lora import Lora
from stts_train.module import VideoFinetune
from tests.train.launch import needs_deepspeed
from tests.train.test_module import FAST, batch_for

FROZEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "tower": {"vit_lr": 0},
    "all but LoRA and scorer": {"vit_lr": 0, "connector_lr": 0, "lora": Lora(rank=4)},
    "all but the scorer": {"llm_lr": 0, "vit_lr": 0, "connector_lr": 0},
}


@pytest.mark.parametrize("frozen", FROZEN)
def test_batches_of_every_kind_take_the_same_way_forth_and_back(tiny_folder: Any, frozen: str) -> None:
    """ZeRO-3 gathers the parameters of a module when it runs, and again for its backward pass where its output has a
    gradient; ranks whose order differs wait for each other for ever. A video that loses tokens, one that is too short
    to lose any, text, an image, and a batch of broken files."""
    module = VideoFinetune(str(tiny_folder), "stts", **{**FAST, **FROZEN[frozen]})
    module.train().model.train()
    module.pruning.run_all_modules()
    collator = Collator(module.processor, training=True)
    answer = Message("assistant", "red")
    text = Example(Sample("text", (Message("user", "what colour ?"), answer)))
    image = torch.zeros(56, 56, 3, dtype=torch.uint8).numpy()
    shown = Example(Sample("image", (Message("user", "<image>\nwhat colour ?"), answer)), images=(image,))
    batches = {"video": batch_for(module, 1), "text": collator([text]), "image": collator([shown])}
    batches["broken"] = collator.blank()
    ways: dict[str, list[tuple[str, bool]]] = {}
    owners = [(n, m) for n, m in module.named_modules() if any(True for _ in m.parameters(recurse=False))]
    for kind, batch in batches.items():
        way: list[tuple[str, bool]] = []

        def note(name: str, way: list[tuple[str, bool]] = way) -> Any:
            return lambda _, __, out: way.append((name, isinstance(out, torch.Tensor) and out.requires_grad))

        handles = [owner.register_forward_hook(note(name)) for name, owner in owners]
        with module.pruning:
            module._forward(batch)
        for handle in handles:
            handle.remove()
        ways[kind] = way
    assert any(has_grad for _, has_grad in ways["video"])
    assert all(way == ways["video"] for way in ways.values()), [kind for kind in ways if ways[kind] != ways["video"]]


@needs_deepspeed
@pytest.mark.parametrize("stage", ["stage_1_and_2.DeepSpeedZeroOptimizer", "stage3.DeepSpeedZeroOptimizer_Stage3"])
def test_deepspeed_has_the_names_that_we_read(stage: str) -> None:
    """Of `zero_engine.py` and `zero_resume.py`, in the optimizers of the installed DeepSpeed."""
    from importlib import import_module

    file, _, name = stage.partition(".")
    optimizer = getattr(import_module(f"deepspeed.runtime.zero.{file}"), name)
    joint = "_get_norm_groups" if file == "stage3" else "scaled_global_norm"
    for method in (
        "backward_prologue", "reduce_ready_partitions_and_remove_grads", "get_grad_norm_direct", joint,
        "overlapping_partition_gradients_reduce_epilogue", "complete_grad_norm_calculation_for_cpu_offload",
        "unscale_and_clip_grads",
    ):  # fmt: skip
        assert callable(getattr(optimizer, method, None)), method
    source = inspect.getsource(optimizer)
    assert re.search(rf"self\.{joint}\(", source) and re.search(r"self\.get_grad_norm_direct\(", source)
    assert re.search(r"self\.unscale_and_clip_grads\([^)]*, scaled_global_grad_norm\)", source)
    first = "sub_group_id" if file == "stage3" else "grad_groups_flat"
    assert f"def unscale_and_clip_grads(self, {first}, total_norm)" in source
    if file == "stage3":
        assert "self.sub_group_to_group_id" in source
