"""What a trainer's precision converts: parameters of the model and pixels of a batch, and nothing else.

Lightning's `bf16-true`, `16-true` and `64-true` convert every floating-point tensor of a batch, times of frames
included, and every buffer of the model: with rotary frequencies in bf16, late tokens turn by whole radians more or
less than in the exported model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, Precision
from torch import nn

PIXEL_DTYPES = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-true": torch.float16}
"""Dtype in which pixels leave the loader: that of the layer that reads them, so nothing is lost, and half is moved."""


def exact_conversions(plugin: Precision) -> None:
    """Restrict Lightning's half and double precision, in place, to parameters and pixels. Other plugins stay.

    The default dtype of new tensors stays fp32 too: counts and thresholds are computed with it."""
    if isinstance(plugin, HalfPrecision):
        dtype = plugin._desired_input_dtype
    elif isinstance(plugin, DoublePrecision):
        dtype = torch.float64
    else:
        return

    def convert_module(module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(dtype)
        return module

    replaced: dict[str, Any] = {
        "convert_input": lambda batch: batch.with_pixels(lambda pixels: pixels.to(dtype)),
        "convert_module": convert_module,
        "forward_context": nullcontext,
    }
    for name, function in replaced.items():
        setattr(plugin, name, function)
