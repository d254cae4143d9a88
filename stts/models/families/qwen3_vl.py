"""Qwen3-VL on stock transformers classes: attention inside temporal patches, a resampled position table, deepstack.

Mergers on early blocks (`deepstack_visual_indexes`) make features that the first LLM layers add to their outputs at the
visual places, so nothing may be dropped behind the lowest of these blocks. The prompt shows every temporal patch behind
its time; times, starts and ends of patches without survivors stay.

Shape suffixes beside those of `stts.tokens`: Q = entries of the table that a patch mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from stts.models.families.qwen_vl import QwenVision
from stts.models.families.visual import TowerInput, Visual


class Qwen3VL(QwenVision):
    """Adapter of `Qwen3VLForConditionalGeneration`.

    Differs from the stock forward pass, beside what `QwenVision` lists: deepstack mergers run behind the tower on what
    is left of the outputs they read, and their features are added at the places of survivors.
    """

    family = "qwen3_vl"
    marks_per_frame = 10
    norms_heads = True
    processor_classes = (Qwen3VLProcessor, Qwen3VLVideoProcessor)
    min_frames = 8

    @classmethod
    def num_mergers(cls, vision: Any) -> int:
        return 1 + len(vision.deepstack_visual_indexes)

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

    def taps(self) -> tuple[int, ...]:
        return (*self.vision.deepstack_visual_indexes, *super().taps())

    def mergers(self) -> Sequence[nn.Module]:
        return [*self.tower.deepstack_merger_list, *super().mergers()]
