"""Attention masks for prompts in rows: dense, packed, after a cut inside the LLM, and at a decode step.

Shape suffixes as in `llm_layers`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from stts.models.families.attention import stock_name
from stts.packing.segments import Segments


@dataclass(frozen=True)
class Slots:
    """What the slots of the hidden states hold at some layer; real tokens of a prompt row lie in order, row by row."""

    full_RM: Tensor
    """int64 place in the flattened (B * L) prompt."""
    row_RM: Tensor
    """int64 row of the prompt."""
    valid_RM: Tensor
    """bool, False at padding."""
    video_RM: Tensor
    """int64 number of the video the slot shows, -1 for text and newlines."""
    cell_RM: Tensor
    """int64 cell of that video's grid."""
    both_RM: Tensor | None
    """bool, tokens that see each other in both directions (visual tokens of some families); None: all is causal."""
    num_rows: int
    length: int
    """Slots of a row of the full prompt."""
    packed: bool
    """All rows lie in one, without padding; else one row each, padded."""
    left: bool
    """Padding is on the left."""

    def lengths(self) -> list[int]:
        """Real tokens of every prompt row."""
        counts: list[int] = torch.bincount(self.row_RM[self.valid_RM], minlength=self.num_rows).tolist()
        return counts

    def take(self, index_RM: Tensor, valid_RM: Tensor) -> Slots:
        """The same for the chosen slots of every row."""
        names = ("full_RM", "row_RM", "video_RM", "cell_RM", *(("both_RM",) if self.both_RM is not None else ()))
        return replace(self, valid_RM=valid_RM, **{n: getattr(self, n).gather(1, index_RM) for n in names})


def pad_rows(keep_BL: Tensor, *, left: bool) -> tuple[Tensor, Tensor]:
    """Columns of the kept tokens of every row, (B, M) int64, and which of them are real, (B, M) bool."""
    count_B = keep_BL.sum(1)
    longest = int(count_B.max())
    order_BL = torch.sort(keep_BL.to(torch.uint8), dim=1, descending=not left, stable=True).indices
    index_BM = order_BL[:, -longest:] if left else order_BL[:, :longest]
    slot_M = torch.arange(longest, device=keep_BL.device)
    valid_BM = slot_M >= longest - count_B[:, None] if left else slot_M < count_B[:, None]
    return index_BM, valid_BM


def make_mask(slots: Slots, llm: Any) -> Any:
    """The mask of a prefill as the layers read it: `Segments` for packed causal rows, else a 4-D mask in the form of
    the attention implementation (causal, inside each row, both ways between `both` tokens).

    A query at padding sees itself, so that nothing divides by zero."""
    if slots.packed and slots.both_RM is None:
        row_M = slots.row_RM[0]  # counted without the host, which `bincount` would make wait
        lengths_B = row_M.new_zeros(slots.num_rows).index_add(0, row_M, torch.ones_like(row_M))
        return Segments.from_lengths(lengths_B, slots.row_RM.shape[1])
    name = stock_name(llm.config)
    if "flash" in name and slots.both_RM is None:
        return slots.valid_RM.to(torch.long)
    row_RM, valid_RM, both_RM = slots.row_RM, slots.valid_RM, slots.both_RM
    if name != "flex_attention":
        return _as_read(dense_mask(row_RM, valid_RM, both_RM)[:, None], name, llm)

    def sees(b: Any, h: Any, q: Any, k: Any) -> Any:
        both = False if both_RM is None else both_RM[b, q] & both_RM[b, k]
        inside = valid_RM[b, k] & (row_RM[b, q] == row_RM[b, k])
        return (inside & ((q >= k) | both)) | (q == k)

    size = valid_RM.shape[1]
    return create_block_mask(sees, len(valid_RM), None, size, size, valid_RM.device)


def dense_mask(row_RM: Tensor, valid_RM: Tensor, both_RM: Tensor | None) -> Tensor:
    """bool (R, M, M), queries first: which slots a slot sees. Written in place: beside it one more of its size at most,
    where a mask of 20,000 tokens takes 0.4 GB."""
    number_M = torch.arange(valid_RM.shape[1], device=valid_RM.device)
    keep_RMM = (number_M[:, None] >= number_M).expand(len(valid_RM), -1, -1).clone()
    if both_RM is not None:
        keep_RMM |= both_RM[:, :, None] & both_RM[:, None]
    keep_RMM &= row_RM[:, :, None] == row_RM[:, None]
    keep_RMM &= valid_RM[:, None]
    keep_RMM.diagonal(dim1=1, dim2=2).fill_(True)
    return keep_RMM


def decode_mask(valid_BM: Tensor, llm: Any) -> Any:
    """The mask of one new token over a layer's cache; valid_BM: bool, False at padding, the new token included."""
    name = stock_name(llm.config)
    return valid_BM.to(torch.long) if "flash" in name else _as_read(valid_BM[:, None, None], name, llm)


def _as_read(keep: Tensor, name: str, llm: Any) -> Tensor:
    """A bool mask as this attention implementation reads it (flex attention adds tensors to the scores)."""
    if name == "sdpa":
        return keep
    if name not in ("eager", "flex_attention"):
        raise ValueError(
            f"this mask cannot be given to the attention {name!r}; reload the model with attn_implementation='sdpa'"
        )
    low = torch.finfo(llm.dtype).min
    return torch.zeros(keep.shape, dtype=llm.dtype, device=keep.device).masked_fill(~keep, low)
