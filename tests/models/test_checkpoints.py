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
from stts.models.base import make_adapter
from stts.models.signals import SiglipSource
from stts.pruners.base import HostInfo

Parts = dict[str, Any]
ROPE: Parts = {"rope_type": "default"}


def tower(layers: int) -> Parts:
    """SigLIP so400m/14-384; LLaVA checkpoints leave its last block out, and the head with it."""
    return {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": layers, "image_size": 384, "patch_size": 14,
        "vision_use_head": layers == 27,
    }  # fmt: skip


def onevision(d: int, mlp: int, layers: int, heads: int, kv: int, rows: int, tied: bool) -> Parts:
    text = {
        "model_type": "qwen2", "hidden_size": d, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": rows,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
        "rope_parameters": {**ROPE, "rope_theta": 1e6}, "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    return {
        "model_type": "llava_onevision", "text_config": text, "vision_config": tower(26),
        "image_token_index": 151646, "video_token_index": 151647, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "tie_word_embeddings": tied,
    }  # fmt: skip


IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652}
IDS |= {"vision_end_token_id": 151653}


def qwen25(d: int, mlp: int, layers: int, heads: int, kv: int, rows: int, tied: bool) -> Parts:
    text = {
        "model_type": "qwen2_5_vl_text", "hidden_size": d, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": rows,
        "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
        "rope_parameters": {**ROPE, "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "model_type": "qwen2_5_vl_vision", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
        "num_heads": 16, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "tokens_per_second": 2, "window_size": 112, "out_hidden_size": d,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    return {
        "model_type": "qwen2_5_vl",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": tied,
        **IDS,
    }


def qwen3(d: int, mlp: int, tied: bool, depth: int, width: int, vision_mlp: int, deepstack: list[int]) -> Parts:
    text = {
        "model_type": "qwen3_vl_text", "hidden_size": d, "intermediate_size": mlp, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
        "bos_token_id": 151643, "eos_token_id": 151645,
        "rope_parameters": {**ROPE, "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "model_type": "qwen3_vl_vision", "depth": depth, "hidden_size": width, "intermediate_size": vision_mlp,
        "num_heads": 16, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "num_position_embeddings": 2304, "out_hidden_size": d, "deepstack_visual_indexes": deepstack,
    }  # fmt: skip
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": tied, **IDS}


def molmo2(d: int, mlp: int, theta: float) -> Parts:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72, "hidden_size": 1152}
    return {
        "model_type": "molmo2", "tie_word_embeddings": False, "image_patch_id": 151938,
        "image_start_token_id": 151936, "image_end_token_id": 151937, "low_res_image_start_token_id": 151940,
        "frame_start_token_id": 151943, "frame_end_token_id": 151944,
        "text_config": {
            "hidden_size": d, "intermediate_size": mlp, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "additional_vocab_size": 128,
            "attention_bias": False, "qk_norm_type": "qwen3", "max_position_embeddings": 36864,
            "rms_norm_eps": 1e-6, "rope_parameters": {**ROPE, "rope_theta": theta},
        },
        "adapter_config": {
            "vision_feature_layer": [24, 18], "intermediate_size": mlp, "text_hidden_size": d,
            "hidden_act": "silu", **heads,
        },
        "vision_config": {
            "intermediate_size": 4304, "num_hidden_layers": 25, "image_size": [378, 378], "patch_size": 14,
            "num_position_embeddings": 729, **heads,
        },
    }  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What must come out."""

    parts: Parts
    parameters: int
    taps: tuple[int, ...]
    largest_prune_block: int
    """The drop after block prune_block + 1 may come no later than the lowest tap, and two blocks must follow."""
    per_frame: int | None
    """Groups of a frame; None: by resolution."""
    patches_per_group: int


CHECKPOINTS = {
    "llava-onevision-0.5b": Facts(
        onevision(896, 4864, 24, 14, 2, 152000, True), 893_675_552, (25,), 23, 196, 4
    ),
    "llava-onevision-7b": Facts(
        onevision(3584, 18944, 28, 28, 4, 152128, False), 8_030_807_584, (25,), 23, 196, 4
    ),
    "llava-video-7b": Facts(
        onevision(3584, 18944, 28, 28, 4, 152064, False), 8_030_348_832, (25,), 23, 196, 4
    ),
    "qwen2.5-vl-3b": Facts(qwen25(2048, 11008, 36, 16, 2, 151936, True), 3_754_622_976, (31,), 29, None, 4),
    "qwen2.5-vl-7b": Facts(qwen25(3584, 18944, 28, 28, 4, 152064, False), 8_292_166_656, (31,), 29, None, 4),
    "qwen3-vl-4b": Facts(
        qwen3(2560, 9728, True, 24, 1024, 4096, [5, 11, 17]), 4_437_815_808, (5, 11, 17, 23), 3, None, 4
    ),
    "qwen3-vl-8b": Facts(
        qwen3(4096, 12288, False, 27, 1152, 4304, [8, 16, 24]), 8_767_123_696, (8, 16, 24, 26), 6, None, 4
    ),
    "molmo2-4b": Facts(molmo2(2560, 9728, 5e6), 4_850_869_200, (24, 18), 16, 81, 9),
    "molmo2-8b": Facts(molmo2(4096, 12288, 1e6), 8_661_703_120, (24, 18), 16, 81, 9),
}  # fmt: skip


def on_meta(parts: Parts, auto: Any = AutoModelForImageTextToText) -> Any:
    rest = {name: value for name, value in parts.items() if name != "model_type"}
    config = AutoConfig.for_model(parts["model_type"], **rest)
    with torch.device("meta"):
        return auto.from_config(config).eval()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_an_adapter_reads_every_published_shape(name: str) -> None:
    facts = CHECKPOINTS[name]
    model = on_meta(facts.parts)
    assert sum(p.numel() for p in model.parameters()) == facts.parameters, "the checkpoint's own shapes"
    adapter = make_adapter(model)
    host = adapter.host
    vision, text = facts.parts["vision_config"], facts.parts["text_config"]
    assert adapter.taps() == facts.taps and host.lowest_tap == min(facts.taps)
    assert host.vit_depth == vision.get("depth", vision.get("num_hidden_layers"))
    assert (host.vit_width, host.vit_mlp) == (vision["hidden_size"], vision["intermediate_size"])
    assert (host.llm_width, host.llm_layers) == (text["hidden_size"], text["num_hidden_layers"])
    assert host.patches_per_group == facts.patches_per_group
    assert host.mrope == (facts.parts["model_type"].startswith("qwen"))
    if facts.per_frame is not None:
        assert adapter.grid(32).num_groups == 32 * facts.per_frame
    assert len(adapter.blocks()) == host.vit_depth
    allowed = [k for k in range(host.vit_depth) if _attaches(model, k)]
    assert allowed == list(range(facts.largest_prune_block + 1)), "prune_block, and no other"


def _attaches(model: Any, prune_block: int) -> bool:
    try:
        stts.pruning(model, "random-vit", prune_block=prune_block)
    except ValueError as error:
        assert "prune_block" in str(error)
        return False
    return True


def test_siglip_fits_llava_towers_and_no_other() -> None:
    text = {
        "model_type": "siglip_text_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "vocab_size": 32000, "max_position_embeddings": 64,
    }  # fmt: skip
    model = on_meta({"model_type": "siglip", "text_config": text, "vision_config": tower(27)}, AutoModel)
    assert isinstance(model, SiglipModel) and sum(p.numel() for p in model.parameters()) == 877_960_498
    vision = model.vision_model
    source = SiglipSource("siglip-so400m", vision.post_layernorm, vision.head, model.text_model, None)
    source.check(_host("llava-onevision-7b"))
    with pytest.raises(ValueError, match="width 1152"):
        source.check(_host("qwen2.5-vl-7b"))


def _host(name: str) -> HostInfo:
    return make_adapter(on_meta(CHECKPOINTS[name].parts)).host
