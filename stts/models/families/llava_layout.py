"""How a LLaVA model lays the frames of a video out: pooling, newlines, and what the prompt says about time.

LLaVA-OneVision resizes 27 x 27 patches to 14 x 14 tokens and adds one newline per video. LLaVA-Video averages 2 x 2
patches to 13 x 13 tokens (the last row and column of patches are read by no token) and ends every row of every frame
with a newline: 182 tokens a frame. Stock classes know the first layout only. A model with another one says so in its
config, `config.stts_video_layout = {"pool": "average", "newline": "grid", "time_instruction": true}`, which
`save_pretrained` keeps; such a model runs inside `stts.pruning` only, also dense (pruner `none`).

Shape suffixes beside those of `stts.tokens`: H, W = sides.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ProcessorMixin
from transformers.processing_utils import MultiModalData

from stts.pruners.base import Newlines, with_newlines
from stts.tokens import Grid

Pool = Literal["bilinear", "average"]
Newline = Literal["one", "grid"]
CONFIG_NAME = "stts_video_layout"


@dataclass(frozen=True, kw_only=True)
class VideoLayout:
    """The defaults are LLaVA-OneVision's."""

    pool: Pool = "bilinear"
    """2 x 2 patches to a token: resized (a side of n patches gives ceil(n / 2) tokens) or averaged (floor(n / 2))."""
    newline: Newline = "one"
    """One newline behind the video, or one behind every row of every frame."""
    time_instruction: bool = False
    """The prompt says how long the video is and when its frames were taken."""

    def __post_init__(self) -> None:
        if self.pool not in get_args(Pool) or self.newline not in get_args(Newline):
            raise ValueError(
                f"{CONFIG_NAME} has pool={self.pool!r}, newline={self.newline!r}; expected pool in {get_args(Pool)} "
                f"and newline in {get_args(Newline)}"
            )

    @classmethod
    def of(cls, config: Any) -> VideoLayout:
        """As the model's config says; stock where it says nothing. ValueError for what no layout has."""
        settings = getattr(config, CONFIG_NAME, None) or {}
        known = [field.name for field in fields(cls)]
        if not isinstance(settings, Mapping) or not set(settings) <= set(known):
            raise ValueError(f"{CONFIG_NAME}={settings!r} in the model's config; expected a mapping with keys {known}")
        return cls(**settings)

    def write(self, config: Any) -> None:
        """Put this layout into a model's config."""
        setattr(config, CONFIG_NAME, asdict(self))

    @property
    def is_stock(self) -> bool:
        """Whether stock transformers code lays videos out like this."""
        return (self.pool, self.newline) == ("bilinear", "one")

    def grid(self, num_frames: int, side: int) -> Grid:
        """Tokens of frames of `side` x `side` patches, without newlines."""
        cells = side // 2 if self.pool == "average" else -(-side // 2)
        return Grid(num_frames, cells, cells)

    def num_placeholders(self, num_frames: int, side: int) -> int:
        """Tokens of a video in the prompt, newlines included."""
        grid = self.grid(num_frames, side)
        return grid.num_groups + (grid.t * grid.h if self.newline == "grid" else 1)

    def resize(self, x_FdHW: Tensor) -> Tensor:
        """Features of patches to features of tokens."""
        if self.pool == "average":
            return F.avg_pool2d(x_FdHW, 2)
        return F.interpolate(x_FdHW, size=[-(-side // 2) for side in x_FdHW.shape[-2:]], mode="bilinear")

    def places(self, grid: Grid, index_K: Tensor | None, rule: Newlines, device: torch.device) -> tuple[Tensor, Tensor]:
        """What the placeholders of a video hold: int64 (P,) cell or -1 for a newline, and bool (P,) which stay.

        index_K: kept cells in increasing order, None: all, and then every newline stays where it is. Otherwise `rule`
        says which newlines of rows stay, and `after_frame` moves those of a frame behind its tokens; the one newline
        behind a video stays whatever the rule."""
        cell_G = torch.arange(grid.num_groups, device=device)
        if index_K is None or len(index_K) == grid.num_groups:
            index_K, rule = cell_G, "all"
        if self.newline == "one":
            keep_G = torch.zeros_like(cell_G, dtype=torch.bool).index_fill(0, index_K, True)
            return F.pad(cell_G, (0, 1), value=-1), F.pad(keep_G, (0, 1), value=True)
        order_P = with_newlines(cell_G, grid, rule if rule == "after_frame" else "all")
        keep_P = torch.zeros_like(order_P, dtype=torch.bool).index_fill(0, with_newlines(index_K, grid, rule), True)
        row_P, column_P = order_P // (grid.w + 1), order_P % (grid.w + 1)
        return torch.where(column_P < grid.w, row_P * grid.w + column_P, -1), keep_P[order_P]


STOCK = VideoLayout()


def lay_out(processor: ProcessorMixin, layout: VideoLayout) -> None:
    """Make a stock LLaVA-OneVision processor write the placeholders of this layout.

    It stays the stock class and is saved as one: the layout is the model's, and `load_vlm` applies it again."""
    if layout.is_stock and not layout.time_instruction:
        return
    side = math.isqrt(processor.num_image_tokens)
    # On the instance, where they hide stock methods of these names; partials, so that loader workers can pickle them.
    processor.__dict__["replace_video_token"] = functools.partial(_video_tokens, processor.video_token, layout, side)
    processor.__dict__["_get_num_multimodal_tokens"] = functools.partial(_num_tokens, layout, side)
    processor.__dict__["time_instruction"] = layout.time_instruction


def _video_tokens(
    token: str, layout: VideoLayout, side: int, inputs: Mapping[str, Any], video_idx: int, **_: Any
) -> str:
    return token * layout.num_placeholders(len(inputs["pixel_values_videos"][video_idx]), side)


def _num_tokens(
    layout: VideoLayout, side: int, image_sizes: Any = None, video_sizes: Sequence[Sequence[int]] = (), **_: Any
) -> MultiModalData:
    if image_sizes is not None:
        raise ValueError("a processor with a layout of videos counts their tokens only; ask a stock one for images")
    return MultiModalData(num_video_tokens=[layout.num_placeholders(frames, side) for frames, *_ in video_sizes])
