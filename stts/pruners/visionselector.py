"""VisionSelector: a learned score per token behind the connector, trained through a soft top-k (arXiv 2510.16598).

Shape suffixes beside those of `stts.tokens`: V = videos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stts.pruners import ops
from stts.pruners.base import HostInfo, Newlines, Positions, Stage, check_counts, check_finite, keep_top
from stts.pruners.scorer import Fp32Linear
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens


class Queries(Fp32Linear):
    """A linear layer whose outputs are only needed as products with a few keys, so that it is applied to those."""

    def forward(self, x_ND: Tensor, k_VE: Tensor) -> Tensor:  # type: ignore[override]  # nobody else calls it
        """(N, V) fp32: (W x_i + b) . k_v = x_i . (W^T k_v) + b . k_v."""
        w_VD = k_VE @ self.weight.float()
        return torch.addmm(k_VE @ self.bias.float(), x_ND.float(), w_VD.T)


class ImportanceScorer(nn.Module):
    """s_i = q_i . mean_j k_j / sqrt(E): the attention of a token to all keys of its video, without a softmax.

    The release builds all q_i . k_j; their mean over j is the product with the mean key, the key of the mean token.
    fp32. A constant on all queries changes no ranking, so the bias of `q_proj` has no gradient."""

    def __init__(self, dim: int, width: int, std: float) -> None:
        super().__init__()
        self.q_proj, self.k_proj = Queries(dim, width), Fp32Linear(dim, width)
        for layer in (self.q_proj, self.k_proj):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x_ND: Tensor, video_N: Tensor, num_videos: int) -> Tensor:
        """(N,) fp32; video_N: int64 pool of each token."""
        with torch.autocast(x_ND.device.type, enabled=False):
            mean_VD, _ = ops.cluster_mean(x_ND, video_N, num_videos)
            k_VE = self.k_proj(mean_VD)
            score_NV: Tensor = self.q_proj(x_ND, k_VE) / math.sqrt(k_VE.shape[-1])
            return score_NV.gather(1, video_N[:, None])[:, 0]


class VisionSelector(nn.Module):
    """Keep the tokens that a small attention-like scorer ranks highest; taught by the answer, one for all budgets.

        s = ImportanceScorer(tokens behind the connector),   sum_i sigmoid(s_i + t) = k gives t,   p = sigmoid(s + t)

    In evaluation the k highest stay as they are. In training (`soft`) nothing is dropped: the LLM sees p_i x_i at full
    length, and the loss `sharpen`, the mean over videos of BCE(p, the k highest), pulls p towards 0 and 1. The recipe
    raises its weight linearly over the run, from 0.1 to 2 (`loss_weights: {sharpen: {from: 0.1, to: 2.0}}`), and trains
    the scorer alone at k = 0.2 N. A token's score is linear in it; time, place and question play no part.

    arXiv 2510.16598; `selector_scorer.py`, `selector_model.py` of JulietChoo/VisionSelector (inference and training);
    `importance_scorer.*` are its tensor names. Trained and released on images.

    **Differs** from the release. Each video is a pool of its own: there all images of a call share mean, threshold and
    k (compat="official", in evaluation with exact=False the counts too). fp32 throughout: in bf16 scores tie and sum p
    misses k. k = N gives p = 1 and no loss (an assertion there). Levels of deepstack are not weighted by p.
    `soft=False` is ours: drop in training as in evaluation, p on the way back only (a gate of value 1)."""

    paper: ClassVar[str] = "2510.16598"
    site: Site = Site("pre_llm")
    signals: frozenset[Signal] = frozenset()
    newlines: Newlines = "all"

    def __init__(
        self,
        dim: int,
        *,
        width: int | None = None,
        std: float = 1e-4,
        soft: bool = True,
        positions: Positions = "compact",
        compat: Literal["official"] | None = None,
    ) -> None:
        """dim: of the tokens; width: of query and key, default dim // 2; std: of the first weights, 1e-4 published."""
        super().__init__()
        if compat not in (None, "official"):
            raise ValueError(f"compat={compat!r} is unknown; expected None or 'official'")
        self.dim, self.width = dim, width or max(1, dim // 2)
        self.soft, self.positions, self.compat = soft, positions, compat
        self.importance_scorer = ImportanceScorer(dim, self.width, std)

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> VisionSelector:
        """Sized for this host; original positions where they have a time of their own."""
        return cls(host.llm_width, **{"positions": "original" if host.mrope else "compact", **options})

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (self,)

    @property
    def keeps_all(self) -> bool:
        """Nothing is dropped while the weights learn."""
        return self.soft and self.training and torch.is_grad_enabled()

    @property
    def count_known(self) -> bool:
        return self.compat is None and not self.keeps_all

    def forward(self, videos: Sequence[VideoTokens], budgets: Sequence[Budget]) -> list[Kept]:
        """One scorer call for all videos of the batch."""
        if not videos:
            return []
        check_finite(videos)
        check_counts(videos, budgets)
        sizes, device = [video.num_groups for video in videos], videos[0].x_ND.device
        video_N = torch.arange(len(videos), device=device).repeat_interleave(torch.tensor(sizes, device=device))
        pooled = self.compat == "official"
        pool_N = torch.zeros_like(video_N) if pooled else video_N
        rows = [video.x_ND.detach().float() for video in videos]
        x_ND = torch.cat(rows) if len(rows) > 1 else rows[0]  # a copy of a long video takes as long as its scores
        score_N = self.importance_scorer(x_ND, pool_N, 1 if pooled else len(videos))
        scores = torch.split(score_N, sizes)
        if not (self.training and torch.is_grad_enabled()):
            return self._highest(videos, [score_G.detach() for score_G in scores], budgets)
        pools, counts = ([score_N], [self._pool_count(budgets, sizes)]) if pooled else (
            list(scores), [budget.num_kept for budget in budgets]
        )  # fmt: skip
        weights, loss = ops.soft_top_k(pools, counts)
        weight_N = torch.cat(weights)
        return self._trained(videos, scores, torch.split(weight_N, sizes), budgets, loss)

    def _pool_count(self, budgets: Sequence[Budget], sizes: Sequence[int]) -> int:
        """k of the release for all tokens of the call."""
        if all(budget.exact for budget in budgets):
            return sum(budget.num_kept for budget in budgets)
        return max(1, int(sum(sizes) * budgets[0].retention_ratio))

    def _highest(
        self, videos: Sequence[VideoTokens], scores: Sequence[Tensor], budgets: Sequence[Budget]
    ) -> list[Kept]:
        if self.compat != "official" or budgets[0].exact:
            pairs = zip(videos, scores, budgets, strict=True)
            return [keep_top(video, score_G, budget.num_kept) for video, score_G, budget in pairs]
        sizes = [len(score_G) for score_G in scores]
        score_N = torch.cat(list(scores))
        keep_N = torch.zeros_like(score_N, dtype=torch.bool)
        keep_N[ops.top(score_N, self._pool_count(budgets, sizes))] = True
        return [
            Kept(index_K=keep_G.nonzero()[:, 0], scores_G=score_G)
            for keep_G, score_G in zip(torch.split(keep_N, sizes), scores, strict=True)
        ]

    def _trained(
        self, videos: Sequence[VideoTokens], scores: Sequence[Tensor], weights: Sequence[Tensor],
        budgets: Sequence[Budget], loss: Tensor,
    ) -> list[Kept]:  # fmt: skip
        row = []
        for video, score_G, p_G, budget in zip(videos, scores, weights, budgets, strict=True):
            hard = keep_top(video, score_G.detach(), budget.num_kept)
            if self.soft:
                everything_K = torch.arange(video.num_groups, device=p_G.device)
                x_KD = (p_G[:, None] * video.x_ND).to(video.x_ND.dtype)
                row.append(replace(hard, index_K=everything_K, x_KD=x_KD))
            else:
                row.append(replace(hard, gate_G=1 + (p_G - p_G.detach())))
        return [replace(row[0], losses={"sharpen": loss}), *row[1:]]

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """One key, what it weighs each feature by, and one product per token; the release pays for N x N of them."""
        return 2 * (self.width * (2 * width + 1) + grid.num_groups * width)
