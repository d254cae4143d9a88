"""STTS by hand-made cases; the authors' numbers are in tests/golden/test_stts.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stts.budget import plan
from stts.pruners import temporal
from stts.pruners.base import HostInfo
from stts.pruners.stts import STTS, choose
from stts.tokens import Budget, Grid, Kept, VideoTokens

FLOOR = math.exp(-2)
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


def make(**options) -> STTS:
    torch.manual_seed(0)
    return STTS(8, 12, 2, **options)


def windows(grid: Grid, side: int = 2) -> Tensor:
    """(G, side^2) patches of windows that lie side by side."""
    num_patches = grid.num_groups * side**2
    patch_TYX = torch.arange(num_patches).view(grid.t, grid.h * side, grid.w * side)
    return patch_TYX.unfold(1, side, side).unfold(2, side, side).reshape(-1, side**2)


def make_video(t: int = 4, h: int = 2, w: int = 3, seed: int = 1) -> VideoTokens:
    grid = Grid(t, h, w)
    x_ND = torch.randn(4 * grid.num_groups, 8, generator=torch.Generator().manual_seed(seed))
    return VideoTokens(x_ND, grid, torch.arange(grid.num_groups), group_GW=windows(grid))


def run(stage: STTS, *videos: VideoTokens, ratio: float = 0.5) -> list[Kept]:
    return stage(videos, plan([stage.site], ratio, [video.grid for video in videos], 8)[0])


# --- score to bias -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "spread_of"),
    [("row", lambda a_TYX: a_TYX.flatten(0, 1)), ("frame", lambda a_TYX: a_TYX.flatten(1))],
)
def test_every_range_runs_from_the_floor_to_one(scope, spread_of):
    [kept] = run(make(rescale_scope=scope), make_video())
    patch_TYX = kept.attention_bias_N.view(4, 4, 6)
    assert (patch_TYX[0] == 0).all(), "the first frame"
    assert torch.equal(patch_TYX[:, ::2, ::2], patch_TYX[:, 1::2, 1::2]), "one value per window"
    ranges = spread_of(patch_TYX[1:]).exp()
    assert_close(ranges.amin(1), torch.full((len(ranges),), FLOOR))
    assert_close(ranges.amax(1), torch.ones(len(ranges)), atol=1e-3, rtol=0)


def test_video_scope_leaves_the_first_frame_out():
    [kept] = run(make(rescale_scope="video"), make_video())
    later_G = temporal.rescale(kept.scores_G[6:], torch.zeros(18, dtype=torch.long), 1, FLOOR)
    expected_N = temporal.key_bias(later_G, windows(Grid(3, 2, 3)), 72)
    assert_close(kept.attention_bias_N, torch.cat([torch.zeros(24), expected_N]))


def test_overlapping_windows():
    # Three patches in a row, two cells that share the middle one.
    group_GW = torch.tensor([[0, 1], [1, 2], [3, 4], [4, 5]])
    x_ND = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))
    video = VideoTokens(x_ND, Grid(2, 1, 2), torch.arange(4), group_GW=group_GW)
    [kept] = make()([video], [Budget(3, 0.75)])
    low, high = sorted([0, 1], key=lambda cell: kept.scores_G[2 + cell])
    assert kept.index_K.tolist() == sorted([0, 1, 2 + high])
    bias_TX = kept.attention_bias_N.view(2, 3)
    assert (bias_TX[0] == 0).all()
    assert_close(bias_TX[1, 2 * low], torch.tensor(-2.0))
    assert_close(bias_TX[1, [1, 2 * high]], torch.zeros(2), atol=1e-3, rtol=0)


# --- the choice --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "ratio", "expected"), [(1, 0.2, 6), (2, 0.2, 6), (3, 0.2, 6), (2, 0.8, 10), (9, 0.5, 27)]
)
def test_the_first_frame_survives_every_ratio(t, ratio, expected):
    [kept] = run(make(), make_video(t), ratio=ratio)
    assert len(kept.index_K) == expected
    assert kept.index_K[:6].tolist() == list(range(6))


# --- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"rescale_scope": "video"}])
def test_a_video_does_not_depend_on_its_neighbours(options):
    stage = make(**options)
    videos = [make_video(seed=1), make_video(5, 2, 2, seed=2), make_video(1, seed=3), make_video(2, seed=4)]
    for video, beside in zip(videos, run(stage, *videos), strict=True):
        [alone] = run(stage, video)
        assert_close(beside.scores_G, alone.scores_G, atol=1e-6, rtol=0)
        assert torch.equal(beside.index_K, alone.index_K)
        if alone.attention_bias_N is not None:
            assert_close(beside.attention_bias_N, alone.attention_bias_N, atol=1e-4, rtol=0)


def test_the_release_looks_across_the_border():
    stage = make(compat="official")
    before, video = make_video(seed=1), make_video(seed=2)
    beside, alone = run(stage, before, video)[1].scores_G, run(stage, video)[0].scores_G
    assert_close(beside[6:], alone[6:], atol=1e-6, rtol=0)
    assert (beside[:6] - alone[:6]).abs().max() > 1e-5


def test_scoring_in_pieces_needs_one_frame_of_context():
    stage, video = make(), make_video(6)
    [whole_G] = stage.score([video])
    pieces = []
    for start, end in ((0, 3), (3, 6)):
        context = max(start - 1, 0)
        grid = Grid(end - context, 2, 3)
        x_ND = video.x_ND[24 * context : 24 * end]
        piece = VideoTokens(x_ND, grid, torch.arange(grid.num_groups), group_GW=windows(grid))
        pieces.append(stage.score([piece])[0][6 * (start - context) :])
    assert_close(torch.cat(pieces), whole_G, atol=1e-6, rtol=0)
    assert torch.equal(choose(whole_G, [video.grid], [Budget(18, 0.5)])[0], run(stage, video)[0].index_K)


def test_slots_outside_the_grid_are_not_attended():
    stage = make()
    x_ND = torch.randn(4, 8)
    pooled = stage.scorer.pooling(x_ND, torch.tensor([[0, 1, -1], [2, 3, 3]]))
    assert_close(pooled[:1], stage.scorer.pooling(x_ND, torch.tensor([[0, 1]])))
    official = make(compat="official").scorer.pooling(x_ND, torch.tensor([[0, 1, -1]]))
    padded_ND = torch.cat([x_ND, torch.zeros(1, 8)])
    assert_close(official, make().scorer.pooling(padded_ND, torch.tensor([[0, 1, 4]])))


@pytest.mark.parametrize("half_weights", [False, True])
def test_scores_are_fp32_under_bf16(half_weights):
    stage, video = make(), make_video()
    expected_G = run(stage, video)[0].scores_G
    video = VideoTokens(video.x_ND.bfloat16(), video.grid, video.cell_G, group_GW=video.group_GW)
    if half_weights:
        [kept] = run(stage.bfloat16(), video)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            [kept] = run(stage, video)
    assert kept.scores_G.dtype == kept.attention_bias_N.dtype == torch.float32
    assert (kept.scores_G != kept.scores_G.bfloat16()).any(), "more digits than bf16 has"
    assert_close(kept.scores_G, expected_G, atol=1e-2, rtol=0)
    [loss] = run(stage.train(), video)[0].losses.values()
    assert loss.dtype == torch.float32


# --- losses and gradients ----------------------------------------------------------------------------------------


def test_target_options():
    video = make_video()
    video.x_ND.requires_grad_()
    features = temporal.window_features(video.x_ND, video.group_GW)
    target_G = temporal.temporal_target(features, torch.arange(24) - 6)[6:]
    assert target_G.max() > 1
    for options, want in (({}, target_G.clamp(0, 1)), ({"clamp_target": False}, target_G)):
        [kept] = run(make(**options).train(), video)
        assert_close(kept.losses["temporal"], (kept.scores_G[6:] - want).square().mean())
    detached, attached = (
        torch.autograd.grad(run(make(detach_target=d).train(), video)[0].losses["temporal"], video.x_ND)[0]
        for d in (True, False)
    )
    assert (detached - attached).abs().max() > 1e-4


def test_losses_come_in_training_only_and_with_the_first_video_only():
    stage, videos = make(), [make_video(seed=1), make_video(seed=2)]
    assert all(not kept.losses for kept in run(stage.eval(), *videos))
    first, second = run(stage.train(), *videos)
    assert list(first.losses) == ["temporal"] and not second.losses


def test_loss_is_the_mean_over_the_groups_of_all_prunable_videos():
    stage = make().train()
    videos = [make_video(2, seed=1), make_video(4, seed=2), make_video(1, seed=3)]
    ones = [run(stage, video)[0].losses["temporal"] for video in videos[:2]]
    together = run(stage, *videos)[0].losses["temporal"]
    assert_close(together, (ones[0] * 6 + ones[1] * 18) / 24)


@pytest.mark.parametrize("videos", [[make_video(1)], [make_video(4), make_video(1)]])
def test_nothing_to_prune_means_a_bias_of_zero_and_a_zero_loss_that_keep_every_gradient(videos):
    stage = make(straight_through=True).train()
    budgets = [Budget(video.grid.num_groups, 0.5) for video in videos]
    kept = stage(videos, budgets)
    assert all((k.attention_bias_N == 0).all() and (k.gate_G == 1).all() for k in kept)
    loss = kept[0].losses["temporal"]
    assert loss == 0
    (loss + sum(k.attention_bias_N.sum() + k.gate_G.sum() for k in kept)).backward()
    with torch.no_grad():
        assert all(k.attention_bias_N is None and k.gate_G is None for k in stage(videos, budgets))
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_dense_pass_has_no_bias_and_a_zero_loss_that_keeps_every_gradient():
    stage = make(straight_through=True).train()
    [kept] = stage([make_video(4)], [Budget(24, 1.0)])
    assert kept.attention_bias_N is None and kept.gate_G is None
    kept.losses["temporal"].backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_whole_video_beside_a_pruned_one_has_no_bias():
    _, whole = run(make(straight_through=True), make_video(4), make_video(1, seed=2))
    assert (whole.attention_bias_N == 0).all() and (whole.gate_G == 1).all()
    assert whole.index_K.tolist() == list(range(6))


def test_gumbel_noise_tries_other_groups_in_training_only():
    """As often as the softmax of the logits says: of two free groups one is kept."""
    stage, budget = make(gumbel=1.0), Budget(7, 7 / 24)
    grid, scores = Grid(4, 2, 3), torch.full((24,), 1e-6)
    scores[10], scores[15] = torch.tensor([1.0, -1.0]).sigmoid()
    torch.manual_seed(0)
    kept = [stage.train().settle([scores], [grid], [budget])[0][0][-1].item() for _ in range(400)]
    assert abs(kept.count(10) / 400 - math.exp(2) / (1 + math.exp(2))) < 0.05 and set(kept) == {10, 15}
    assert {stage.eval().settle([scores], [grid], [budget])[0][0][-1].item() for _ in range(20)} == {10}
    with pytest.raises(ValueError, match="gumbel=-1"):
        make(gumbel=-1)


def test_the_answer_reaches_the_scorer_through_the_bias():
    stage, video = make(), make_video()
    [kept] = run(stage, video)
    assert not kept.scores_G.requires_grad and not kept.index_K.requires_grad and kept.gate_G is None
    (kept.attention_bias_N * torch.randn(96)).sum().backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        if name not in ("scorer.pooling.key.bias", "scorer.mlp.2.bias"):  # softmax and rescaling ignore a constant
            assert parameter.grad.any(), name


def test_straight_through_gate():
    stage, video = make(straight_through=True), make_video()
    [kept] = run(stage, video)
    assert torch.equal(kept.gate_G.detach(), torch.ones(24))
    kept.gate_G.sum().backward()
    gate_gradient = stage.scorer.mlp[2].bias.grad.clone()
    stage.zero_grad()
    stage.score([video])[0][6:].sum().backward()  # d gate / d s = 1, except in the first frame
    assert_close(gate_gradient, stage.scorer.mlp[2].bias.grad)


def test_without_the_answer_gradient_only_the_temporal_loss_teaches():
    stage, video = make(answer_gradient=False).train(), make_video()
    [kept], [usual] = run(stage, video), run(make().train(), video)
    assert (
        torch.equal(kept.attention_bias_N, usual.attention_bias_N.detach()) and not kept.attention_bias_N.requires_grad
    )
    assert kept.losses["temporal"].requires_grad and usual.attention_bias_N.requires_grad


# --- options -----------------------------------------------------------------------------------------------------


def test_site_and_its_options():
    site = make().site
    assert (site.kind, site.layer, site.drop_after) == ("vit", 3, 4)
    assert make(prune_block=1, drop_after=5).site.drop_after == 5
    assert STTS.for_host(HOST).site == make().site
    with pytest.raises(ValueError, match="set prune_block=3"):
        STTS.for_host(HOST, prune_block=4)
    soft = STTS.for_host(HOST, soft_only=True)
    assert (soft.site.layer, soft.site.drop_after) == (3, 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale_scope": "column"}, "'row', 'frame' or 'video'"),
        ({"rescale_min": 0.0}, r"\(0, 1\)"),
        ({"min_groups_per_frame": -1}, "0 \\(off\\) or more"),
        ({"straight_through": True, "answer_gradient": False}, "withholds"),
        ({"compat": "paper"}, "'official'"),
        ({"drop_after": 3}, "no block for the bias"),
        ({"num_heads": 3}, "equal heads"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        STTS(**{"dim": 8, "mlp_dim": 12, "num_heads": 2, **options})


def test_windows_are_needed():
    video = make_video()
    with pytest.raises(ValueError, match="group_GW"):
        run(make(), VideoTokens(video.x_ND, video.grid, video.cell_G))


def test_flops_of_one_group_at_the_published_sizes():
    with torch.device("meta"):
        stage = STTS(1152, 4304, 16)
    assert stage.flops(Grid(1, 1, 1), 1152, 1) == 110_015_904
    assert stage.flops(Grid(1, 9, 9), 1152, 81) == 8_911_288_224
    assert sum(parameter.numel() for parameter in stage.parameters()) == pytest.approx(33.8e6, rel=2e-3)
