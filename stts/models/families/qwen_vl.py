"""What the Qwen-VL families share: flat patches of any resolution, merge units as groups, mrope positions.

A frame is a temporal patch (two video frames); an image is a frame of its own. The processor lays patches out
unit by unit, so a group is a run of `spatial_merge_size` ** 2 rows, also where a tower permutes units into windows.
Nothing but video placeholders belongs to a group: timestamps and vision start and end tokens are text and stay.

Shape suffixes beside those of `stts.tokens`: Q = entries of the table that a patch mixes, W = patches per unit, B =
rows, L = prompt length, V = visual tokens left in the prompt, Y = merge units of all frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from stts.metrics.cost import LlmShape, VitShape, VlmShape, mlp_flops
from stts.metrics.memory import BlockShape, Widths
from stts.models.families.base import Part, TinySizes, embeds_of, layer_sizes, run_device
from stts.models.families.visual import (
    Block,
    Connected,
    Placed,
    TowerInput,
    TowerOutput,
    Visual,
    flat_features,
    place_groups,
)
from stts.packing.segments import Segments
from stts.pruners.base import HostInfo
from stts.tokens import Grid

_TINY_UNITS = 3  # merge units per side of a square frame of a tiny model
Size = Sequence[int]
"""Temporal patches, rows and columns of patches: one line of `image_grid_thw` or `video_grid_thw`."""


def _as_block(layer: nn.Module) -> Block:
    def block(x_SD: Tensor, segments: Segments, cos: Tensor, sin: Tensor) -> Tensor:
        # one chunk, known on the host, so that the stock loop runs once; our attention sees the segments
        cu_seqlens = torch.tensor([0, len(x_SD)], dtype=torch.int32)
        y_SD: Tensor = layer(x_SD, cu_seqlens=cu_seqlens, position_embeddings=(cos, sin), segments=segments)
        return y_SD

    return block


class QwenFacts:
    """What is known of the family without a model; the members are described in `Adapter`."""

    family: ClassVar[str]
    marks_per_frame: ClassVar[int] = 0
    processor_classes: ClassVar[tuple[type[Any], type[Any]]]
    """The family's own processor, and its processor of videos."""
    min_frames: ClassVar[int] = 1
    """Frames that the processor's lower limit of pixels is for, in a tiny model: 1, or those of a whole video."""
    norms_heads: ClassVar[bool] = False
    """Whether queries and keys of the LLM have a norm of their own."""
    token_ids: ClassVar[Mapping[str, str]] = {
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
    }
    media_text: ClassVar[tuple[str, str]] = (
        "<|vision_start|><|video_pad|><|vision_end|>",
        "<|vision_start|><|image_pad|><|vision_end|>",
    )
    unused: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def vit_shape(cls, vision: Any) -> VitShape:
        """A tower of plain feed-forward blocks that attend to whole frames."""
        return VitShape(
            width=vision.hidden_size,
            blocks=vision.depth,
            mlp=vision.intermediate_size,
            patches=0,
            patch_size=vision.patch_size,
            channels=vision.in_channels * vision.temporal_patch_size,
        )

    @classmethod
    def num_mergers(cls, vision: Any) -> int:
        return 1

    @classmethod
    def vlm_shape(cls, config: Any) -> VlmShape:
        vision, llm = config.vision_config, LlmShape.from_config(config.text_config)
        side, unit = vision.spatial_merge_size, vision.hidden_size * vision.spatial_merge_size**2
        connector = cls.num_mergers(vision) * mlp_flops((unit, unit, llm.width), 1)
        return VlmShape(llm, cls.vit_shape(vision), connector, side)

    @classmethod
    def block_shapes(cls, config: Any) -> tuple[BlockShape, BlockShape]:
        gated = cls.vit_shape(config.vision_config).gated  # those towers have RMS norms, the others layer norms
        vit = BlockShape.of_vit(config.vision_config, gated=gated, rms=gated)
        return vit, BlockShape.of_llm(config.text_config, norms_heads=cls.norms_heads)

    @classmethod
    def connector_bytes(cls, config: Any, widths: Widths) -> tuple[int, int]:
        vision = config.vision_config
        patches = vision.spatial_merge_size**2
        return cls.num_mergers(vision) * (widths.stream + 3 * widths.compute) * vision.hidden_size * patches, patches

    @classmethod
    def resize(cls, vision: Any, num_frames: int, frame_size: tuple[int, int], low: int, high: int) -> tuple[int, int]:
        """Pixels (height, width) that the processor makes of a frame; `low` and `high` are its limits."""
        raise NotImplementedError

    @classmethod
    def plan_grid(
        cls, config: Any, num_frames: int, frame_size: tuple[int, int], limits: Mapping[str, int] | None
    ) -> Grid:
        if limits is None:
            raise ValueError(
                "the resolution of this family is free and its limits are in the processor, not in the config; set "
                "model.video_size (shortest_edge, longest_edge in pixels)"
            )
        vision = config.vision_config
        factor = vision.patch_size * vision.spatial_merge_size
        height, width = cls.resize(vision, num_frames, frame_size, limits["shortest_edge"], limits["longest_edge"])
        return Grid(-(-num_frames // vision.temporal_patch_size), height // factor, width // factor)

    @classmethod
    def frames_of(cls, inputs: Mapping[str, Any], video_processor: Any) -> Tensor:
        t, h, w = inputs["video_grid_thw"][0].tolist()
        pair, m, p = (getattr(video_processor, f"{name}_size") for name in ("temporal_patch", "merge", "patch"))
        patches = inputs["pixel_values_videos"][: t * h * w].view(t, h // m, w // m, m, m, 3, pair, p, p)
        frames: Tensor = patches.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * pair, 3, h * p, w * p)
        return frames

    @classmethod
    def part_of(cls, name: str) -> Part:
        if ".merger." in name or ".deepstack_merger_list." in name:
            return "connector"
        return "vit" if ".visual." in name else "llm"

    @classmethod
    def prepare_processor(cls, processor: ProcessorMixin, config: Any) -> None:
        """Nothing to do: the stock processor writes what the model reads."""

    @classmethod
    def tiny_config(cls, config: Any, sizes: TinySizes) -> None:
        vision = config.vision_config
        vision.hidden_size = vision.out_hidden_size = sizes.width
        vision.intermediate_size, vision.num_heads = sizes.mlp, sizes.heads

    @classmethod
    def tiny_processor(cls, config: Any, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        vision, (processor_class, video_class) = config.vision_config, cls.processor_classes
        pixels = (_TINY_UNITS * vision.patch_size * vision.spatial_merge_size) ** 2
        common = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "size": {"shortest_edge": pixels * cls.min_frames, "longest_edge": pixels * 64},
        }
        # a limit for the whole video instead of one per frame, as the checkpoints were trained
        videos = video_class(do_sample_frames=False, cap_pixels_per_frame=False, **common)
        processor: ProcessorMixin = processor_class(
            image_processor=Qwen2VLImageProcessor(**common), tokenizer=tokenizer, video_processor=videos
        )
        return processor


class QwenVision(QwenFacts):
    """The common part of the adapters; a family adds its name and what its tower does differently.

    Differs from the stock forward passes:
    - images and videos go through the tower in one call
    - attention inside frames (and windows) is one packed call per block instead of a Python loop over chunks
    - blocks run one by one, so that a stage may drop patches between them, whole merge units at a time
    - mergers run on the units left
    - features are written at the places of survivors; dropped places are zeros until the prompt is shortened
    """

    pools_keys = True
    visual_args: tuple[str, ...] = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.inner: Any = model.model
        self.tower: Any = self.inner.visual
        self.language_model: nn.Module = self.inner.language_model
        self.vision = self.tower.config
        self.configs = (self.vision, self.language_model.config)
        self.side: int = self.vision.spatial_merge_size

    @property
    def host(self) -> HostInfo:
        vision, text = self.configs
        return HostInfo(
            family=self.family,
            vit_width=vision.hidden_size,
            vit_mlp=vision.intermediate_size,
            vit_heads=vision.num_heads,
            vit_depth=vision.depth,
            lowest_tap=min(self.taps()),
            llm_width=text.hidden_size,
            llm_layers=text.num_hidden_layers,
            **layer_sizes(text),
            patches_per_group=self.side**2,
            patches_per_frame=0,  # another number for every resolution
            mrope=True,
        )

    # --- the visual input --------------------------------------------------------------------------------------------

    def take_visual(self, kwargs: dict[str, Any]) -> Visual | None:
        visual_kwargs = {name: kwargs.pop(name, None) for name in self.visual_args}
        if kwargs.get("mm_encoder_outputs"):
            raise ValueError("mm_encoder_outputs skip the tower, so nothing could be pruned; pass pixel values")
        pixels, sizes = [], []
        for values, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            if (visual_kwargs[values] is None) != (visual_kwargs[grid] is None):
                missing, there = (values, grid) if visual_kwargs[values] is None else (grid, values)
                raise ValueError(f"{there} came without {missing}; pass everything the processor returned")
            sizes.append([] if visual_kwargs[grid] is None else visual_kwargs[grid].tolist())
            pixels += [] if visual_kwargs[values] is None else [visual_kwargs[values]]
        if not pixels:
            return None
        images, videos = sizes
        return self._visual(torch.cat(pixels), images, videos, visual_kwargs)

    def _visual(self, pixels: Tensor, images: Sequence[Size], videos: Sequence[Size], given: dict[str, Any]) -> Visual:
        frames = tuple(h * w for t, h, w in (*images, *videos) for _ in range(t))
        if sum(frames) != len(pixels) or any(h % self.side or w % self.side for _, h, w in (*images, *videos)):
            raise ValueError(
                f"image_grid_thw {list(images)} and video_grid_thw {list(videos)} do not fit {len(pixels)} patches in "
                f"units of {self.side} x {self.side}; pass pixels and grids of the same processor call"
            )
        grids = tuple(Grid(t, h // self.side, w // self.side) for t, h, w in videos)
        layout = {"grid_thw": torch.tensor([*images, *videos]), "images": images, "given": given}
        return Visual(pixels, frames, sum(t for t, _, _ in images), grids, layout)

    def images_as_videos(self, visual: Visual) -> Visual:
        images = visual.image_args["images"]
        return visual.with_images([Grid(t, h // self.side, w // self.side) for t, h, w in images])

    def with_blank(self, visual: Visual | None) -> Visual:
        vision = self.vision
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        blank = torch.zeros(self.side**2, width, device=run_device(self.model))
        size = (1, self.side, self.side)
        if visual is None:
            return self._visual(blank, [], [size], {})
        pixels = torch.cat([visual.pixels, blank.to(visual.pixels)])
        return self._visual(pixels, visual.image_args["images"], [size], visual.image_args["given"])

    def runs_stock(self, visual: Visual) -> bool:
        return True

    def grid(self, num_frames: int) -> Grid:
        return Grid(-(-num_frames // self.vision.temporal_patch_size), 1, 1)

    def units(self, visual: Visual) -> Tensor:
        """int64 (U,): number, in the order of `visual.pixels`, of the merge unit at each place of the tower."""
        return torch.arange(len(visual.pixels) // self.side**2, device=visual.pixels.device)

    def groups(self, visual: Visual, video: int) -> tuple[Tensor, Tensor]:
        width = self.side**2
        sizes = [size // width for size in (visual.num_tile_patches, *visual.patches_per_video)]
        place_G = self.units(visual).split(sizes)[1 + video].argsort()  # units of a video stay together
        rows_GW = place_G[:, None] * width + torch.arange(width, device=place_G.device)
        return rows_GW, torch.full(rows_GW.shape, 1 / width, device=rows_GW.device)

    def part(self, visual: Visual, video: int | None, first: int = 0, last: int = 0) -> Visual:
        given = visual.image_args["given"]
        if video is None:
            return self._visual(visual.pixels[: visual.num_tile_patches], visual.image_args["images"], [], given)
        start, stop = visual.span(video, first, last)
        before, inside = sum(visual.frames[:start]), sum(visual.frames[start:stop])
        grid = visual.grids[video]
        size = (last - first, grid.h * self.side, grid.w * self.side)
        return self._visual(visual.pixels[before : before + inside], [], [size], given)

    # --- tower and connector -----------------------------------------------------------------------------------------

    def embed(self, visual: Visual) -> TowerInput:
        x_SD: Tensor = self.tower.patch_embed(visual.pixels)
        position_S2 = get_vision_position_ids(visual.image_args["grid_thw"], self.side).to(x_SD.device)
        return TowerInput(x_SD, visual.frames, aux=self.tower.rotary_pos_emb(x_SD, position_S2))

    def blocks(self) -> Sequence[Block]:
        return [_as_block(layer) for layer in self.tower.blocks]

    def taps(self) -> tuple[int, ...]:
        return (self.vision.depth - 1,)

    def mergers(self) -> Sequence[nn.Module]:
        """One per tap; the last makes the features of the prompt, those before it go to early LLM layers."""
        return [self.tower.merger]

    def timed_modules(self) -> tuple[nn.Module, nn.Module]:
        return self.tower.patch_embed, self.mergers()[-1]

    def tower_attention(self, block: int | None = None) -> nn.Module:
        attention: nn.Module = self.tower.blocks[max(self.taps()) if block is None else block].attn
        return attention

    def connect(self, tower: TowerOutput, visual: Visual, cells: Sequence[Tensor | None]) -> Connected:
        width = self.side**2
        unit_Y, sizes = self.units(visual), [grid.num_groups for grid in visual.grids]
        if tower.row_S is not None:  # whole units live or die
            unit_Y = unit_Y[tower.row_S[::width] // width]
            sizes = [size if cell is None else len(cell) for size, cell in zip(sizes, cells, strict=True)]
            cells = [None] * len(sizes)
        order_Y = unit_Y.argsort()
        tiles = [] if visual.num_images else [t * h * w // width for t, h, w in visual.image_args["images"]]

        def lay_out(merger: nn.Module, x_SD: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            parts = merger(x_SD)[order_Y].split([*tiles, *sizes])
            videos = zip(parts[len(tiles) :], cells, strict=True)
            return parts[: len(tiles)], tuple(x if cell is None else x[cell] for x, cell in videos)

        *early, last = [lay_out(merger, x_SD) for merger, x_SD in zip(self.mergers(), tower.taps, strict=True)]
        return Connected(*last, early=tuple(early))

    # --- the prompt --------------------------------------------------------------------------------------------------

    def merge(
        self, kwargs: dict[str, Any], connected: Connected, visual: Visual, kept: Sequence[Tensor | None]
    ) -> tuple[dict[str, Any], Placed]:
        x_BLd = embeds_of(kwargs, self.inner)
        masks = self.inner.get_placeholder_mask(kwargs.get("input_ids"), inputs_embeds=x_BLd)
        image_BL, video_BL = (mask.squeeze(-1) for mask in masks)
        place_V, placed = place_groups(image_BL, video_BL, connected.images, visual, kept)
        x_Nd = x_BLd.masked_fill(~placed.keep_BL[..., None], 0).flatten(0, 1)
        x_Nd = x_Nd.index_copy(0, place_V, flat_features(x_BLd, connected.images, connected.videos))
        arguments: dict[str, Any] = {"input_ids": None, "inputs_embeds": x_Nd.view_as(x_BLd)}
        if kwargs.get("position_ids") is None:
            arguments["position_ids"] = self._positions(kwargs, x_BLd, visual)
        early = tuple(flat_features(x_BLd, *layer) for layer in connected.early)
        return arguments, replace(placed, early=early, early_V=place_V)

    def finish(self, x_RMd: Tensor, late_RM: Tensor) -> Tensor:
        return x_RMd

    def _positions(self, kwargs: dict[str, Any], x_BLd: Tensor, visual: Visual) -> Tensor:
        """What the stock forward would compute here, from the full prompt; without visual input, plain counting."""
        grid_thw, num_images = visual.image_args["grid_thw"], len(visual.image_args["images"])
        position: Tensor | None = self.inner.compute_3d_position_ids(
            input_ids=kwargs.get("input_ids"),
            inputs_embeds=x_BLd,
            image_grid_thw=grid_thw[:num_images] if num_images else None,
            video_grid_thw=grid_thw[num_images:] if len(visual.grids) > visual.num_images else None,
            attention_mask=kwargs.get("attention_mask"),
            past_key_values=kwargs.get("past_key_values"),
            mm_token_type_ids=kwargs.get("mm_token_type_ids"),
            **self.times(visual),
        )
        return torch.arange(x_BLd.shape[1], device=x_BLd.device)[None] if position is None else position

    def times(self, visual: Visual) -> dict[str, Any]:
        """Arguments of the stock position code that only some families have."""
        return {}


class Qwen3Vision(QwenVision):
    """What Qwen3-VL and Qwen3.5 share beside that: their processor, and a resampled table of positions.

    The prompt shows every temporal patch behind its time; times, starts and ends of patches without survivors stay."""

    marks_per_frame = 10
    norms_heads = True
    processor_classes = (Qwen3VLProcessor, Qwen3VLVideoProcessor)
    min_frames = 8

    @classmethod
    def resize(cls, vision: Any, num_frames: int, frame_size: tuple[int, int], low: int, high: int) -> tuple[int, int]:
        factor, pair = vision.patch_size * vision.spatial_merge_size, vision.temporal_patch_size
        height, width = smart_resize(num_frames, *frame_size, pair, factor, low, high)
        return height, width

    def embed(self, visual: Visual) -> TowerInput:
        given, tower = super().embed(visual), self.tower
        entry_SQ, weight_SQ = get_vision_interpolation_indices_and_weights(
            visual.image_args["grid_thw"].to(given.x_SD.device),
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=self.side,
        )
        table_SD = (tower.pos_embed(entry_SQ) * weight_SQ[..., None]).sum(1)
        return replace(given, x_SD=given.x_SD + table_SD.to(given.x_SD.dtype))
