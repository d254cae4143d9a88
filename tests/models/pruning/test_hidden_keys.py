"""Keys hidden while decoding: deeper layers read what the layer before attends to, as if the rest were not there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import stts
from stts.metrics.cost import decode_cost
from stts.models.families.base import vlm_shape
from stts.models.pruning.continuation import continuation_of
from stts.pruners.chain import Chain
from stts.pruners.dycoke import DyCoke
from stts.pruners.fastv import FastV
from tests.models.pruning.test_continuation import step
from tests.models.test_matrix import FAMILIES

LAYER = 1


@pytest.fixture(scope="module", params=["LLaVA-OneVision", "Qwen3-VL"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    build_model, build_inputs = FAMILIES[request.param][:2]
    model, processor = build_model(tmp_path_factory.mktemp("family"))
    return model, dict(build_inputs(processor, "left"))


def test_a_step_is_that_of_a_cache_without_the_hidden_keys(case: tuple[Any, dict[str, Any]]) -> None:
    model, prompt = case
    tokens = torch.full((len(prompt["input_ids"]), 1), 5)
    with torch.no_grad(), stts.pruning(model, DyCoke(hidden=0.6, layer=LAYER), retention_ratio=0.6) as pruned:
        cache = model(**prompt, use_cache=True).past_key_values
        report = pruned.last
        assert report.decode_layer == LAYER and report.decode_keys == [int(0.4 * n) for n in report.num_kept]
        shape, num_text = vlm_shape(model.config).llm, int(prompt["attention_mask"].sum()) - sum(report.num_groups)
        costs = [
            decode_cost(shape, [kept] * shape.layers, 4, first=LAYER, num_visible=seen)
            for kept, seen in zip(report.num_kept, report.decode_keys, strict=True)
        ]
        slot = shape.layers * 2 * shape.kv_heads * shape.head_dim * 4  # keys and values of a token, in bytes
        assert sum(cost.cache_bytes for cost in costs) == slot * (report.llm_tokens - num_text)
        held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        assert held == slot * len(tokens) * cache.layers[0].keys.shape[2]
        twin = copy.deepcopy(cache)
        logits = step(model, cache, prompt, tokens)
        facts = continuation_of(cache)
        assert facts is not None and facts.hiding is not None and facts.hiding.last is not None
        visible_BM, video_BM = facts.hiding.last.visible_BM, facts.hiding.video_BM
        seen = [int((visible_BM & (video_BM == number)).sum()) for number in range(len(report.num_kept))]
        assert seen == report.decode_keys and visible_BM[video_BM < 0].all()
        assert cache.layers[-1].keys.shape[2] == visible_BM.shape[1] + 1, "hidden keys stay in memory"

        # The same step on a cache whose deeper layers have lost these keys.
        facts = continuation_of(twin)
        assert facts is not None
        most = int((visible_BM & facts.valid_BM).sum(1).max())
        order_BM = torch.sort((visible_BM & facts.valid_BM).to(torch.uint8), dim=1, stable=True).indices[:, -most:]
        for layer in twin.layers[LAYER:]:
            index = order_BM[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        facts.hiding, facts.by_layer = None, {LAYER: (visible_BM & facts.valid_BM).gather(1, order_BM)}
        assert_close(step(model, twin, prompt, tokens), logits, atol=1e-5, rtol=1e-4)


def test_nothing_hidden_is_the_first_part_alone(case: tuple[Any, dict[str, Any]]) -> None:
    model, prompt = case
    steps = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    answers = {}
    for hidden in (None, 0.0, 0.9):
        with torch.no_grad(), stts.pruning(model, DyCoke(hidden=hidden, layer=LAYER), retention_ratio=0.6):
            answers[hidden] = torch.stack(model.generate(**prompt, **steps).logits)
    assert_close(answers[0.0], answers[None], atol=1e-5, rtol=1e-4)
    assert torch.equal(answers[0.9][0], answers[None][0]), "the first token comes from the prefill"
    assert not torch.allclose(answers[0.9], answers[None], atol=1e-4)


def test_where_keys_cannot_be_hidden(case: tuple[Any, dict[str, Any]]) -> None:
    model, _ = case
    layers = model.config.get_text_config().num_hidden_layers
    with pytest.raises(ValueError, match=f"expected 1 to {layers - 1}"):
        stts.pruning(model, DyCoke(hidden=0.5, layer=layers), retention_ratio=0.6)
    with pytest.raises(ValueError, match="caches of their"):
        stts.pruning(model, Chain([DyCoke(hidden=0.5, layer=LAYER), FastV(layer=1)]), retention_ratio=0.6)
