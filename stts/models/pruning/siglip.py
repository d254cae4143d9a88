"""A SigLIP checkpoint whose pooling head and text tower make signals that a VLM's own tower lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, SiglipModel

from stts.pruners.base import HostInfo

CHUNK_BYTES = 256 * 2**20
"""Size of the largest intermediate tensor; frames are taken so many at a time."""


@dataclass(frozen=True, eq=False)
class SiglipSource:
    """The parts of a SigLIP checkpoint that VLM checkpoints built on its tower leave out."""

    name: str
    post_layernorm: nn.Module
    head: Any
    text_model: Any
    tokenizer: Any

    def check(self, host: HostInfo) -> None:
        """ValueError unless the head takes patches as wide as this host's tower makes them."""
        if host.class_token:
            raise ValueError(
                f"the tower of {host.family} has a class token, so it is no SigLIP tower; leave siglip out, salience "
                "is that token's attention"
            )
        width = self.head.probe.shape[-1]
        if width != host.vit_width:
            raise ValueError(
                f"{self.name} has a vision tower of width {width}, this {host.family} one of {host.vit_width}; "
                "pass the SigLIP checkpoint that the tower was started from"
            )

    def pool(self, x_FND: Tensor) -> tuple[Tensor, Tensor]:
        """Frame features (F, D) and the attention of the probe, mean over heads, (F, N); fp32."""
        num_frames = _frames_at_once(4 * 4 * x_FND[0].numel())  # fp32: the normed patches, keys, values, one spare
        parts = [self._pool(x.float()) for x in x_FND.split(num_frames)]
        return torch.cat([frame for frame, _ in parts]), torch.cat([weight for _, weight in parts])

    def _pool(self, x_FND: Tensor) -> tuple[Tensor, Tensor]:
        head, device = self.head.to(x_FND.device), x_FND.device
        x_FND = self.post_layernorm.to(device)(x_FND)
        y_F1D, weight_F1N = head.attention(head.probe.expand(len(x_FND), -1, -1), x_FND, x_FND)
        y_F1D = y_F1D + head.mlp(head.layernorm(y_F1D))
        return y_F1D[:, 0], weight_F1N[:, 0]

    def align(self, x_FND: Tensor) -> Tensor:
        """(F, N, C) fp32: every patch as if the probe attended to it alone, so that it lies in the space of frame
        features and of the text (ours; SigLIP has no such output)."""
        num_frames = _frames_at_once(4 * 6 * x_FND[0].numel())  # fp32: the normed patches, values, the hidden width
        return torch.cat([self._align(x.float()) for x in x_FND.split(num_frames)])

    def _align(self, x_FND: Tensor) -> Tensor:
        head = self.head.to(x_FND.device)
        x_FND = self.post_layernorm.to(x_FND.device)(x_FND)
        attention, width = head.attention, x_FND.shape[-1]
        value = attention.in_proj_weight[2 * width :], attention.in_proj_bias[2 * width :]
        y_FNC = attention.out_proj(torch.nn.functional.linear(x_FND, *value))
        aligned_FNC: Tensor = y_FNC + head.mlp(head.layernorm(y_FNC))
        return aligned_FNC

    def encode(self, questions: Sequence[str], device: torch.device) -> Tensor:
        """(Q, C) fp32 pooled outputs of the text tower.

        Padding is not masked and always reaches the full length, as in SigLIP's training; longer text is cut."""
        length = self.text_model.config.max_position_embeddings
        ids_QL = self.tokenizer(
            list(questions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        text_QC: Tensor = self.text_model.to(device)(input_ids=ids_QL.to(device)).pooler_output
        return text_QC


def load_siglip(path: str | Path) -> SiglipSource:
    """Post-layernorm, pooling head, text tower and tokenizer of a stock SigLIP, from a local folder or a hub id.

    For so400m towers: google/siglip-so400m-patch14-384, whose tokenizer needs the package sentencepiece. fp32,
    safetensors only, no remote code. ValueError: no SigLIP there, or no pooling head, tokenizer or some tensor."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except OSError as error:
        raise ValueError(
            f"SigLIP {str(path)!r} is neither a local folder nor reachable on the hub; check the path ({error})"
        ) from error
    if config.model_type != "siglip" or not config.vision_config.vision_use_head:
        raise ValueError(
            f"{path} holds a {config.model_type!r} model without the parts wanted; expected a whole 'siglip' model "
            "(text tower, vision tower, pooling head) such as google/siglip-so400m-patch14-384"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"the tokenizer of {path} does not load; SigLIP's own needs spiece.model and tokenizer_config.json in the "
            "folder, and `pip install sentencepiece protobuf`"
        ) from error
    model, info = SiglipModel.from_pretrained(path, dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    wrong = {name: sorted(info[name]) for name in ("missing_keys", "mismatched_keys") if info[name]}
    if wrong:
        raise ValueError(f"{path} does not fit SiglipModel: {wrong}; these weights would stay random")
    model.eval().requires_grad_(False)
    vision = model.vision_model
    return SiglipSource(str(path), vision.post_layernorm, vision.head, model.text_model, tokenizer)


def _frames_at_once(bytes_per_frame: int) -> int:
    return max(1, CHUNK_BYTES // bytes_per_frame)
