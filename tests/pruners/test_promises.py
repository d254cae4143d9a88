"""What every pruner of the registry promises, on one small video and on a batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stts.pruners.base import HostInfo, Pruner, Stage
from stts.pruners.registry import PRUNERS, make_pruner
from stts.tokens import Budget, Grid, Kept, PromptTokens, VideoTokens

HOST = HostInfo(
    family="tiny",
    vit_width=8,
    vit_mlp=12,
    vit_heads=2,
    vit_depth=6,
    lowest_tap=5,
    llm_width=8,
    llm_layers=8,
    patches_per_group=4,
)
NAMES = [name for name in PRUNERS if name != "none"]  # `none` has no stage
GRID = Grid(4, 2, 3)


def first_stage(name: str) -> Stage:
    torch.manual_seed(0)  # a learned pruner starts from random weights
    return make_pruner(name, HOST).stages[0]


def tiny_video(stage: Stage, grid: Grid = GRID, seed: int = 1) -> VideoTokens:
    """A random video with the signals the stage asked for; windows of 2x2 patches at a vit site."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    group_GW, num_rows = None, grid.num_groups
    if stage.site.kind == "vit":
        num_rows *= 4
        patch_TYX = torch.arange(num_rows).view(grid.t, 2 * grid.h, 2 * grid.w)
        group_GW = patch_TYX.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 4)
    signals = stage.signals
    return VideoTokens(
        x_ND=randn(num_rows, 8),
        grid=grid,
        cell_G=torch.arange(grid.num_groups),
        group_GW=group_GW,
        timestamps_T=torch.arange(grid.t, dtype=torch.float64) / 2,
        salience_G=randn(grid.num_groups).softmax(0) if signals & {"attn", "probe", "last_row"} else None,
        keys_GD=randn(grid.num_groups, 8) if "keys" in signals else None,
        frame_TC=randn(grid.t, 8) if "frame" in signals else None,
        text_C=randn(8) if "text" in signals else None,
        prompt=PromptTokens(randn(5, 8), randn(5, 8), torch.ones(8)) if "prompt" in signals else None,
        uid=f"video-{seed}",
    )


def run(stage: Stage, video: VideoTokens, num_kept: int) -> Kept:
    [kept] = stage([video], [Budget(num_kept, num_kept / video.num_groups, exact=True)])
    return kept


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_kept", [7, 12, 23, 24])
def test_every_pruner_keeps_its_promises(name, num_kept):
    stage = first_stage(name)
    video = tiny_video(stage)
    before = tiny_video(stage)
    kept = run(stage, video, num_kept)
    assert len(kept.index_K) == num_kept, "an exact budget is met exactly"
    assert kept.index_K.dtype == torch.int64
    assert (kept.index_K.diff() > 0).all(), "unique and in video order"
    assert kept.index_K.min() >= 0 and kept.index_K.max() < video.num_groups, "inside the grid"
    for field in ("x_ND", "cell_G", "group_GW", "timestamps_T", "salience_G", "keys_GD", "frame_TC"):
        value = getattr(video, field)
        assert value is None or torch.equal(value, getattr(before, field)), f"a pruner must not write to {field}"
    assert kept.x_KD is None or kept.x_KD.shape == (num_kept, 8)
    assert kept.gate_G is None or torch.equal(kept.gate_G.detach(), torch.ones(24)), "a gate changes no value"
    assert kept.attention_bias_N is None or kept.attention_bias_N.shape == video.x_ND.shape[:1]
    assert kept.scores_G is None or (kept.scores_G.shape == (24,) and not kept.scores_G.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_every_pruner_is_deterministic(name):
    first, second = (run(first_stage(name), tiny_video(first_stage(name)), 9) for _ in range(2))
    assert torch.equal(first.index_K, second.index_K)
    assert first.x_KD is None or torch.equal(first.x_KD, second.x_KD)


@pytest.mark.parametrize("name", NAMES)
def test_a_video_is_treated_alike_alone_and_in_a_batch(name):
    stage = first_stage(name)
    videos = [tiny_video(stage), tiny_video(stage, Grid(2, 3, 3), seed=2), tiny_video(stage, Grid(3, 2, 2), seed=3)]
    budgets = [Budget(n, n / v.num_groups, exact=True) for n, v in zip([8, 18, 5], videos, strict=True)]
    for video, budget, beside in zip(videos, budgets, stage(videos, budgets), strict=True):
        [alone] = stage([video], [budget])
        assert torch.equal(alone.index_K, beside.index_K)
        for field in ("x_KD", "scores_G"):
            if (value := getattr(alone, field)) is not None:
                torch.testing.assert_close(getattr(beside, field), value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_equal_groups_are_no_trouble(name):
    stage = first_stage(name)
    video = tiny_video(stage)
    flat = VideoTokens(
        torch.ones_like(video.x_ND),
        video.grid,
        video.cell_G,
        group_GW=video.group_GW,
        timestamps_T=video.timestamps_T,
        salience_G=None if video.salience_G is None else torch.full_like(video.salience_G, 1 / 24),
        keys_GD=None if video.keys_GD is None else torch.ones_like(video.keys_GD),
        frame_TC=None if video.frame_TC is None else torch.ones_like(video.frame_TC),
        text_C=video.text_C,
        prompt=video.prompt,
        uid="flat",
    )
    kept = run(stage, flat, 10)
    assert len(kept.index_K) == 10 and (kept.index_K.diff() > 0).all()


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_declares_itself(name):
    pruner = make_pruner(name, HOST)
    assert isinstance(pruner, Pruner)
    for stage in pruner.stages:
        assert isinstance(stage, Stage)
        assert stage.positions in ("original", "compact")
        assert stage.newlines in ("all", "kept_rows", "every_row", "after_frame", "none")
        more = stage.flops(Grid(8, 2, 3), 8, 12)
        assert isinstance(more, int) and more >= stage.flops(GRID, 8, 12) >= 0
    assert bool(pruner.stages) == (name != "none")


def test_a_pruner_by_dotted_path_and_unknown_names():
    assert make_pruner("stts.pruners.novelty:Novelty", HOST).stages
    with pytest.raises(ValueError, match="known: none, random"):
        make_pruner("nonsense", HOST)
    with pytest.raises(ValueError, match="importable"):
        make_pruner("stts.pruners.novelty:Nothing", HOST)
    with pytest.raises(ValueError, match="does not take the options"):
        make_pruner("uniform", HOST, seed=3)
