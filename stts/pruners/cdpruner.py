"""CDPruner: diverse tokens that answer the question, by a determinantal point process.

Shape suffixes beside those of `stts.tokens`: C = width of the space shared with the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners.base import ByHost, check_counts, check_finite
from stts.tokens import Budget, Grid, Kept, Signal, VideoTokens


@dataclass(frozen=True, kw_only=True)
class CDPruner(ByHost):
    """Choose the set whose determinant of similarity is largest, each token weighted by how it relates to the question.

        g_i = -cos(v_i, t),   then (g - min + 1e-6) / (max - min);   K = diag(g) S diag(g),   S_ij = cos(x_i, x_j)

    v are patches and t the question in a space made for both, x the tokens behind the connector. Tokens are added one
    by one, always the one whose variance given those chosen is largest (greedy MAP). arXiv:2506.10967, `llava_arch.py`
    and `clip_encoder.py` of Theia-4869/CDPruner, which treats images; a clip is one pool here, and video use is ours.
    The sign is as published for CLIP, whose patches resemble a text less where they matter more; `sign=1` turns it.

    Patches and question come from a SigLIP checkpoint where one is given (`--siglip`), each patch sent through its
    pooling head alone (ours). Without one, or without a question, g = 1: the most diverse tokens, whatever is asked.

    **Differs:** minimum and maximum are those of the video; the release takes them over all images of the call
    (compat="official"). Where the variance of every token left is 0, as behind the rank of S, the earlier token comes
    first (NaN in the release). fp32."""

    paper: ClassVar[str] = "2506.10967"
    signals: ClassVar[frozenset[Signal]] = frozenset({"aligned", "text"})

    sign: Literal[-1, 1] = -1
    compat: Literal["official"] | None = None

    def __post_init__(self) -> None:
        if self.sign not in (-1, 1):
            raise ValueError(f"sign={self.sign} must be -1 (as published) or 1")

    def __call__(self, videos: Sequence[VideoTokens], budgets: Sequence[Budget]) -> list[Kept]:
        check_finite(videos)
        check_counts(videos, budgets)
        raw = [self.relevance(video) for video in videos]
        pool = torch.cat(raw) if self.compat == "official" and raw else None
        row = []
        for video, budget, raw_N in zip(videos, budgets, raw, strict=True):
            weight_N = to_weight(raw_N, raw_N if pool is None else pool)
            order_K = most_diverse(video.x_ND.detach(), weight_N, budget.num_kept)
            row.append(Kept(index_K=order_K.sort().values, scores_G=weight_N))
        return row

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        [kept] = self([video], [budget])
        return kept

    def relevance(self, video: VideoTokens) -> Tensor:
        """(N,) fp32 before it is brought to [0, 1]; all 1 where there is no aligned space or no question."""
        if video.aligned_GC is None or video.text_C is None:
            return video.x_ND.new_ones(video.num_groups, dtype=torch.float32)
        unit_NC = F.normalize(video.aligned_GC.detach().float(), dim=-1)
        return self.sign * (unit_NC @ F.normalize(video.text_C.detach().float(), dim=-1))

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Norms, one row of similarities per chosen token, and its product with the rows before."""
        return 2 * grid.num_groups * (width * (num_kept + 1) + num_kept**2 // 2)


def to_weight(raw_N: Tensor, pool_M: Tensor) -> Tensor:
    """(raw - min + 1e-6) / (max - min) with the extremes of the pool; 1 where all of it is equal."""
    low, high = pool_M.aminmax()
    return torch.where(high > low, (raw_N - low + 1e-6) / (high - low).clamp_min(1e-12), 1.0)


def most_diverse(x_ND: Tensor, weight_N: Tensor, num_kept: int) -> Tensor:
    """(K,) int64 in the order of a greedy choice for the largest determinant of K_ij = g_i g_j cos(x_i, x_j).

    Cholesky rows grow with every token chosen: c = (K_j - sum_k c_k[j] c_k) / sqrt(w_j), w -= c^2. K stands in one
    matrix while this is at most twice as large as the tokens, else each row is computed when its token is chosen: that
    reads all tokens for each one chosen. No host synchronisation."""
    unit_ND = F.normalize(x_ND.float(), dim=-1).mul_(weight_N[:, None])
    # Not the sum of squares: equal weights must tie exactly, and then the earlier token is chosen.
    variance_N = weight_N.square() * (torch.linalg.vector_norm(unit_ND, dim=-1) > 0)
    whole_NN = products(unit_ND) if len(unit_ND) <= 2 * unit_ND.shape[1] else None
    row_KN = unit_ND.new_zeros(num_kept, len(unit_ND))
    taken_N = torch.zeros_like(variance_N, dtype=torch.bool)
    chosen = []
    for row_N, step in zip(row_KN, range(num_kept), strict=True):
        pick_1 = variance_N.argmax(keepdim=True)
        chosen.append(pick_1)
        kernel_1N = unit_ND[pick_1] @ unit_ND.T if whole_NN is None else whole_NN[pick_1]
        torch.addmv(kernel_1N[0], row_KN[:step].T, row_KN[:step, pick_1][:, 0], alpha=-1, out=row_N)
        row_N.div_(variance_N[pick_1].clamp_min_(1e-12).sqrt_())
        variance_N.addcmul_(row_N, row_N, value=-1).clamp_min_(0)  # rounding; chosen ones are not chosen again
        variance_N.masked_fill_(taken_N.index_fill_(0, pick_1, True), -torch.inf)
    return torch.cat(chosen)


def products(x_ND: Tensor, block: int = 512) -> Tensor:
    """(N, N) x x^T by blocks of rows; what lies below the diagonal is copied from above it."""
    product_NN = x_ND.new_empty(len(x_ND), len(x_ND))
    for start in range(0, len(x_ND), block):
        end = start + block
        torch.mm(x_ND[start:end], x_ND[start:].T, out=product_NN[start:end, start:])
        product_NN[end:, start:end] = product_NN[start:end, end:].T
    return product_NN
