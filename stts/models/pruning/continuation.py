"""What decode steps must know about the pruned prompt that they continue; it lives on the KV cache of that prompt.

The cache is what a caller keeps, copies and hands back, so the facts stay on it: a deep copy of a cache has its own,
reordered or repeated rows are reordered or repeated here too, and two prompts may be continued in turns.

Shape suffixes beside those of `stts.tokens`: B = rows, M = slots of the shortened prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stts.models.families.attention import PASS_ARGUMENT
from stts.models.pruning.masks import decode_mask


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
    open: bool = False
    """A forward pass under a pruning context is running on the cache; no other may write to it."""

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply to every tensor what happens to the rows of the cache."""
        self.valid_BM, self.next_position_B = change(self.valid_BM), change(self.next_position_B)
        self.by_layer = {layer: change(valid_BM) for layer, valid_BM in self.by_layer.items()}


class _PrunedCache:
    """Mixed into the class of a cache that holds a pruned prompt."""

    continuation: Continuation

    def update(self, *args: Any, **kwargs: Any) -> Any:
        if not self.continuation.open:
            raise ValueError(
                "this cache holds a pruned prompt, so only a forward pass inside a pruning context can continue it; "
                "enter the context again (`with stts.pruning(...)`), or start a new cache outside it"
            )
        return super().update(*args, **kwargs)  # type: ignore[misc]

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


@dataclass(frozen=True)
class DecodeStep:
    """What layers behind a drop inside the LLM need at one decode step."""

    masks: dict[int, Any]
    """Attention mask, by the layer from which on it holds."""

    def before(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Changed inputs of a layer, or None."""
        cuts = [cut for cut in self.masks if cut <= layer]
        return (args, kwargs | {"attention_mask": self.masks[max(cuts)]}) if cuts else None

    def after(self, layer: int, x_RMD: Tensor) -> Tensor | None:
        """Changed output of a layer, or None."""
        return None


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
    changed = kwargs | {
        "position_ids": (continuation.next_position_B + step)[:, None],
        "attention_mask": torch.cat([valid_BM, tail_BT], 1).to(torch.long),
    }
    if continuation.by_layer:
        masks = {
            layer: decode_mask(torch.cat([deep_BM, tail_BT], 1), llm)
            for layer, deep_BM in continuation.by_layer.items()
        }
        changed[PASS_ARGUMENT] = DecodeStep(masks)
    return changed
