"""Shorten the prompt: the language model sees survivors only, everyone around it sees stock shapes.

Two hooks on the language model, beside those of `llm.py` where stages act inside it. Before: gather the kept tokens of
every row, at prefill; shorten mask and renumber positions, at prefill and at every decode step. After: scatter hidden
states back to full length, zeros at dropped places, so that `labels`, `logits_to_keep` and output shapes stay stock.

Without a cache (training) all rows become one packed row with explicit boundaries, so nothing is padded and nothing is
inferred from position gaps. With a cache (generate) rows stay rows, padded like the prompt was.

Shape suffixes: B = rows, L = full prompt length, M = longest shortened row, S = kept tokens of all rows.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from stts.models.families.base import Placed
from stts.models.pruning.llm_layers import Layers
from stts.models.pruning.masks import Slots, pad_rows
from stts.pruners.base import Positions


@dataclass
class _Prefill:
    """What decode steps need to know about the prompt they continue."""

    cache: weakref.ref[Any]
    valid_BM: Tensor
    full_length: int
    next_position_B: Tensor
    """Position of the first generated token."""


class Prompt:
    """State of the hooks on one language model."""

    def __init__(self, positions: Positions, layers: Layers) -> None:
        self.positions = positions
        self.layers = layers
        self.num_tokens = 0
        """Real tokens the language model saw in the last prefill."""
        self.num_slots = 0
        """Slots it computed, padding included."""
        self._placed: Placed | None = None
        self._mask_BL: Tensor | None = None
        self.pending = False
        """True between `expect` and the call it announces."""
        self._restore: tuple[Tensor, tuple[int, int]] | None = None
        self._valid_BM: Tensor | None = None
        self._prefill: _Prefill | None = None

    def expect(self, placed: Placed, mask_BL: Tensor | None) -> None:
        """Announce the next call: what lies where in the full prompt, and which of its places are real (None: all)."""
        if mask_BL is not None and (not isinstance(mask_BL, Tensor) or mask_BL.dim() != 2):
            raise ValueError("pruning needs the 2-D attention mask (batch, length); static caches are not supported")
        self._placed, self._mask_BL, self.pending = placed, mask_BL, True

    def before(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the language model."""
        if args or "inputs_embeds" not in kwargs:
            raise ValueError(
                "the language model was not called with inputs_embeds by keyword; this transformers version is outside "
                "the tested range (>= 5.17, < 6)"
            )
        self._restore = None
        self.layers.rest()
        cache = kwargs.get("past_key_values")
        seen = cache.get_seq_length() if cache is not None else 0
        if self.pending:
            self.pending = False
            if seen:
                raise ValueError(
                    "a prompt with video was fed to a cache that already has tokens; pruning needs one prefill of the "
                    "whole prompt: start a new cache, and switch off chunked prefill and assisted decoding"
                )
            return args, self._shorten(module, kwargs)
        prefill = self._prefill
        if seen and prefill is not None and prefill.cache() is cache:
            return args, self._decode(prefill, kwargs, seen)
        return args, kwargs

    def after(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Forward hook of the language model."""
        if self._restore is None:
            return output
        index_S, (rows, length) = self._restore
        slots = self.layers.slots
        if slots is not None:
            self._valid_BM = None if slots.packed else slots.valid_RM
            index_S = slots.full_RM[slots.valid_RM]
        self._restore = None
        self.layers.rest()

        def full(x: Tensor) -> Tensor:
            flat = x.new_zeros(rows * length, x.shape[-1])
            return flat.index_copy(0, index_S, self._select(x)).view(rows, length, -1)

        output.last_hidden_state = full(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(full(x) for x in output.hidden_states)
        return output

    def _shorten(self, module: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        x_BLD, placed = kwargs["inputs_embeds"], self._placed
        assert placed is not None
        rows, length = x_BLD.shape[:2]
        real_BL = torch.ones_like(placed.keep_BL) if self._mask_BL is None else self._mask_BL.bool()
        keep_BL = real_BL & placed.keep_BL
        if self.layers.stages and (kwargs.get("output_hidden_states") or module.config.output_hidden_states):
            raise ValueError(
                "output_hidden_states is not supported with a pruner that drops inside the LLM: layers have different "
                "lengths; leave it off"
            )
        position_BL = kwargs.get("position_ids")  # mrope: three or four rows of them, (., B, L)
        if position_BL is None:
            position_BL = torch.arange(length, device=x_BLD.device)
        position_BL = position_BL.expand(*position_BL.shape[:-2], rows, length)
        rotary_BL = position_BL[-3:] if position_BL.dim() == 3 else position_BL  # four rows: the first only counts text
        next_B = rotary_BL.masked_fill(~real_BL, 0).amax(-1).view(-1, rows).amax(0) + 1
        if self.positions == "compact":
            position_BL = keep_BL.cumsum(1).sub(1).clamp_min(0)
            next_B = keep_BL.sum(1)
        limit: int = module.config.max_position_embeddings
        if self.positions == "original" or length > limit:  # else nothing can be too long, and nobody needs to wait
            self._check_window(next_B, limit, placed, real_BL, renumbers=position_BL.dim() < 3)
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None and (module.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = DynamicCache(
                config=module.config
            )  # the stock default, made here to know it
        if cache is None:
            kinds = set(getattr(module.config, "layer_types", None) or ["full_attention"])
            if kinds != {"full_attention"}:
                raise ValueError(f"packed rows need full attention in every LLM layer, got {sorted(kinds)}")
            index_S = keep_BL.flatten().nonzero().squeeze(1)
            self._note(index_S, None, (rows, length), len(index_S), len(index_S))
            # the layers get their own mask; the 4-D form keeps the stock code from making one
            mask = torch.zeros(1, 1, 1, 1, dtype=x_BLD.dtype, device=x_BLD.device)
            self._begin(index_S[None], torch.ones_like(index_S, dtype=torch.bool)[None], placed, packed=True, mask=mask)
            return kwargs | {
                "inputs_embeds": x_BLD.flatten(0, 1)[index_S][None],
                "position_ids": position_BL.flatten(-2)[..., None, index_S],
                "attention_mask": mask,
            }
        left = bool(real_BL[:, -1].all())
        index_BM, valid_BM = pad_rows(keep_BL, left=left)
        flat_BM = index_BM + torch.arange(rows, device=x_BLD.device)[:, None] * length
        self._note(flat_BM[valid_BM], valid_BM, (rows, length), int(valid_BM.sum()), valid_BM.numel())
        self._begin(flat_BM, valid_BM, placed, packed=False, left=left)
        self._prefill = _Prefill(weakref.ref(cache), valid_BM, length, next_B)
        return kwargs | {
            "inputs_embeds": x_BLD.gather(1, index_BM[..., None].expand(-1, -1, x_BLD.shape[-1])),
            "position_ids": position_BL.gather(-1, index_BM.expand(position_BL.shape[:-1] + index_BM.shape[-1:])),
            "attention_mask": valid_BM.to(torch.long),
        }

    def _check_window(self, length_B: Tensor, limit: int, placed: Placed, real_BL: Tensor, *, renumbers: bool) -> None:
        """ValueError when positions go beyond those the language model was made for.

        length_B: last position + 1 of every row. renumbers: positions='compact' is possible in this family."""
        longest = int(length_B.max())
        if longest <= limit:
            return
        visual_BL = real_BL & (placed.video_BL >= 0)
        kept_B = (real_BL & placed.keep_BL).sum(1)
        room_B = limit - (real_BL & placed.keep_BL & ~visual_BL).sum(1)
        rows = [(n, room) for n, room in zip(visual_BL.sum(1).tolist(), room_B.tolist(), strict=True) if n]
        videos = int(placed.video_BL.max()) + 1
        spare = videos - len(rows)  # a row has at most one video more; counts may be rounded up in all but one
        ratio = min((math.floor(1000 * (room - spare) / n) / 1000 for n, room in rows), default=0.0)
        if ratio <= 0:
            advice = "text and images alone fill it; shorten them"
        elif self.positions == "original" and not renumbers:
            advice = (
                "dropping tokens does not shorten the positions of this family; use fewer frames or a lower resolution"
            )
        elif self.layers.stages:
            advice = "this pruner drops inside the LLM; use one that drops before it, or fewer frames"
        else:
            advice = f"retention_ratio={min(ratio, 1.0)} fits" + " with positions='compact'" * (
                self.positions == "original"
            )
        raise ValueError(
            f"the prompt has {int(kept_B.max())} tokens after pruning and positions up to {longest - 1}, but the "
            f"language model's window is {limit} (max_position_embeddings): {advice}"
        )

    def _decode(self, prefill: _Prefill, kwargs: dict[str, Any], seen: int) -> dict[str, Any]:
        new = kwargs["inputs_embeds"].shape[1]
        if new != 1:
            raise ValueError(
                f"{new} tokens were fed to a pruned cache at once; continuing it with a new turn is not supported "
                "(start again from the whole conversation), nor are assisted decoding and chunked prefill"
            )
        rows, shortened = prefill.valid_BM.shape
        step = seen - shortened
        mask = kwargs.get("attention_mask")
        tail = prefill.valid_BM.new_ones(rows, step + 1)
        if isinstance(mask, Tensor) and mask.dim() == 2:  # another form was made by the stock code, for the full length
            tail = mask[:, prefill.full_length :].bool()
        self.layers.resume(tail)
        return kwargs | {
            "position_ids": (prefill.next_position_B + step)[:, None],
            "attention_mask": torch.cat([prefill.valid_BM, tail], 1).to(torch.long),
        }

    def _begin(
        self,
        full_RM: Tensor,
        valid_RM: Tensor,
        placed: Placed,
        *,
        packed: bool,
        left: bool = False,
        mask: Tensor | None = None,
    ) -> None:
        rows, length = placed.keep_BL.shape
        video_RM, cell_RM = (x.flatten()[full_RM] for x in (placed.video_BL, placed.cell_BL))
        both_RM = None if placed.both_BL is None else placed.both_BL.flatten()[full_RM]
        slots = Slots(full_RM, full_RM // length, valid_RM, video_RM, cell_RM, both_RM, rows, length, packed, left)
        self.layers.begin(slots, placed.early, placed.early_V, mask)

    def _note(self, index_S: Tensor, valid_BM: Tensor | None, shape: tuple[int, int], tokens: int, slots: int) -> None:
        self._restore = (index_S, shape)
        self._valid_BM = valid_BM
        self.num_tokens, self.num_slots = tokens, slots

    def _select(self, x: Tensor) -> Tensor:
        return x[0] if self._valid_BM is None else x[self._valid_BM]
