"""Qwen2.5-VL keeps the laws of an adapter, with windows in most blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

import stts
from stts.models.families.base import host_info, make_adapter
from tests.models.families.qwen_tiny import ROWS, QwenLaws, make, make_inputs


class TestQwen25VL(QwenLaws):
    blocks_of_stts = (2, 3)  # the bias of block 3 acts inside windows, that of block 4 inside temporal patches

    @pytest.fixture
    def tiny(self, tmp_path: Path) -> tuple[Any, Any]:
        windows = {"window_size": 16, "fullatt_block_indexes": [1, 4, 7]}
        return make("qwen2_5_vl", tmp_path, **windows, tokens_per_second=2)

    def order(self, model: Any, grid_thw: Tensor) -> Tensor:
        return get_vision_window_index(grid_thw, spatial_merge_size=2, window_size=16, patch_size=4)[0]

    def test_the_host_is_read_from_the_config(self, tiny: Any) -> None:
        host = host_info(tiny[0])
        assert (host.vit_depth, host.vit_width, host.lowest_tap, host.llm_layers) == (8, 32, 7, 4)
        assert host.patches_per_group == 4 and host.mrope

    def test_windows_are_two_by_two_units_cut_at_the_edge(self, tiny: Any) -> None:
        model, processor = tiny
        adapter = make_adapter(model)
        visual = adapter.take_visual(dict(make_inputs(processor, ["v what ?"])))
        assert visual is not None
        given = adapter.embed(visual)
        assert given.windowed == {0, 2, 3, 5, 6}
        assert given.windows == (16, 16, 8, 8, 8, 4) * 3, "3 x 5 units of 4 patches: 2 + 1 rows, 2 + 2 + 1 columns"
        rows_GW, _ = adapter.groups(visual, 0)
        first = [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]  # raster numbers, window by window
        assert rows_GW[first, 0].tolist() == list(range(0, 60, 4))
        assert rows_GW[[15 + cell for cell in first], 0].tolist() == list(range(60, 120, 4)), "frames stay apart"

    def test_seconds_per_grid_reach_the_positions(self, tiny: Any) -> None:
        model, processor = tiny
        model.train()
        inputs = make_inputs(processor, ROWS[:1])
        seen: list[Tensor] = []
        model.model.language_model.rotary_emb.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((*args[1:], *kwargs.values())[0]), with_kwargs=True
        )
        with stts.pruning(model, "none", retention_ratio=1.0):
            for seconds in (1.0, 3.0):
                model(**{**inputs, "second_per_grid_ts": torch.tensor([seconds])}, use_cache=False)
        time_L = [x_31S[0, 0] - x_31S[0, 0, 2] for x_31S in seen]  # the video starts behind two tokens
        assert [time[2 + 15 * frame].item() for time in time_L for frame in range(3)] == [0, 2, 4, 0, 6, 12]
