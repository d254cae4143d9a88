"""Bytes that training holds until the backward pass, from shapes alone.

What autograd keeps of the stock code, tensor by tensor; c = bytes of a value in matrix products (bf16: 2), s = bytes in
the residual stream (4 under autocast, where norms and sums stay fp32). Values in [brackets] are kept for gradients of
weights only, so a frozen block that gradients pass through does without them. Per token, with d = width, a / g = query
/ key-value heads times their width, H = query heads, m = inner width of one branch:

    RMS norm     4 d (its fp32 input) [+ s d (before the scale)]      layer norm   s d + 8
    attention    c (2 a + 2 g) + 4 H  (q, k, v, output, fp32 log-sum of a flash kernel)  [+ c d (input)]
    q, k norm    4 (a + g) [+ c (a + g)]
    gated MLP    c 3 m [+ c d + c m (inputs of its matrices)]         plain MLP    c m [+ c d + c m]

With activation checkpointing a block keeps its input (s d), and one block at a time is whole while it is recomputed.
Checked against torch's saved tensors by tests/train/test_plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stts.metrics.cost import LinearShape


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Bytes of one value."""

    compute: int
    """c, of inputs and outputs of matrix products."""
    stream: int
    """s, of the residual stream."""


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """A transformer block, of a tower or of an LLM."""

    width: int
    heads: int
    query: int
    """Query heads times their width."""
    key: int
    """Key heads times theirs; beside layers of linear attention what brings attention to the mean of all layers."""
    mlp: int
    gated: bool
    rms: bool
    """RMS norms, else layer norms."""
    norms_heads: bool = False
    """Queries and keys have a norm of their own."""

    @classmethod
    def of_llm(cls, config: Any, *, norms_heads: bool = False, output_gate: bool = False) -> BlockShape:
        """From the `text_config` of a decoder with RMS norms and a gated feed-forward part.

        A layer of linear attention keeps its q, k, v before and behind the convolution, and three tensors as wide as
        its values, as fused kernels do; the stock torch code for CPU keeps many times that."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        query, key = heads * head_dim, (getattr(config, "num_key_value_heads", None) or heads) * head_dim
        kept, linear = query * (4 if output_gate else 2) + 2 * key, LinearShape.from_config(config)
        if linear is not None:
            recurrent, share = 4 * linear.key + 5 * linear.value, len(linear.layers) / config.num_hidden_layers
            kept = round(share * recurrent + (1 - share) * kept)
        return cls(
            width=config.hidden_size,
            heads=heads,
            query=query,
            key=kept // 2 - query,
            mlp=config.intermediate_size,
            gated=True,
            rms=True,
            norms_heads=norms_heads,
        )

    @classmethod
    def of_vit(cls, config: Any, *, gated: bool = False, rms: bool = False, norms_heads: bool = False) -> BlockShape:
        """From `vision_config`, of a tower whose heads share its width."""
        width = config.hidden_size
        return cls(
            width=width,
            heads=config.num_attention_heads,
            query=width,
            key=width,
            mlp=config.intermediate_size,
            gated=gated,
            rms=rms,
            norms_heads=norms_heads,
        )


def block_bytes(shape: BlockShape, widths: Widths, *, learns: bool) -> int:
    """Kept per token by one block that gradients pass through."""
    c, s, d, inner = widths.compute, widths.stream, shape.width, shape.query + shape.key
    norm = 4 * d + (s * d if learns else 0) if shape.rms else s * d + 8
    attention = c * 2 * inner + 4 * shape.heads + (c * d if learns else 0)
    if shape.norms_heads:
        attention += 4 * inner + (c * inner if learns else 0)
    mlp = c * shape.mlp * (3 if shape.gated else 1) + (c * (d + shape.mlp) if learns else 0)
    return 2 * norm + attention + mlp


def input_bytes(shape: BlockShape, widths: Widths) -> int:
    """Kept per token by a block that is recomputed."""
    return widths.stream * shape.width


def scorer_bytes(width: int, mlp: int, heads: int, patches: int, widths: Widths) -> int:
    """Kept per group of `patches` patches by the scorer of STTS: windows, fp32 attention inside them, the MLP."""
    c, d, w, m = widths.compute, width, patches, mlp
    pooling = c * w * d + c * d + 4 * (2 * w * d + d) + 4 * heads * w + c * d
    return pooling + c * 2 * d + c * 4 * m + (4 - c) * m


HEAD_CHUNK = 256
"""Answer tokens whose loss is computed at a time."""


def head_bytes(config: Any, widths: Widths, num_tokens: int) -> int:
    """At its peak, for all answer tokens: logits and their gradient; of one chunk an fp32 copy, its log-softmax and the
    gradient."""
    text = config.text_config
    logits = num_tokens * (2 * widths.compute * text.vocab_size + widths.compute * text.hidden_size)
    return logits + min(num_tokens, HEAD_CHUNK) * 3 * 4 * text.vocab_size
