"""Activation checkpointing under a pruner: gradients are the same, also where a layer's hooks run a second time, as in
transformers 5.17, and also when another pass began in between."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stts
from stts.models.pruning.prompt import Prompt
from tests.scripts import load_script

MODELS = ("allenai/Molmo2-4B", "Qwen/Qwen3-VL-4B-Instruct", "llava-hf/llava-onevision-qwen2-7b-ov-hf")


def hooks_and_all(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """How a layer is checkpointed in transformers 5.17."""
    return checkpoint(partial(nn.Module.__call__, layer, **kwargs), *args, use_reentrant=False)


@pytest.mark.parametrize("name", MODELS)
def test_hooks_that_run_again_change_no_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models = load_script("benchmarks/gpu_models")
    config = models.make_config(name, tiny=True)
    model = models.make_model(config, torch.device("cpu"), torch.float32, "sdpa").train()
    inputs = [
        models.make_inputs(config, models.grid_of(config, frames, tiny=True), model.device, model.dtype, training=True)
        for frames in (4, 6)
    ]
    pruned = stts.Pruning(model, "stts", retention_ratio=0.5)
    assert pruned.module is not None
    parameters = [*model.parameters(), *pruned.module.parameters()]

    def gradients() -> list[Tensor | None]:
        """Of two passes; the second begins before the first is recomputed."""
        for parameter in parameters:
            parameter.grad = None
        with pruned:
            losses = [model(**one, use_cache=False).loss for one in inputs]
            for loss in losses:
                loss.backward()
        return [None if parameter.grad is None else parameter.grad.clone() for parameter in parameters]

    expected = gradients()
    layer = type(pruned.adapter.language_model.layers[0])
    monkeypatch.setattr(layer, "__call__", hooks_and_all)
    again = gradients()
    assert sum(gradient is not None for gradient in again) > 50
    for one, other in zip(again, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other)
    gc.collect()
    assert not [one for one in gc.get_objects() if isinstance(one, Prompt)], "nothing is held once its graph is gone"
