"""Molmo2 on stock transformers classes: SigLIP2 tower with two feature layers, attention pooling, Qwen3: STTS's home.

Groups are the windows of `video_token_pooling`, 3 x 3 patches side by side (-1 outside the frame). The pooling indexes
a flat list of patches, so survivors only need new numbers. Images (2 x 2 windows, several crops) are never pruned. All
frame and image tokens of a row, markers included, see each other in both directions inside the LLM.

Shape suffixes beside those of `stts.tokens`: C = values of a patch, W = patches per window, B = rows, L = prompt
length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from stts.metrics.cost import LlmShape, VitShape, VlmShape
from stts.metrics.memory import BlockShape, Widths
from stts.models.families.attention import stock_name
from stts.models.families.base import (
    Part,
    TinySizes,
    as_block,
    embeds_of,
    layer_sizes,
    run_device,
    run_inside,
)
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
from stts.pruners.base import HostInfo
from stts.tokens import Grid

POOL = 3
"""Side of a video's pooling windows in every release; the processor holds it (`pooling_size`), the config does not."""


def pooling_windows(height: int, width: int) -> Tensor:
    """Patches of every window of one frame, int64 (G, W), -1 outside; the stock video processor centres the padding."""
    top, left = -height % POOL, -width % POOL
    padding = (left // 2, left - left // 2, top // 2, top - top // 2)
    patches = F.pad(torch.arange(height * width).view(height, width), padding, value=-1)
    return patches.unfold(0, POOL, POOL).unfold(1, POOL, POOL).flatten(2).flatten(0, 1)


def _sides(config: Any) -> tuple[int, int]:
    """Patches of a frame, down and across."""
    height, width = (pixels // config.vision_config.patch_size for pixels in config.vision_config.image_size)
    return height, width


def pooling_flops(config: Any, num_patches: int) -> int:
    """The connector for one group: attention of the mean of its patches over them, and a gated projector."""
    taps = config.hidden_size * len(config.vision_feature_layer)
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    attention = 2 * taps * heads + 4 * num_patches * taps * kv_heads + 4 * num_patches * heads
    attention += 2 * heads * config.hidden_size
    gate_and_up, down = config.hidden_size * 2, config.text_hidden_size
    return int(attention + 2 * config.intermediate_size * (gate_and_up + down))


class Molmo2Facts:
    """What is known of the family without a model; the members are described in `Adapter`."""

    marks_per_frame: ClassVar[int] = 7
    token_ids: ClassVar[Mapping[str, str]] = {
        "image_patch_id": "<im_patch>",
        "image_start_token_id": "<im_start>",
        "image_end_token_id": "<im_end>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "image_low_res_id": "<im_low>",
        "image_col_id": "<im_col>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    media_text: ClassVar[tuple[str, str]] = ("<|video|>", "<|image|>")
    unused: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def vlm_shape(cls, config: Any) -> VlmShape:
        llm, vit = LlmShape.from_config(config.text_config), VitShape.from_config(config.vision_config)
        return VlmShape(llm, vit, pooling_flops(config.adapter_config, POOL**2), POOL)

    @classmethod
    def block_shapes(cls, config: Any) -> tuple[BlockShape, BlockShape]:
        return BlockShape.of_vit(config.vision_config), BlockShape.of_llm(config.text_config, norms_heads=True)

    @classmethod
    def connector_bytes(cls, config: Any, widths: Widths) -> tuple[int, int]:
        adapter, cells, c = config.adapter_config, POOL**2, widths.compute
        taps = adapter.hidden_size * len(adapter.vision_feature_layer)
        heads = adapter.num_attention_heads * adapter.head_dim
        pooled = c * (cells * taps + taps + heads * (2 * cells + 2)) + 4 * adapter.num_attention_heads * cells
        return pooled + c * (adapter.hidden_size + 4 * adapter.intermediate_size), cells

    @classmethod
    def plan_grid(
        cls, config: Any, num_frames: int, frame_size: tuple[int, int], limits: Mapping[str, int] | None
    ) -> Grid:
        height, width = _sides(config)
        return Grid(num_frames, -(-height // POOL), -(-width // POOL))

    @classmethod
    def frames_of(cls, inputs: Mapping[str, Any], video_processor: Any) -> Tensor:
        size, side = video_processor.patch_size, video_processor.size["height"] // video_processor.patch_size
        num_frames = int(inputs["video_grids"][0, 0])
        patches = inputs["pixel_values_videos"][:num_frames].view(-1, side, side, size, size, 3)
        frames: Tensor = patches.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, side * size, side * size)
        return frames

    @classmethod
    def part_of(cls, name: str) -> Part:
        if "multi_modal_projector" in name:
            return "connector"
        return "vit" if ".vision_tower." in name else "llm"

    @classmethod
    def prepare_processor(cls, processor: ProcessorMixin, config: Any) -> None:
        """Nothing to do: the stock processor writes what the model reads."""

    @classmethod
    def tiny_config(cls, config: Any, sizes: TinySizes) -> None:
        text, vision, adapter = config.text_config, config.vision_config, config.adapter_config
        pixels = sizes.side * vision.patch_size
        vision.image_size, vision.num_position_embeddings = [pixels, pixels], sizes.side**2
        for part in (vision, adapter):
            part.hidden_size, part.intermediate_size = sizes.width, sizes.mlp
            part.num_attention_heads = part.num_key_value_heads = sizes.heads
            part.head_dim = sizes.width // sizes.heads
        adapter.text_hidden_size = sizes.width
        # the head has no rows for visual tokens, which come last
        text.additional_vocab_size = len(cls.token_ids) + len(cls.media_text)
        text.vocab_size -= text.additional_vocab_size

    @classmethod
    def tiny_processor(cls, config: Any, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        # imported here: transformers 5.17 lacks them, and other families need this module's name only
        from transformers import Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

        vision = config.vision_config
        common: dict[str, Any] = {"size": dict(zip(("height", "width"), vision.image_size, strict=True))}
        common |= {"patch_size": vision.patch_size, "do_rescale": True, "do_normalize": True}
        images = Molmo2ImageProcessor(max_crops=2, overlap_margins=[1, 1], **common)
        return Molmo2Processor(images, Molmo2VideoProcessor(do_sample_frames=False, **common), tokenizer)


class Molmo2(Molmo2Facts):
    """Adapter of `Molmo2ForConditionalGeneration`.

    Differs from the stock forward pass:
    - blocks run one by one, so that a stage may drop patches between them, and stop at the last one that is read
    - pooling windows index the patches left instead of all, and only those of kept groups are pooled
    - the mask in which visual tokens see each other both ways is made for the shortened, packed row
    """

    pools_keys = True
    visual_args = (
        "pixel_values",
        "image_token_pooling",
        "image_grids",
        "image_num_crops",
        "pixel_values_videos",
        "video_token_pooling",
        "video_grids",
    )

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        kernel = stock_name(config.text_config)
        if "flash" in kernel:
            raise ValueError(
                f"the language model runs {kernel!r}, which silently drops the two-way attention between visual "
                'tokens; reload Molmo2 with attn_implementation={"text_config": "sdpa"}, flash is fine in the tower'
            )
        self.model = model
        self.config = config
        self.inner: Any = model.model
        self.language_model: nn.Module = self.inner.language_model
        self.configs = (config.vision_config, config.text_config)

    @property
    def host(self) -> HostInfo:
        vision, text = self.config.vision_config, self.config.text_config
        return HostInfo(
            family="molmo2",
            vit_width=vision.hidden_size,
            vit_mlp=vision.intermediate_size,
            vit_heads=vision.num_attention_heads,
            vit_depth=vision.num_hidden_layers,
            lowest_tap=min(self.taps()),
            llm_width=text.hidden_size,
            llm_layers=text.num_hidden_layers,
            **layer_sizes(text),
            patches_per_group=POOL**2,
            patches_per_frame=vision.num_position_embeddings,
        )

    def take_visual(self, kwargs: dict[str, Any]) -> Visual | None:
        visual_kwargs = {name: kwargs.pop(name, None) for name in self.visual_args}
        if kwargs.get("mm_encoder_outputs") is not None:
            raise ValueError("mm_encoder_outputs skip the tower, so nothing could be pruned; pass pixel values")
        kinds = [name for name in ("pixel_values", "pixel_values_videos") if visual_kwargs[name] is not None]
        if not kinds:
            return None
        if len(kinds) == 2:
            raise ValueError(
                "images and videos came in one call, but Molmo2 has one placeholder token for both; put samples with "
                "images and samples with videos into different batches"
            )
        names = ("image_token_pooling", "image_grids") if kinds == ["pixel_values"] else self.visual_args[5:]
        if missing := [name for name in names if visual_kwargs[name] is None]:
            raise ValueError(f"{kinds[0]} came without {missing}; pass everything the processor returned")
        pixels_FUC: Tensor = visual_kwargs[kinds[0]].flatten(0, -3)
        windows, grids = (visual_kwargs[name].to(pixels_FUC.device) for name in names)
        if kinds == ["pixel_values"]:  # rows and columns of the small view, then of the crops
            tokens = (grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]).tolist()
            return self._visual(pixels_FUC, windows, tokens, windows[:0], ())
        videos = tuple(Grid(*grid) for grid in grids.tolist())
        frames, groups = sum(grid.t for grid in videos), sum(grid.num_groups for grid in videos)
        if (frames, groups) != (len(pixels_FUC), len(windows)):
            raise ValueError(
                f"video_grids tell of {frames} frames and {groups} windows, but pixel_values_videos has "
                f"{len(pixels_FUC)} frames and video_token_pooling {len(windows)} rows; all must come from one "
                "processor call"
            )
        return self._visual(pixels_FUC, windows[:0], [], windows, videos)

    def _visual(
        self, pixels_FUC: Tensor, image_KW: Tensor, tokens: list[int], video_GW: Tensor, grids: tuple[Grid, ...]
    ) -> Visual:
        """image_KW: windows of all images, counted from their first patch, video_GW: of all videos, from theirs;
        tokens: windows of each image."""
        frames = (pixels_FUC.shape[1],) * len(pixels_FUC)
        layout = {"image_windows": image_KW.long(), "image_tokens": tokens, "video_windows": video_GW.long()}
        return Visual(pixels_FUC, frames, len(frames) - sum(grid.t for grid in grids), grids, layout)

    def images_as_videos(self, visual: Visual) -> Visual:
        if visual.num_tiles:
            raise ValueError(
                "images=True is not supported for Molmo2: the tokens of an image are a small view and a grid of "
                "overlapping crops, no single grid; leave images=True out, images then stay whole"
            )
        return visual

    def with_blank(self, visual: Visual | None) -> Visual:
        vision = self.config.vision_config
        values = vision.num_channels * vision.patch_size**2
        blank = torch.zeros(1, vision.num_position_embeddings, values, device=run_device(self.model))
        windows = pooling_windows(*_sides(self.config)).to(blank.device)
        if visual is None:
            return self._visual(blank, windows[:0], [], windows, (self.grid(1),))
        images, tokens = visual.image_args["image_windows"], visual.image_args["image_tokens"]
        pixels = torch.cat([visual.pixels, blank.to(visual.pixels)])
        return self._visual(pixels, images, tokens, windows, (self.grid(1),))

    def runs_stock(self, visual: Visual) -> bool:
        return True

    def grid(self, num_frames: int) -> Grid:
        return self.plan_grid(self.config, num_frames, (0, 0), None)

    def groups(self, visual: Visual, video: int) -> tuple[Tensor, Tensor]:
        rows_GW = self._windows(visual)[video]
        rows_GW = torch.where(rows_GW >= 0, rows_GW - sum(visual.patches_per_video[:video]), -1)
        inside_GW = rows_GW >= 0
        return rows_GW, inside_GW.float() / inside_GW.sum(1, keepdim=True).clamp_min(1)

    def _windows(self, visual: Visual) -> tuple[Tensor, ...]:
        windows: Tensor = visual.image_args["video_windows"]
        return windows.split([grid.num_groups for grid in visual.grids])

    def part(self, visual: Visual, video: int | None, first: int = 0, last: int = 0) -> Visual:
        images = visual.image_args["image_windows"]
        if video is None:  # images and videos never share a call
            return visual
        start, stop = visual.span(video, first, last)
        grid, windows = visual.grids[video], self._windows(visual)[video]
        windows = windows[first * grid.per_frame : last * grid.per_frame]
        windows = torch.where(windows >= 0, windows - sum(visual.frames[:start]), -1)
        return self._visual(visual.pixels[start:stop], images[:0], [], windows, (Grid(last - first, grid.h, grid.w),))

    def embed(self, visual: Visual) -> TowerInput:
        tower = self.inner.vision_tower

        def embed(pixels_FUC: Tensor) -> Tensor:
            x_FUD: Tensor = tower.patch_embedding(pixels_FUC)
            return x_FUD + tower.positional_embedding.to(x_FUD)

        x_FUD = run_inside(tower, embed, visual.pixels.to(tower.dtype))  # the positions are the tower's own parameter
        return TowerInput(x_FUD.flatten(0, 1), visual.frames, batched=True)

    def blocks(self) -> Sequence[Block]:
        return [as_block(layer) for layer in self.inner.vision_tower.layers]

    def taps(self) -> tuple[int, ...]:
        depth = self.config.vision_config.num_hidden_layers
        return tuple(layer % depth for layer in self.config.adapter_config.vision_feature_layer)

    def timed_modules(self) -> tuple[nn.Module, nn.Module]:
        return self.inner.vision_tower.patch_embedding, self.inner.multi_modal_projector

    def tower_attention(self, block: int | None = None) -> nn.Module:
        attention: nn.Module = self.inner.vision_tower.layers[max(self.taps()) if block is None else block].self_attn
        return attention

    def connect(self, tower: TowerOutput, visual: Visual, cells: Sequence[Tensor | None]) -> Connected:
        videos = [
            window_GW if cell is None else window_GW[cell]
            for window_GW, cell in zip(self._windows(visual), cells, strict=True)
        ]
        images, tokens = visual.image_args["image_windows"], visual.image_args["image_tokens"]
        behind = [torch.where(rows >= 0, rows + visual.num_tile_patches, -1) for rows in videos]
        parts = [rows for rows in (images, *behind) if len(rows)]
        width = max(rows.shape[1] for rows in parts)
        rows_KW = torch.cat([F.pad(rows, (0, width - rows.shape[1]), value=-1) for rows in parts])
        if tower.row_S is not None:  # numbers of survivors instead of patches
            number = torch.full((sum(visual.frames),), -1, device=rows_KW.device)
            number[tower.row_S] = torch.arange(len(tower.row_S), device=rows_KW.device)
            rows_KW = torch.where(rows_KW >= 0, number[rows_KW.clamp_min(0)], -1)
        pooled_Kd = self.inner.multi_modal_projector(torch.cat(tower.taps, dim=-1), rows_KW).last_hidden_state
        features = pooled_Kd.split([*tokens, *map(len, videos)])
        return Connected(features[: len(tokens)], features[len(tokens) :])

    def merge(
        self, kwargs: dict[str, Any], connected: Connected, visual: Visual, kept: Sequence[Tensor | None]
    ) -> tuple[dict[str, Any], Placed]:
        x_BLd, input_ids, patch = embeds_of(kwargs, self.inner), kwargs.get("input_ids"), self.config.image_patch_id
        if input_ids is None:
            patch_d = self.inner.get_input_embeddings()(torch.tensor(patch, device=x_BLd.device))
            place_BL = (x_BLd == patch_d).all(-1)
        else:
            place_BL = input_ids == patch
        none_BL = torch.zeros_like(place_BL)
        image_BL, video_BL = (none_BL, place_BL) if visual.grids else (place_BL, none_BL)
        place_V, placed = place_groups(image_BL, video_BL, connected.images, visual, kept)
        features_Vd = flat_features(x_BLd, connected.images, connected.videos)
        arguments = {
            "input_ids": None,
            "inputs_embeds": x_BLd.flatten(0, 1).index_add(0, place_V, features_Vd).view_as(x_BLd),
            # `Prompt` has the 2-D mask; a ready 4-D one keeps the stock code from making one for the full prompt
            "attention_mask": x_BLd.new_zeros(1, 1, 1, 1),
        }
        kinds_BL = kwargs.get("mm_token_type_ids")
        if kinds_BL is not None and len(kinds_BL) != len(x_BLd):  # beams: once per row
            kinds_BL = kinds_BL[:: len(kinds_BL) // len(x_BLd)]
        return arguments, replace(placed, both_BL=None if kinds_BL is None else kinds_BL.to(x_BLd.device) == 1)

    def finish(self, x_RMd: Tensor, late_RM: Tensor) -> Tensor:
        return x_RMd
