"""What goes through an adapter in one forward pass: pixels, patches, features, places in the prompt.

Shape suffixes beside those of `stts.tokens`: V = visual tokens in the prompt, B = rows, L = prompt length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stts.data.video.stream import StreamedPixels
from stts.pruners.base import Newlines
from stts.tokens import Grid


@dataclass(frozen=True)
class Visual:
    """The visual input of one forward pass, flat: images first, then the frames of all videos."""

    pixels: Tensor
    """As the family's patch embedding takes it; or `StreamedPixels` in its place, which `loaded` makes into that."""
    frames: tuple[int, ...]
    """Rows of every frame (image tile, temporal patch) in the tower, in the order of `pixels`: its patches, and class
    tokens in front of them."""
    num_tiles: int
    """Leading frames that belong to images and are not pruned."""
    grids: tuple[Grid, ...]
    """Groups of every video; its frames follow those of the video before."""
    image_args: dict[str, Any]
    """What the adapter needs to lay out features (sizes, counts)."""
    class_tokens: int = 0
    """Leading rows of every frame that are no patches: they belong to no group, stay when groups are dropped, and are
    counted nowhere but in FLOPs."""
    num_images: int = 0
    """Leading `grids` that are images, pruned as videos of one frame; `num_tiles` is 0 then."""

    @property
    def streamed(self) -> bool:
        """Whether the pixels are not there yet."""
        return isinstance(self.pixels, StreamedPixels)

    def loaded(self) -> Visual:
        """The same with its pixels in memory."""
        return replace(self, pixels=self.pixels.load()) if isinstance(self.pixels, StreamedPixels) else self

    def with_images(self, images: Sequence[Grid]) -> Visual:
        """The same with its images, one frame each, as videos in front of the videos."""
        return replace(self, num_tiles=0, grids=(*images, *self.grids), num_images=len(images))

    @property
    def num_tile_patches(self) -> int:
        return sum(self.frames[: self.num_tiles])

    @property
    def patches_per_video(self) -> list[int]:
        """Rows of each video, all its frames together."""
        sizes, start = [], self.num_tiles
        for grid in self.grids:
            sizes.append(sum(self.frames[start : start + grid.t]))
            start += grid.t
        return sizes

    def span(self, video: int, first: int, last: int) -> tuple[int, int]:
        """Places in `frames` of frames first to last - 1 of a video."""
        start = self.num_tiles + sum(grid.t for grid in self.grids[:video])
        return start + first, start + last


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
    late_BL: Tensor | None = None
    """bool, places that `Adapter.finish` fills; None: there are none."""

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
            None if self.late_BL is None else self.late_BL.repeat_interleave(times, 0),
        )


def check_placeholders(kind: str, places: int, filled: int) -> None:
    """ValueError unless the prompt has as many placeholders of this kind ("image", "video") as features fill."""
    if places != filled:
        raise ValueError(
            f"the prompt has {places} {kind} placeholders, the {kind} input fills {filled}; build both with the same "
            "processor call (`load_vlm` gives the processor the layout of the model's videos) and do not truncate the "
            "prompt"
        )


def place_groups(
    image_BL: Tensor, video_BL: Tensor, images: Sequence[Tensor], visual: Visual, kept: Sequence[Tensor | None]
) -> tuple[Tensor, Placed]:
    """Where features go in a prompt whose placeholders are groups and nothing else (no newlines).

    image_BL, video_BL: bool, placeholders of images and of videos; images: features of each that is not pruned; kept:
    cells kept of each video, None: all. Returns int64 places in the flattened prompt of all features, images first, and
    what lies where. ValueError for counts that differ."""
    device, counts = video_BL.device, [grid.num_groups for grid in visual.grids]
    split = sum(counts[: visual.num_images])
    check_placeholders("image", int(image_BL.sum()), sum(map(len, images)) + split)
    check_placeholders("video", int(video_BL.sum()), sum(counts) - split)
    cell_G = torch.cat([torch.arange(0), *map(torch.arange, counts)]).to(device)
    video_G = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long)).to(device)
    keep_G = torch.zeros(len(cell_G), dtype=torch.bool, device=device)
    for mine_G, index_K in zip(keep_G.split(counts), kept, strict=True):
        mine_G[slice(None) if index_K is None else index_K] = True

    def scatter(base_BL: Tensor, value_G: Tensor) -> Tensor:
        base_BL = base_BL.masked_scatter(video_BL, value_G[split:])
        return base_BL.masked_scatter(image_BL, value_G[:split]) if split else base_BL

    keep_BL = scatter(torch.ones_like(video_BL), keep_G)
    none_BL = torch.full_like(video_BL, -1, dtype=torch.long)
    masks = image_BL & keep_BL, video_BL & keep_BL
    place_V = torch.cat([mask_BL.flatten().nonzero().squeeze(1) for mask_BL in masks])
    return place_V, Placed(keep_BL, scatter(none_BL, video_G), scatter(none_BL, cell_G))


def flat_features(x_BLd: Tensor, images: Sequence[Tensor], videos: Sequence[Tensor]) -> Tensor:
    """Features (V, d) of images and videos in the order of `place_groups`, in the dtype of the prompt."""
    return torch.cat([x_BLd[0, :0], *images, *videos]).to(x_BLd)
