"""Shorten the prompt: the language model sees survivors only, everyone around it sees stock shapes.

Before the language model: gather the kept tokens of every row, and renumber them where positions are compact. Behind
it: scatter hidden states back to full length, zeros at dropped places, so that `labels`, `logits_to_keep` and output
shapes stay stock. `continuation.py` has the decode steps, `llm_layers.py` the drops between layers.

Without a cache (training) all rows become one packed row with explicit boundaries, so nothing is padded and nothing is
inferred from position gaps. With a cache (generate) rows stay rows, padded like the prompt was. So they do, padded on
the left, where the LLM has linear attention layers: stock torch code of those ignores boundaries inside a row, and one
sample's state would leak into the next without an error.

Shape suffixes beside those of `stts.tokens`: B = rows, L = full prompt length, M = longest shortened row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from stts.models.families.attention import PASS_ARGUMENT
from stts.models.families.base import Placed, linear_layers
from stts.models.pruning.continuation import Continuation, Hiding, continue_on
from stts.models.pruning.llm_layers import Decide, Listeners, Prefill
from stts.models.pruning.masks import Slots, pad_rows
from stts.pruners.base import HidesKeys, Positions, Stage


class Prompt:
    """The full prompt of one pass, and where its survivors are while the language model runs on them."""

    def __init__(
        self,
        placed: Placed,
        mask_BL: Tensor | None,
        positions: Positions,
        stages: Sequence[Stage],
        decide: Decide,
        listeners: Listeners,
        hides: HidesKeys | None = None,
        num_keys: Sequence[int] = (),
    ) -> None:
        """placed: what lies where; mask_BL: which of its places are real (None: all); stages: those inside the language
        model, which `decide` asks; listeners: who is told of attention in it; hides: what acts while decoding, on
        `num_keys` keys of each video (per beam). ValueError for a mask of another form."""
        if mask_BL is not None and (not isinstance(mask_BL, Tensor) or mask_BL.dim() != 2):
            raise ValueError("pruning needs the 2-D attention mask (batch, length); static caches are not supported")
        self.num_tokens = 0
        """Real tokens the language model sees."""
        self.num_slots = 0
        """Slots it computes, padding included."""
        self.is_shortened = False
        self._placed, self._mask_BL = placed, mask_BL
        self._positions: Positions = positions
        self._stages, self._decide, self._listeners = stages, decide, listeners
        self._hides, self._num_keys = hides, list(num_keys)
        self._layers: Prefill | None = None
        self._sequence_BL: Tensor | None = None
        """Number of the sample that each place belongs to, where the caller packed several into a row."""

    def shorten(self, llm: Any, kwargs: dict[str, Any], seen: int) -> dict[str, Any]:
        """Inputs of the language model `llm` for the survivors; `seen`: slots its cache holds already.

        ValueError: the cache is not empty, hidden states of all layers are asked for beside stages inside the language
        model, or positions go beyond its window."""
        if seen:
            raise ValueError(
                "a prompt with video was fed to a cache that already has tokens; pruning needs one prefill of the "
                "whole prompt: start a new cache, and switch off chunked prefill and assisted decoding"
            )
        if self._stages and (kwargs.get("output_hidden_states") or llm.config.output_hidden_states):
            raise ValueError(
                "output_hidden_states is not supported with a pruner that drops inside the LLM: layers have different "
                "lengths; leave it off"
            )
        x_BLD, keep_BL = kwargs["inputs_embeds"], self._placed.keep_BL
        if self._mask_BL is None:  # as the stock code does, which sees packed samples only where there is no mask
            self._sequence_BL = packed_samples(kwargs.get("position_ids"), x_BLD)
        real_BL = torch.ones_like(keep_BL) if self._mask_BL is None else self._mask_BL.bool()
        keep_BL = real_BL & keep_BL
        position_BL, next_B = self._place(llm, x_BLD, kwargs.get("position_ids"), real_BL, keep_BL)
        self.is_shortened = True
        cache, use_cache = kwargs.get("past_key_values"), kwargs.get("use_cache")
        if cache is None and (llm.config.use_cache if use_cache is None else use_cache):
            cache = kwargs["past_key_values"] = DynamicCache(config=llm.config)  # stock, made here to know it
        if linear_layers(llm.config) and self._sequence_BL is not None:
            raise ValueError(
                "position_ids start anew inside a row, so it packs several samples, but the linear attention layers of "
                "this language model would carry one sample's state into the next; give every sample its own row"
            )
        if cache is not None and self._sequence_BL is not None:
            raise ValueError(
                "position_ids start anew inside a row, so it packs several samples, but a cache cannot tell them "
                "apart; pass use_cache=False, or one sample per row"
            )
        if cache is None and not linear_layers(llm.config):
            return kwargs | self._pack(llm, x_BLD, position_BL, keep_BL)
        return kwargs | self._pad(llm, x_BLD, position_BL, real_BL, keep_BL, cache, next_B)

    def survivors(self, places_BL: Tensor) -> Tensor:
        """Values of the survivors' places, (1, S) where rows are packed, else (B, M)."""
        assert self._layers is not None
        return places_BL.flatten()[self._layers.slots.full_RM]

    def before(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Changed inputs of a layer, or None."""
        return self._layers.before(layer, args, kwargs) if self._layers is not None else None

    def after(self, layer: int, x_RMD: Tensor) -> Tensor | None:
        """Changed output of a layer, or None."""
        return self._layers.after(layer, x_RMD) if self._layers is not None else None

    def restore(self, output: Any) -> Any:
        """The output of the language model at full length."""
        assert self._layers is not None
        slots, rows = self._layers.slots, len(self._placed.keep_BL)
        index_S = slots.full_RM[slots.valid_RM]
        length = self._placed.keep_BL.shape[1]

        def full(x: Tensor) -> Tensor:
            flat = x.new_zeros(rows * length, x.shape[-1])
            kept = x[0] if slots.packed else x[slots.valid_RM]
            return flat.index_copy(0, index_S, kept).view(rows, length, -1)

        output.last_hidden_state = full(output.last_hidden_state)
        if getattr(output, "hidden_states", None) is not None:
            output.hidden_states = tuple(full(x) for x in output.hidden_states)
        return output

    def _place(
        self, llm: Any, x_BLD: Tensor, position_BL: Tensor | None, real_BL: Tensor, keep_BL: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Positions (., B, L) of every place, three or four rows of them with mrope, and (B,) of the token behind."""
        rows, length = x_BLD.shape[:2]
        if position_BL is None:
            position_BL = torch.arange(length, device=x_BLD.device)
        position_BL = position_BL.expand(*position_BL.shape[:-2], rows, length)
        rotary_BL = position_BL[-3:] if position_BL.dim() == 3 else position_BL  # four rows: the first only counts text
        next_B = rotary_BL.masked_fill(~real_BL, 0).amax(-1).view(-1, rows).amax(0) + 1
        if self._positions == "compact":
            position_BL = renumber(keep_BL, self._sequence_BL)
            next_B = keep_BL.sum(1)
        limit: int = llm.config.max_position_embeddings
        if self._positions == "original" or length > limit:  # else nothing can be too long, and nobody needs to wait
            self._check_window(next_B, limit, real_BL, renumbers=position_BL.dim() < 3)
        return position_BL, next_B

    def _pack(self, llm: Any, x_BLD: Tensor, position_BL: Tensor, keep_BL: Tensor) -> dict[str, Any]:
        """All rows as one, without padding."""
        kinds = set(getattr(llm.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(f"packed rows need full attention in every LLM layer, got {sorted(kinds)}")
        index_S = keep_BL.flatten().nonzero().squeeze(1)
        self.num_tokens = self.num_slots = len(index_S)
        valid_1S = torch.ones_like(index_S, dtype=torch.bool)[None]
        self._layers = self._prefill(llm, self._slots(index_S[None], valid_1S))
        return {
            "inputs_embeds": x_BLD.flatten(0, 1)[index_S][None],
            "position_ids": position_BL.flatten(-2)[..., None, index_S],
            # the layers get their own mask; the 4-D form keeps the stock code from making one
            "attention_mask": torch.zeros(1, 1, 1, 1, dtype=x_BLD.dtype, device=x_BLD.device),
            PASS_ARGUMENT: self,
        }

    def _pad(
        self, llm: Any, x_BLD: Tensor, position_BL: Tensor, real_BL: Tensor, keep_BL: Tensor, cache: Any, next_B: Tensor
    ) -> dict[str, Any]:
        """Rows stay rows, padded on the side where the prompt is. Linear attention layers go through a row from left to
        right, and their state stays what it was through padding in front of the row alone."""
        rows, length = keep_BL.shape
        left = bool(linear_layers(llm.config)) or bool(real_BL[:, -1].all())
        index_BM, valid_BM = pad_rows(keep_BL, left=left)
        flat_BM = index_BM + torch.arange(rows, device=x_BLD.device)[:, None] * length
        self.num_tokens, self.num_slots = int(valid_BM.sum()), valid_BM.numel()
        self._layers = self._prefill(llm, self._slots(flat_BM, valid_BM, left))
        if cache is not None:
            hiding = self._hiding(llm, valid_BM)
            continue_on(cache, Continuation(valid_BM, length, next_B, self._layers.valid, hiding))
        return {
            "inputs_embeds": x_BLD.gather(1, index_BM[..., None].expand(-1, -1, x_BLD.shape[-1])),
            "position_ids": position_BL.gather(-1, index_BM.expand(position_BL.shape[:-1] + index_BM.shape[-1:])),
            "attention_mask": valid_BM.to(torch.long),
            PASS_ARGUMENT: self,
        }

    def _prefill(self, llm: Any, slots: Slots) -> Prefill:
        return Prefill(llm, self._stages, self._decide, slots, self._placed, self._listeners)

    def _hiding(self, llm: Any, valid_BM: Tensor) -> Hiding | None:
        """What decode steps must know to hide keys. ValueError for a cache whose slots are not those of the prompt."""
        if self._hides is None or self._hides.hides_from is None:
            return None
        kinds = set(getattr(llm.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise ValueError(
                f"keys are hidden by their slot in the cache, but layers of this LLM keep {sorted(kinds)}, which drop "
                "or move slots; leave out `hidden`"
            )
        assert self._layers is not None
        video_BM = self._layers.slots.video_RM.masked_fill(~valid_BM, -1)
        return Hiding(self._hides, self._hides.hides_from, video_BM, self._num_keys)

    def _slots(self, full_RM: Tensor, valid_RM: Tensor, left: bool | None = None) -> Slots:
        """left: where padding is; None: the rows are packed into one."""
        placed, (rows, length) = self._placed, self._placed.keep_BL.shape
        video_RM, cell_RM = (x.flatten()[full_RM] for x in (placed.video_BL, placed.cell_BL))
        both_RM = None if placed.both_BL is None else placed.both_BL.flatten()[full_RM]
        packed, row_RM = left is None, full_RM // length
        if self._sequence_BL is not None:
            row_RM, rows = self._sequence_BL.flatten()[full_RM], int(self._sequence_BL.max()) + 1
        return Slots(full_RM, row_RM, valid_RM, video_RM, cell_RM, both_RM, rows, length, packed, bool(left))

    def _check_window(self, length_B: Tensor, limit: int, real_BL: Tensor, *, renumbers: bool) -> None:
        """ValueError when positions go beyond those the language model was made for.

        length_B: last position + 1 of every row. renumbers: positions='compact' is possible in this family."""
        longest = int(length_B.max())
        if longest <= limit:
            return
        placed = self._placed
        visual_BL = real_BL & (placed.video_BL >= 0)
        kept_B = (real_BL & placed.keep_BL).sum(1)
        room_B = limit - (real_BL & placed.keep_BL & ~visual_BL).sum(1)
        rows = [(n, room) for n, room in zip(visual_BL.sum(1).tolist(), room_B.tolist(), strict=True) if n]
        videos = int(placed.video_BL.max()) + 1
        spare = videos - len(rows)  # a row has at most one video more; counts may be rounded up in all but one
        ratio = min((math.floor(1000 * (room - spare) / n) / 1000 for n, room in rows), default=0.0)
        if ratio <= 0:
            advice = "text and images alone fill it; shorten them"
        elif self._positions == "original" and not renumbers:
            advice = (
                "dropping tokens does not shorten the positions of this family; use fewer frames or a lower resolution"
            )
        elif self._stages:
            advice = "this pruner drops inside the LLM; use one that drops before it, or fewer frames"
        else:
            advice = f"retention_ratio={min(ratio, 1.0)} fits" + " with positions='compact'" * (
                self._positions == "original"
            )
        raise ValueError(
            f"the prompt has {int(kept_B.max())} tokens after pruning and positions up to {longest - 1}, but the "
            f"language model's window is {limit} (max_position_embeddings): {advice}"
        )


def packed_samples(position_BL: Tensor | None, x_BLD: Tensor) -> Tensor | None:
    """int64 (B, L): number of the sample at each place, counted over all rows, where the caller packed several into a
    row; None where each row is one.

    position_BL: the caller's (B, L), or (4, B, L) whose first row counts text; a new sample begins wherever the next
    position is not one more, as in transformers' `find_packed_sequence_indices`. ValueError for packed rows with three
    rows of mrope positions alone: in them the stock code sees no boundary, and samples would see each other."""
    if position_BL is None:
        return None
    if position_BL.dim() == 3 and len(position_BL) == 3:
        if bool((position_BL == 0).all(0)[:, 1:].any()):
            raise ValueError(
                "position_ids start anew inside a row, so it packs several samples, but three rows of mrope positions "
                "do not say so to the attention; pass four, with the text positions first, or one sample per row"
            )
        return None
    text_BL = (position_BL[0] if position_BL.dim() == 3 else position_BL).expand(x_BLD.shape[:2])
    begins_BL = text_BL.diff(prepend=text_BL[:, :1] - 1) != 1
    if not bool(begins_BL.any()):
        return None
    begins_BL[:, 0] = True
    return begins_BL.flatten().cumsum(0).sub(1).view_as(begins_BL)


def renumber(keep_BL: Tensor, sequence_BL: Tensor | None) -> Tensor:
    """int64 (B, L) positions that count kept places, from 0 in every row, or in every sample of a row."""
    if sequence_BL is None:
        return keep_BL.cumsum(1).sub(1).clamp_min(0)
    keep_N, sequence_N = keep_BL.flatten().long(), sequence_BL.flatten()
    count_N = keep_N.cumsum(0)
    lengths_S = torch.zeros_like(sequence_N).index_add(0, sequence_N, keep_N)  # samples never outnumber places
    before_S = lengths_S.cumsum(0) - lengths_S
    return (count_N - 1 - before_S[sequence_N]).clamp_min(0).view_as(keep_BL)
