"""InternVL (2.5, 3, 3.5) on stock transformers classes: InternViT with a class token, pixel shuffle, Qwen LLMs.

Groups are the 2 x 2 patches that pixel shuffle makes into one token; one lives or dies whole. A frame of a video is one
tile; an image is as many tiles as its form asks for. The class token of a tile belongs to no group
and always stays; its attention to the patches is what the signals `attn` and `probe` mean here, as VisionZip and
FasterVLM take it from towers that have one.

The stock processor writes one placeholder for frames and tiles and lays them out in one `pixel_values`, in the order of
the prompt, so neither says what is a video. `prepare_processor` makes it add `image_sizes`, int64 (M, 2): tiles of each
image or video in the order of the prompt, and 1 for a video. The stock class has an argument of this name, which it
does not read.

Shape suffixes beside those of `stts.tokens`: W = 4 patches of a group, B = rows, L = prompt
length, V = visual tokens left in the prompt, M = images and videos.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from stts.metrics.cost import LlmShape, VitShape, VlmShape, mlp_flops
from stts.metrics.memory import BlockShape, Widths
from stts.models.families.base import Part, TinySizes, embeds_of, layer_sizes, run_device, run_inside
from stts.models.families.visual import (
    Block,
    Connected,
    Placed,
    TowerInput,
    TowerOutput,
    Visual,
    check_placeholders,
    flat_features,
    place_groups,
)
from stts.pruners.base import HostInfo
from stts.tokens import Grid

Items = Sequence[Sequence[int]]
"""Tiles of each image or video in the order of the prompt, and 1 for a video: the rows of `image_sizes`."""


def _side(config: Any) -> int:
    """Patches per side of a tile, which is square."""
    vision = config.vision_config
    (height, width), (down, across) = vision.image_size, vision.patch_size
    if height // down != width // across or config.downsample_ratio != 0.5 or height // down % 2:
        raise ValueError(
            f"image_size={vision.image_size}, patch_size={vision.patch_size} and downsample_ratio="
            f"{config.downsample_ratio} in the model's config; expected square tiles with an even number of patches a "
            "side, 2 x 2 of which make a token (0.5), as in every published InternVL"
        )
    return int(height // down)


def shuffled_patches(side: int) -> Tensor:
    """int64 (P, W): the patches, in reading order, whose features pixel shuffle puts side by side in each token."""
    return torch.arange(side**2).view(side // 2, 2, side // 2, 2).transpose(1, 2).reshape(-1, 4)


def _norms_heads(config: Any) -> bool:
    """Whether queries and keys of the LLM have a norm of their own."""
    return str(config.text_config.model_type).startswith("qwen3")


class InternVLFacts:
    """What is known of the family without a model; the members are described in `Adapter`."""

    marks_per_frame: ClassVar[int] = 8
    token_ids: ClassVar[Mapping[str, str]] = {
        "image_token_id": "<IMG_CONTEXT>",
        "start_image_token_id": "<img>",
        "end_image_token_id": "</img>",
    }
    media_text: ClassVar[tuple[str, str]] = ("<video>", "<IMG_CONTEXT>")
    unused: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def vlm_shape(cls, config: Any) -> VlmShape:
        vision, llm = config.vision_config, LlmShape.from_config(config.text_config)
        vit = VitShape(
            width=vision.hidden_size,
            blocks=vision.num_hidden_layers,
            mlp=vision.intermediate_size,
            patches=_side(config) ** 2,
            patch_size=vision.patch_size[0],
            channels=vision.num_channels,
            class_tokens=1,
        )
        return VlmShape(llm, vit, mlp_flops((4 * vit.width, llm.width, llm.width), 1), merge_side=2)

    @classmethod
    def block_shapes(cls, config: Any) -> tuple[BlockShape, BlockShape]:
        vision = config.vision_config
        vit = BlockShape.of_vit(vision, rms=vision.norm_type == "rms_norm", norms_heads=vision.use_qk_norm)
        return vit, BlockShape.of_llm(config.text_config, norms_heads=_norms_heads(config))

    @classmethod
    def connector_bytes(cls, config: Any, widths: Widths) -> tuple[int, int]:
        shuffled, width = 4 * config.vision_config.hidden_size, config.text_config.hidden_size
        return (widths.stream + widths.compute) * shuffled + 2 * widths.compute * width, 4

    @classmethod
    def plan_grid(
        cls, config: Any, num_frames: int, frame_size: tuple[int, int], limits: Mapping[str, int] | None
    ) -> Grid:
        return Grid(num_frames, _side(config) // 2, _side(config) // 2)

    @classmethod
    def frames_of(cls, inputs: Mapping[str, Any], video_processor: Any) -> Tensor:
        start = 0
        for tiles, is_video in inputs["image_sizes"].tolist():
            if is_video:
                frames: Tensor = inputs["pixel_values"][start : start + tiles]
                return frames
            start += tiles
        raise ValueError("image_sizes tells of no video in these inputs")

    @classmethod
    def part_of(cls, name: str) -> Part:
        if "multi_modal_projector" in name:
            return "connector"
        return "vit" if ".vision_tower." in name else "llm"

    @classmethod
    def prepare_processor(cls, processor: ProcessorMixin, config: Any) -> None:
        # on the instance, where they hide stock methods of these names; a list that the call fills while it writes text
        own = processor.__dict__
        own["_items"] = []
        own["replace_image_token"] = functools.partial(_replace, processor, "replace_image_token")
        own["replace_video_token"] = functools.partial(_replace, processor, "replace_video_token")
        own["get_text_with_replacements"] = functools.partial(_write_items, processor)

    @classmethod
    def tiny_config(cls, config: Any, sizes: TinySizes) -> None:
        vision, side = config.vision_config, sizes.side + sizes.side % 2
        vision.image_size = [side * patch for patch in vision.patch_size]
        vision.hidden_size, vision.intermediate_size, vision.num_attention_heads = sizes.width, sizes.mlp, sizes.heads
        config.image_seq_length = side**2 // 4

    @classmethod
    def tiny_processor(cls, config: Any, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        size = dict(zip(("height", "width"), config.vision_config.image_size, strict=True))
        tokenizer._set_model_specific_special_tokens(
            {
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            }
        )
        return InternVLProcessor(
            image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=4),
            tokenizer=tokenizer,
            video_processor=InternVLVideoProcessor(size=size, do_sample_frames=False),
            image_seq_length=config.image_seq_length,
        )


def _replace(processor: ProcessorMixin, name: str, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> str:
    """The stock method of this name; the list of the call goes among its outputs."""
    text: str = getattr(type(processor), name)(processor, inputs, *args, **kwargs)
    inputs["image_sizes"] = processor.__dict__["_items"]
    return text


def _write_items(processor: ProcessorMixin, *args: Any, **kwargs: Any) -> tuple[list[str], list[dict[str, Any]]]:
    """The stock method; what it replaces, in the order of the prompt, goes into the list of the call."""
    texts, offsets = type(processor).get_text_with_replacements(processor, *args, **kwargs)
    token, length = processor.image_token, processor.image_seq_length
    processor.__dict__["_items"][:] = [
        [one["replacement"].count(token) // length, int(one["type"] == "video")] for row in offsets for one in row
    ]
    processor.__dict__["_items"] = []  # the next call has its own
    return texts, offsets


class _Masked:
    """A tower layer whose attention gets a mask, which the stock layer has no argument for; all else is the layer's."""

    forward = None  # the stock wrapper that checkpoints a layer asks its type for this, and leaves other types alone

    def __init__(self, layer: nn.Module, mask: Any) -> None:
        self._layer, self._mask = layer, mask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)

    def attention(self, x_1SD: Tensor) -> Any:
        attention: Any = self._layer.attention
        return attention(x_1SD, attention_mask=self._mask)


def _as_block(layer: Any) -> Block:
    def block(x: Tensor, mask: Any) -> Tensor:
        if mask is None:
            y_FND: Tensor = layer(x)
            return y_FND

        def forward(x_1SD: Tensor) -> Tensor:
            y_1SD: Tensor = type(layer).forward(_Masked(layer, mask), x_1SD)
            return y_1SD

        def recomputed(x_1SD: Tensor) -> Tensor:
            y_1SD: Tensor = layer._gradient_checkpointing_func(forward, x_1SD)  # the mask is there again, in `forward`
            return y_1SD

        return run_inside(layer, recomputed if layer.gradient_checkpointing and layer.training else forward, x[None])[0]

    return block


class InternVL(InternVLFacts):
    """Adapter of `InternVLForConditionalGeneration`.

    Differs from the stock forward pass:
    - image tiles go through the tower in front of the frames of all videos, and features back to their places
    - blocks run one by one, so that a stage may drop patches between them; the class tokens stay
    - pixel shuffle gathers the four patches of the groups left, and the projector runs on those
    """

    pools_keys = False
    visual_args = ("pixel_values", "image_sizes")

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        for name, expected in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "default")):
            if getattr(config, name) != expected:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} is not supported; expected {expected!r}, the output of the last "
                    "block without its class token, as in every published InternVL"
                )
        self.model = model
        self.config = config
        self.inner: Any = model.model
        self.language_model: nn.Module = self.inner.language_model
        self.configs = (config.vision_config, config.text_config)
        self.side = _side(config)

    @property
    def host(self) -> HostInfo:
        vision, text = self.config.vision_config, self.config.text_config
        return HostInfo(
            family="internvl",
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
            class_token=True,
        )

    # --- the visual input --------------------------------------------------------------------------------------------

    def take_visual(self, kwargs: dict[str, Any]) -> Visual | None:
        pixels_FCHW, sizes = (kwargs.pop(name, None) for name in self.visual_args)
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            value = kwargs.pop(name, None)
            if value is not None and value != getattr(self.config, name):
                raise ValueError(f"{name}={value!r} in the call is not supported; set it in the model's config")
        if kwargs.get("mm_encoder_outputs"):
            raise ValueError("mm_encoder_outputs skip the tower, so nothing could be pruned; pass pixel values")
        if pixels_FCHW is None:
            return None
        if sizes is None:
            raise ValueError(
                "pixel_values came without image_sizes, so frames of videos cannot be told from tiles of images; load "
                "the processor with `load_vlm`, or call `InternVL.prepare_processor(processor, model.config)` of "
                "stts.models.families.internvl once: it then returns image_sizes"
            )
        items: Items = sizes.tolist()
        if sum(tiles for tiles, _ in items) != len(pixels_FCHW):
            raise ValueError(
                f"image_sizes tells of {sum(tiles for tiles, _ in items)} tiles and frames, pixel_values has "
                f"{len(pixels_FCHW)}; both must come from one processor call"
            )
        if len({is_video for _, is_video in items}) > 1:  # images first
            kinds_F = torch.tensor([is_video for tiles, is_video in items for _ in range(tiles)])
            pixels_FCHW = pixels_FCHW[kinds_F.argsort(stable=True).to(pixels_FCHW.device)]
        return self._visual(pixels_FCHW, [tiles for tiles, is_video in items if is_video], items)

    def _visual(self, pixels_FCHW: Tensor, clips: Sequence[int], items: Items) -> Visual:
        frames, layout = (1 + self.side**2,) * len(pixels_FCHW), {"items": items}
        grids = tuple(self.grid(clip) for clip in clips)
        return Visual(pixels_FCHW, frames, len(frames) - sum(clips), grids, layout, class_tokens=1)

    def images_as_videos(self, visual: Visual) -> Visual:
        """Each tile is a video of its own: tiles of an image are views of one moment, not its frames."""
        return visual.with_images([self.grid(1)] * visual.num_tiles)

    def with_blank(self, visual: Visual | None) -> Visual:
        vision = self.config.vision_config
        blank = torch.zeros(1, vision.num_channels, *vision.image_size, device=run_device(self.model))
        if visual is None:
            return self._visual(blank, [1], [])
        return self._visual(torch.cat([visual.pixels, blank.to(visual.pixels)]), [1], visual.image_args["items"])

    def runs_stock(self, visual: Visual) -> bool:
        return True

    def grid(self, num_frames: int) -> Grid:
        return self.plan_grid(self.config, num_frames, (0, 0), None)

    def groups(self, visual: Visual, video: int) -> tuple[Tensor, Tensor]:
        rows_GW = self._rows(visual.grids[video].t, visual.pixels.device)
        return rows_GW, torch.full(rows_GW.shape, 0.25, device=rows_GW.device)

    def _rows(self, num_frames: int, device: torch.device) -> Tensor:
        """int64 (G, W): rows of the patches of every group of so many frames, each with its class token in front."""
        first_F = torch.arange(num_frames, device=device) * (1 + self.side**2) + 1
        return (first_F[:, None, None] + shuffled_patches(self.side).to(device)).flatten(0, 1)

    def part(self, visual: Visual, video: int | None, first: int = 0, last: int = 0) -> Visual:
        items = visual.image_args["items"]
        if video is None:
            return self._visual(visual.pixels[: visual.num_tiles], [], items)
        start, stop = visual.span(video, first, last)
        return self._visual(visual.pixels[start:stop], [last - first], [])

    # --- tower and connector -----------------------------------------------------------------------------------------

    def embed(self, visual: Visual) -> TowerInput:
        x_FND: Tensor = self.inner.vision_tower.embeddings(visual.pixels)
        return TowerInput(x_FND.flatten(0, 1), visual.frames, batched=True)

    def blocks(self) -> Sequence[Block]:
        return [_as_block(layer) for layer in self.inner.vision_tower.encoder.layer]

    def taps(self) -> tuple[int, ...]:
        return (self.config.vision_config.num_hidden_layers - 1,)

    def timed_modules(self) -> tuple[nn.Module, nn.Module]:
        return self.inner.vision_tower.embeddings, self.inner.multi_modal_projector

    def tower_attention(self, block: int | None = None) -> nn.Module:
        attention: nn.Module = self.inner.vision_tower.encoder.layer[-1 if block is None else block].attention
        return attention

    def connect(self, tower: TowerOutput, visual: Visual, cells: Sequence[Tensor | None]) -> Connected:
        x_SD = self.inner.vision_tower.layernorm(tower.taps[0])
        images = [tiles for tiles, is_video in visual.image_args["items"] if not (is_video or visual.num_images)]
        parts = [self._rows(visual.num_tiles, x_SD.device)]
        start = visual.num_tile_patches
        for grid, length, cell in zip(visual.grids, visual.patches_per_video, cells, strict=True):
            rows_GW = start + self._rows(grid.t, x_SD.device)
            parts.append(rows_GW if cell is None else rows_GW[cell])
            start += length
        rows_KW = torch.cat(parts)
        if tower.row_S is not None:  # numbers of survivors instead of patches
            number_S = torch.zeros(sum(visual.frames), dtype=torch.long, device=x_SD.device)
            number_S[tower.row_S] = torch.arange(len(tower.row_S), device=x_SD.device)
            rows_KW = number_S[rows_KW]
        y_Kd: Tensor = self.inner.multi_modal_projector(x_SD[rows_KW].flatten(1))
        per_tile = self.side**2 // 4
        features = y_Kd.split([*(tiles * per_tile for tiles in images), *map(len, parts[1:])])
        return Connected(features[: len(images)], features[len(images) :])

    # --- the prompt --------------------------------------------------------------------------------------------------

    def merge(
        self, kwargs: dict[str, Any], connected: Connected, visual: Visual, kept: Sequence[Tensor | None]
    ) -> tuple[dict[str, Any], Placed]:
        x_BLd, input_ids, token = embeds_of(kwargs, self.inner), kwargs.get("input_ids"), self.config.image_token_id
        if input_ids is None:
            token_d = self.inner.get_input_embeddings()(torch.tensor(token, device=x_BLd.device))
            place_BL = (x_BLd == token_d).all(-1)
        else:
            place_BL = input_ids == token
        per_tile, device = self.side**2 // 4, x_BLd.device
        is_video_P = torch.tensor(
            [bool(is_video) for tiles, is_video in visual.image_args["items"] for _ in range(tiles * per_tile)],
            dtype=torch.bool, device=device,
        )  # fmt: skip
        check_placeholders("visual", int(place_BL.sum()), len(is_video_P))
        none_BL = torch.zeros_like(place_BL)
        image_BL, video_BL = (none_BL.masked_scatter(place_BL, kind_P) for kind_P in (~is_video_P, is_video_P))
        place_V, placed = place_groups(image_BL, video_BL, connected.images, visual, kept)
        x_Nd = x_BLd.masked_fill(~placed.keep_BL[..., None], 0).flatten(0, 1)
        x_Nd = x_Nd.index_copy(0, place_V, flat_features(x_BLd, connected.images, connected.videos))
        return {"input_ids": None, "inputs_embeds": x_Nd.view_as(x_BLd)}, placed

    def finish(self, x_RMd: Tensor, late_RM: Tensor) -> Tensor:
        return x_RMd
