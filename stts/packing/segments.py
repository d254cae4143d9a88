"""Boundaries of sequences that lie one behind the other in a packed row.

Shape suffixes beside those of `stts.tokens`: B = sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Which neighbouring tokens of a packed row form one sequence. Rides through stock blocks as `attention_mask`."""

    cu_seqlens: Tensor
    """int32 (B + 1,) boundaries, from 0 to S; empty sequences are allowed."""
    max_seqlen: int
    """An upper bound of the longest sequence, known without asking the device."""
    key_bias: Tensor | None = None
    """fp32 (S,) added to the attention logits of every query and head for this key; gradients flow to it."""

    @classmethod
    def from_lengths(cls, lengths: Tensor, max_seqlen: int, device: torch.device | str | None = None) -> Segments:
        """From (B,) sequence lengths; no host synchronisation."""
        boundaries = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
        torch.cumsum(lengths, 0, dtype=torch.int32, out=boundaries[1:])
        return cls(boundaries.to(device) if device is not None else boundaries, max_seqlen)

    @property
    def num_sequences(self) -> int:
        """B, empty ones included."""
        return len(self.cu_seqlens) - 1

    @property
    def lengths(self) -> Tensor:
        """int32 (B,) tokens per sequence."""
        return self.cu_seqlens.diff()

    def with_bias(self, key_bias: Tensor) -> Segments:
        """The same boundaries with a key bias, shape (S,)."""
        return replace(self, key_bias=key_bias)

    def ids(self, num_tokens: int) -> Tensor:
        """int64 (S,) number of the sequence each token belongs to."""
        positions = torch.arange(num_tokens, device=self.cu_seqlens.device)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), positions, right=True)
