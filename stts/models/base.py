"""What a family adapter must offer, and which families there are.

An adapter knows one Hugging Face family: where its tower, connector and language model are, which patches form a group,
and how features reach the prompt. What is the same everywhere (when stages run, how the prompt is shortened, reports)
is in `pruning.py`, `vit.py` and `prompt.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stts.models.vit import TowerOutput
from stts.pruners.base import HostInfo
from stts.tokens import Grid

ADAPTERS = {"llava_onevision": "stts.models.llava_onevision:LlavaOnevision"}
TESTED_TRANSFORMERS = ((5, 17), (6, 0))


@dataclass(frozen=True)
class Visual:
    """The visual input of one forward pass, flat: image tiles first, then the frames of all videos.

    Shape suffixes: F = tiles and frames together."""

    pixels_FCHW: Tensor
    num_tiles: int
    """Leading entries that belong to images; they are never pruned."""
    frames_per_video: tuple[int, ...]
    image_args: dict[str, Any]
    """What the stock code needs to lay out image features (sizes, counts)."""


class Adapter(Protocol):
    """One Hugging Face family."""

    def __init__(self, model: PreTrainedModel) -> None: ...
    @property
    def host(self) -> HostInfo: ...
    @property
    def inner(self) -> nn.Module:
        """The module that merges features into the prompt; our hook on it does the visual part instead."""
        ...

    @property
    def language_model(self) -> nn.Module: ...
    @property
    def configs(self) -> tuple[Any, ...]:
        """Sub-configs whose attention implementation carries `Segments` (tower and language model)."""
        ...

    @property
    def visual_args(self) -> tuple[str, ...]:
        """Names of the visual arguments of a forward call."""
        ...

    def take_visual(self, kwargs: dict[str, Any]) -> Visual | None:
        """Remove the visual arguments from a forward call; None when there are none."""
        ...

    def blank_frame(self) -> Tensor:
        """(1, C, H, W) zeros, for a training pass without video: every rank runs the same modules."""
        ...

    def grid(self, num_frames: int) -> Grid:
        """Groups of one video."""
        ...

    def groups(self) -> Tensor:
        """(P, W) int64 patches of each group of one frame, -1 = outside."""
        ...

    def embed_patches(self, pixels_FCHW: Tensor) -> Tensor:
        """(F, N, D) input of block 0."""
        ...

    def blocks(self) -> Sequence[Callable[[Tensor, Any], Tensor]]: ...
    def taps(self) -> tuple[int, ...]:
        """Blocks whose outputs the connector reads, in its order."""
        ...

    def tower_attention(self) -> nn.Module:
        """The attention module of the last block the connector reads; q and k of signals come from it."""
        ...

    def pool_groups(self, value_FNC: Tensor) -> Tensor:
        """(F, P, C): values of all patches brought to groups by the operator that pools features, not renormalised."""
        ...

    def connect(self, tower: TowerOutput, visual: Visual, cells: Sequence[Tensor | None]) -> Connected:
        """One connector call: features of images, and of the kept cells of each video (None: all)."""
        ...

    def merge(
        self, kwargs: dict[str, Any], connected: Connected, visual: Visual, kept: Sequence[Tensor | None]
    ) -> Placed:
        """Put features into the prompt: `kwargs` get full-length `inputs_embeds`, zeros where a group was dropped.

        `kept` holds the kept cells of each video, None: all. Features lie in the order they come in, on the kept
        cells in increasing order."""
        ...


@dataclass(frozen=True)
class Connected:
    """Output of the connector."""

    images: tuple[Tensor, ...]
    """Per image (tokens, d), newlines included."""
    videos: tuple[Tensor, ...]
    """Per video (K, d), without newlines."""


@dataclass(frozen=True)
class Placed:
    """What each place of the full prompt holds."""

    keep_BL: Tensor
    """bool, False at the placeholder of a dropped group."""
    video_BL: Tensor
    """int64 number of the video whose group lies here, -1 for text, newlines and images."""
    cell_BL: Tensor
    """int64 cell of that video's grid."""

    def repeat(self, times: int, num_videos: int) -> Placed:
        """For beams: each row `times` times, the videos of copy c numbered from c * num_videos."""
        keep, video, cell = (x.repeat_interleave(times, 0) for x in (self.keep_BL, self.video_BL, self.cell_BL))
        copy = torch.arange(len(video), device=video.device)[:, None] % times
        return Placed(keep, torch.where(video >= 0, video + copy * num_videos, -1), cell)


def check_family(model_type: str) -> None:
    """ValueError, naming the families there are, for a model type without an adapter."""
    if model_type not in ADAPTERS:
        raise ValueError(f"family {model_type!r} has no adapter; supported: {', '.join(sorted(ADAPTERS))}")


def make_adapter(model: PreTrainedModel) -> Adapter:
    """The adapter of this model's family."""
    check_family(model.config.model_type)
    module, _, name = ADAPTERS[model.config.model_type].partition(":")
    adapter: Adapter = getattr(importlib.import_module(module), name)(model)
    return adapter


def host_info(model: PreTrainedModel) -> HostInfo:
    """Widths and depths that pruners need, read from the model's own config."""
    return make_adapter(model).host
