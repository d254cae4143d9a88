"""LLaVA-OneVision on stock transformers classes: SigLIP tower, per-patch projector, bilinear pooling, Qwen2; and
LLaVA-Video, the same with the layout that `llava_layout.py` describes, where the model's config asks for it.

Groups are cells of the pooled grid. Bilinear resizing of a side of n patches to ceil(n / 2) cells reads at most two
patches per cell and direction; for odd n neighbouring cells in the middle share a patch (27 -> 14: patch 13 belongs to
cells 6 and 7), so groups overlap and a patch lives as long as any kept cell needs it. Averaged groups are disjoint, and
for odd n the last row and column of patches belong to none: they serve the others as context until a stage drops.

Shape suffixes beside those of `stts.tokens`: W = 4 patches per cell.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from stts.data.video.stream import StreamedPixels
from stts.metrics.cost import LlmShape, VitShape, VlmShape, mlp_flops
from stts.metrics.memory import BlockShape, Widths
from stts.models.families.base import Part, TinySizes, as_block, embeds_of, layer_sizes, run_device
from stts.models.families.llava_layout import STOCK, VideoLayout, lay_out
from stts.models.families.visual import Block, Connected, Placed, TowerInput, TowerOutput, Visual, check_placeholders
from stts.pruners.base import HostInfo
from stts.tokens import Grid


@functools.cache
def pooling_cells(side: int, layout: VideoLayout = STOCK) -> tuple[Tensor, Tensor]:
    """Patches and weights of every pooled cell of a `side` x `side` patch grid: int64 (P, W) with -1, fp32 (P, W).

    Read off the operator itself (what it makes of unit impulses), so it holds for any side."""
    impulses = torch.eye(side * side).view(side * side, 1, side, side)
    weight_PN = layout.resize(impulses).flatten(1).T
    weight_PW, patch_PW = weight_PN.sort(dim=1, descending=True, stable=True)
    weight_PW, patch_PW = weight_PW[:, :4], patch_PW[:, :4]
    order_PW = torch.where(weight_PW > 0, patch_PW, side * side).argsort(dim=1)  # patches of a cell in reading order
    weight_PW, patch_PW = weight_PW.gather(1, order_PW), patch_PW.gather(1, order_PW)
    return torch.where(weight_PW > 0, patch_PW, -1), weight_PW


def _side(config: Any) -> int:
    """Patches per side of a frame."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def _num_taps(config: Any) -> int:
    """Blocks whose outputs the projector reads, side by side."""
    layers = config.vision_feature_layer
    return 1 if isinstance(layers, int) else len(layers)


class LlavaFacts:
    """What is known of the family without a model; the members are described in `Adapter`."""

    marks_per_frame: ClassVar[int] = 0
    token_ids: ClassVar[Mapping[str, str]] = {"image_token_index": "<image>", "video_token_index": "<video>"}
    media_text: ClassVar[tuple[str, str]] = ("<video>", "<image>")
    unused: ClassVar[tuple[str, ...]] = (".vision_tower.post_layernorm.", ".vision_tower.head.")

    @classmethod
    def vlm_shape(cls, config: Any) -> VlmShape:
        llm, vit = LlmShape.from_config(config.text_config), VitShape.from_config(config.vision_config)
        return VlmShape(llm, vit, mlp_flops((vit.width * _num_taps(config), llm.width, llm.width), 1))

    @classmethod
    def block_shapes(cls, config: Any) -> tuple[BlockShape, BlockShape]:
        text = config.text_config
        norms_heads = text.model_type.startswith("qwen3")
        return BlockShape.of_vit(config.vision_config), BlockShape.of_llm(text, norms_heads=norms_heads)

    @classmethod
    def connector_bytes(cls, config: Any, widths: Widths) -> tuple[int, int]:
        inputs = _num_taps(config) * config.vision_config.hidden_size
        return widths.compute * (inputs + 2 * config.text_config.hidden_size), 1

    @classmethod
    def plan_grid(
        cls, config: Any, num_frames: int, frame_size: tuple[int, int], limits: Mapping[str, int] | None
    ) -> Grid:
        return VideoLayout.of(config).grid(num_frames, _side(config))

    @classmethod
    def frames_of(cls, inputs: Mapping[str, Any], video_processor: Any) -> Tensor:
        frames: Tensor = inputs["pixel_values_videos"][0]
        return frames

    @classmethod
    def part_of(cls, name: str) -> Part:
        if "multi_modal_projector" in name or "image_newline" in name:
            return "connector"
        return "vit" if ".vision_tower." in name else "llm"

    @classmethod
    def prepare_processor(cls, processor: ProcessorMixin, config: Any) -> None:
        lay_out(processor, VideoLayout.of(config))

    @classmethod
    def tiny_config(cls, config: Any, sizes: TinySizes) -> None:
        vision = config.vision_config
        side = sizes.side * vision.patch_size
        vision.hidden_size, vision.intermediate_size, vision.image_size = sizes.width, sizes.mlp, side
        vision.num_attention_heads = sizes.heads
        config.image_grid_pinpoints = [[h * side, w * side] for h in (1, 2) for w in (1, 2)]

    @classmethod
    def tiny_processor(cls, config: Any, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        size = dict.fromkeys(("height", "width"), config.vision_config.image_size)
        half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        pinpoints = config.image_grid_pinpoints
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints, **half),
            tokenizer=tokenizer,
            video_processor=LlavaOnevisionVideoProcessor(size=size, do_sample_frames=False, **half),
            num_image_tokens=_side(config) ** 2,
            vision_feature_select_strategy="full",
        )


class LlavaOnevision(LlavaFacts):
    """Adapter of `LlavaOnevisionForConditionalGeneration`, with videos laid out as its config says.

    Differs from the stock forward pass:
    - image tiles and frames go through the tower in one call, and videos may differ in their number of frames
    - blocks run one by one, so that a stage may drop patches between them
    - the projector runs on the patches left, and pooling gathers those of the cells kept
    - a video's newlines and pooling follow `VideoLayout`, which can be LLaVA-Video's
    """

    pools_keys = False
    visual_args = ("pixel_values", "image_sizes", "pixel_values_videos", "image_sizes_videos", "batch_num_images")

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        if config.vision_feature_select_strategy != "full":
            raise ValueError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} is not supported: a SigLIP "
                "tower has no class token to drop; set it to 'full'"
            )
        self.model = model
        self.config = config
        self.layout = VideoLayout.of(config)
        self.inner: Any = model.model
        self.language_model: nn.Module = self.inner.language_model
        self.configs = (config.vision_config, config.text_config)
        self.side = _side(config)

    @property
    def host(self) -> HostInfo:
        vision, text = self.config.vision_config, self.config.text_config
        return HostInfo(
            family="llava_onevision",
            vit_width=vision.hidden_size,
            vit_mlp=vision.intermediate_size,
            vit_heads=vision.num_attention_heads,
            vit_depth=vision.num_hidden_layers,
            lowest_tap=min(self.taps()),
            llm_width=text.hidden_size,
            llm_layers=text.num_hidden_layers,
            **layer_sizes(text),
            patches_per_group=4,
            patches_per_frame=self.side**2,
            newline_per_row=self.layout.newline == "grid",
        )

    def take_visual(self, kwargs: dict[str, Any]) -> Visual | None:
        images, sizes, videos, _, counts = (kwargs.pop(name, None) for name in self.visual_args)
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):  # filled in from the config upstream
            value = kwargs.pop(name, None)
            if value is not None and value != getattr(self.config, name):
                raise ValueError(f"{name}={value!r} as a call argument is not supported while pruning; set the config")
        kwargs.pop("vision_aspect_ratio", None)
        if kwargs.get("mm_encoder_outputs") is not None:
            raise ValueError("mm_encoder_outputs skip the tower, so nothing could be pruned; pass pixel values")
        if images is None and videos is None:
            return None
        if isinstance(videos, StreamedPixels):
            if images is not None:
                raise ValueError("streamed videos and images came in one call; put them into different batches")
            return self._visual(cast(Tensor, videos), videos.lengths, {"sizes": None, "tiles": []})
        parts: list[Tensor] = []
        tiles: list[int] = []
        if images is not None:
            alone = [True] * len(sizes) if counts is None else [n == 1 for n in counts for _ in range(int(n))]
            tiles = [self._num_tiles(size) if tiled else 1 for size, tiled in zip(sizes, alone, strict=True)]
            parts += [x[:n] for x, n in zip(images, tiles, strict=True)] if images.dim() == 5 else [images]
        clips = [] if videos is None else list(videos)
        # Videos of one length came as one tensor: frames in a row are a view of it, and pixels are large.
        parts += [videos.flatten(0, 1)] if isinstance(videos, Tensor) else clips
        pixels = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._visual(pixels, [len(clip) for clip in clips], {"sizes": sizes, "tiles": tiles})

    def _visual(self, pixels: Tensor, clips: Sequence[int], image_args: dict[str, Any]) -> Visual:
        frames = (self.side**2,) * len(pixels)
        return Visual(pixels, frames, len(pixels) - sum(clips), tuple(self.grid(clip) for clip in clips), image_args)

    def images_as_videos(self, visual: Visual) -> Visual:
        tiles = visual.image_args["tiles"]
        if any(count > 1 for count in tiles):
            raise ValueError(
                f"images=True is not supported for an image in {max(tiles)} tiles: LLaVA-OneVision cuts their padding "
                "off, may scale them down, and ends every row with a newline, so its tokens are no plain grid; a row "
                "with several images has one tile for each, and those are pruned"
            )
        return visual.with_images([Grid(1, self.side, self.side)] * len(tiles))

    def with_blank(self, visual: Visual | None) -> Visual:
        size, channels = self.config.vision_config.image_size, self.config.vision_config.num_channels
        blank = torch.zeros(1, channels, size, size, device=run_device(self.model))
        if visual is None:
            return self._visual(blank, [1], {"sizes": None, "tiles": []})
        return self._visual(torch.cat([visual.pixels, blank.to(visual.pixels)]), [1], visual.image_args)

    def runs_stock(self, visual: Visual) -> bool:
        videos = visual.grids[visual.num_images :]
        return (self.layout.is_stock or not videos) and len({grid.t for grid in videos}) <= 1

    def _num_tiles(self, size: Any) -> int:
        pinpoints, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        return int(image_size_to_num_patches(size, pinpoints, side))

    def grid(self, num_frames: int) -> Grid:
        return self.layout.grid(num_frames, self.side)

    def groups(self, visual: Visual, video: int) -> tuple[Tensor, Tensor]:
        if video < visual.num_images:  # not pooled
            rows_G1 = torch.arange(self.side**2, device=visual.pixels.device)[:, None]
            return rows_G1, torch.ones_like(rows_G1, dtype=torch.float32)
        patch_PW, weight_PW = (x.to(visual.pixels.device) for x in pooling_cells(self.side, self.layout))
        frames = visual.grids[video].t
        offset_T = torch.arange(frames, device=patch_PW.device)[:, None, None] * self.side**2
        rows_GW = torch.where(patch_PW >= 0, patch_PW + offset_T, -1).flatten(0, 1)
        return rows_GW, weight_PW.repeat(frames, 1)

    def part(self, visual: Visual, video: int | None, first: int = 0, last: int = 0) -> Visual:
        if video is None:
            return self._visual(visual.pixels[: visual.num_tiles], [], visual.image_args)
        start, stop = visual.span(video, first, last)
        if video < visual.num_images:
            return self._visual(visual.pixels[start:stop], [], {"sizes": None, "tiles": [1]}).with_images(
                [visual.grids[video]]
            )
        return self._visual(visual.pixels[start:stop], [last - first], {"sizes": None, "tiles": []})

    def embed(self, visual: Visual) -> TowerInput:
        x_FND: Tensor = self.inner.vision_tower.embeddings(visual.pixels)
        return TowerInput(x_FND.flatten(0, 1), visual.frames, batched=True)

    def blocks(self) -> Sequence[Block]:
        return [as_block(layer) for layer in self.inner.vision_tower.encoder.layers]

    def taps(self) -> tuple[int, ...]:
        depth = self.config.vision_config.num_hidden_layers
        layers = self.config.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        # hidden_states[0] is the embedding, so hidden_states[i] is the output of block i - 1
        return tuple((layer if layer >= 0 else depth + 1 + layer) - 1 for layer in layers)

    def timed_modules(self) -> tuple[nn.Module, nn.Module]:
        return self.inner.vision_tower.embeddings, self.inner.multi_modal_projector

    def tower_attention(self, block: int | None = None) -> nn.Module:
        number = max(self.taps()) if block is None else block
        attention: nn.Module = self.inner.vision_tower.encoder.layers[number].self_attn
        return attention

    def connect(self, tower: TowerOutput, visual: Visual, cells: Sequence[Tensor | None]) -> Connected:
        y_Sd = self.inner.multi_modal_projector(torch.cat(tower.taps, dim=-1))
        num_patches = self.side**2
        split = visual.num_tiles * num_patches
        images: tuple[Tensor, ...] = ()
        if visual.num_tiles:
            tiles = y_Sd[:split].unflatten(0, (visual.num_tiles, num_patches)).split(visual.image_args["tiles"])
            newline = y_Sd.new_zeros(y_Sd.shape[1])  # `finish` writes it
            packed, _ = self.inner.pack_image_features(tiles, visual.image_args["sizes"], image_newline=newline)
            images = tuple(packed)
        if not visual.grids:
            return Connected(images, ())
        if tower.row_S is None:
            images_FNd, frames_FNd = y_Sd[split:].unflatten(0, (-1, num_patches)).tensor_split([visual.num_images])
            chunks = list(images_FNd)
            if len(frames_FNd):
                counts = [grid.t for grid in visual.grids[visual.num_images :]]
                chunks += [clip.flatten(0, 1) for clip in self._pool(frames_FNd).split(counts)]
            return Connected(
                images, tuple(x if cell is None else x[cell] for x, cell in zip(chunks, cells, strict=True))
            )
        return Connected(images, self._pool_survivors(y_Sd, tower.row_S, visual, cells))

    def _pool(self, y_FNd: Tensor) -> Tensor:
        if self.layout.pool == "bilinear":
            stock: Tensor = self.inner.apply_pooling(y_FNd)
            return stock
        y_FdHW = y_FNd.transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.layout.resize(y_FdHW).flatten(2).transpose(1, 2)

    def _pool_survivors(
        self, y_Sd: Tensor, row_S: Tensor, visual: Visual, cells: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Pooling of the kept cells, as a gather of at most four surviving patches each."""
        patch_PW, weight_PW = (x.to(y_Sd.device) for x in pooling_cells(self.side, self.layout))
        num_patches, num_cells = self.side**2, len(patch_PW)
        total = (visual.num_tiles + sum([grid.t for grid in visual.grids])) * num_patches
        place = torch.zeros(total, dtype=torch.long, device=y_Sd.device)
        place[row_S] = torch.arange(len(row_S), device=y_Sd.device)
        first_frame, cells_of_videos = visual.num_tiles, []
        for frames, cell_K in zip([grid.t for grid in visual.grids], cells, strict=True):
            cell_K = torch.arange(frames * num_cells, device=y_Sd.device) if cell_K is None else cell_K
            cells_of_videos.append(cell_K + first_frame * num_cells)
            first_frame += frames
        cell = torch.cat(cells_of_videos)
        patch_KW = patch_PW[cell % num_cells]
        flat_KW = (cell // num_cells)[:, None] * num_patches + patch_KW.clamp_min(0)
        weight_KW = weight_PW[cell % num_cells].to(y_Sd.dtype)
        x_Kd = (y_Sd[place[flat_KW]] * weight_KW[..., None]).sum(1)
        return x_Kd.split([len(part) for part in cells_of_videos])

    def merge(
        self, kwargs: dict[str, Any], connected: Connected, visual: Visual, kept: Sequence[Tensor | None]
    ) -> tuple[dict[str, Any], Placed]:
        x_BLd = embeds_of(kwargs, self.inner)
        masks = self.inner.get_placeholder_mask(kwargs.get("input_ids"), inputs_embeds=x_BLd)
        image_BL, video_BL = (mask.squeeze(-1) for mask in masks)
        newline = x_BLd.new_zeros(1, x_BLd.shape[-1])  # `finish` writes it
        nothing = torch.zeros(0, dtype=torch.long, device=x_BLd.device)
        rows, flags, cells, numbers = [newline[:0]], [video_BL.new_zeros(0)], [nothing], [nothing]
        for video, (x_Kd, index_K, grid) in enumerate(zip(connected.videos, kept, visual.grids, strict=True)):
            index_K = index_K if index_K is None else index_K.sort().values
            layout = STOCK if video < visual.num_images else self.layout  # one newline behind an image
            cell_P, keep_P = layout.places(grid, index_K, connected.newlines, x_BLd.device)
            row_P = cell_P  # -1, no cell, is the last row below: the newline
            if index_K is not None:
                number_G = torch.full((grid.num_groups + 1,), -1, device=x_BLd.device)
                number_G[index_K] = torch.arange(len(index_K), device=x_BLd.device)
                row_P = number_G[cell_P]
            rows.append(torch.cat([x_Kd, newline])[row_P[keep_P]])
            flags.append(keep_P)
            cells.append(cell_P)
            numbers.append(torch.where(cell_P >= 0, video, -1))
        images, first = [newline[:0], *connected.images], 1 + visual.num_images
        for kind, mask_BL, parts in (
            ("image", image_BL, [*images, *flags[:first]]), ("video", video_BL, flags[first:])
        ):  # fmt: skip
            check_placeholders(kind, int(mask_BL.sum()), sum(map(len, parts)))

        def scatter(base_BL: Tensor, parts: list[Tensor]) -> Tensor:
            base_BL = base_BL.masked_scatter(video_BL, torch.cat([parts[0], *parts[first:]]))
            return base_BL.masked_scatter(image_BL, torch.cat(parts[:first])) if first > 1 else base_BL

        keep_BL = scatter(torch.ones_like(video_BL), flags)
        masks = image_BL & keep_BL, video_BL & keep_BL
        place_V = torch.cat([mask_BL.flatten().nonzero().squeeze(1) for mask_BL in masks])
        if any(index_K is not None for index_K in kept):
            x_BLd = x_BLd.masked_fill(~keep_BL[..., None], 0)
        # only what stays is written: an hour of video has a long prompt and few survivors
        x_Nd = x_BLd.flatten(0, 1).index_copy(0, place_V, torch.cat([*images, *rows]).to(x_BLd))
        none_BL = torch.full_like(video_BL, -1, dtype=torch.long)
        cell_BL = scatter(none_BL, cells)
        late_BL = (video_BL | image_BL if first > 1 else video_BL) & (cell_BL < 0)
        if visual.num_tiles:
            late_BL = late_BL.masked_scatter(image_BL, self._image_newlines(visual, x_BLd.device))
        return {"input_ids": None, "inputs_embeds": x_Nd.view_as(x_BLd)}, Placed(
            keep_BL, scatter(none_BL, numbers), cell_BL, late_BL=late_BL
        )

    def _image_newlines(self, visual: Visual, device: torch.device) -> Tensor:
        """bool, which tokens of all images are newlines: the stock code lays out zeros with a newline of one."""
        zeros = torch.zeros(visual.num_tiles, self.side**2, 1, device=device).split(visual.image_args["tiles"])
        packed, _ = self.inner.pack_image_features(
            zeros, visual.image_args["sizes"], image_newline=torch.ones(1, device=device)
        )
        return torch.cat(packed).squeeze(1) == 1

    def finish(self, x_RMd: Tensor, late_RM: Tensor) -> Tensor:
        return torch.where(late_RM[..., None], self.inner.image_newline.to(x_RMd), x_RMd)
