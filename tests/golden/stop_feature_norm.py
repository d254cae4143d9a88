"""The function that SToP's release has for Qwen2.5-VL, compared with golden outputs; the model around it cannot run.

Shape suffixes: D = width, T = frames, S = places of a frame, B = subsets of equal size, P = tokens of a subset,
K = kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import PerVideo
from stts.pruners.stop import sink_score
from stts.tokens import Budget, Grid, Kept, VideoTokens


@dataclass(frozen=True, kw_only=True)
class FeatureNormSToP(PerVideo):
    """SToP by feature norms. Not in the registry: use SToP on VisionZip instead.

    There importance is not attention but I = |x| (1 + cos(x, mean of the frame)). Windows and static places are those
    of HoliTom, with mu_t s from I of the whole video. Then the static means of a window, and the moving tokens of each
    frame, keep max(1, round(P R')) by I - mu_s s, both from these P tokens alone, and every dropped token joins the
    kept one most like it: (kept + mean of those that join) / 2. The release puts the static tokens of a window before
    its frames (compat="official"); otherwise the order is that of the video.

    arXiv:2604.20937; `pruning/qwen2vl/wrapper.py` of rlqja1107/SToP, where the model around it cannot run."""

    paper: ClassVar[str] = "2604.20937"
    salience: float = 3.7
    temporal: float = 0.0
    power: float = 1.1
    tau: float = 0.8
    compat: Literal["official"] | None = None

    count_known: ClassVar[bool] = False

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        ops.need_full_grid(video)
        num_frames, num_places = video.grid.t, video.grid.per_frame
        x_TSD = video.x_ND.float().view(num_frames, num_places, -1)
        with torch.no_grad():
            penalty_P = sink_score(feature_importance(x_TSD).mean(0), self.power)
            similarity_TS = ops.neighbour_similarity(video.x_ND, video.grid).view(num_frames, num_places)[1:]
            windows, _ = ops.temporal_windows(similarity_TS > self.tau)
            static_TS = similarity_TS + self.temporal * penalty_P > self.tau
        static = [static_TS[start : end - 1].all(0) & (end - start > 1) for start, end in windows]
        removed = sum(
            int(mask_S.sum()) * (end - start - 1) for mask_S, (start, end) in zip(static, windows, strict=True)
        )
        ratio = min(budget.retention_ratio / max(1 - removed / video.num_groups, 0.1), 1.0)

        index, rows = [], []
        for mask_S, (start, end) in zip(static, windows, strict=True):
            here_TSD = x_TSD[start:end]
            for x_BSD, chosen_S in ((here_TSD.mean(0, keepdim=True), mask_S), (here_TSD, ~mask_S)):
                place_P = chosen_S.nonzero()[:, 0]
                if len(place_P):
                    kept_BK, x_BKD = self._reduce(x_BSD[:, place_P], ratio)
                    frame_B1 = torch.arange(start, start + len(x_BSD), device=place_P.device)[:, None]
                    index.append((frame_B1 * num_places + place_P[kept_BK]).flatten())
                    rows.append(x_BKD.flatten(0, 1).to(video.x_ND.dtype))
        kept = Kept(index_K=torch.cat(index), x_KD=torch.cat(rows))
        if self.compat == "official" and not budget.exact:
            return kept
        num_kept = budget.num_kept if budget.exact else len(kept.index_K)
        return ops.fit_count(video, kept, num_kept, feature_importance(x_TSD).detach().flatten())

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Norms and means, then similarity and sum for each pair of a token and a kept one of its frame."""
        return 8 * grid.num_groups * width + 4 * (grid.num_groups * num_kept // grid.t) * width

    def _reduce(self, x_BPD: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        """(B, K) kept tokens of each subset, and (B, K, D) these with the others merged in."""
        num_tokens = x_BPD.shape[1]
        num_kept = max(1, round(num_tokens * ratio))
        with torch.no_grad():
            importance_BP = feature_importance(x_BPD)
            score_BP = importance_BP - self.salience * sink_score(importance_BP, self.power)
            kept_BK = ops.top(score_BP, num_kept).sort(-1).values
            unit_BPD = F.normalize(x_BPD, dim=-1)
            row_B1 = torch.arange(len(x_BPD), device=x_BPD.device)[:, None]
            nearest_BP = (unit_BPD @ unit_BPD[row_B1, kept_BK].transpose(1, 2)).argmax(-1)
            joins_BPK = F.one_hot(nearest_BP, num_kept).float()
            joins_BPK[row_B1, kept_BK] = 0
        count_BK1 = joins_BPK.sum(1)[..., None]
        mean_BKD = joins_BPK.transpose(1, 2) @ x_BPD / count_BK1.clamp_min(1)
        x_BKD = x_BPD[row_B1, kept_BK]
        return kept_BK, torch.where(count_BK1 > 0, (x_BKD + mean_BKD) / 2, x_BKD)


def feature_importance(x_BPD: Tensor) -> Tensor:
    """(B, P) |x| (1 + cos(x, mean of its subset))."""
    cosine_BP = F.cosine_similarity(x_BPD, x_BPD.mean(1, keepdim=True), dim=-1)
    norm_BP: Tensor = torch.linalg.vector_norm(x_BPD, dim=-1)
    return norm_BP * (1 + cosine_BP)
