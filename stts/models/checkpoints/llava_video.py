"""LLaVA-Video's original files as an ordinary folder of stock classes.

`lmms-lab/LLaVA-Video-7B-Qwen2` is written for the authors' own code: other tensor names, a config without the sizes of
its tower, no processor. Its parts are those of LLaVA-OneVision, so one conversion makes it a
`LlavaOnevisionForConditionalGeneration` whose config asks for LLaVA-Video's layout (`families/llava_layout.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AddedToken,
    AutoTokenizer,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerBase,
)

from stts.files import new_folder
from stts.models.families.llava_layout import Pool, VideoLayout

SO400M: Mapping[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
"""Tower of the 7B: SigLIP so400m/14 at 384 pixels without its last block and pooling head."""
CHAT_TEMPLATE = (  # ChatML, with the system turn of the original prompt where the conversation has none
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<' + part['type'] + '>\n' }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_RENAMED = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.image_newline", "model.image_newline"),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("lm_head.", "lm_head."),
)
_TEXT_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
)


def module_name(name: str, num_blocks: int) -> str | None:
    """Where a tensor of the original files belongs in the stock class; None for the parts of SigLIP it does not use
    (blocks from `num_blocks` on, the pooling head). ValueError for a name no original file has."""
    for old, new in _RENAMED:
        if name.startswith(old):
            name = new + name[len(old) :]
            block = re.match(r"model\.vision_tower\.encoder\.layers\.(\d+)\.", name)
            unused = name.startswith("model.vision_tower.head.") or (block and int(block[1]) >= num_blocks)
            return None if unused else name
    raise ValueError(
        f"tensor {name!r} is none of LLaVA-Video's; expected names starting with {[old for old, _ in _RENAMED]}"
    )


def convert_llava_video(
    folder: str | Path, out: str | Path, *, pool: Pool = "average", vision_config: Mapping[str, Any] = SO400M
) -> Path:
    """Read LLaVA-Video's original files in `folder` and write an ordinary model folder to `out`, for `load_vlm`.

    pool: 'average' as the authors evaluate (182 tokens a frame), or 'bilinear' as their training script has it (210).
    vision_config: sizes of the tower, which the files do not tell.

    The folder appears whole or not at all. ValueError: `out` is not empty, `folder` holds another model or no
    tokenizer, or a tensor is missing, unknown or of another shape."""
    folder, out = Path(folder), Path(out)
    with new_folder(out) as part:
        model, config, tokenizer = _converted(folder, pool, vision_config)
        model.save_pretrained(part)
        _processor(config, tokenizer).save_pretrained(part)
    return out


def _converted(folder: Path, pool: Pool, vision_config: Mapping[str, Any]) -> tuple[Any, Any, PreTrainedTokenizerBase]:
    """The stock model with the weights of `folder`, its config and its tokenizer."""
    original = _original_config(folder)
    tokenizer = _tokenizer(folder, original["vocab_size"])
    config = _config(original, vision_config, tokenizer)
    VideoLayout(pool=pool, newline="grid", time_instruction=bool(original.get("add_time_instruction", True))).write(
        config
    )
    with torch.device("meta"):
        model = LlavaOnevisionForConditionalGeneration(config)
    _fill(model, folder, vision_config["num_hidden_layers"])
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, config, tokenizer


def _original_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    original: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    architectures = original.get("architectures")
    if architectures != ["LlavaQwenForCausalLM"]:
        raise ValueError(
            f"{folder} holds {architectures or 'no config.json'}, expected the original files of LLaVA-Video "
            "(LlavaQwenForCausalLM); folders of stock classes need no conversion"
        )
    if lacking := [name for name in (*_TEXT_SIZES, "rope_theta") if name not in original]:
        raise ValueError(f"{file} lacks {lacking}; fetch the original file again")
    if original.get("rope_scaling"):
        raise ValueError(f"{file} has rope_scaling={original['rope_scaling']!r}, which no LLaVA-Video has; set it null")
    return original


def _config(
    original: Mapping[str, Any], vision_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> LlavaOnevisionConfig:
    tied, image_size = original.get("tie_word_embeddings", False), vision_config["image_size"]
    text = {name: original[name] for name in _TEXT_SIZES} | {
        "model_type": "qwen2",
        "tie_word_embeddings": tied,
        "rope_parameters": {"rope_type": "default", "rope_theta": original["rope_theta"]},
        "bos_token_id": original.get("bos_token_id"),
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlavaOnevisionConfig(
        text_config=text,
        vision_config=dict(vision_config),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[h * image_size, w * image_size] for h in range(1, 7) for w in range(1, 7)],
        tie_word_embeddings=tied,
    )


def _fill(model: LlavaOnevisionForConditionalGeneration, folder: Path, num_blocks: int) -> None:
    """Give a model on the meta device the tensors of the original files, as they are."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if new := module_name(name, num_blocks):
                tensors[new] = tensor
    own = model.state_dict()
    wrong = [f"missing {name}" for name in own if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in own]
    wrong += [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        for name, tensor in tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(
            f"{folder}/*.safetensors do not fit the config: {', '.join(wrong[:5])}{' ...' * (len(wrong) > 5)} "
            f"({len(wrong)} in all); fetch all files of the checkpoint, and give the sizes of another tower as "
            "vision_config"
        )
    model.load_state_dict(tensors, assign=True)
    model.config.dtype = next(iter(tensors.values())).dtype


def _tokenizer(folder: Path, num_rows: int) -> PreTrainedTokenizerBase:
    """The tokenizer of the files and two media markers, which the original code knows without tokens."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} has no tokenizer ({error}); copy the tokenizer files of Qwen/Qwen2-7B-Instruct there"
        ) from error
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<image>", "<video>")])
    if len(tokenizer) > num_rows:
        raise ValueError(
            f"the tokenizer of {folder} has {len(tokenizer)} tokens, the embedding {num_rows} rows; copy the tokenizer "
            "that belongs to the checkpoint"
        )
    return tokenizer


def _processor(config: LlavaOnevisionConfig, tokenizer: PreTrainedTokenizerBase) -> LlavaOnevisionProcessor:
    vision = config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=config.image_grid_pinpoints, **half
        ),
        tokenizer=tokenizer,
        video_processor=LlavaOnevisionVideoProcessor(size=size, do_sample_frames=False, **half),
        num_image_tokens=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
