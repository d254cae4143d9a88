"""Tiny stock models of every family with a free or fixed resolution, as folders: ShapesQA's words, released templates.

The templates write what the released ones write: Qwen2.5-VL a system turn where there is none, Molmo2 all media first
and the end of an answer only where the next question starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from stts.data.shapes.clips import vocabulary
from tests.models.families import molmo2_tiny, qwen_tiny, test_internvl

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "molmo2", "internvl")
_QWEN = (
    "{% for message in messages %}SYSTEM<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nyou are a helpful assistant<|im_end|>\n"
    "{% endif %}"
)
_INTERNVL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<video>\n{% elif part['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_MOLMO2 = (
    "{% for message in messages %}{% for part in message['content'] if part['type'] != 'text' %}"
    "{{ '<|' + part['type'] + '|>' }}{% endfor %}{% endfor %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% if not loop.first %}<|im_end|>\n{% endif %}<|im_start|>user\n"
    "{% else %} <|im_start|>assistant\n{% endif %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% if message['role'] == 'user' %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_family(family: str, folder: Path) -> Path:
    """Model, processor and tokenizer of the family's own classes, saved to `folder`."""
    folder.mkdir(parents=True)
    if family == "molmo2":
        extra = [f"<{name}>" for name in molmo2_tiny.EXTRA.split()]
        tokenizer = _tokenizer(folder, ["<|im_start|>", "<|im_end|>"], extra)
        return molmo2_tiny.write_molmo2(folder, tokenizer, _MOLMO2)
    if family == "internvl":
        special = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
        return _write(folder, *test_internvl.make(tokenizer=_tokenizer(folder, special, []), template=_INTERNVL))
    vision: dict[str, dict[str, Any]] = {
        "qwen2_5_vl": {"window_size": 16, "fullatt_block_indexes": [1, 4, 7], "tokens_per_second": 2},
        "qwen3_vl": {"deepstack_visual_indexes": [5, 6], "num_position_embeddings": 36},
    }
    template = _QWEN.replace("SYSTEM", _SYSTEM if family == "qwen2_5_vl" else "")
    tokenizer = _tokenizer(folder, qwen_tiny.SPECIAL, [])
    return _write(folder, *qwen_tiny.make(family, folder, tokenizer, template, **vision[family]))


def _write(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _tokenizer(folder: Path, special: list[str], last: list[str]) -> PreTrainedTokenizerFast:
    """One word, one token, digits and punctuation alone; `last` behind everything else."""
    words = ["user", "assistant", "system", *vocabulary(), *"0123456789.<>", "seconds"]
    vocab = dict.fromkeys(["<pad>", "<unk>", *special, *words, *last])
    description: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    split = {"type": "Split", "pattern": {"Regex": r"\d|[.<>]"}, "behavior": "Isolated", "invert": False}
    description["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, split]}
    ids = {word: number for number, word in enumerate(vocab)}
    description["model"] = {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"}
    description |= {"version": "1.0", "added_tokens": []}
    file = folder / "words.json"
    file.write_text(json.dumps(description))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>",
        additional_special_tokens=[*special, *last], model_max_length=4096,
    )  # fmt: skip
