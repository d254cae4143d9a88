"""How many operators a call starts (on a GPU each is a kernel launch) and how much memory it takes, over the video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stts.budget import plan
from stts.pruners.check import HOST, example_video
from stts.pruners.registry import PRUNERS, make_pruner
from stts.tokens import Grid
from tests.scripts import load_script

GREEDY = {"divprune", "cdpruner"}  # one token after another: operators grow with the tokens chosen
BY_PART = {  # parts of a video still go one by one
    "holitom", "holitom+inner", "stop-holitom", "tango", "tango+inner", "heuristic", "fastvid", "stop-fastvid",
}  # fmt: skip
DOUBLINGS = 16
"""`flashvid` finds roots of trees in log2 steps, and its greedy choice per frame follows the share of a frame."""


class Count(TorchDispatchMode):
    """Counts operators, those included that only change how a tensor is seen."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += 1
        return func(*args, **(kwargs or {}))


def operators(name: str, frames: int) -> int:
    torch.manual_seed(0)
    stage = make_pruner(name, HOST).stages[0]
    if isinstance(stage, torch.nn.Module):
        stage.eval()
    video = example_video(stage, Grid(frames, 3, 4), seed=1)
    site = stage.site if stage.site.kind != "llm" else make_pruner("evs", HOST).stages[0].site
    grid = video.grid if site.kind == "vit" else Grid(1, 1, video.num_groups)
    [[budget]] = plan([site], 0.5, [grid], 8)
    with torch.no_grad(), Count() as count:
        stage([video], [budget])
    return count.total


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "none" and name not in GREEDY | BY_PART])
def test_operators_do_not_grow_with_frames(name: str) -> None:
    assert operators(name, 64) <= operators(name, 8) + DOUBLINGS


PAIRS = {"tango", "tango+inner"}  # distances between all tokens of a window
WORST = 12
"""Bytes at any moment beyond the input, over the bytes of the tokens in fp32."""


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "none" and name not in PAIRS])
def test_memory_is_a_multiple_of_the_tokens(name: str) -> None:
    """At 64 frames of 7 x 7 tokens a matrix of all pairs would be 24 times as large as the tokens."""
    torch.manual_seed(0)
    stage = make_pruner(name, replace(HOST, llm_width=128, vit_width=128)).stages[0]
    if isinstance(stage, torch.nn.Module):
        stage.eval()
    video = example_video(stage, Grid(64, 7, 7), seed=1, width=128)
    site = stage.site if stage.site.kind != "llm" else make_pruner("evs", HOST).stages[0].site
    grid = video.grid if site.kind == "vit" else Grid(1, 1, video.num_groups)
    [[budget]] = plan([site], 0.2, [grid], 8)
    extra = load_script("benchmarks/measure").extra_mib
    with torch.no_grad():
        found = extra(lambda: stage([video], [budget]), torch.device("cpu"))
    assert found * 2**20 <= WORST * 4 * video.x_ND.numel(), f"{found:.1f} MiB"
