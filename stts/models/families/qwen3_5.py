"""Qwen3.5 on stock transformers classes: the tower of Qwen3-VL without deepstack, three of four LLM layers recurrent.

Nothing is read off early blocks of the tower, so a stage inside it may drop after any of them. Those LLM layers have
linear attention (gated delta rule): a recurrent state that takes in token after token, and a convolution over the last
four. So rows are never packed into one (stock torch code would carry one sample's state into the next), padding stands
on the left, and tokens that are dropped before the LLM enter no state.

A stage inside the LLM drops before a layer with attention that has another before it (7, 11, ... of 3, 7, 11, ...), and
sees the attention of that one. Layers before the cut have taken every token into their state already: what is dropped
is gone from deeper layers alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from stts.metrics.cost import VlmShape
from stts.metrics.memory import BlockShape
from stts.models.families.base import TinySizes, linear_layers
from stts.models.families.qwen_vl import Qwen3Vision
from stts.pruners.base import HostInfo


class Qwen3_5(Qwen3Vision):
    """Adapter of `Qwen3_5ForConditionalGeneration`.

    Differs from the stock forward pass, beside what `QwenVision` lists: rows are padded on the left inside the LLM,
    whatever the side of the prompt, so that a cache can be continued in both cases.
    """

    family = "qwen3_5"

    @classmethod
    def prepare_processor(cls, processor: ProcessorMixin, config: Any) -> None:
        """A tokenizer of words, that of tiny models, stays one: transformers 5.23 rebuilds every saved tokenizer of
        this family as byte-level BPE, which would lose all words."""
        super().prepare_processor(processor, config)
        tokenizer = processor.tokenizer
        if isinstance(tokenizer, Qwen3_5Tokenizer) and "Ġ" not in tokenizer.get_vocab():  # its mark of a space
            processor.tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer.name_or_path)

    @classmethod
    def vlm_shape(cls, config: Any) -> VlmShape:
        shape = super().vlm_shape(config)
        return replace(shape, llm=replace(shape.llm, output_gate=True))

    @classmethod
    def block_shapes(cls, config: Any) -> tuple[BlockShape, BlockShape]:
        vit, _ = super().block_shapes(config)
        return vit, BlockShape.of_llm(config.text_config, norms_heads=cls.norms_heads, output_gate=True)

    @classmethod
    def tiny_config(cls, config: Any, sizes: TinySizes) -> None:
        super().tiny_config(config, sizes)
        text = config.text_config
        text.linear_key_head_dim = text.linear_value_head_dim = text.head_dim
        text.linear_num_key_heads, text.linear_num_value_heads = sizes.heads, 2 * sizes.heads
        if text.num_hidden_layers - len(linear_layers(text)) < 2:  # so that a stage may act inside it, and early
            layers = ["full_attention", "full_attention", "linear_attention", "full_attention"]
            text.layer_types = layers[: text.num_hidden_layers]
        part = text.head_dim // 8  # all of a small head is rotated, so that three axes have frequencies
        text.rope_parameters |= {"partial_rotary_factor": 1.0, "mrope_section": [2 * part, part, part]}

    @property
    def host(self) -> HostInfo:
        return replace(super().host, llm_linear=linear_layers(self.configs[1]))
