"""A small stock LLaVA-OneVision for ShapesQA, written as an ordinary Hugging Face folder.

Nothing here is a model of ours: the class, the processor and the file format are transformers' own; only the sizes are
small and the vocabulary is that of ShapesQA. `configs/shapes_pretrain_small.yaml` trains it (`shapes_pretrain.yaml` on
larger frames), and a real checkpoint takes its place by changing one line.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PreTrainedTokenizerFast,
)

from stts.data.shapes.clips import vocabulary
from stts.files import new_folder
from stts.progress import no_bars

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<video> {% elif part['type'] == 'image' %}<image> "
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
_SPECIAL = ("<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")


@dataclass(frozen=True, kw_only=True)
class SmallVlmConfig:
    """Sizes of the small VLM. The defaults let methods differ: 9 tokens a frame, 6 ViT blocks, 8 LLM layers."""

    image_size: int = 48
    """Pixels per side."""
    patch_size: int = 8
    """Pixels per side; 48 / 8 gives 6 x 6 patches, which the connector pools to 3 x 3 tokens."""
    vit_width: int = 64
    vit_blocks: int = 6
    vit_heads: int = 4
    vit_mlp: int = 128
    llm_width: int = 96
    llm_layers: int = 8
    llm_heads: int = 4
    llm_kv_heads: int = 2
    llm_mlp: int = 192
    seed: int = 0
    start: Path | None = None
    """A small VLM of the same widths and depths to begin with, of any frame size: words keep their vectors, position
    embeddings are interpolated, everything else is copied."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")


def write_small_vlm(out: str | Path, config: SmallVlmConfig | None = None, **sizes: Any) -> Path:
    """Write an untrained small LLaVA-OneVision (model, processor, word-level tokenizer) to the folder `out`.

    The same config and seed give the same bytes. An existing folder is refused; the folder appears whole or not at all.
    Raises ValueError for a `start` of other widths, depths or patch size.
    """
    config = config or SmallVlmConfig(**sizes)
    out = Path(out)
    with new_folder(out) as part:
        processor = _processor(config)
        model = _model(config, processor.tokenizer)
        if config.start is not None:
            _begin_with(model, processor.tokenizer, config.start)
        with no_bars(model.get_memory_footprint()):
            model.save_pretrained(part)
        processor.save_pretrained(part)
    return out


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*_SPECIAL, "user", "assistant", "system", *vocabulary()]
    description: dict[
        str, Any
    ] = {  # one word, one token; serialised by hand because that is all the tokenizer there is
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {w: i for i, w in enumerate(dict.fromkeys(words))},
            "unk_token": "<unk>",
        },
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "tokenizer.json"
        path.write_text(json.dumps(description))
        return PreTrainedTokenizerFast(
            tokenizer_file=str(path),
            unk_token="<unk>",
            pad_token="<|endoftext|>",
            eos_token="<|im_end|>",
            extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
            additional_special_tokens=["<|im_start|>"],
            model_max_length=32768,
        )


def _processor(config: SmallVlmConfig) -> LlavaOnevisionProcessor:
    side = {"height": config.image_size, "width": config.image_size}
    pinpoints = [[h * config.image_size, w * config.image_size] for h in (1, 2) for w in (1, 2)]
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=pinpoints, **half),
        tokenizer=_tokenizer(),
        video_processor=LlavaOnevisionVideoProcessor(size=side, do_sample_frames=False, **half),
        num_image_tokens=(config.image_size // config.patch_size) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def _model(config: SmallVlmConfig, tokenizer: PreTrainedTokenizerFast) -> LlavaOnevisionForConditionalGeneration:
    text = {
        "model_type": "qwen2",
        "hidden_size": config.llm_width,
        "intermediate_size": config.llm_mlp,
        "num_hidden_layers": config.llm_layers,
        "num_attention_heads": config.llm_heads,
        "num_key_value_heads": config.llm_kv_heads,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": config.vit_width,
        "intermediate_size": config.vit_mlp,
        "num_attention_heads": config.vit_heads,
        "num_hidden_layers": config.vit_blocks,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "vision_use_head": False,
    }
    pinpoints = [[h * config.image_size, w * config.image_size] for h in (1, 2) for w in (1, 2)]
    vlm_config = LlavaOnevisionConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlavaOnevisionForConditionalGeneration(vlm_config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


@torch.no_grad()
def _begin_with(model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, start: Path) -> None:
    """Fill `model` with the weights of the folder `start`, word by word and place by place."""
    old_model = LlavaOnevisionForConditionalGeneration.from_pretrained(start)
    old_words = PreTrainedTokenizerFast.from_pretrained(start).get_vocab()
    weights, old = model.state_dict(), old_model.state_dict()
    for name, weight in weights.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            for word, row in tokenizer.get_vocab().items():
                if word in old_words:
                    weight[row] = old[name][old_words[word]]
        elif name.endswith("position_embedding.weight"):
            side, old_side = (round(len(table) ** 0.5) for table in (weight, old[name]))
            grid_1DHW = old[name].T.reshape(1, -1, old_side, old_side)
            wider = torch.nn.functional.interpolate(grid_1DHW, size=(side, side), mode="bicubic", align_corners=False)
            weight.copy_(wider[0].flatten(1).T)
        elif name not in old or old[name].shape != weight.shape:
            old_shape = tuple(old[name].shape) if name in old else "missing"
            raise ValueError(
                f"start={start}: {name} is {old_shape}, expected {tuple(weight.shape)}; give the widths, depths and "
                "patch size of that folder"
            )
        else:
            weight.copy_(old[name])
