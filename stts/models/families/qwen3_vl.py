"""Qwen3-VL on stock transformers classes: attention inside temporal patches, a resampled position table, deepstack.

Mergers on early blocks (`deepstack_visual_indexes`) make features that the first LLM layers add to their outputs at the
visual places, so nothing may be dropped behind the lowest of these blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from stts.models.families.qwen_vl import Qwen3Vision


class Qwen3VL(Qwen3Vision):
    """Adapter of `Qwen3VLForConditionalGeneration`.

    Differs from the stock forward pass, beside what `QwenVision` lists: deepstack mergers run behind the tower on what
    is left of the outputs they read, and their features are added at the places of survivors.
    """

    family = "qwen3_vl"

    @classmethod
    def num_mergers(cls, vision: Any) -> int:
        return 1 + len(vision.deepstack_visual_indexes)

    def taps(self) -> tuple[int, ...]:
        return (*self.vision.deepstack_visual_indexes, *super().taps())

    def mergers(self) -> Sequence[nn.Module]:
        return [*self.tower.deepstack_merger_list, *super().mergers()]
