"""The one maker of tiny random models: a config shrunk, with a processor of the family's own class.

`stts fit --dry-run` rehearses a checkpoint with it in seconds on a CPU, tests and benchmarks compare families with it.
What decides whether a run is possible stays: the family with its processor class, the depth of the tower and the blocks
its connector reads (so `prune_block` means the same), windows, deepstack, the layout of videos. Widths, LLM layers,
resolution and vocabulary shrink. Tokenizer and chat template are ours and know the words of ShapesQA, unless given.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from stts.data.shapes.clips import vocabulary
from stts.files import new_folder
from stts.models.families.base import Adapter, TinySizes, adapter_class
from stts.progress import no_bars

_CHAT = ("<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>")


def write_tiny(out: str | Path, config: PretrainedConfig, **options: Any) -> Path:
    """Write `make_tiny(config, **options)` to the new folder `out`.

    It appears whole or not at all. ValueError for a family without an adapter, or a folder that is not empty."""
    model, processor = make_tiny(config, **options)
    with new_folder(Path(out)) as part:
        with no_bars(model.get_memory_footprint()):
            model.save_pretrained(part)
        processor.save_pretrained(part)
    return Path(out)


def make_tiny(
    config: PretrainedConfig,
    *,
    sizes: TinySizes | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    template: str | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A random fp32 model of this config's family, in eval mode, and its processor.

    sizes: of the model. tokenizer: one that has the family's visual tokens, behind all others where the head has no
    rows for them. template: of a chat. ValueError for a family without an adapter."""
    adapter = adapter_class(config.model_type)
    tokenizer = tokenizer or make_tokenizer(adapter)
    small = shrink_config(config, tokenizer, sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(small, dtype=torch.float32)
    processor = adapter.tiny_processor(small, tokenizer)
    processor.chat_template = template or _template(adapter)
    adapter.prepare_processor(processor, small)
    return model.eval(), processor


def shrink_config(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast, sizes: TinySizes | None = None
) -> PretrainedConfig:
    """The same config with small sizes and the ids of this tokenizer."""
    sizes = sizes or TinySizes()
    small, adapter = copy.deepcopy(config), adapter_class(config.model_type)
    text: Any = small.text_config
    text.hidden_size, text.intermediate_size = sizes.width, sizes.mlp
    text.num_attention_heads, text.num_key_value_heads = 2 * sizes.heads, sizes.heads
    text.num_hidden_layers = min(sizes.llm_layers, text.num_hidden_layers)
    text.vocab_size, text.bos_token_id = len(tokenizer), None
    text.eos_token_id, text.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if hasattr(text, "head_dim"):
        text.head_dim = sizes.width // (2 * sizes.heads)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    if "mrope_section" in text.rope_parameters:
        half = sizes.width // (4 * sizes.heads)
        text.rope_parameters = text.rope_parameters | {"mrope_section": [half // 2, half // 4, half // 4]}
    adapter.tiny_config(small, sizes)
    for name, token in adapter.token_ids.items():
        setattr(small, name, tokenizer.convert_tokens_to_ids(token))
    small.dtype = torch.float32
    return small


def make_tokenizer(adapter: type[Adapter]) -> PreTrainedTokenizerFast:
    """One word, one token: those of ShapesQA, and the visual tokens of a family behind them."""
    visual = list(adapter.token_ids.values())
    for text in adapter.media_text:
        rest = text
        for token in visual:
            rest = rest.replace(token, "")
        visual += [text] if rest else []
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
            bos_token="<|endoftext|>",  # some processors put it in front
            additional_special_tokens=["<|im_start|>", *visual],
            model_max_length=32768,
        )


def _template(adapter: type[Adapter]) -> str:
    video, image = adapter.media_text
    return (
        "{% for message in messages %}<|im_start|> {{ message['role'] }} "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        f"{{% if part['type'] == 'video' %}}{video} {{% elif part['type'] == 'image' %}}{image} "
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    )
