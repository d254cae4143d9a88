"""V-CAST: frames where the path of frame means turns keep more; in a frame, what is far from its mean and large."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from stts.pruners import frames, ops
from stts.pruners.base import ByHost
from stts.tokens import Budget, Grid, Kept, VideoTokens


@dataclass(frozen=True, kw_only=True)
class VCAST(ByHost):
    """Keep in each frame the tokens farthest from its mean and longest; frames at turns of the video keep more.

        f_t = unit mean of frame t,   c_t = 1 - cos(f_t - f_t-1, f_t+1 - f_t),   c = 1 at both ends
        frame t keeps its share softmax(c / 0.7)_t, one token at least
        score = 1 - cos(x_i, f_t) + (|x_i| - min) / (max - min),   min and max over the frame

    arXiv:2603.27650, `compressor/v_cast/main.py` of xinyouu/V-CAST. Tokens keep their values and positions.

    * `budget.exact` below one token per frame: frames of the largest share keep one, the others none.
    * A still but noisy scene has a curvature of about 1.5, steady motion one near 0: kept as published.

    **Differs:** shares that a frame cannot hold go to the others in proportion, and what does not divide goes one by
    one to the largest remainders. The release gives all of it to a single frame, and keeps one token a frame whatever
    the budget and every token of a single frame (compat="official"). fp32: in bfloat16 the differences of frame means
    are noise. Ties go to the earlier token or frame."""

    paper: ClassVar[str] = "2603.27650"
    needs_time: ClassVar[str] = "it shares the budget among frames by how the video turns"

    temperature: float = 0.7
    norm_weight: float = 1.0
    """Of a token's length, against its distance from the mean of its frame."""
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0")

    @property
    def count_known(self) -> bool:  # type: ignore[override]  # an option decides
        return self.compat is None

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        num_frames, per_frame = video.grid.t, video.grid.per_frame
        x_TPD = video.x_ND.detach().float().view(num_frames, per_frame, -1)
        frame_TD = frame_means(x_TPD)
        weights = self.weights(curvature(frame_TD)).tolist()  # the one host synchronisation
        num_kept = budget.num_kept
        if self.compat == "official" and not budget.exact:
            num_kept = max(num_kept, num_frames) if num_frames > 1 else per_frame
        counts = share_out(weights, num_kept, per_frame, one_frame=self.compat == "official")
        score_TP = self.scores(x_TPD, frame_TD, video.norm_N)
        index_K = frames.top_per_frame(score_TP, torch.tensor(counts, device=score_TP.device))
        return Kept(index_K=index_K, scores_G=score_TP.flatten())

    def weights(self, curvature_T: Tensor) -> Tensor:
        """(T,) share of each frame; they sum to 1."""
        return (curvature_T / self.temperature).softmax(0)

    def scores(self, x_TPD: Tensor, frame_TD: Tensor, norm_N: Tensor | None = None) -> Tensor:
        """(T, S) fp32, to be compared inside a frame only; norm_N: `VideoTokens.norm_N`, computed where it is None."""
        norm_TP = (ops.lengths(x_TPD) if norm_N is None else norm_N).view(x_TPD.shape[:2])
        # One row a frame: a product with one column takes twice as long on a CPU.
        cosine_TP = torch.bmm(frame_TD[:, None], x_TPD.transpose(1, 2))[:, 0] / norm_TP.clamp_min(1e-6)
        low_T1, high_T1 = norm_TP.amin(1, keepdim=True), norm_TP.amax(1, keepdim=True)
        return 1 - cosine_TP + self.norm_weight * (norm_TP - low_T1) / (high_T1 - low_T1 + 1e-6)

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        return 6 * grid.num_groups * width  # means, norms and dot products


def frame_means(x_TPD: Tensor) -> Tensor:
    """(T, D) unit mean of each frame."""
    mean_TD = (x_TPD.new_full((1, x_TPD.shape[1]), 1 / x_TPD.shape[1]) @ x_TPD)[:, 0]  # half the time of `mean`
    norm_T1: Tensor = torch.linalg.vector_norm(mean_TD, dim=-1, keepdim=True)
    return mean_TD / norm_T1.clamp_min(1e-6)


def curvature(frame_TD: Tensor) -> Tensor:
    """(T,) 1 - cosine of the step to a frame with the step behind it, in [0, 2]; 1, a right angle, at both ends."""
    curvature_T = frame_TD.new_ones(len(frame_TD))
    if len(frame_TD) > 2:
        step_TD = frame_TD.diff(dim=0)
        norm_T = torch.linalg.vector_norm(step_TD, dim=-1).clamp_min(1e-6)
        curvature_T[1:-1] -= torch.linalg.vecdot(step_TD[1:], step_TD[:-1]) / (norm_T[1:] * norm_T[:-1])
    return curvature_T


def share_out(weights: list[float], total: int, most: int, *, one_frame: bool = False) -> list[int]:
    """Whole numbers of at most `most` that sum to `total`: 1 for each if `total` allows, the rest by `weights`.

    A frame that is full leaves its surplus to the others in proportion; then one each by largest remainder, the earlier
    frame on ties. one_frame: as released, surplus and remainders all go to the frame with the largest remainder until
    it is full, then to the next."""
    frames = range(len(weights))
    least = 1 if total >= len(weights) else 0
    room, rest = most - least, total - least * len(weights)
    quotas = [weight * rest / sum(weights) for weight in weights]
    full: set[int] = set()
    while not one_frame and (over := {t for t in frames if t not in full and quotas[t] > room}):
        full |= over
        free = sum(weights[t] for t in frames if t not in full)
        left = rest - room * len(full)
        quotas = [room if t in full else weights[t] * left / free for t in frames]
    counts = [min(int(quota), room) for quota in quotas]
    remainder = [quota - int(quota) for quota in quotas]
    for _ in range(rest - sum(counts)):
        t = max((t for t in frames if counts[t] < room), key=lambda t: remainder[t])
        counts[t] += 1
        if not one_frame:
            remainder[t] -= 1
    return [least + count for count in counts]
