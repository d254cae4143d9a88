"""MyPruner: say in one line what it keeps, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from stts.pruners.base import PerVideo, Positions, keep_top
from stts.tokens import Budget, Kept, Signal, Site, VideoTokens


@dataclass(frozen=True)  # fields are the options: --pruner_options '{frame_share: 0.2}'
class MyPruner(PerVideo):
    """Keep tokens that differ from the mean of the video, and from the mean of their frame."""

    frame_share: float = 0.5
    """Weight of the frame's mean, in [0, 1]; the rest is the video's."""

    # Where it acts: Site("pre_llm") sees what the connector gives; Site("llm", layer=3) hidden states before an LLM
    # layer; Site("vit", layer=3, drop_after=4) patches inside the tower, in groups `video.group_GW`.
    site: ClassVar[Site] = Site("pre_llm")
    # What must be collected first, as in frozenset({"attn"}) for `video.salience_G`; features need no signal.
    signals: ClassVar[frozenset[Signal]] = frozenset()
    # compact: what survives is renumbered; original: it keeps its position in the prompt.
    positions: ClassVar[Positions] = "compact"

    def __post_init__(self) -> None:
        if not 0 <= self.frame_share <= 1:
            raise ValueError(f"frame_share={self.frame_share} must be in [0, 1]")

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        """One video. `video.x_ND` has a row per token, frame after frame; `video.cell_G` says which cell of
        `video.grid` each is; `budget.num_kept` is how many to return. Inputs must not be written to."""
        x_ND = F.normalize(video.x_ND.float(), dim=-1)  # in bfloat16 close scores would tie
        frame_N = video.cell_G // video.grid.per_frame
        sum_TD = x_ND.new_zeros(video.grid.t, x_ND.shape[1]).index_add(0, frame_N, x_ND)
        to_frame_N = (x_ND * F.normalize(sum_TD, dim=-1)[frame_N]).sum(-1)
        to_video_N = x_ND @ F.normalize(x_ND.sum(0), dim=-1)
        similarity_N = self.frame_share * to_frame_N + (1 - self.frame_share) * to_video_N
        return keep_top(video, -similarity_N, budget.num_kept)  # the highest scores, in the order of the video
