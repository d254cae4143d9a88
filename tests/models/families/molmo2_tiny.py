"""A tiny random Molmo2: two feature layers (one counted from the end), two kinds of rotary tables, and frames of 7 x 7
patches, so that pooling windows at the edge have holes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Molmo2Config,
    PreTrainedTokenizerFast,
)

from stts.models.families.base import TinySizes
from stts.models.families.tiny import make_tiny
from tests.models.families import family_laws as laws
from tests.models.pruning.test_llm_layers import Cut, Cuts

SIDE, CELLS, LLM_LAYERS = 7, 9, 6
WORDS = "what colour is the circle squares cross there a how many which ? user assistant"
EXTRA = "im_start im_end im_patch im_col low_res_im_start im_low frame_start frame_end |image| |video|"
ROWS = ["3 what colour is the circle ?", "- how many squares is there ?", "4 is there a cross ?"]
EVEN = ["4 what colour is the circle ?", *ROWS[1:]]
"""Every video can be halved twice."""
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|video|>{% elif part['type'] == 'image' %}<|image|>"
    "{% else %} user {{ part['text'] }} {% endif %}{% endfor %}{% endfor %} assistant "
)


def make_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """One word, one token; visual tokens behind the words, as in the releases, where the head has no rows for them."""
    words = ["<pad>", "<unk>", "<eos>", *WORDS.split(), *(f"{tenths / 10:.1f}" for tenths in range(0, 60, 5))]
    extra = [f"<{name}>" for name in EXTRA.split()]
    description: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    description |= {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}}
    vocab = {word: number for number, word in enumerate([*words, *extra])}
    description["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    file.write_text(json.dumps(description))
    return PreTrainedTokenizerFast(
        tokenizer_file=str(file), unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", bos_token="<eos>",
        additional_special_tokens=extra,
    )  # fmt: skip


def write_molmo2(folder: Path, tokenizer: Any = None, template: str = TEMPLATE) -> Path:
    """Model and processor of the stock classes; visual tokens are the last words of a tokenizer."""
    config = Molmo2Config(
        vision_config={"num_hidden_layers": 8},
        adapter_config={"vision_feature_layer": [7, -3]},
        text_config={
            "num_hidden_layers": LLM_LAYERS,
            "rope_scaling_layers": [0, 3, 4],
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
        },
    )
    tokenizer = tokenizer or make_tokenizer(folder / "words.json")
    sizes = TinySizes(llm_layers=LLM_LAYERS, side=SIDE)
    model, processor = make_tiny(config, sizes=sizes, tokenizer=tokenizer, template=template)
    laws.stir(model).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_inputs(processor: Any, rows: Sequence[str], *, padding_side: str = "right") -> Any:
    """Processor outputs; a row starts with the frames of its video, "i" for an image or "-" for neither."""
    texts, videos, images = [], [], []
    for row in rows:
        rng = np.random.default_rng(len(row))  # the same row shows the same, in any batch
        media, _, question = row.partition(" ")
        kind = "text" if media == "-" else "image" if media == "i" else "video"
        if kind == "video":
            videos.append(rng.integers(0, 255, (int(media), 40, 60, 3), dtype=np.uint8))
        elif kind == "image":
            images.append(rng.integers(0, 255, (150, 300, 3), dtype=np.uint8))
        content = ([{"type": kind}] if kind != "text" else []) + [{"type": "text", "text": question}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}]))
    options = {name: given for name, given in (("videos", videos), ("images", images)) if given}
    return processor(text=texts, padding=True, padding_side=padding_side, return_tensors="pt", **options)


def places_of(model: Any, inputs: Any, frames: Sequence[int]) -> list[Tensor]:
    """Per video, the flat prompt places of its groups."""
    return [torch.tensor(places) for places in laws.video_places(model, inputs, [n * CELLS for n in frames])]


@contextmanager
def masked_dense(model: Any, inputs: Any, lost: dict[int, Tensor]) -> Iterator[None]:
    """The stock model in which layers from `layer` on do not see the keys that are lost (bool B, L) there."""
    length = inputs["input_ids"].shape[1]
    both = inputs["mm_token_type_ids"] == 1
    open_BLL = torch.ones(length, length).tril().bool() | (both[:, :, None] & both[:, None])
    handles = []
    for number, layer in enumerate(model.model.language_model.layers):
        see = inputs["attention_mask"].bool()
        for gone in [lost[k] for k in lost if k <= number]:
            see = see & ~gone
        mask = ((open_BLL & see[:, None]) | torch.eye(length).bool())[:, None]
        handles.append(
            layer.register_forward_pre_hook(
                lambda m, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def cuts(*layers: int) -> tuple[Any, float]:
    """A pruner that halves the groups before each of these LLM layers, and its ratio: their mean share over layers."""
    ends = zip([0, *layers], [*layers, LLM_LAYERS], strict=True)
    ratio = sum(0.5**number * (end - start) for number, (start, end) in enumerate(ends)) / LLM_LAYERS
    return Cuts(tuple(Cut(layer, share=0.5) for layer in layers)), ratio
