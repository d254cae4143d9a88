"""A checkpoint shrunk to a tiny random one of the same family, to rehearse a training run in seconds on a CPU.

What decides whether a run is possible stays: the family with its processor class, the depth of the tower and the blocks
its connector reads (so `prune_block` means the same), windows, deepstack, the layout of videos. Widths, LLM layers,
resolution and vocabulary shrink. Tokenizer and chat template are ours and know the words of ShapesQA.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from stts.data.shapes.clips import vocabulary
from stts.models.families.base import check_family

_WIDTH, _HEADS, _MLP = 32, 2, 48
_LLM_LAYERS = 4  # more than the three that deepstack writes to
_SIDE = 7  # patches, where the resolution is fixed: odd, so that windows overlap or have holes, as 27 does
_UNITS = 3  # tokens per side of a square frame, where it is free
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_CHAT = ("<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>")
_MARKERS = {  # what a chat template writes for a video and for an image
    "llava_onevision": ("<video>", "<image>"),
    "qwen2_5_vl": ("<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"),
    "qwen3_vl": ("<|vision_start|><|video_pad|><|vision_end|>", "<|vision_start|><|image_pad|><|vision_end|>"),
    "molmo2": ("<|video|>", "<|image|>"),
}
_LLAVA_IDS = {"image_token_index": "<image>", "video_token_index": "<video>"}
_QWEN_IDS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
_MOLMO2_IDS = {
    "image_patch_id": "<im_patch>",
    "image_start_token_id": "<im_start>",
    "image_end_token_id": "<im_end>",
    "low_res_image_start_token_id": "<low_res_im_start>",
    "image_low_res_id": "<im_low>",
    "image_col_id": "<im_col>",
    "frame_start_token_id": "<frame_start>",
    "frame_end_token_id": "<frame_end>",
}
_IDS = {"llava_onevision": _LLAVA_IDS, "qwen2_5_vl": _QWEN_IDS, "qwen3_vl": _QWEN_IDS, "molmo2": _MOLMO2_IDS}


def write_shrunk(out: str | Path, config: PretrainedConfig, seed: int = 0) -> Path:
    """Write a tiny random model of this config's family, with its processor, to the new folder `out`.

    It appears whole or not at all. ValueError for a family without an adapter, or a folder that is not empty."""
    check_family(config.model_type)
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty; choose another folder or remove it")
    tokenizer = _tokenizer(config.model_type)
    small = shrink_config(config, tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(small, dtype=torch.float32)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        staged = Path(scratch) / out.name
        model.save_pretrained(staged)
        _processor(small, tokenizer).save_pretrained(staged)
        if out.exists():
            out.rmdir()
        os.replace(staged, out)
    return out


def shrink_config(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The same config with small sizes and the ids of this tokenizer."""
    small = copy.deepcopy(config)
    family, text, vision = small.model_type, small.text_config, small.vision_config
    layers = min(_LLM_LAYERS, text.num_hidden_layers)
    _set(
        text,
        hidden_size=_WIDTH,
        intermediate_size=_MLP,
        num_hidden_layers=layers,
        num_attention_heads=2 * _HEADS,
        num_key_value_heads=_HEADS,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if hasattr(text, "head_dim"):
        text.head_dim = _WIDTH // (2 * _HEADS)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    if "mrope_section" in text.rope_parameters:
        half = _WIDTH // (4 * _HEADS)
        text.rope_parameters = text.rope_parameters | {"mrope_section": [half // 2, half // 4, half // 4]}
    _set(vision, hidden_size=_WIDTH, intermediate_size=_MLP)
    side = _SIDE * vision.patch_size
    if family == "llava_onevision":
        pinpoints = [[h * side, w * side] for h in (1, 2) for w in (1, 2)]
        _set(vision, num_attention_heads=_HEADS, image_size=side)
        small.image_grid_pinpoints = pinpoints
    elif family == "molmo2":
        heads = {"num_attention_heads": _HEADS, "num_key_value_heads": _HEADS, "head_dim": _WIDTH // _HEADS}
        _set(vision, image_size=[side, side], num_position_embeddings=_SIDE**2, **heads)
        _set(small.adapter_config, hidden_size=_WIDTH, intermediate_size=_MLP, text_hidden_size=_WIDTH, **heads)
        # the head has no rows for visual tokens, which come last
        text.additional_vocab_size = len(_IDS["molmo2"]) + 2
        text.vocab_size -= text.additional_vocab_size
    else:
        _set(vision, num_heads=_HEADS, out_hidden_size=_WIDTH)
    for name, token in _IDS[family].items():
        setattr(small, name, tokenizer.convert_tokens_to_ids(token))
    small.dtype = torch.float32
    return small


def _set(config: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(config, name, value)


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One word, one token; visual tokens last."""
    visual = list(dict.fromkeys([*_IDS[family].values(), *(() if "qwen" in family else _MARKERS[family])]))
    words = [*_CHAT, "user", "assistant", "system", *vocabulary(), *visual]
    description: dict[str, Any] = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    description |= {"version": "1.0", "added_tokens": [], "normalizer": {"type": "Lowercase"}}
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    description["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    description["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "tokenizer.json"
        file.write_text(json.dumps(description))
        return PreTrainedTokenizerFast(
            tokenizer_file=str(file),
            unk_token="<unk>",
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
            bos_token="<|endoftext|>" if family == "molmo2" else None,
            additional_special_tokens=["<|im_start|>", *visual],
            model_max_length=32768,
        )


def _template(family: str) -> str:
    video, image = _MARKERS[family]
    return (
        "{% for message in messages %}<|im_start|> {{ message['role'] }} "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'video' %}}{video} {{% elif part['type'] == 'image' %}}{image} "
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    )


def _processor(config: Any, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
    family, vision, template = config.model_type, config.vision_config, _template(config.model_type)
    if family == "llava_onevision":
        side = {"height": vision.image_size, "width": vision.image_size}
        return LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(
                size=side, image_grid_pinpoints=config.image_grid_pinpoints, **_HALF
            ),
            tokenizer=tokenizer,
            video_processor=LlavaOnevisionVideoProcessor(size=side, do_sample_frames=False, **_HALF),
            num_image_tokens=_SIDE**2,
            vision_feature_select_strategy="full",
            chat_template=template,
        )
    if family == "molmo2":  # which older transformers do not have
        from transformers import Molmo2ImageProcessor, Molmo2Processor, Molmo2VideoProcessor

        height, width = vision.image_size
        common = {"size": {"height": height, "width": width}, "patch_size": vision.patch_size}
        common |= {"do_rescale": True, "do_normalize": True}
        images = Molmo2ImageProcessor(max_crops=2, overlap_margins=[1, 1], **common)
        videos = Molmo2VideoProcessor(do_sample_frames=False, **common)
        return Molmo2Processor(images, videos, tokenizer, chat_template=template)
    pixels = (_UNITS * vision.patch_size * vision.spatial_merge_size) ** 2
    qwen3 = family == "qwen3_vl"
    shape = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    # Qwen3-VL's limits are pixels of the whole video, Qwen2.5-VL's of a frame
    size = {"shortest_edge": pixels * (8 if qwen3 else 1), "longest_edge": pixels * 64}
    video_class, whole_class = (
        (Qwen3VLVideoProcessor, Qwen3VLProcessor) if qwen3 else (Qwen2VLVideoProcessor, Qwen2_5_VLProcessor)
    )
    more = {"cap_pixels_per_frame": False}  # a total limit instead, as the checkpoints were trained
    return whole_class(
        image_processor=Qwen2VLImageProcessor(size=size, **shape),
        tokenizer=tokenizer,
        video_processor=video_class(size=size, do_sample_frames=False, **more, **shape),
        chat_template=template,
    )
