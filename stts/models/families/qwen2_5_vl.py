"""Qwen2.5-VL on stock transformers classes: attention inside windows, inside temporal patches in a few blocks.

The tower sees merge units window by window, so rows of a video are permuted inside each temporal patch; groups and the
connector undo that. Which segments hold in a block (`fullatt_block_indexes`: temporal patches, else windows) is kept
after the drop, with fewer members; the key bias of STTS acts inside whatever segments its block has.

Shape suffixes beside those of `stts.tokens`: Y = merge units of all frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize
from transformers.vision_utils import get_vision_window_index

from stts.metrics.cost import VitShape
from stts.models.families.qwen_vl import QwenVision, Size
from stts.models.families.visual import TowerInput, Visual


class Qwen2_5VL(QwenVision):
    """Adapter of `Qwen2_5_VLForConditionalGeneration`.

    Differs from the stock forward pass, beside what `QwenVision` lists: windows lose the units that are dropped, and
    `second_per_grid_ts` is taken with the pixels, so that positions come from the full prompt.
    """

    family = "qwen2_5_vl"
    processor_classes = (Qwen2_5_VLProcessor, Qwen2VLVideoProcessor)
    visual_args = (*QwenVision.visual_args, "second_per_grid_ts")

    @classmethod
    def vit_shape(cls, vision: Any) -> VitShape:
        return replace(
            super().vit_shape(vision),
            gated=True,
            windowed=frozenset(range(vision.depth)) - frozenset(vision.fullatt_block_indexes),
            window_side=vision.window_size // vision.patch_size,
        )

    @classmethod
    def resize(cls, vision: Any, num_frames: int, frame_size: tuple[int, int], low: int, high: int) -> tuple[int, int]:
        height, width = smart_resize(*frame_size, vision.patch_size * vision.spatial_merge_size, low, high)
        return height, width

    def _visual(self, pixels: Tensor, images: Sequence[Size], videos: Sequence[Size], given: dict[str, Any]) -> Visual:
        visual = super()._visual(pixels, images, videos, given)
        unit_Y, boundaries = get_vision_window_index(
            visual.image_args["grid_thw"],
            spatial_merge_size=self.side,
            window_size=self.vision.window_size,
            patch_size=self.vision.patch_size,
        )
        layout = {"units": unit_Y.to(pixels.device), "windows": tuple(boundaries.diff().tolist())}
        return replace(visual, image_args=visual.image_args | layout)

    def units(self, visual: Visual) -> Tensor:
        unit_Y: Tensor = visual.image_args["units"]
        return unit_Y

    def embed(self, visual: Visual) -> TowerInput:
        entry = super().embed(visual)
        x_SD, *aux = (
            self.tower.permute_input_for_window_attn(x, self.units(visual), len(x)) for x in (entry.x_SD, *entry.aux)
        )
        windowed = frozenset(range(self.vision.depth)) - frozenset(self.vision.fullatt_block_indexes)
        return replace(entry, x_SD=x_SD, aux=tuple(aux), windows=visual.image_args["windows"], windowed=windowed)

    def times(self, visual: Visual) -> dict[str, Any]:
        return {"second_per_grid_ts": visual.image_args["given"].get("second_per_grid_ts")}
