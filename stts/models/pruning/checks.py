"""Whether a pruner fits a stock model: positions, devices, checkpointing, adapters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from stts.pruners.base import HostInfo, Positions, Pruner


def without_adapters(model: Any) -> PreTrainedModel:
    """The stock model inside a peft model, whose adapters lie in its layers and stay in use; any other model itself.

    ValueError for adapters that lengthen the prompt, and for a model inside `torch.compile`."""
    if hasattr(model, "_orig_mod"):
        raise ValueError(
            "torch.compile(model) would trace the pruner and the tower with the model; prune the model itself, and "
            "compile layers of its language model: for layer in language_model.layers: layer.compile()"
        )
    wraps = not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model")
    for name, config in getattr(model, "peft_config", {}).items() if wraps else ():
        if config.is_prompt_learning:
            raise ValueError(
                f"adapter {name!r} is {config.peft_type.value}, which puts tokens of its own in front of the prompt, "
                "so places of visual tokens would be wrong; LoRA and other adapters inside layers work"
            )
    stock: PreTrainedModel = model.get_base_model() if wraps else model
    return stock


def choose_positions(positions: Positions | None, pruner: Pruner, host: HostInfo) -> Positions:
    """As asked for, as the family needs, or as the first stage declares. ValueError for what the family cannot."""
    declared: Positions = pruner.stages[0].positions if pruner.stages else "compact"
    if positions not in (None, "compact", "original"):
        raise ValueError(f"positions={positions!r} must be 'compact', 'original' or None (as the stage declares)")
    if host.mrope and positions == "compact":
        raise ValueError(
            "positions='compact' would lose the time, row and column of every token in a model with mrope "
            "positions; leave it out or write 'original'"
        )
    return positions or ("original" if host.mrope else declared)


def check_images(pruner: Pruner) -> None:
    """ValueError for a pruner that has nothing to choose in an image, a video of one frame."""
    for stage in pruner.stages:
        why = str(getattr(stage, "needs_time", ""))
        if stage.site.kind == "vit":
            why = "inside the tower at least as many tokens stay as one frame has, so all of an image"
        if why:
            raise ValueError(
                f"images=True: {type(stage).__name__} cannot prune an image, which is one frame: {why}; take a method "
                "that chooses inside a frame (visionzip, divprune, cdpruner, visionselector, fastv, dart), or leave "
                "images=True out"
            )


def check_uncompiled(*modules: nn.Module) -> None:
    """ValueError where one of these, inside which the tower runs, was compiled in place: attention of a traced tower
    shows nobody its queries and keys."""
    for module in modules:
        if module._compiled_call_impl is not None:
            raise ValueError(
                f"{type(module).__name__}.compile() would trace the pruner and the tower with the model; compile "
                "layers of its language model: for layer in language_model.layers: layer.compile()"
            )


def check_one_device(model: PreTrainedModel) -> None:
    """ValueError for a model whose parts lie on several devices; weights offloaded to memory or disk are no parts."""
    places = set(getattr(model, "hf_device_map", {}).values()) - {"cpu", "disk"}
    devices = {torch.device(place) if not isinstance(place, int) else torch.device("cuda", place) for place in places}
    if len(devices) > 1:
        raise ValueError(
            f"this model is split over {sorted(map(str, devices))}, but what a pruner keeps must lie beside tower, "
            "connector and language model at once; load it on one device (device_map={'': 0}), with offload or in "
            "fewer bits where it does not fit, or train it sharded with `stts fit`"
        )


def check_checkpointing(model: PreTrainedModel) -> None:
    """ValueError for reentrant activation checkpointing: it gives no gradient to what enters a block beside its first
    input, as the key bias of a scorer does, and none at all where that input needs none (a frozen tower)."""
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if not getattr(module, "gradient_checkpointing", False) or not isinstance(function, partial):
            continue
        if function.keywords.get("use_reentrant"):
            raise ValueError(
                "reentrant activation checkpointing loses the gradient that reaches a scorer through the key bias; "
                'call model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )
        return  # all modules of a model have the same
