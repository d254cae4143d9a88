"""FLOPs of a video VLM from shapes alone, in the four conventions of the field.

1 multiply-add = 2 FLOPs unless a convention says otherwise; norms, softmax, rotary, activations, biases and embedding
look-up are not counted, causal attention counts as full. What one LLM block costs for N tokens (d = width, m = inner
width of one branch of the feed-forward, H / G = query / key-value heads of width h):

    exact   4 N d h (H + G) + 4 N^2 H h + 6 N d m    grouped queries and gating counted (arXiv 2604.09547)
    macs    half of `exact`                          FastVID, arXiv 2503.11187
    fastv   4 N d^2 + 2 N^2 d + 2 N d m              FastV, arXiv 2403.06764; HoliTom, arXiv 2505.21334
    pdrop   4 N d^2 + 2 N^2 d + 3 N d m              PyramidDrop, arXiv 2410.17247

A layer of linear attention (gated delta rule; k, v = widths of all its key and value heads, e of one key head, c = taps
of its convolution, s = value heads) has no part that is quadratic in N. `exact` counts the rule token by token, as in
decoding; chunked kernels of a prefill do more:

    exact   2 N d (2 k + 3 v + 2 s) + 2 N c (2 k + v) + 6 N v e + 6 N d m
    fastv, pdrop   as above without their quadratic part, ours: these papers know no such layer

The same dense model costs 40.8 to 97.6 T among them, so no number goes out without the name of its formula.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from stts.tokens import Grid

Formula = Literal["exact", "macs", "fastv", "pdrop"]


@dataclass(frozen=True, kw_only=True)
class LinearShape:
    """The layers of an LLM that have linear attention (gated delta rule)."""

    layers: frozenset[int]
    key: int
    """Key heads times their width; queries have the same."""
    value: int
    """Value heads times theirs."""
    heads: int
    """Value heads."""
    head_dim: int
    """Of a key head."""
    kernel: int
    """Taps of the convolution over tokens."""

    @classmethod
    def from_config(cls, config: Any) -> LinearShape | None:
        """From the config of a Hugging Face decoder; None where every layer has attention."""
        kinds = getattr(config, "layer_types", None) or []
        layers = frozenset(number for number, kind in enumerate(kinds) if kind == "linear_attention")
        if not layers:
            return None
        return cls(
            layers=layers,
            key=config.linear_num_key_heads * config.linear_key_head_dim,
            value=config.linear_num_value_heads * config.linear_value_head_dim,
            heads=config.linear_num_value_heads,
            head_dim=config.linear_key_head_dim,
            kernel=config.linear_conv_kernel_dim,
        )

    def mixer_flops(self, num_tokens: int, width: int) -> int:
        """One such layer without its feed-forward part."""
        inputs = 2 * self.key + self.value
        projections = 2 * width * (inputs + 2 * self.value + 2 * self.heads)
        return num_tokens * (projections + 2 * self.kernel * inputs + 6 * self.value * self.head_dim)


@dataclass(frozen=True, kw_only=True)
class LlmShape:
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    """May differ from width / heads."""
    mlp: int
    """Inner width of one branch."""
    gated: bool = True
    """True: three feed-forward matrices (SwiGLU), False: two."""
    output_gate: bool = False
    """Attention has a gate on its output, as wide as the queries."""
    linear: LinearShape | None = None
    """Its layers with linear attention."""

    @property
    def attention_layers(self) -> int:
        return self.layers - len(self.linear.layers) if self.linear else self.layers

    @classmethod
    def from_config(cls, config: Any) -> LlmShape:
        """From the config of a Hugging Face decoder (`text_config` of a VLM) with a gated feed-forward part."""
        heads = config.num_attention_heads
        return cls(
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            mlp=config.intermediate_size,
            linear=LinearShape.from_config(config),
        )


@dataclass(frozen=True, kw_only=True)
class VitShape:
    """A tower whose frames (or temporal patches of two) attend to themselves only."""

    width: int
    blocks: int
    """Blocks that are executed, which may be fewer than a checkpoint defines."""
    mlp: int
    patches: int
    """Per frame; 0: another number for every resolution, see `VlmShape.at`."""
    patch_size: int
    """Pixels per side."""
    channels: int = 3
    """Values of a patch at each of its pixels: colours, times the frames of a temporal patch."""
    gated: bool = False
    """Like `LlmShape.gated`."""
    class_tokens: int = 0
    """Beside the patches of a frame in every block, whatever is dropped."""
    windowed: frozenset[int] = frozenset()
    """Blocks whose patches attend inside `windows` only."""
    window_side: int = 0
    """Patches per side of a window."""
    windows: tuple[int, ...] = ()
    """Patches in each window of a frame."""

    @classmethod
    def from_config(cls, config: Any) -> VitShape:
        """From the `vision_config` of a plain tower with frames of one size; all its layers run."""
        sides = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
        return cls(
            width=config.hidden_size,
            blocks=config.num_hidden_layers,
            mlp=config.intermediate_size,
            patches=math.prod(side // config.patch_size for side in sides),
            patch_size=config.patch_size,
            channels=config.num_channels,
        )


@dataclass(frozen=True)
class VlmShape:
    llm: LlmShape
    vit: VitShape
    connector: int
    """FLOPs of the connector for one of its items."""
    merge_side: int = 0
    """An item is a cell of that many patches per side; 0: every patch is an item."""

    def at(self, grid: Grid) -> VlmShape:
        """The shape for a video of this grid, where the number of patches depends on its resolution."""
        if self.vit.patches:
            return self
        height, width, side = grid.h * self.merge_side, grid.w * self.merge_side, self.vit.window_side
        rows, columns = (
            [min(side, length - start) for start in range(0, length, side)] if side else [length]
            for length in (height, width)
        )
        windows = tuple(row * column for row in rows for column in columns)
        return replace(self, vit=replace(self.vit, patches=height * width, windows=windows))


@dataclass(frozen=True)
class VideoCost:
    """FLOPs of one video: tower and connector, the pruner's own work, LLM prefill of the visual tokens (no text)."""

    vit: int
    """Blocks only."""
    vit_embed: int
    connector: int
    pruner: int
    llm: int

    @property
    def total(self) -> int:
        return self.vit + self.vit_embed + self.connector + self.pruner + self.llm


@dataclass(frozen=True)
class DecodeCost:
    """What one video costs while an answer is decoded."""

    flops: int
    """Of each new token: its attention to the keys of the video, and the choice of those it reads."""
    cache_bytes: int
    """Keys and values of the video, whatever of them is read."""


def decode_cost(
    shape: LlmShape,
    tokens_L: Sequence[int],
    bytes_per_value: int,
    *,
    first: int | None = None,
    num_visible: int = 0,
) -> DecodeCost:
    """tokens_L: keys of the video in the cache of every layer (`tokens_per_layer`); layers with linear attention have
    none. first: the layer from which on a stage lets a new token read `num_visible` of them at most (DyCoke); it looks
    at the attention of the layer before once more."""
    linear = shape.linear.layers if shape.linear else frozenset[int]()
    keys = {layer: number for layer, number in enumerate(tokens_L) if layer not in linear}
    read = [min(n, num_visible) if first is not None and layer >= first else n for layer, n in keys.items()]
    flops = 4 * shape.heads * shape.head_dim * sum(read)
    if first is not None:
        flops += 2 * shape.heads * shape.head_dim * tokens_L[first - 1]
    return DecodeCost(flops, 2 * shape.kv_heads * shape.head_dim * bytes_per_value * sum(keys.values()))


def llm_block_flops(
    shape: LlmShape, num_tokens: int, formula: Formula = "exact", *, causal: bool = False, layer: int | None = None
) -> int:
    """One LLM block on `num_tokens` tokens; `causal` halves the part that is quadratic in them.

    layer: its number; None: one with attention."""
    n, d, m = num_tokens, shape.width, shape.mlp
    recurrent = shape.linear if shape.linear is not None and layer in shape.linear.layers else None
    if formula in ("exact", "macs"):
        feed_forward = (6 if shape.gated else 4) * n * d * m
        if recurrent is not None:
            flops = recurrent.mixer_flops(n, d) + feed_forward
            return flops if formula == "exact" else flops // 2
        queries = (2 if shape.output_gate else 1) * shape.heads
        linear = 2 * n * d * shape.head_dim * (queries + shape.heads + 2 * shape.kv_heads) + feed_forward
        quadratic = 4 * n * n * shape.heads * shape.head_dim
        flops = linear + (quadratic // 2 if causal else quadratic)
        return flops if formula == "exact" else flops // 2
    if formula not in ("fastv", "pdrop"):
        raise ValueError(f"formula {formula!r} is unknown; expected one of {', '.join(get_args(Formula))}")
    quadratic = 0 if recurrent is not None else 2 * n * n * d
    return 4 * n * d * d + (quadratic // 2 if causal else quadratic) + (2 if formula == "fastv" else 3) * n * d * m


def llm_prefill_flops(
    shape: LlmShape, num_tokens: int | Sequence[int], formula: Formula = "exact", *, causal: bool = False
) -> int:
    """The prompt through the LLM: the same tokens in every layer, or one count per layer.

    ValueError when the counts are not one per layer."""
    if isinstance(num_tokens, int):
        num_tokens = [num_tokens] * shape.layers
    if len(num_tokens) != shape.layers:
        raise ValueError(f"got {len(num_tokens)} token counts for {shape.layers} layers; give one per layer")
    return sum(llm_block_flops(shape, n, formula, causal=causal, layer=layer) for layer, n in enumerate(num_tokens))


def tokens_per_layer(entry: int, cuts: Sequence[int], counts: Sequence[int], layers: int) -> list[int]:
    """Visual tokens in every LLM layer: `entry` of them at first, `counts[i]` from layer `cuts[i]` on.

    Of two cuts before the same layer the later one counts. ValueError for cuts that are not one per count, not in order
    or outside [1, layers - 1]."""
    if len(cuts) != len(counts):
        raise ValueError(f"got {len(cuts)} cuts and {len(counts)} counts; give the tokens left after each cut")
    edges = [0, *cuts, layers]
    if any(start > end for start, end in pairwise(edges)) or not all(0 < cut < layers for cut in cuts):
        raise ValueError(f"cuts before layers {list(cuts)} must be in order and in [1, {layers - 1}]")
    return [n for n, (start, end) in zip([entry, *counts], pairwise(edges), strict=True) for _ in range(end - start)]


def vit_block_flops(shape: VitShape, num_patches: int, block: int = 0) -> int:
    """Block number `block` on `num_patches` patches of one frame, and its class tokens.

    Survivors are taken to be spread over windows like the patches before the drop; unevenly they cost a little more."""
    n, d = num_patches + shape.class_tokens, shape.width
    pairs = n * n
    if block in shape.windowed:
        pairs = pairs * sum(window**2 for window in shape.windows) // shape.patches**2
    return 8 * n * d * d + 4 * pairs * d + (6 if shape.gated else 4) * n * d * shape.mlp


def vit_flops(
    shape: VitShape, num_frames: int, kept_patches: Sequence[int] | None = None, drop_after: int | None = None
) -> int:
    """All blocks of the tower; with survivors per frame, blocks 0..drop_after run on everything, the others on those.

    Attention is counted per frame, as in packed rows without padding. ValueError for counts that do not fit."""
    block_flops = [vit_block_flops(shape, shape.patches, block) for block in range(shape.blocks)]
    if kept_patches is None:
        return num_frames * sum(block_flops)
    if drop_after is None or not 0 <= drop_after < shape.blocks:
        raise ValueError(f"drop_after={drop_after} must be one of the blocks 0..{shape.blocks - 1}")
    if len(kept_patches) != num_frames or not all(0 <= n <= shape.patches for n in kept_patches):
        raise ValueError(f"expected {num_frames} counts in [0, {shape.patches}], got {list(kept_patches)}")
    full = drop_after + 1
    pruned = (vit_block_flops(shape, n, block) for block in range(full, shape.blocks) for n in kept_patches)
    return num_frames * sum(block_flops[:full]) + sum(pruned)


def vit_embed_flops(shape: VitShape, num_frames: int) -> int:
    """Patch embedding of all patches of all frames."""
    return 2 * num_frames * shape.patches * shape.channels * shape.patch_size**2 * shape.width


def mlp_flops(widths: Sequence[int], num_items: int) -> int:
    """A stack of linear layers on `num_items` items; `widths` begins with the input."""
    return 2 * num_items * sum(a * b for a, b in pairwise(widths))


def video_cost(
    shape: VlmShape,
    *,
    num_frames: int,
    llm_tokens: int | Sequence[int],
    kept_patches: Sequence[int] | None = None,
    drop_after: int | None = None,
    num_cells: int | None = None,
    pruner_flops: int = 0,
    formula: Formula = "exact",
) -> VideoCost:
    """Cost of one video; text and frame separators are left out.

    llm_tokens: visual tokens in the LLM, the same in every layer or one count per layer (`tokens_per_layer`).
    kept_patches: survivors per frame after ViT block `drop_after`; None: the tower ran on everything.
    num_cells: those the connector runs on. ValueError when it runs on cells and they are not given."""
    items = num_frames * shape.vit.patches if kept_patches is None else sum(kept_patches)
    if shape.merge_side:
        if num_cells is None:
            raise ValueError("this connector runs on cells of the grid; pass num_cells")
        items = num_cells
    return VideoCost(
        vit=vit_flops(shape.vit, num_frames, kept_patches, drop_after),
        vit_embed=vit_embed_flops(shape.vit, num_frames),
        connector=shape.connector * items,
        pruner=pruner_flops,
        llm=llm_prefill_flops(shape.llm, llm_tokens, formula),
    )
