"""What cannot run is refused before it runs: prompts beyond the context window, kernels for another device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import stts
from tests.conftest import make_inputs
from tests.models.families import qwen_tiny


def sizes(model: Any, inputs: Any) -> tuple[int, int]:
    """Tokens of the full prompt, and how many of them are visual, as the stock code counts them."""
    visual = int((inputs["input_ids"] == model.config.video_token_id).sum())
    return inputs["input_ids"].shape[1], visual


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_prompt_beyond_the_window_names_the_ratio_that_fits(tiny: Any, use_cache: bool) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ["v which is red ?"])
    length, _ = sizes(model, inputs)
    with stts.pruning(model, "uniform", retention_ratio=0.99) as pruned, torch.no_grad():
        model(**inputs, use_cache=use_cache)
        assert pruned.last is not None and pruned.last.llm_tokens == length - 1  # 64 of 64 + 1 newline: 63 are kept
        limit = model.config.text_config.max_position_embeddings = length - 32
        message = rf"{length - 1} tokens after pruning .* window is {limit} .*retention_ratio=(\S+) fits$"
        with pytest.raises(ValueError, match=message) as caught:
            model(**inputs, use_cache=use_cache)
        [fits] = re.findall(message, str(caught.value))
        pruned.retention_ratio = float(fits)  # 32 of 64 may stay
        model(**inputs, use_cache=use_cache)
        assert float(fits) == 0.5 and pruned.last.llm_tokens == limit
        pruned.retention_ratio = float(fits) + 1 / 64
        with pytest.raises(ValueError, match="window"):
            model(**inputs, use_cache=use_cache)


def test_the_ratio_that_fits_holds_for_every_row_and_several_videos(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ["vv which is red ?", "v what ?", "- which ?"])
    limit = model.config.text_config.max_position_embeddings = 60
    with stts.pruning(model, "uniform", retention_ratio=0.9) as pruned, torch.no_grad():
        with pytest.raises(ValueError, match="fits") as caught:
            model(**inputs, use_cache=True)
        pruned.retention_ratio = float(re.findall(r"retention_ratio=(\S+) fits", str(caught.value))[0])
        model(**inputs, use_cache=True)
        assert pruned.last is not None and limit - 3 <= pruned.last.llm_padded / 3 <= limit


def test_original_positions_count_up_to_the_last_place(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ["v which is red ?"])
    length, _ = sizes(model, inputs)
    with stts.pruning(model, "uniform", retention_ratio=0.25, positions="original"), torch.no_grad():
        model.config.text_config.max_position_embeddings = length
        model(**inputs)
        model.config.text_config.max_position_embeddings = length - 1
        with pytest.raises(ValueError, match=rf"positions up to {length - 1}, .*fits with positions='compact'"):
            model(**inputs)
    with stts.pruning(model, "uniform", retention_ratio=0.25, positions="compact"), torch.no_grad():
        model(**inputs)


def test_no_ratio_is_named_for_positions_that_show_time_and_place(tmp_path: Path) -> None:
    model, processor = qwen_tiny.make("qwen3_vl", tmp_path, deepstack_visual_indexes=[5], num_position_embeddings=36)
    inputs = qwen_tiny.make_inputs(processor, ["v what colour is the circle ?"])
    length, visual = sizes(model, inputs)
    assert (length, visual) == (79, 45)
    last = length - 45 + 3 * 5 - 1  # each of the 3 frames of 3 x 5 units moves positions on by 5
    with stts.pruning(model, "uniform", retention_ratio=0.25), torch.no_grad():
        model.config.text_config.max_position_embeddings = last + 1
        model(**inputs)
        model.config.text_config.max_position_embeddings = last
        with pytest.raises(ValueError, match=rf"positions up to {last}, .*use fewer frames or a lower resolution"):
            model(**inputs)


def test_no_ratio_is_named_where_none_helps(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ["v which is red ?"])
    length, visual = sizes(model, inputs)
    model.config.text_config.max_position_embeddings = length - visual
    with stts.pruning(model, "uniform"), torch.no_grad(), pytest.raises(ValueError, match="text and images alone"):
        model(**inputs)
    model.config.text_config.max_position_embeddings = length - 1
    with stts.pruning(model, "fastv"), torch.no_grad(), pytest.raises(ValueError, match="drops inside the LLM"):
        model(**inputs)


def test_attention_for_gpus_is_refused_on_a_cpu_and_leaves_the_model_clean(tiny: Any) -> None:
    model, _ = tiny
    model.config.text_config._attn_implementation = "flash_attention_2"
    pruning = stts.pruning(model, "uniform")
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' runs on GPUs only"):
        pruning.attach()
    assert model.config.vision_config._attn_implementation == "sdpa", "nothing was switched on"
    model.config.text_config._attn_implementation = "sdpa"
    with pruning:
        pass
