"""`framefusion` as loops to be read: the stage before the LLM, and the whole of the release, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stts.tokens import Budget, Kept, VideoTokens


def framefusion(video: VideoTokens, budget: Budget, threshold: float = 0.6) -> Kept:
    """Before the LLM only."""
    places = (video.cell_G % video.grid.per_frame).tolist()
    cosine = _similarity(video.x_ND, places)
    merged = sorted(cosine, key=lambda n: (-cosine[n], places[n], n))[: len(places) - budget.num_kept]
    if not budget.exact:
        merged = [n for n in merged if cosine[n] >= threshold]
    kept, x_KD = _merge(video.x_ND, places, set(merged))
    if budget.exact and len(kept) > budget.num_kept:
        chosen = [(2 * i + 1) * len(kept) // (2 * budget.num_kept) for i in range(budget.num_kept)]
        kept, x_KD = [kept[i] for i in chosen], x_KD[chosen]
    return Kept(index_K=torch.tensor(kept), x_KD=x_KD)


@dataclass
class Release:
    """The calls of the release during one prefill: on the embeddings, then behind the attention of layers 0, 1, ..."""

    cost: float
    threshold: float
    least: float = 0.1
    """Merging ends with the first call that merges less than this share."""
    num_layers: int = 28
    removed: list[float] = field(default_factory=list)
    merging_done: bool = False
    pruning_done: bool = False

    def call(self, x_ND: Tensor, places: list[int], attention_N: Tensor | None) -> tuple[list[int], Tensor]:
        """Rows that stay, and their features. places: -1 for text; attention_N: of the last query, mean over heads."""
        visual = [n for n, place in enumerate(places) if place >= 0]
        share = left_to_remove(self.removed, self.cost, self.num_layers) if self.removed else 1 - self.cost
        if self.merging_done:
            assert attention_N is not None and not self.pruning_done
            ranked = sorted(visual, key=lambda n: -float(attention_N[n]))[: round(len(visual) * (1 - share))]
            self.pruning_done = True
            kept = sorted([*ranked, *(n for n, place in enumerate(places) if place < 0)])
            return kept, x_ND[kept]
        cosine = _similarity(x_ND, places)
        merged = [n for n in cosine if cosine[n] >= self.threshold]
        if len(merged) / len(visual) < share:
            self.removed.append(len(merged) / len(visual))
            self.merging_done = self.removed[-1] < self.least
        else:
            merged = sorted(cosine, key=lambda n: (-cosine[n], places[n], n))[: int(share * len(visual))]
            self.merging_done = self.pruning_done = True
        return _merge(x_ND, places, set(merged))


def _similarity(x_ND: Tensor, places: list[int]) -> dict[int, float]:
    """Row -> cosine with the row before it at the same place, where there is one."""
    last: dict[int, int] = {}
    cosine = {}
    for n, place in enumerate(places):
        if place in last and place >= 0:
            cosine[n] = float(torch.cosine_similarity(x_ND[n], x_ND[last[place]], dim=0))
        last[place] = n
    return cosine


def _merge(x_ND: Tensor, places: list[int], merged: set[int]) -> tuple[list[int], Tensor]:
    runs: dict[int, list[int]] = {}  # row that stays -> itself and the run behind it
    head: dict[int, int] = {}  # place -> the last row that stays
    for n, place in enumerate(places):
        if n in merged:
            runs[head[place]].append(n)
        else:
            runs[n], head[place] = [n], n
    return list(runs), torch.stack([x_ND[run].float().mean(0) for run in runs.values()])


def left_to_remove(removed: Sequence[float], cost: float, num_layers: int) -> float:
    """Share of the present tokens to remove now so that the layers see `cost` of all on average (rho of the release).

    removed: shares removed so far, each of what was there; every entry counts as one layer. ValueError where the layers
    before have used up the cost."""
    present, used = 1.0, 0.0
    for share in removed:
        present *= 1 - share
        used += present
    remain = num_layers * cost - used
    if remain < 0:
        raise ValueError(f"cost={cost} of {num_layers} layers is used up by the first {len(removed)}; raise it")
    return max(0.0, 1 - remain / ((num_layers - len(removed)) * present))
