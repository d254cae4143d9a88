"""What a family adapter must offer, and which families there are.

An adapter knows one Hugging Face family: where its tower, connector and language model are, which patches form a group,
and how features reach the prompt. What is the same everywhere (when stages run, how the prompt is shortened, reports)
is in `stts.models.pruning`.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from stts.data.video.stream import StreamedPixels
from stts.pruners.base import HostInfo, Newlines
from stts.tokens import Grid

ADAPTERS = {
    "llava_onevision": "stts.models.families.llava_onevision:LlavaOnevision",
    "qwen2_5_vl": "stts.models.families.qwen2_5_vl:Qwen2_5VL",
    "qwen3_vl": "stts.models.families.qwen3_vl:Qwen3VL",
    "molmo2": "stts.models.families.molmo2:Molmo2",
}
TESTED_TRANSFORMERS = ((5, 17), (6, 0))


@dataclass(frozen=True)
class Visual:
    """The visual input of one forward pass, flat: images first, then the frames of all videos."""

    pixels: Tensor
    """As the family's patch embedding takes it; or `StreamedPixels` in its place, which `loaded` makes into that."""
    frames: tuple[int, ...]
    """Patches of every frame (image tile, temporal patch), in the order of `pixels`."""
    num_tiles: int
    """Leading frames that belong to images; they are never pruned."""
    grids: tuple[Grid, ...]
    """Groups of every video; its frames follow those of the video before."""
    image_args: dict[str, Any]
    """What the adapter needs to lay out features (sizes, counts)."""

    @property
    def streamed(self) -> bool:
        """Whether the pixels are not there yet."""
        return isinstance(self.pixels, StreamedPixels)

    def loaded(self) -> Visual:
        """The same with its pixels in memory."""
        return replace(self, pixels=self.pixels.load()) if isinstance(self.pixels, StreamedPixels) else self

    @property
    def num_tile_patches(self) -> int:
        return sum(self.frames[: self.num_tiles])

    @property
    def patches_per_video(self) -> list[int]:
        """Patches of each video, all its frames together."""
        sizes, start = [], self.num_tiles
        for grid in self.grids:
            sizes.append(sum(self.frames[start : start + grid.t]))
            start += grid.t
        return sizes

    def span(self, video: int, first: int, last: int) -> tuple[int, int]:
        """Places in `frames` of frames first to last - 1 of a video."""
        start = self.num_tiles + sum(grid.t for grid in self.grids[:video])
        return start + first, start + last


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

    @property
    def pools_keys(self) -> bool:
        """Whether the mean-query attention of a frame runs over keys averaged per group (True) or over patches, pooled
        afterwards."""
        ...

    def take_visual(self, kwargs: dict[str, Any]) -> Visual | None:
        """Remove the visual arguments from a forward call; None when there are none."""
        ...

    def with_blank(self, visual: Visual | None) -> Visual:
        """The same and one blank video of one frame, for a training pass without video: every rank runs the same
        modules."""
        ...

    def runs_stock(self, visual: Visual) -> bool:
        """Whether the stock code takes this batch of videos as it is (some families want equal lengths)."""
        ...

    def grid(self, num_frames: int) -> Grid:
        """Groups of a video of this many frames; where resolution is free, of the smallest one."""
        ...

    def groups(self, visual: Visual, video: int) -> tuple[Tensor, Tensor]:
        """Patches of each group of a video, int64 (G, W) rows counted from its first patch, -1 = outside, and their
        weights (G, W) fp32 when values of patches are pooled to groups as features are, 0 outside."""
        ...

    def part(self, visual: Visual, video: int | None, first: int = 0, last: int = 0) -> Visual:
        """Frames first to last - 1 of one video alone, or (None) the images alone."""
        ...

    def embed(self, visual: Visual) -> TowerInput:
        """Input of block 0."""
        ...

    def blocks(self) -> Sequence[Block]: ...
    def taps(self) -> tuple[int, ...]:
        """Blocks whose outputs the connector reads, in its order."""
        ...

    def timed_modules(self) -> tuple[nn.Module, nn.Module]:
        """The two modules that timers hook: the first of the tower, and the connector's that makes the features of the
        prompt."""
        ...

    def tower_attention(self) -> nn.Module:
        """The attention module of the last block the connector reads; q and k of signals come from it."""
        ...

    def connect(self, tower: TowerOutput, visual: Visual, cells: Sequence[Tensor | None]) -> Connected:
        """One connector call: features of images, and of the kept cells of each video (None: all)."""
        ...

    def merge(
        self, kwargs: dict[str, Any], connected: Connected, visual: Visual, kept: Sequence[Tensor | None]
    ) -> tuple[dict[str, Any], Placed]:
        """Put features into the prompt, and say what lies where.

        kwargs: arguments of the forward call, left as they are. kept: cells kept of each video, None: all. Features
        lie in the order they come in, on the kept cells in increasing order.

        Returns the arguments that replace those of the call: full-length `inputs_embeds` (B, L, d), zeros where a group
        was dropped, `input_ids=None`, and what the stock code would have computed from the ids."""
        ...


@dataclass(frozen=True)
class Connected:
    """Output of the connector."""

    images: tuple[Tensor, ...]
    """Per image (tokens, d), newlines included."""
    videos: tuple[Tensor, ...]
    """Per video (K, d), without newlines."""
    early: tuple[tuple[tuple[Tensor, ...], tuple[Tensor, ...]], ...] = ()
    """Deepstack: for LLM layer 0, 1, ... the same two tuples, to be added to that layer's output."""
    newlines: Newlines = "all"
    """Which newlines stay where tokens are dropped, in families that end every row of a frame with one."""


@dataclass(frozen=True)
class Placed:
    """What each place of the full prompt holds."""

    keep_BL: Tensor
    """bool, False at the placeholder of a dropped group."""
    video_BL: Tensor
    """int64 number of the video whose group lies here, -1 for text, newlines and images."""
    cell_BL: Tensor
    """int64 cell of that video's grid."""
    both_BL: Tensor | None = None
    """bool, tokens that see each other in both directions; None: the LLM is causal throughout."""
    early: tuple[Tensor, ...] = ()
    """Features (V, d) added to the output of LLM layer 0, 1, ..."""
    early_V: Tensor | None = None
    """int64 places of `early` in the flattened prompt."""

    def repeat(self, times: int, num_videos: int) -> Placed:
        """For beams: each row `times` times, the videos of copy c numbered from c * num_videos."""
        keep, video, cell = (x.repeat_interleave(times, 0) for x in (self.keep_BL, self.video_BL, self.cell_BL))
        copy = torch.arange(len(video), device=video.device)[:, None] % times
        early_V = self.early_V
        if early_V is not None:
            length = self.keep_BL.shape[1]
            first_V = early_V + early_V // length * (times - 1) * length
            early_V = torch.cat([first_V + number * length for number in range(times)])
        return Placed(
            keep,
            torch.where(video >= 0, video + copy * num_videos, -1),
            cell,
            None if self.both_BL is None else self.both_BL.repeat_interleave(times, 0),
            tuple(feature.repeat(times, 1) for feature in self.early),
            early_V,
        )


def embeds_of(kwargs: Mapping[str, Any], inner: Any) -> Tensor:
    """Embeddings (B, L, d) of a forward call's prompt. ValueError unless it got `input_ids` or `inputs_embeds`, one."""
    input_ids, x_BLd = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if (input_ids is None) == (x_BLd is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    embeds: Tensor = inner.get_input_embeddings()(input_ids) if x_BLd is None else x_BLd
    return embeds


def check_placeholders(kind: str, places: int, filled: int) -> None:
    """ValueError unless the prompt has as many placeholders of this kind ("image", "video") as features fill."""
    if places != filled:
        raise ValueError(
            f"the prompt has {places} {kind} placeholders, the {kind} input fills {filled}; build both with the same "
            "processor call (`load_vlm` gives the processor the layout of the model's videos) and do not truncate the "
            "prompt"
        )


def as_block(layer: nn.Module) -> Block:
    """A SigLIP-like layer, which hands its `attention_mask` on untouched, as a `Block`."""

    def block(x: Tensor, mask: Any) -> Tensor:
        y: Tensor = layer(x, None) if mask is None else layer(x[None], mask)[0]
        return y

    return block


@functools.cache
def check_transformers(version: str = transformers.__version__) -> None:
    """ValueError below the range this library was tested with; above it a warning, once.

    Hooks rely on how the stock code calls its parts, which versions may change."""
    lowest, above = TESTED_TRANSFORMERS
    tested = f"transformers >= {lowest[0]}.{lowest[1]}, < {above[0]}.{above[1]}"
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < lowest:
        raise ValueError(f"transformers {version} is too old; install {tested}")
    if found >= above:
        warnings.warn(
            f"transformers {version} was not tested; if a pruned model misbehaves, use {tested}", stacklevel=2
        )


def check_family(model_type: str) -> None:
    """ValueError, naming the families there are, for a model type without an adapter."""
    if model_type not in ADAPTERS:
        raise ValueError(f"family {model_type!r} has no adapter; supported: {', '.join(sorted(ADAPTERS))}")


def make_adapter(model: PreTrainedModel) -> Adapter:
    """The adapter of this model's family."""
    check_transformers()
    check_family(model.config.model_type)
    module, _, name = ADAPTERS[model.config.model_type].partition(":")
    adapter: Adapter = getattr(importlib.import_module(module), name)(model)
    return adapter


def host_info(model: PreTrainedModel) -> HostInfo:
    """Widths and depths that pruners need, read from the model's own config."""
    return make_adapter(model).host


Block = Callable[..., Tensor]
"""`block(x, mask, *aux) -> x`; the mask is `Segments` for x (S, D), or None for x (F, N, D) in a `batched` tower."""


@dataclass(frozen=True)
class TowerInput:
    """Patches of all frames on their way into block 0, image tiles first."""

    x_SD: Tensor
    frames: tuple[int, ...]
    """Patches of every frame; attention stays inside a frame."""
    aux: tuple[Tensor, ...] = ()
    """What blocks need per patch beside x (rotary tables), first axis S."""
    windows: tuple[int, ...] = ()
    """Patches of every attention window, in the order of the rows; a window lies inside one frame."""
    windowed: frozenset[int] = frozenset()
    """Blocks that attend inside windows instead of frames."""
    batched: bool = False
    """Blocks take frames as a batch while all of them are whole and of one size: the stock path."""


@dataclass(frozen=True)
class TowerOutput:
    taps: tuple[Tensor, ...]
    """Per tapped block (S, D), survivors of all frames in order."""
    row_S: Tensor | None
    """int64 place of each survivor in the flat list of patches; None: nothing was dropped."""
    lengths_F: Tensor | None
    """int64 survivors per frame; None: nothing was dropped."""
