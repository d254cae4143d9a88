"""Chain: stages one behind the other, in the order of the forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from stts.budget import plan
from stts.pruners.base import HostInfo, PerVideo, Pruner, keep_top
from stts.pruners.chain import Chain
from stts.pruners.registry import make_pruner
from stts.pruners.simple import Dense
from stts.tokens import Budget, Grid, Kept, Site, VideoTokens

HOST = HostInfo(
    family="tiny", vit_width=8, vit_mlp=12, vit_heads=2, vit_depth=6, lowest_tap=5, llm_width=8, llm_layers=28,
    patches_per_group=4,
)  # fmt: skip


@dataclass(frozen=True)
class At(PerVideo):
    site: Site  # type: ignore[misc]  # a class variable elsewhere

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        return keep_top(video, torch.zeros(video.num_groups), budget.num_kept)


VIT = At(Site("vit", layer=1, drop_after=2))
PRE = At(Site("pre_llm"))
EARLY, LATE = At(Site("llm", layer=2)), At(Site("llm", layer=9))


def test_a_chain_holds_all_stages_in_order():
    chain = Chain((VIT, Chain((PRE, EARLY)), Dense(), LATE))
    assert chain.stages == (VIT, PRE, EARLY, LATE)
    assert isinstance(chain, Pruner)
    assert Chain(()).stages == ()


@pytest.mark.parametrize("pruners", [(PRE, PRE), (EARLY, EARLY), (VIT, VIT)])
def test_equal_sites_may_follow_each_other(pruners):
    assert len(Chain(pruners).stages) == 2


@pytest.mark.parametrize(
    ("pruners", "names"),
    [
        ((PRE, VIT), "pre_llm in front of one at vit 1"),
        ((EARLY, PRE), "llm 2 in front of one at pre_llm"),
        ((PRE, LATE, EARLY), "llm 9 in front of one at llm 2"),
        ((LATE, VIT), "llm 9 in front of one at vit 1"),
    ],
)
def test_a_chain_against_the_order_of_the_forward_pass_is_refused(pruners, names):
    with pytest.raises(ValueError, match=names):
        Chain(pruners)


@pytest.mark.parametrize("name", ["holitom+inner", "tango+inner"])
def test_the_published_pairs_cost_one_ratio(name):
    # Before layer 18 of 28 half is dropped: (18 + 10 / 2) / 28 r = 0.23 gives r = 0.28 before the LLM.
    sites = [stage.site for stage in make_pruner(name, HOST).stages]
    assert [(site.kind, site.layer, site.share) for site in sites] == [("pre_llm", None, None), ("llm", 18, 0.5)]
    assert [row[0].num_kept for row in plan(sites, 0.23, [Grid(10, 10, 10)], 28)] == [280, 140]
