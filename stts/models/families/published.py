"""Shapes of the published checkpoints that recipes start from, for planning and rehearsing where nothing is downloaded.

Facts of the checkpoints' own `config.json`; the parameter counts they give are those printed on the public model cards.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

Parts = dict[str, Any]
_ROPE: Parts = {"rope_type": "default"}
_SIGLIP: Parts = {  # so400m/14-384 without its last block
    "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
    "num_hidden_layers": 26, "image_size": 384, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
_QWEN_IDS: Parts = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}  # fmt: skip


def _llava_onevision(width: int, mlp: int, layers: int, heads: int, kv_heads: int, rows: int, tied: bool) -> Parts:
    text = {
        "model_type": "qwen2", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": rows,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
        "rope_parameters": {**_ROPE, "rope_theta": 1e6}, "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    return {
        "model_type": "llava_onevision", "dtype": "float16", "text_config": text, "vision_config": dict(_SIGLIP),
        "image_token_index": 151646, "video_token_index": 151647, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "tie_word_embeddings": tied,
    }  # fmt: skip


def _qwen2_5_vl(width: int, mlp: int, layers: int, heads: int, kv_heads: int, rows: int, tied: bool) -> Parts:
    text = {
        "model_type": "qwen2_5_vl_text", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": rows,
        "max_position_embeddings": 128000, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
        "rope_parameters": {**_ROPE, "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "model_type": "qwen2_5_vl_vision", "depth": 32, "hidden_size": 1280, "intermediate_size": 3420,
        "num_heads": 16, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2, "tokens_per_second": 2,
        "window_size": 112, "out_hidden_size": width, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    return {
        "model_type": "qwen2_5_vl", "dtype": "bfloat16", "text_config": text, "vision_config": vision,
        "tie_word_embeddings": tied, **_QWEN_IDS,
    }  # fmt: skip


def _qwen3_vl(
    width: int, mlp: int, tied: bool, depth: int, vit_width: int, vit_mlp: int, deepstack: list[int]
) -> Parts:
    text = {
        "model_type": "qwen3_vl_text", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
        "bos_token_id": 151643, "eos_token_id": 151645,
        "rope_parameters": {**_ROPE, "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "model_type": "qwen3_vl_vision", "depth": depth, "hidden_size": vit_width, "intermediate_size": vit_mlp,
        "num_heads": 16, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "num_position_embeddings": 2304, "out_hidden_size": width, "deepstack_visual_indexes": deepstack,
    }  # fmt: skip
    return {
        "model_type": "qwen3_vl", "dtype": "bfloat16", "text_config": text, "vision_config": vision,
        "tie_word_embeddings": tied, **_QWEN_IDS,
    }  # fmt: skip


def _qwen3_5(
    width: int,
    mlp: int,
    layers: int,
    heads: int,
    kv_heads: int,
    values: int,
    tied: bool,
    vision: tuple[int, int, int, int],
) -> Parts:
    """values: value heads of the linear layers; vision: depth, width, inner width and heads of the tower."""
    depth, vit_width, vit_mlp, vit_heads = vision
    text = {
        "model_type": "qwen3_5_text", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 256, "vocab_size": 248320,
        "linear_num_key_heads": 16, "linear_num_value_heads": values, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "max_position_embeddings": 262144,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (layers // 4), "tie_word_embeddings": tied,
        "rope_parameters": {
            **_ROPE, "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
            "mrope_interleaved": True,
        },
    }  # fmt: skip
    tower = {
        "model_type": "qwen3_5_vision", "depth": depth, "hidden_size": vit_width, "intermediate_size": vit_mlp,
        "num_heads": vit_heads, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "num_position_embeddings": 2304, "out_hidden_size": width,
    }  # fmt: skip
    return {
        "model_type": "qwen3_5", "dtype": "bfloat16", "text_config": text, "vision_config": tower,
        "tie_word_embeddings": tied, "image_token_id": 248056, "video_token_id": 248057,
        "vision_start_token_id": 248053, "vision_end_token_id": 248054,
    }  # fmt: skip


def _molmo2(width: int, mlp: int, theta: float) -> Parts:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72, "hidden_size": 1152}
    text = {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "additional_vocab_size": 128,
        "attention_bias": False, "qk_norm_type": "qwen3", "max_position_embeddings": 36864, "rms_norm_eps": 1e-6,
        "rope_parameters": {**_ROPE, "rope_theta": theta},
    }  # fmt: skip
    adapter = {
        "vision_feature_layer": [24, 18], "intermediate_size": mlp, "text_hidden_size": width, "hidden_act": "silu",
    }  # fmt: skip
    vision = {
        "intermediate_size": 4304, "num_hidden_layers": 25, "image_size": [378, 378], "patch_size": 14,
        "num_position_embeddings": 729,
    }  # fmt: skip
    return {
        "model_type": "molmo2", "tie_word_embeddings": False, "image_patch_id": 151938,
        "image_start_token_id": 151936, "image_end_token_id": 151937, "low_res_image_start_token_id": 151940,
        "frame_start_token_id": 151943, "frame_end_token_id": 151944, "text_config": text,
        "dtype": "float32",  # of the converter; what the released files hold is not confirmed, so the larger one
        "adapter_config": adapter | heads, "vision_config": vision | heads,
    }  # fmt: skip


def _internvl(llm: str, width: int, mlp: int, layers: int, heads: int, kv_heads: int, rows: int, rope: Parts) -> Parts:
    """With InternViT-300M-448px-V2_5, the tower of all but the largest."""
    text = {
        "model_type": llm, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": rows, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "rope_parameters": rope, "bos_token_id": 151643, "eos_token_id": 151645,
        "max_position_embeddings": 32768 if llm == "qwen2" else 40960,
    }  # fmt: skip
    vision = {
        "model_type": "internvl_vision", "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_hidden_layers": 24, "image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True,
        "norm_type": "layer_norm", "use_qk_norm": False, "use_mean_pooling": True,
    }  # fmt: skip
    return {
        "model_type": "internvl", "dtype": "bfloat16", "text_config": text, "vision_config": vision,
        "image_token_id": 151667 if llm == "qwen2" else 151671, "image_seq_length": 256, "downsample_ratio": 0.5,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
    }  # fmt: skip


def _internvl3(width: int, mlp: int, layers: int, heads: int, kv_heads: int) -> Parts:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    return _internvl("qwen2", width, mlp, layers, heads, kv_heads, 151674, rope)


def _internvl3_5(width: int, mlp: int, layers: int, heads: int) -> Parts:
    parts = _internvl("qwen3", width, mlp, layers, heads, 8, 151936, {**_ROPE, "rope_theta": 1e6})
    parts["text_config"]["head_dim"] = 128
    return parts


PUBLISHED: dict[str, Parts] = {
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": _llava_onevision(896, 4864, 24, 14, 2, 152000, True),
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": _llava_onevision(3584, 18944, 28, 28, 4, 152128, False),
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, False),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(2560, 9728, True, 24, 1024, 4096, [5, 11, 17]),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(4096, 12288, False, 27, 1152, 4304, [8, 16, 24]),
    "Qwen/Qwen3.5-0.8B": _qwen3_5(1024, 3584, 24, 8, 2, 16, True, (12, 768, 3072, 12)),
    "Qwen/Qwen3.5-9B": _qwen3_5(4096, 12288, 32, 16, 4, 32, False, (27, 1152, 4304, 16)),
    "allenai/Molmo2-4B": _molmo2(2560, 9728, 5e6),
    "allenai/Molmo2-8B": _molmo2(4096, 12288, 1e6),
    "OpenGVLab/InternVL3-1B-hf": _internvl3(896, 4864, 24, 14, 2),
    "OpenGVLab/InternVL3-2B-hf": _internvl3(1536, 8960, 28, 12, 2),
    "OpenGVLab/InternVL3-8B-hf": _internvl3(3584, 18944, 28, 28, 4),
    "OpenGVLab/InternVL3_5-1B-HF": _internvl3_5(1024, 3072, 28, 16),
    "OpenGVLab/InternVL3_5-8B-HF": _internvl3_5(4096, 12288, 36, 32),
}
"""By hub id."""


def config_of(model: str, config_file: str | Path | None = None) -> PretrainedConfig:
    """The config of a model folder, of `config_file`, of a checkpoint in the local cache, or of the table above; no
    network is needed. ValueError for a name that is none of these."""
    source = config_file if config_file is not None else model
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True)
    except OSError as error:
        if config_file is None and model in PUBLISHED:
            parts = {name: value for name, value in PUBLISHED[model].items() if name != "model_type"}
            return AutoConfig.for_model(PUBLISHED[model]["model_type"], **parts)
        raise ValueError(
            f"no config of {str(source)!r}: it is no local folder, not in the local cache and not one of "
            f"{', '.join(PUBLISHED)}; give its config.json with --model_config (for a small untrained model, write "
            "the folder first: `stts init --out FOLDER`)"
        ) from error
