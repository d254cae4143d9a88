"""The scheme of the STTS release around any of our adapters, in our words: the rival of `benchmarks/gpu.py`.

The same scorer decides at the same blocks (arXiv 2603.18004; `olmo/nn/temporal_image_vit.py` of allenai/molmo2). What
differs is how the tower runs on: the block with the key bias as a batch of whole frames under a dense additive mask;
behind the drop first-fit rows of N slots, laid out in a Python loop that asks the device about every frame, a frame
alone in its row taking its dropped patches back; a dense mask (R, 1, N, N); after each block the row scattered into a
zero tensor of all patches; the connector on all windows, chosen from afterwards. In the LLM both are the same.

Shape suffixes beside those of `stts.tokens`: R = rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from packing import rival_layout
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import stts
from stts.models.families.base import Block, Connected, TowerInput, TowerOutput, Visual
from stts.models.pruning.tower import Decide, Drop, run_tower
from stts.packing.segments import Segments
from stts.pruners.base import Pruner
from stts.tokens import Site


@dataclass(frozen=True, slots=True)
class Rows(Segments):
    """Rows of equal length, with what SDPA takes as its mask."""

    mask: Tensor | None = None
    """bool (R, 1, N, N), or additive (F, 1, 1, N), or None."""


def dense_attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float) -> Tensor:
    """Attention (S, H, E) inside rows of equal length, under their mask."""
    q, k, v = (x.unflatten(0, (rows.num_sequences, -1)).transpose(1, 2) for x in (q, k, v))
    mask = rows.mask
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


def rows_of(num_rows: int, num_slots: int, mask: Tensor | None, device: torch.device) -> Rows:
    boundaries = torch.arange(0, num_rows * num_slots + 1, num_slots, dtype=torch.int32, device=device)
    return Rows(boundaries, num_slots, mask=mask)


def _register(ours: str) -> str:
    """Name of the attention that takes `Rows`, and leaves everything else to the implementation `ours`."""
    stock: Any = ALL_ATTENTION_FUNCTIONS[ours]

    def attention(module: Any, q_BHSE: Tensor, k: Tensor, v: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        rows = kwargs.get("segments", attention_mask)
        if not isinstance(rows, Rows):
            return stock(module, q_BHSE, k, v, attention_mask, **kwargs)
        scale = kwargs.get("scaling") or q_BHSE.shape[-1] ** -0.5
        return dense_attention(*(x[0].transpose(0, 1) for x in (q_BHSE, k, v)), rows, scale)[None], None

    name = f"packed_or_rival_or_{ours}"  # begins as ours do, which says that the module is inside a context
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    return name


def rival_tower(
    given: TowerInput,
    blocks: Sequence[Block],
    taps: Sequence[int],
    site: Site | None = None,
    decide: Decide | None = None,
) -> TowerOutput:
    """`run_tower` as the release does it; taps hold all patches, zeros where they were dropped."""
    if site is None or decide is None or site.layer is None:
        return run_tower(given, blocks, taps, site, decide)
    if len(set(given.frames)) != 1:
        raise ValueError(f"the release's rows need frames of one size, got {sorted(set(given.frames))} patches")
    x_SD, aux, device = given.x_SD, given.aux, given.x_SD.device
    num_frames, num_patches = len(given.frames), given.frames[0]
    rows = rows_of(num_frames, num_patches, None, device)
    drop: Drop | None = None
    place_K = row_K = lengths_F = None  # survivors: slots of the rows, patches
    y = x_SD
    out: dict[int, Tensor] = {}
    for number, block in enumerate(blocks):
        if given.batched and rows.mask is None:
            y = block(y.unflatten(0, (num_frames, num_patches)), None, *aux).flatten(0, 1)
        else:
            y = block(y, rows, *aux)
        x_SD = y if place_K is None else torch.zeros_like(x_SD).index_copy(0, row_K, y[place_K])
        if number == site.layer:
            drop = decide(x_SD)
            if drop is not None and drop.bias_S is not None and site.drop_after != number:
                rows = replace(rows, mask=drop.bias_S.view(num_frames, 1, 1, num_patches))
        if drop is not None and number == site.drop_after:
            keep_FN = drop.keep_S.view(num_frames, num_patches)
            layout = rival_layout(keep_FN)
            num_rows = len(layout.mask_R1NN)
            slot_S = (layout.row_FN * num_patches + layout.slot_FN).flatten()
            present_S = (layout.row_FN >= 0).flatten().nonzero()[:, 0]
            y, *aux_rows = (
                table.new_zeros(num_rows * num_patches, *table.shape[1:]).index_copy(
                    0, slot_S[present_S], table[present_S]
                )
                for table in (x_SD, *aux)
            )
            aux = tuple(aux_rows)
            rows = rows_of(num_rows, num_patches, layout.mask_R1NN, device)
            row_K = drop.keep_S.nonzero()[:, 0]
            place_K, lengths_F = slot_S[row_K], keep_FN.sum(1)
            x_SD = x_SD * drop.keep_S[:, None]
        if number in taps:
            out[number] = x_SD
    return TowerOutput(tuple(out[tap] for tap in taps), None, lengths_F)


class Rival(stts.Pruning):
    """A `Pruning` that runs the release's scheme; settings as there."""

    def __init__(self, model: Any, pruner: str | Pruner, **settings: Any) -> None:
        super().__init__(model, pruner, tower=rival_tower, **settings)
        adapter: Any = self.adapter
        connect = adapter.connect

        def connect_all(tower: TowerOutput, visual: Visual, cells: Sequence[Tensor | None]) -> Connected:
            everything = connect(tower, visual, [None] * len(cells))

            def chosen(videos: Sequence[Tensor]) -> tuple[Tensor, ...]:
                return tuple(x if cell is None else x[cell] for x, cell in zip(videos, cells, strict=True))

            early = tuple((images, chosen(videos)) for images, videos in everything.early)
            return replace(everything, videos=chosen(everything.videos), early=early)

        adapter.connect = connect_all

    def attach(self) -> stts.Pruning:
        super().attach()
        config = self.adapter.configs[0]  # of the tower; `detach` puts back what the model was loaded with
        config._attn_implementation = _register(config._attn_implementation)
        return self
