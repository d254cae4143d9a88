"""Stock video VLMs of published shapes with random weights, made on the device itself, and inputs as their processors
would lay them out: nothing is downloaded, no tokenizer, no processor."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import measure  # noqa: F401  (brings in stts, which must run before transformers)
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stts.models.families.base import TinySizes, adapter_class
from stts.models.families.molmo2 import POOL, pooling_windows
from stts.models.families.published import PUBLISHED
from stts.models.families.tiny import make_tokenizer, shrink_config
from stts.tokens import Grid

MOLMO2, QWEN3, ONEVISION = "allenai/Molmo2-4B", "Qwen/Qwen3-VL-4B-Instruct", "llava-hf/llava-onevision-qwen2-7b-ov-hf"
BEFORE, STAMP, QUESTION, ANSWER = 16, 4, 32, 16
"""Tokens of text: before the video, of a frame's time, of the question, of the answer (training only)."""
QWEN_SIDE = 13
"""Merge units per side: 13 x 13 tokens for two frames, 84.5 a frame, where Molmo2 has 81 (416 x 416 pixels)."""
_LAYERS = 6


def main_model() -> str:
    """Molmo2-4B where the installed transformers has it, else Qwen3-VL-4B: of Qwen3-4B's LLM both."""
    return MOLMO2 if "molmo2" in CONFIG_MAPPING else QWEN3


_FEWER_BLOCKS: dict[str, dict[str, dict[str, Any]]] = {
    "llava_onevision": {"vision_config": {"num_hidden_layers": 8}},
    "molmo2": {"vision_config": {"num_hidden_layers": 8}, "adapter_config": {"vision_feature_layer": [7, 6]}},
    "qwen3_vl": {"vision_config": {"depth": 10, "num_position_embeddings": 36, "deepstack_visual_indexes": [5, 6, 7]}},
}
"""What a tiny tower has instead of the published depth, and the blocks that are read then."""


def make_config(name: str, *, tiny: bool) -> PretrainedConfig:
    """The published one, or with `tiny` the same family with 8 to 10 blocks of width 32 and 6 LLM layers."""
    parts = copy.deepcopy(PUBLISHED[name])
    family = parts.pop("model_type")
    if not tiny:
        return AutoConfig.for_model(family, **parts)
    for part, fewer in _FEWER_BLOCKS[family].items():
        parts[part] |= fewer
    tokenizer = make_tokenizer(adapter_class(family))
    return shrink_config(AutoConfig.for_model(family, **parts), tokenizer, TinySizes(llm_layers=_LAYERS))


def make_model(config: PretrainedConfig, device: torch.device, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """In eval mode, with the class's own initialisation, drawn where it will live."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    model.generation_config.eos_token_id = None  # answers of equal length
    model.generation_config.pad_token_id = 0
    return model.eval()


def grid_of(config: PretrainedConfig, num_frames: int, *, tiny: bool = False) -> Grid:
    """LLM tokens of a video."""
    vision = config.vision_config
    if config.model_type == "qwen3_vl":
        side = 3 if tiny else QWEN_SIDE
        return Grid(-(-num_frames // vision.temporal_patch_size), side, side)
    pixels = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    side = -(-(pixels // vision.patch_size) // (POOL if config.model_type == "molmo2" else 2))
    return Grid(num_frames, side, side)


def make_inputs(
    config: PretrainedConfig, grid: Grid, device: torch.device, dtype: torch.dtype, *, training: bool
) -> dict[str, Any]:
    """One prompt with one video of noise; with `training` also `labels`, on the answer."""
    generator = torch.Generator(device).manual_seed(0)
    make = {"llava_onevision": _llava_onevision, "molmo2": _molmo2, "qwen3_vl": _qwen3_vl}[config.model_type]
    shape, visual, kinds = make(config, grid)
    inputs: dict[str, Any] = {
        "pixel_values_videos": torch.randn(shape, generator=generator, device=device, dtype=dtype)
    }
    inputs |= {name: value.to(device) for name, value in visual.pop("args").items()}
    after = QUESTION + (ANSWER if training else 0)
    special = {value for name, value in config.to_dict().items() if name.endswith(("_id", "_index"))}
    size = config.get_text_config().vocab_size
    text = itertools.cycle(token for token in range(3, min(100, size)) if token not in special)
    ids = [next(text) if token is None else token for token in [*[None] * BEFORE, *visual["ids"], *[None] * after]]
    inputs["input_ids"] = torch.tensor([ids], device=device)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if kinds:
        types = sum((kind * (inputs["input_ids"] == token) for token, kind in kinds.items()), torch.tensor(0))
        inputs["mm_token_type_ids"] = types
    if training:
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -ANSWER:] = inputs["input_ids"][:, -ANSWER:]
        inputs["labels"] = labels
    return inputs


Layout = tuple[tuple[int, ...], dict[str, Any], dict[int, int]]
"""Shape of the pixels; `ids` (None: text) and further arguments; kind of each visual token."""


def _llava_onevision(config: Any, grid: Grid) -> Layout:
    side = config.vision_config.image_size
    ids = [config.video_token_id] * (grid.num_groups + 1)  # a newline behind the video
    return (1, grid.t, 3, side, side), {"ids": ids, "args": {}}, {}


def _molmo2(config: Any, grid: Grid) -> Layout:
    vision = config.vision_config
    sides = [pixels // vision.patch_size for pixels in vision.image_size]
    window_GW, num_patches = pooling_windows(*sides), sides[0] * sides[1]
    offset_T = num_patches * torch.arange(grid.t)[:, None, None]
    windows = torch.where(window_GW >= 0, window_GW + offset_T, -1).flatten(0, 1)
    start, patch, end = config.frame_start_token_id, config.image_patch_id, config.frame_end_token_id
    ids = ([None] * STAMP + [start] + [patch] * grid.per_frame + [end]) * grid.t
    args: dict[str, Tensor] = {"video_token_pooling": windows, "video_grids": torch.tensor([[grid.t, grid.h, grid.w]])}
    return (
        (grid.t, num_patches, 3 * vision.patch_size**2),
        {"ids": ids, "args": args},
        dict.fromkeys((start, patch, end), 1),
    )


def _qwen3_vl(config: Any, grid: Grid) -> Layout:
    vision = config.vision_config
    height, width = grid.h * vision.spatial_merge_size, grid.w * vision.spatial_merge_size
    pad = config.video_token_id
    one = [config.vision_start_token_id, *[pad] * grid.per_frame, config.vision_end_token_id]
    shape = (grid.t * height * width, 3 * vision.temporal_patch_size * vision.patch_size**2)
    args = {"video_grid_thw": torch.tensor([[grid.t, height, width]])}
    return shape, {"ids": ([None] * STAMP + one) * grid.t, "args": args}, {pad: 2}
