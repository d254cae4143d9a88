"""The published checkpoints, shape by shape, on the meta device: what an adapter reads off each of them.

Configurations and parameter counts are facts of the checkpoints; nothing is downloaded and no memory is used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, SiglipModel

import stts
from stts.models.families.base import make_adapter
from stts.models.families.llava_layout import VideoLayout
from stts.models.families.published import PUBLISHED, config_of
from stts.models.pruning.siglip import SiglipSource

SIGLIP: dict[str, Any] = {
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "image_size": 384, "patch_size": 14,
    },
    "text_config": {
        "model_type": "siglip_text_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "vocab_size": 32000, "max_position_embeddings": 64,
    },
}  # fmt: skip
"""so400m/14-384, whole."""


@dataclass(frozen=True)
class Facts:
    """What must come out."""

    parameters: int
    taps: tuple[int, ...]
    largest_prune_block: int
    """The drop after block prune_block + 1 may come no later than the lowest tap, and two blocks must follow."""
    per_frame: int | None
    """Groups of a frame; None: by resolution."""
    patches_per_group: int


CHECKPOINTS = {
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": Facts(893_675_552, (25,), 23, 196, 4),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": Facts(8_030_807_584, (25,), 23, 196, 4),
    "Qwen/Qwen2.5-VL-3B-Instruct": Facts(3_754_622_976, (31,), 29, None, 4),
    "Qwen/Qwen2.5-VL-7B-Instruct": Facts(8_292_166_656, (31,), 29, None, 4),
    "Qwen/Qwen3-VL-4B-Instruct": Facts(4_437_815_808, (5, 11, 17, 23), 3, None, 4),
    "Qwen/Qwen3-VL-8B-Instruct": Facts(8_767_123_696, (8, 16, 24, 26), 6, None, 4),
    "Qwen/Qwen3.5-0.8B": Facts(852_985_920, (11,), 9, None, 4),
    "Qwen/Qwen3.5-9B": Facts(9_409_813_744, (26,), 24, None, 4),
    "allenai/Molmo2-4B": Facts(4_850_869_200, (24, 18), 16, 81, 9),
    "allenai/Molmo2-8B": Facts(8_661_703_120, (24, 18), 16, 81, 9),
    "OpenGVLab/InternVL3-1B-hf": Facts(938_193_024, (23,), 21, 256, 4),
    "OpenGVLab/InternVL3-2B-hf": Facts(2_088_957_440, (23,), 21, 256, 4),
    "OpenGVLab/InternVL3-8B-hf": Facts(7_944_373_760, (23,), 21, 256, 4),
    "OpenGVLab/InternVL3_5-1B-HF": Facts(1_060_897_792, (23,), 21, 256, 4),
    "OpenGVLab/InternVL3_5-8B-HF": Facts(8_528_318_464, (23,), 21, 256, 4),
}


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config_of(name)).eval()


def test_every_published_shape_is_here() -> None:
    assert set(CHECKPOINTS) == set(PUBLISHED)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_adapter_reads_every_published_shape(name: str) -> None:
    facts = CHECKPOINTS[name]
    parts, model = PUBLISHED[name], on_meta(name)
    assert sum(p.numel() for p in model.parameters()) == facts.parameters, "the checkpoint's own shapes"
    adapter = make_adapter(model)
    host = adapter.host
    vision, text = parts["vision_config"], parts["text_config"]
    assert adapter.taps() == facts.taps and host.lowest_tap == min(facts.taps)
    assert host.vit_depth == vision.get("depth", vision.get("num_hidden_layers"))
    assert (host.vit_width, host.vit_mlp) == (vision["hidden_size"], vision["intermediate_size"])
    assert (host.llm_width, host.llm_layers) == (text["hidden_size"], text["num_hidden_layers"])
    assert host.patches_per_group == facts.patches_per_group
    assert host.mrope == (parts["model_type"].startswith("qwen"))
    if facts.per_frame is not None:
        assert adapter.grid(32).num_groups == 32 * facts.per_frame
    assert len(adapter.blocks()) == host.vit_depth
    allowed = [k for k in range(host.vit_depth) if _attaches(model, k)]
    assert allowed == list(range(facts.largest_prune_block + 1)), "prune_block, and no other"


def test_llava_video_is_a_mode_of_the_7b_shape() -> None:
    config = config_of("llava-hf/llava-onevision-qwen2-7b-ov-hf")
    config.text_config.vocab_size = 152064  # the original files have no rows for the converter's two tokens
    VideoLayout(pool="average", newline="grid", time_instruction=True).write(config)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 8_030_348_832
    adapter = make_adapter(model)
    assert adapter.grid(64).num_groups == 64 * 169 and adapter.host.newline_per_row


def _attaches(model: Any, prune_block: int) -> bool:
    try:
        stts.pruning(model, "random-vit", prune_block=prune_block)
    except ValueError as error:
        assert "prune_block" in str(error)
        return False
    return True


def test_siglip_fits_llava_towers_and_no_other() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model("siglip", **SIGLIP))
    assert isinstance(model, SiglipModel) and sum(p.numel() for p in model.parameters()) == 877_960_498
    vision = model.vision_model
    source = SiglipSource("siglip-so400m", vision.post_layernorm, vision.head, model.text_model, None)
    source.check(make_adapter(on_meta("llava-hf/llava-onevision-qwen2-7b-ov-hf")).host)
    with pytest.raises(ValueError, match="width 1152"):
        source.check(make_adapter(on_meta("Qwen/Qwen2.5-VL-7B-Instruct")).host)
