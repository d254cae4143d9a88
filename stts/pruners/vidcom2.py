"""`vidcom2`: keep what is unusual in the video and in its frame, more of it in unusual frames.

Shape suffixes beside those of `stts.tokens`: C = channels kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from stts.pruners import frames, ops
from stts.pruners.base import HostInfo, Newlines, PerVideo, Positions
from stts.tokens import Budget, Grid, Kept, VideoTokens


@dataclass(frozen=True, kw_only=True)
class VidCom2(PerVideo):
    """Keep the tokens farthest from the mean of the video and of their frame; a frame that stands out keeps more.

        x   = tokens on the half of the channels with the lowest variance, L2-normalised
        G(c) = sum over a in {1/8, 1/4, 1/2, 1, 2} of exp(-|x - c|^2 / 2a)
        v = G(mean of all),  w = G(mean of the frame),  u_t = -mean of v in frame t
        scale_t = min(1, r (1 + p_t - 1/T)),   p = softmax(u / 0.01) over frames
        frame t keeps its k_t = max(1, round(scale_t S)) tokens with the smallest v + w

    arXiv:2505.14454, `token_compressor/vidcom2/vidcom2.py` of the release. Tokens are selected, never merged.

    * `budget.exact`: scale_t S, rescaled to sum num_kept, are quotas, and k_t are those rounded by largest remainder
      within [1, S]. With fewer tokens than frames, frames of largest quota keep one token each, the rest nothing.
    * otherwise k_t as above: close to the plan, not equal to it.

    **Differs:** always fp32, where the release computes in the model's precision and rounds scores to ties. Where every
    row ends with a newline, all newlines stay in place; the release puts those of a frame behind its kept tokens, and
    so does `compat="official"`."""

    paper: ClassVar[str] = "2505.14454"
    needs_time: ClassVar[str] = "it shares the budget among frames by how they stand out"
    channel_share: float = 0.5
    bandwidths: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
    """Squared widths a of the Gaussian kernels."""
    temperature: float = 0.01
    compat: Literal["official"] | None = None
    newline_per_row: bool = False
    """The host puts a newline behind every row."""
    mrope: bool = False
    """The host has positions in time, height and width, which survivors keep."""

    count_known: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.compat not in (None, "official"):
            raise ValueError(f"compat={self.compat!r} is unknown; expected None or 'official'")

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """With the newlines and positions of this host."""
        return cls(**{"newline_per_row": host.newline_per_row, "mrope": host.mrope, **options})

    @property
    def positions(self) -> Positions:  # type: ignore[override]  # the host decides
        return "original" if self.mrope else "compact"

    @property
    def newlines(self) -> Newlines:  # type: ignore[override]  # the host decides
        return "after_frame" if self.compat == "official" and self.newline_per_row else "every_row"

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        num_frames, per_frame = video.grid.t, video.grid.per_frame
        if not 1 <= budget.num_kept <= video.num_groups:
            raise ValueError(f"num_kept={budget.num_kept} is outside [1, {video.num_groups}]; see budget.plan")
        x_TPD = video.x_ND.detach().float().view(num_frames, per_frame, -1)
        v_TP, w_TP = self.redundancy(x_TPD)
        size_T = self.frame_scales(v_TP, budget.retention_ratio) * per_frame
        natural_T = size_T.round().clamp_min(1)  # halves to even
        count_T = frames.share_out(size_T, budget.num_kept, per_frame) if budget.exact else natural_T
        score_TP = -(v_TP + w_TP)
        return Kept(index_K=frames.top_per_frame(score_TP, count_T), scores_G=score_TP.flatten())

    def redundancy(self, x_TPD: Tensor) -> tuple[Tensor, Tensor]:
        """(T, S) closeness of each token to the mean of the video, and to the mean of its frame."""
        x_ND = x_TPD.flatten(0, 1)
        x_NC = x_ND.index_select(1, self.quiet_channels(x_ND).sort().values)
        x_NC /= x_NC.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        x_TPC = x_NC.view(*x_TPD.shape[:2], -1)
        frame_T1C = x_TPC.mean(1, keepdim=True)
        centre_T2C = torch.cat([frame_T1C.mean(0, keepdim=True).expand_as(frame_T1C), frame_T1C], 1)
        # By differences, not by a matrix product: equal tokens get equal distances.
        distance_TP2 = torch.cdist(x_TPC, centre_T2C, compute_mode="donot_use_mm_for_euclid_dist")
        kernels = [torch.exp(-distance_TP2.square() / (2 * a)) for a in self.bandwidths]
        v_TP, w_TP = torch.stack(kernels).sum(0).unbind(-1)
        return v_TP, w_TP

    def quiet_channels(self, x_ND: Tensor) -> Tensor:
        """Channels of lowest variance, rising; one at least."""
        mean_D = x_ND.mean(0)
        parts = torch.split(x_ND, ops.frame_block(x_ND))
        buffer_ND = torch.empty_like(parts[0])  # new memory for each difference takes longer than the difference
        squares = [torch.sub(part_ND, mean_D, out=buffer_ND[: len(part_ND)]).square_().sum(0) for part_ND in parts]
        variance_D = torch.stack(squares).sum(0)
        return ops.top(-variance_D, max(1, int(len(variance_D) * self.channel_share)))

    def frame_scales(self, v_TP: Tensor, retention_ratio: float) -> Tensor:
        """(T,) fraction of its tokens that each frame may keep."""
        p_T = (-v_TP.mean(1) / self.temperature).softmax(0)
        return (retention_ratio * (1 + p_T - p_T.mean())).clamp_max(1)

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Variance of all channels; norm, scaling, two means and two distances on those kept."""
        channels = max(1, int(width * self.channel_share))
        return grid.num_groups * (4 * width + 11 * channels)
