"""Let stock modules attend inside packed rows: one attention function, registered beside the stock ones.

Modules that drop unknown keyword arguments (SigLIP, Molmo2) still hand over `attention_mask` untouched, so `Segments`
ride there; modules that set the mask themselves (Qwen towers) hand over unknown keywords, so there they ride as
`segments`. Everything else falls through to the implementation the model was loaded with.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stts.packing.attention import packed_attention
from stts.packing.segments import Segments

_PREFIX = "packed_or_"
PASS_ARGUMENT = "visual_pass"
"""Keyword under which a forward call carries its own pass from module to module; attention takes it out."""

Note = Callable[[Tensor, Tensor], None]


class _Captured(threading.local):
    """Which modules hand their q and k to whom, in the thread that asked."""

    def __init__(self) -> None:
        self.notes: dict[nn.Module, Note] = {}


_captured = _Captured()


def switch_on(config: Any) -> str:
    """Let modules with this config accept `Segments`; returns the implementation to hand to `switch_off`."""
    original: str = config._attn_implementation or "eager"
    if is_on(config):
        raise ValueError(
            "this model is already inside a pruning context, or shares its config object with one that is; leave that "
            "one first, or give each model a config of its own"
        )
    name = _PREFIX + original
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, _attention_or(original))
        if original in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys():
            ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    config._attn_implementation = name
    return original


def switch_off(config: Any, original: str) -> None:
    """Undo `switch_on`."""
    config._attn_implementation = original


def is_on(config: Any) -> bool:
    """Whether modules with this config accept `Segments` now."""
    return str(config._attn_implementation).startswith(_PREFIX)


def stock_name(config: Any) -> str:
    """The attention implementation that runs outside packed rows."""
    return str(config._attn_implementation).removeprefix(_PREFIX)


def check_device(config: Any, device: torch.device) -> None:
    """ValueError when this attention implementation cannot run where the model is."""
    name = stock_name(config)
    if "flash" in name and device.type == "cpu":
        raise ValueError(
            f"attn_implementation={name!r} runs on GPUs only, but the model is on the CPU; move the model first, or "
            "load it with attn_implementation='sdpa'"
        )


@contextmanager
def capture(module: nn.Module, callback: Note) -> Iterator[None]:
    """While on, every attention call of this one module first hands q (B, H, S, E) and k (B, J, S, E) to `callback`.

    They come as they enter attention: rotary embedding applied, key heads not repeated (J < H with grouped queries), k
    with what a cache holds. Attention itself stays as it is, on the stock path as in packed rows, so no kernel changes.
    ValueError where the module does not run our attention, or is captured already."""
    if not is_on(module.config):
        raise ValueError(f"{type(module).__name__} runs stock attention, which shows no q and k; call switch_on first")
    if module in _captured.notes:
        raise ValueError(f"this {type(module).__name__} is captured already; one context at a time")
    _captured.notes[module] = callback
    try:
        yield
    finally:
        del _captured.notes[module]


@contextmanager
def overhear(module: nn.Module, callback: Note) -> Iterator[None]:
    """As `capture`, beside whoever captures the module already."""
    first = _captured.notes.get(module)

    def both(q_BHSE: Tensor, k_BJSE: Tensor) -> None:
        callback(q_BHSE, k_BJSE)
        if first is not None:
            first(q_BHSE, k_BJSE)

    _captured.notes[module] = both
    try:
        yield
    finally:
        if first is None:
            del _captured.notes[module]
        else:
            _captured.notes[module] = first


def hand_over(module: nn.Module, q_BHSE: Tensor, k_BJSE: Tensor) -> None:
    """Give q and k of an earlier call to whoever captures this module, as if it ran again."""
    if module in _captured.notes:
        _captured.notes[module](q_BHSE, k_BJSE)


def capture_next(module: nn.Module, callback: Note) -> None:
    """Hand q and k of the next attention call of this module, in this thread, to `callback`, as `capture` does."""

    def once(q_BHSE: Tensor, k_BJSE: Tensor) -> None:
        del _captured.notes[module]
        callback(q_BHSE, k_BJSE)

    _captured.notes[module] = once


def _attention_or(original: str) -> Any:
    def attention(
        module: nn.Module, q_BHSE: Tensor, k_BJSE: Tensor, v_BJSE: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        kwargs.pop(PASS_ARGUMENT, None)
        if module in _captured.notes:
            _captured.notes[module](q_BHSE, k_BJSE)
        segments = kwargs.pop("segments", attention_mask)
        if not isinstance(segments, Segments):
            stock = (
                sys.modules[type(module).__module__].eager_attention_forward  # eager lives in the family's own file
                if original == "eager"
                else ALL_ATTENTION_FUNCTIONS[original]
            )
            result: tuple[Tensor, Tensor | None] = stock(module, q_BHSE, k_BJSE, v_BJSE, attention_mask, **kwargs)
            return result
        if kwargs.get("dropout"):
            raise ValueError(f"attention dropout {kwargs['dropout']} is not supported in packed rows; set it to 0")
        if q_BHSE.shape[0] != 1:
            raise ValueError(f"packed rows have batch size 1, got {q_BHSE.shape[0]}")
        q, k, v = (x[0].transpose(0, 1) for x in (q_BHSE, k_BJSE, v_BJSE))
        scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
        causal = kwargs.get("is_causal")
        causal = bool(getattr(module, "is_causal", False)) if causal is None else causal
        return packed_attention(q, k, v, segments, scale=scale, causal=causal)[None], None

    return attention
