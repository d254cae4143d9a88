"""`fastv`: keep what the last word of the prompt looks at.

Shape suffix: G = groups present.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from stts.pruners import ops
from stts.pruners.base import HostInfo, PerVideo, Positions, keep_top
from stts.tokens import Budget, Kept, Signal, Site, VideoTokens


@dataclass(frozen=True, kw_only=True)
class FastV(PerVideo):
    """Keep the groups that the last prompt token attends to most: after two layers the LLM hardly reads the others.

        a_g = mean over heads of softmax(q_last k / sqrt(head width))_g of layer K - 1,   K = 2

    arXiv:2403.06764, `fastv_forward` of the release. The budget follows from equal mean tokens per layer: the layers
    below K see everything, so the share kept from K on is solved by `budget.plan`.

    **Differs:** the paper's text averages the attention a token receives from all others, the release reads the last
    row only; so does this. The release re-ranks at every decoding step unless it has a cache; here the cut is made
    once, at prefill. Row newlines are no candidates and all stay: a newline has no cell in the grid. Several videos are
    ranked one by one, and rows of a batch too, where the release reads row 0 only."""

    paper: ClassVar[str] = "2403.06764"
    layer: int = 2
    """Groups are dropped before this LLM layer; ranked by the attention of the layer before."""

    signals: ClassVar[frozenset[Signal]] = frozenset({"last_row"})
    positions: ClassVar[Positions] = "original"
    reads_features: ClassVar[bool] = False

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The published layer, scaled down for shallow LLMs."""
        return cls(**{"layer": host.llm_layer(cls.layer), **options})

    @property
    def site(self) -> Site:  # type: ignore[override]  # a field decides, so it cannot be a class variable
        return Site("llm", layer=self.layer)

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        salience_G = ops.need(video.salience_G, "last_row", video)
        return keep_top(video, salience_G.detach().float(), budget.num_kept)
