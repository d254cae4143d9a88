"""Qwen3.5 keeps the laws of an adapter, with an LLM most of whose layers have a recurrent state."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import stts
from stts.models.families.base import host_info, linear_layers
from tests.models.families import family_laws as laws
from tests.models.families.qwen_tiny import ROWS, QwenLaws, counts, make, make_inputs
from tests.models.families.test_qwen3_vl import resampled_table
from tests.models.pruning.test_llm_layers import Cut, Cuts

KINDS = ["linear", "full", "full", "linear", "full", "linear"]
TEXT = {"num_hidden_layers": 6, "layer_types": [f"{kind}_attention" for kind in KINDS], "rms_norm_eps": 0.1}
"""Else the norm behind the delta rule divides sums that cancel by their size, and rounding grows with them."""


def make_qwen3_5(folder: Path, tokenizer: Any = None, **options: Any) -> tuple[Any, Any]:
    """A short LLM with two layers before which tokens may go, 2 and 4, and a linear one before the second."""
    vision = {"num_position_embeddings": 36, "depth": 6}
    model, processor = make("qwen3_5", folder, tokenizer, text=TEXT, **vision, **options)
    with torch.no_grad():
        for number in linear_layers(model.config.text_config):
            layer = model.model.language_model.layers[number]
            layer.linear_attn.A_log.fill_(-3.0)  # a state that lasts, so that a leak would show
    return model, processor


class TestQwen3_5(QwenLaws):
    blocks_of_stts = (0, 3)
    reference: ClassVar[Any] = staticmethod(laws.shortened)
    cut: ClassVar[Any] = Cuts((Cut(4, share=0.5),))
    cut_ratio = 0.85

    @pytest.fixture
    def tiny(self, tmp_path: Path) -> tuple[Any, Any]:
        return make_qwen3_5(tmp_path)

    def order(self, model: Any, grid_thw: Tensor) -> Tensor:
        return torch.arange(int(grid_thw.prod(1).sum()) // 4)

    def position_table(self, model: Any, grid_thw: Tensor) -> Tensor:
        return resampled_table(model, grid_thw)

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("layer", [None, 2, 4])
    def test_survivors_equal_the_masked_dense_model(
        self, tiny: Any, layer: int | None, side: str, use_cache: bool
    ) -> None:
        super().test_survivors_equal_the_masked_dense_model(tiny, layer, side, use_cache)

    @pytest.mark.parametrize("name", ["novelty", "llm"])
    def test_a_right_padded_prompt_is_continued_as_each_row_alone(self, tiny: Any, name: str) -> None:
        """Padding behind a row would go into its state; stock code lets it."""
        model, processor = tiny
        pruner, ratio = self.named(name, 0.4)
        batch, rows = make_inputs(processor, ROWS), [make_inputs(processor, [row]) for row in ROWS]
        new = torch.full((len(ROWS), 1), 9)
        with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=ratio):
            cache = model(**batch, use_cache=True).past_key_values
            mask = torch.cat([batch["attention_mask"], torch.ones_like(new)], 1)
            together = model(input_ids=new, attention_mask=mask, past_key_values=cache).logits
            for row, inputs in enumerate(rows):
                if row == 1:  # without video: stock code, which takes the offset of positions from the row before
                    continue
                cache = model(**inputs, use_cache=True).past_key_values
                alone = model(input_ids=new[:1], past_key_values=cache).logits
                torch.testing.assert_close(together[row], alone[0], **laws.CLOSE)

    def test_where_tokens_may_go_inside_the_llm(self, tiny: Any) -> None:
        model, processor = tiny
        host = host_info(model)
        assert host.llm_linear == {0, 3, 5} and host.cut_layers == (2, 4)
        assert (host.llm_layer(2), host.llm_layer(18), host.vit_depth, host.lowest_tap) == (2, 4, 6, 5)
        for layer in (1, 3, 5):
            with pytest.raises(ValueError, match=rf"before LLM layer {layer}, .*: one of \[2, 4\]"):
                stts.pruning(model, Cuts((Cut(layer),)), retention_ratio=0.9)
        seen = []
        hook = model.model.language_model.layers[2].self_attn.register_forward_hook(lambda *_: seen.append(1))
        shows = Cut(4, asks=frozenset({"last_row", "keys"}))
        with torch.no_grad(), stts.pruning(model, Cuts((shows,)), retention_ratio=0.8) as pruned:
            model(**make_inputs(processor, ROWS))
        hook.remove()
        assert seen and pruned.last is not None
        assert all(kept < count for kept, count in zip(pruned.last.num_kept, counts(ROWS), strict=True))
        for video in shows.seen:
            assert video.salience_G is not None and (video.salience_G > 0).all() and video.keys_GD is not None

    def test_callers_packed_rows_and_caches_outside_are_refused(self, tiny: Any) -> None:
        model, processor = tiny
        inputs = make_inputs(processor, ROWS[:1])
        length = inputs["input_ids"].shape[1]
        twice = torch.cat([torch.arange(length - 9), torch.arange(9)]).view(1, 1, -1).expand(4, 1, -1)
        rest = {name: value for name, value in inputs.items() if name != "attention_mask"}
        with torch.no_grad(), stts.pruning(model, "uniform"):
            with pytest.raises(ValueError, match="give every sample its own row"):
                model(**rest, position_ids=twice, use_cache=False)
            cache = model(**inputs, use_cache=True).past_key_values
        before = cache.layers[0].conv_states[0].clone()
        with torch.no_grad(), pytest.raises(ValueError, match="holds a pruned prompt"):
            model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        assert torch.equal(cache.layers[0].conv_states[0], before), "the state is as it was"
