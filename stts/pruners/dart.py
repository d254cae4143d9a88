"""`dart`: keep what a few pivots do not already say.

Shape suffixes beside those of `stts.tokens`: L = prompt tokens after the video, Q = pivots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from stts.budget import check_ratio
from stts.pruners import ops
from stts.pruners.base import HostInfo, PerVideo, Positions
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens


@dataclass(frozen=True, kw_only=True)
class DART(PerVideo):
    """Keep the groups least similar to a few pivots: duplicates of a pivot add nothing. Needs no attention map.

        pivots = the 4 groups and the 4 prompt tokens behind the video with the largest L1 norm of their keys
        for each pivot p in turn: keep the t groups left with the smallest cos(w * x_p, w * x_g)

    w is the weight of the LLM's final RMS norm, whose scale per token a cosine does not see. Image pivots stay
    themselves, text pivots are references only. arXiv:2502.11494; the release was not at hand, so the steps follow
    three public ports that agree (`llmc/compression/token_reduction/dart.py` of ModelTC/LightCompress among them).

    * `budget.exact`: num_kept less the image pivots is split evenly, one more to the first pivots where it does not
      divide. Below 12 there are max(1, num_kept // 3) pivots of each kind at most.
    * otherwise t = floor(G * ratio / pivots), so 4 more or up to about 4 fewer than planned are kept, as in the ports.
    * Fewer prompt tokens behind the video than text pivots: those there are, or none; the rest is split among the
      pivots there are. Groups run out: the remaining pivots pick nothing.

    **Differs:** the ports iterate over a Python set of places, whose order is an accident of hashing; here image pivots
    pick first, then text pivots, each by falling norm. `pivot_order` sets another order."""

    paper: ClassVar[str] = "2502.11494"
    layer: int = 2
    """Groups are dropped before this LLM layer; keys come from the layer before."""
    num_image_pivots: int = 4
    num_text_pivots: int = 4
    pivot_order: tuple[int, ...] | None = None
    """The order in which pivots pick, as numbers in the plain order (4 image pivots are 0..3, text pivots 4..7)."""

    signals: ClassVar[frozenset[Signal]] = frozenset({"keys", "prompt"})
    count_known: ClassVar[bool] = False
    positions: ClassVar[Positions] = "original"

    def __post_init__(self) -> None:
        if self.num_image_pivots < 1 or self.num_text_pivots < 0:
            raise ValueError(
                f"num_image_pivots={self.num_image_pivots} must be at least 1 and num_text_pivots="
                f"{self.num_text_pivots} at least 0"
            )
        numbers = list(range(self.num_image_pivots + self.num_text_pivots))
        if self.pivot_order is not None and sorted(self.pivot_order) != numbers:
            raise ValueError(f"pivot_order={self.pivot_order} must hold each of {numbers} once")

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The published layer, scaled down for shallow LLMs."""
        return cls(**{"layer": host.llm_layer(cls.layer), **options})

    @property
    def site(self) -> Site:  # type: ignore[override]  # a field decides, so it cannot be a class variable
        return Site("llm", layer=self.layer)

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        keys_GD = ops.need(video.keys_GD, "keys", video)
        prompt = ops.need(video.prompt, "prompt", video)
        num_groups, num_kept = video.num_groups, budget.num_kept
        if not 1 <= num_kept <= num_groups:
            raise ValueError(f"num_kept={num_kept} is outside [1, {num_groups}]; see budget.plan")
        most = max(1, num_kept // 3) if budget.exact else num_groups
        image_Q = _largest(keys_GD, min(self.num_image_pivots, most))
        text_Q = _largest(prompt.keys_LD, min(self.num_text_pivots, most))
        num_image, num_text = len(image_Q), len(text_Q)

        norm_D = prompt.norm_D.detach().float()
        g_GD = video.x_ND.detach().float() * norm_D
        text_QD = prompt.x_LD[text_Q].detach().float() * norm_D
        pivot_QD = torch.cat([g_GD[image_Q], text_QD])[self._order(num_image, num_text)]
        # Cosines times the length of the pivot, which does not change the ranking within a row.
        cosine_QG = pivot_QD @ g_GD.T / g_GD.norm(dim=-1).clamp_min(1e-12)
        if budget.exact:
            share, more = divmod(num_kept - num_image, len(pivot_QD))
        else:
            share, more = int(num_groups * check_ratio(budget.retention_ratio)) // len(pivot_QD), 0
        picks = [share + (number < more) for number in range(len(pivot_QD))]
        return Kept(index_K=_pick(cosine_QG, image_Q, picks).sort().values)

    def _order(self, num_image: int, num_text: int) -> list[int]:
        """Rows of the pivots there are, in the order in which they pick."""
        first_text = self.num_image_pivots
        numbers = [*range(num_image), *range(first_text, first_text + num_text)]
        return [numbers.index(number) for number in self.pivot_order or numbers if number in numbers]

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """Weight, norm and one dot per pivot for every group; key norms and the prompt are left out as small."""
        return grid.num_groups * width * (1 + 2 + 2 * (self.num_image_pivots + self.num_text_pivots))


def _largest(keys_ND: Tensor, number: int) -> Tensor:
    """Rows with the largest L1 norm, falling; fewer where there are not so many."""
    return ops.top(keys_ND.detach().float().abs().sum(-1), number)


def _pick(cosine_QG: Tensor, image_Q: Tensor, picks: Sequence[int]) -> Tensor:
    """The image pivots, then for each pivot in turn its `picks` least similar groups of those still there."""
    taken_G = torch.zeros_like(cosine_QG[0]).index_fill_(0, image_Q, torch.inf)
    kept, left = [image_Q], cosine_QG.shape[1] - len(image_Q)
    for cosine_G, wanted in zip(cosine_QG, picks, strict=True):
        picked = ops.top(-(cosine_G + taken_G), min(wanted, left))
        taken_G[picked] = torch.inf
        kept.append(picked)
        left -= len(picked)
    return torch.cat(kept)
