"""Qwen3-VL keeps the laws of an adapter, deepstack included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import stts
from stts.models.families.base import host_info
from tests.models.families.qwen_tiny import CELLS, QwenLaws, make, make_inputs


def resampled_table(model: Any, grid_thw: Tensor) -> Tensor:
    """(S, D): the 6 x 6 table of positions resized to each grid, then laid out unit by unit."""
    table_D66 = model.model.visual.pos_embed.weight.T.unflatten(1, (6, 6))[None]
    parts = []
    for t, h, w in grid_thw.tolist():
        x_Dhw = F.interpolate(table_D66, size=(h, w), mode="bilinear", align_corners=True)[0]
        units = x_Dhw.view(-1, h // 2, 2, w // 2, 2).permute(1, 3, 2, 4, 0).flatten(0, 3)
        parts.append(units.repeat(t, 1))
    return torch.cat(parts)


class TestQwen3VL(QwenLaws):
    blocks_of_stts = (0, 3)

    @pytest.fixture
    def tiny(self, tmp_path: Path) -> tuple[Any, Any]:
        return make("qwen3_vl", tmp_path, deepstack_visual_indexes=[5, 6], num_position_embeddings=36)

    def order(self, model: Any, grid_thw: Tensor) -> Tensor:
        return torch.arange(int(grid_thw.prod(1).sum()) // 4)

    def position_table(self, model: Any, grid_thw: Tensor) -> Tensor:
        return resampled_table(model, grid_thw)

    def test_the_host_is_read_from_the_config(self, tiny: Any) -> None:
        host = host_info(tiny[0])
        assert (host.vit_depth, host.vit_width, host.lowest_tap, host.llm_layers) == (8, 32, 5, 4)
        assert host.patches_per_group == 4 and host.mrope
        with pytest.raises(ValueError, match="prune_block=3 or lower"):
            stts.pruning(tiny[0], "stts", prune_block=4)

    def test_deepstack_features_of_dropped_groups_reach_no_layer(self, tiny: Any) -> None:
        """Two stages before the LLM: what the early layers add belongs to the groups that both kept."""
        model, processor = tiny
        inputs = make_inputs(processor, ["v what ?"])
        outputs: list[Tensor] = []
        added: list[Tensor] = []
        layers = model.model.language_model.layers
        tower = model.model.visual.deepstack_merger_list
        tower[0].register_forward_hook(lambda m, args, out: outputs.append(out))
        layers[0].register_forward_hook(lambda m, args, out: added.append(out))  # before our own hook
        layers[1].register_forward_pre_hook(lambda m, args: added.append(args[0]))
        with torch.no_grad(), stts.pruning(model, "uniform", retention_ratio=0.4) as pruned:
            model(**inputs, use_cache=False)
        assert pruned.last is not None
        [kept] = pruned.last.index
        t, h, w = CELLS["v"]
        assert len(outputs[0]) == t * h * w and len(kept) == 18
        difference = (added[1] - added[0])[0]
        touched = difference.abs().sum(1) > 0
        torch.testing.assert_close(difference[touched], outputs[0][kept], atol=1e-5, rtol=1e-4)
