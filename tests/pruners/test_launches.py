"""How many operators a call starts (on a GPU each is a kernel launch) and how much memory it takes, over the video."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stts.budget import plan
from stts.pruners.check import HOST, example_video
from stts.pruners.registry import PRUNERS, make_pruner
from stts.pruners.tango_pools import Pool, Tokens, merge_context
from stts.tokens import Grid, Site
from tests.scripts import load_script

GREEDY = {"divprune", "cdpruner"}  # one token after another: operators grow with the tokens chosen
RECURRENT = {"heuristic"}  # a baseline: the reference of a frame depends on what was decided on the one before
BRANCHES = 20
"""`flashvid` finds roots of trees in log2 steps and pads sets of unequal size; exact budgets are trimmed or filled."""


def launches_and_waits(name: str, frames: int) -> tuple[int, int]:
    """Of all stages of a pruner, one call each."""
    torch.manual_seed(0)
    counted = load_script("benchmarks/counting").counted
    launches = waits = 0
    for stage in make_pruner(name, HOST).stages:
        if isinstance(stage, torch.nn.Module):
            stage.eval()
        video = example_video(stage, Grid(frames, 3, 4), seed=1)
        site = stage.site if stage.site.kind != "llm" else Site("pre_llm")
        grid = video.grid if site.kind == "vit" else Grid(1, 1, video.num_groups)
        [[budget]] = plan([site], 0.5, [grid], 8)
        with torch.no_grad():
            own_launches, own_waits = counted(lambda stage=stage, video=video, budget=budget: stage([video], [budget]))
        launches, waits = launches + own_launches, waits + own_waits
    return launches, waits


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "none" and name not in GREEDY | RECURRENT])
def test_launches_do_not_grow_with_frames_nor_do_waits(name: str) -> None:
    (few, few_waits), (many, many_waits) = launches_and_waits(name, 8), launches_and_waits(name, 32)
    assert many <= few + BRANCHES
    assert many_waits <= few_waits <= 8  # PruneVid settles its thresholds on the host


WORST = 12
"""Bytes at any moment beyond the input, over the bytes of the tokens in fp32."""


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "none"])
def test_memory_is_a_multiple_of_the_tokens(name: str) -> None:
    """At 64 frames of 7 x 7 tokens a matrix of all pairs would be 24 times as large as the tokens."""
    torch.manual_seed(0)
    stage = make_pruner(name, replace(HOST, llm_width=128, vit_width=128)).stages[0]
    if isinstance(stage, torch.nn.Module):
        stage.eval()
    video = example_video(stage, Grid(64, 7, 7), seed=1, width=128)
    site = stage.site if stage.site.kind != "llm" else Site("pre_llm")
    grid = video.grid if site.kind == "vit" else Grid(1, 1, video.num_groups)
    [[budget]] = plan([site], 0.2, [grid], 8)
    extra = load_script("benchmarks/measure").extra_mib
    with torch.no_grad():
        found = extra(lambda: stage([video], [budget]), torch.device("cpu"))
    assert found * 2**20 <= WORST * 4 * video.x_ND.numel(), f"{found:.1f} MiB"


class Alive(TorchDispatchMode):
    """Bytes of all tensors that exist at the same time, at most: on the device `meta` they have a size but no data."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "meta":
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("num_windows", [1, 8, 200])
def test_merging_512_frames_takes_a_multiple_of_the_tokens(num_windows: int) -> None:
    """512 frames of 196 tokens; in one window all pairs would be 28 times as large as the tokens."""
    num_tokens, width = 512 * 196, 3584
    x_ND = torch.empty(num_tokens, width, device="meta")
    row_N = torch.arange(num_tokens, device="meta")
    tokens = Tokens(x_ND, x_ND.new_empty(0, width), x_ND, row_N, x_ND.new_empty(num_tokens))
    size = num_tokens // num_windows
    pools = [Pool(size // 3, size // 60)] * (num_windows - 1)
    pools.append(Pool(num_tokens - sum(pool.num_tokens for pool in pools), size // 12))  # one is larger than the others
    with torch.no_grad(), Alive() as alive:
        merge_context(tokens, row_N, pools, 7, 0.6)
    assert 1 <= alive.most / 4 / x_ND.numel() <= WORST, f"{alive.most / 4 / x_ND.numel():.1f} times the tokens"
