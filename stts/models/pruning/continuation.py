"""What decode steps must know about the pruned prompt that they continue; it lives on the KV cache of that prompt.

The cache is what a caller keeps, copies and hands back, so the facts stay on it: a deep copy of a cache has its own,
reordered or repeated rows are reordered or repeated here too, and two prompts may be continued in turns.

Shape suffixes beside those of `stts.tokens`: B = rows, M = slots of the shortened prompt, C = slots of the cache, H =
query heads, J = key heads, I = query heads of a key head, Q = 1, the new token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stts.models.families.attention import PASS_ARGUMENT, capture_next
from stts.models.families.base import linear_layers
from stts.models.pruning.masks import decode_mask
from stts.pruners.base import HidesKeys, Shown


@dataclass
class Hiding:
    """Keys of the videos in a cache that deeper layers do not read while decoding."""

    pruner: HidesKeys
    layer: int
    """The first that reads a part."""
    video_BM: Tensor
    """int64 video of each slot of the shortened prompt, -1 elsewhere."""
    num_keys: list[int]
    """Of every video (per beam, with beams)."""
    last: Shown | None = None
    """What the step before showed."""

    def next(self, attention_BM: Tensor) -> Shown:
        """What this step shows; attention_BM: of the new token to the slots of the prompt, in the layer before."""
        visible_BM = torch.ones_like(self.video_BM, dtype=torch.bool)
        for number, num_keys in enumerate(self.num_keys):
            inside_BM = self.video_BM == number
            seen_BM = self.pruner.show(attention_BM, inside_BM, num_keys, self.last)
            visible_BM = torch.where(inside_BM, seen_BM, visible_BM)
        return Shown(visible_BM, attention_BM.masked_fill(self.video_BM < 0, 0))

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.video_BM = change(self.video_BM)
        self.last = self.last and Shown(*map(change, self.last))


@dataclass
class Continuation:
    """A pruned prompt as its decode steps see it."""

    valid_BM: Tensor
    """bool, False at padding."""
    full_length: int
    """Slots of a row of the prompt before pruning."""
    next_position_B: Tensor
    """int64 position of the first generated token."""
    by_layer: dict[int, Tensor] = field(default_factory=dict)
    """`valid_BM` of deeper LLM layers, by the layer from which on it holds, where a stage dropped tokens before it."""
    hiding: Hiding | None = None
    """Set by a pruner that acts while decoding."""
    open: bool = False
    """A forward pass under a pruning context is running on the cache; no other may write to it."""

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply to every tensor what happens to the rows of the cache."""
        self.valid_BM, self.next_position_B = change(self.valid_BM), change(self.next_position_B)
        self.by_layer = {layer: change(valid_BM) for layer, valid_BM in self.by_layer.items()}
        if self.hiding is not None:
            self.hiding.change_rows(change)


class _PrunedCache:
    """Mixed into the class of a cache that holds a pruned prompt."""

    continuation: Continuation

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self._check_open()
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def get_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        self._check_open()  # a linear attention layer asks for it first, and changes it in place
        return super().get_conv_state(*args, **kwargs)  # type: ignore[misc]

    def _check_open(self) -> None:
        if not self.continuation.open:
            raise ValueError(
                "this cache holds a pruned prompt, so only a forward pass inside a pruning context can continue it; "
                "enter the context again (`with stts.pruning(...)`), or start a new cache outside it"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.continuation.change_rows(lambda x: x[beam_idx.to(x.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.continuation.change_rows(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.continuation.change_rows(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            "a cache that holds a pruned prompt cannot be cut back; going on from an earlier token is not supported, "
            "nor are assisted decoding and chunked prefill: start a new cache"
        )


_pruned_classes: dict[type, type] = {}


def _pruned_class(stock: type) -> type:
    if stock not in _pruned_classes:
        _pruned_classes[stock] = type(f"Pruned{stock.__name__}", (_PrunedCache, stock), {})
    return _pruned_classes[stock]


def continue_on(cache: Any, continuation: Continuation) -> None:
    """Put what decode steps need on an empty cache that is about to be filled.

    Its class becomes a subclass of what it was, because the facts must follow whatever happens to its rows."""
    cache.__class__ = _pruned_class(type(cache)) if not isinstance(cache, _PrunedCache) else type(cache)
    cache.continuation = continuation


def continuation_of(cache: Any) -> Continuation | None:
    """What `continue_on` put there; None for any other cache."""
    return cache.continuation if isinstance(cache, _PrunedCache) else None


@dataclass
class DecodeStep:
    """What layers need at one decode step behind a drop inside the LLM, or behind the layer that hides keys."""

    llm: Any
    masks: dict[int, Any]
    """Attention mask, by the layer from which on it holds."""
    valid_BC: Tensor
    """bool, False at padding: slots of the cache, the new token included."""
    hiding: Hiding | None = None
    shown: Shown | None = None
    """What this step shows, once the layer that decides has run."""

    def before(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Changed inputs of a layer, or None."""
        if layer in linear_layers(self.llm.config):
            return None  # it reads no mask of one token
        if self.hiding is not None and layer == self.hiding.layer - 1:
            capture_next(self.llm.layers[layer].self_attn, self._hide)
        cuts = [cut for cut in self.masks if cut <= layer]
        return (args, kwargs | {"attention_mask": self.masks[max(cuts)]}) if cuts else None

    def after(self, layer: int, x_RMD: Tensor) -> Tensor | None:
        """Changed output of a layer, or None."""
        return None

    def finish(self) -> None:
        """Behind the last layer: what was shown is what the next step is compared with."""
        if self.hiding is not None:
            self.hiding.last = self.shown

    def _hide(self, q_BHQE: Tensor, k_BJCE: Tensor) -> None:
        assert self.hiding is not None
        layer = self.hiding.layer
        scale = getattr(self.llm.layers[layer - 1].self_attn, "scaling", None) or q_BHQE.shape[-1] ** -0.5
        attention_BC = step_attention(q_BHQE.detach(), k_BJCE.detach(), self.valid_BC, scale)
        num_slots = self.hiding.video_BM.shape[1]
        self.shown = self.hiding.next(attention_BC[:, :num_slots])
        visible_BC = torch.cat([self.shown.visible_BM, self.valid_BC[:, num_slots:]], 1)
        self.masks[layer] = decode_mask(visible_BC & self.valid_BC, self.llm)


def step_attention(q_BHQE: Tensor, k_BJCE: Tensor, valid_BC: Tensor, scale: float) -> Tensor:
    """(B, C) fp32 attention of one new token to every slot of its row, mean over heads; 0 at padding."""
    q_BJIE = q_BHQE[:, :, -1].float().unflatten(1, (k_BJCE.shape[1], -1))
    score_BJIC = q_BJIE @ k_BJCE.float().transpose(2, 3) * scale
    return score_BJIC.masked_fill(~valid_BC[:, None, None], -torch.inf).softmax(-1).mean((1, 2))


def decode(continuation: Continuation, llm: nn.Module, kwargs: dict[str, Any], seen: int) -> dict[str, Any]:
    """Inputs of the language model for one token per row behind a pruned prompt; `seen`: slots of the cache.

    ValueError for more than one token, or for another number of rows than the cache has."""
    rows, new = kwargs["inputs_embeds"].shape[:2]
    if new != 1:
        raise ValueError(
            f"{new} tokens were fed to a pruned cache at once; continuing it with a new turn is not supported "
            "(start again from the whole conversation), nor are assisted decoding and chunked prefill"
        )
    valid_BM = continuation.valid_BM
    if rows != len(valid_BM):
        raise ValueError(f"{rows} rows were fed to a cache of {len(valid_BM)} rows; repeat or select its rows first")
    step = seen - valid_BM.shape[1]
    mask = kwargs.get("attention_mask")
    tail_BT = valid_BM.new_ones(rows, step + 1)
    if isinstance(mask, Tensor) and mask.dim() == 2:  # another form was made by the stock code, for the full length
        tail_BT = mask[:, continuation.full_length :].bool()
    valid_BC = torch.cat([valid_BM, tail_BT], 1)
    changed = kwargs | {
        "position_ids": (continuation.next_position_B + step)[:, None],
        "attention_mask": valid_BC.to(torch.long),
    }
    if continuation.by_layer or continuation.hiding is not None:
        masks = {
            layer: decode_mask(torch.cat([deep_BM, tail_BT], 1), llm)
            for layer, deep_BM in continuation.by_layer.items()
        }
        changed[PASS_ARGUMENT] = DecodeStep(llm, masks, valid_BC, continuation.hiding)
    return changed
