"""`visionselector`: what evaluation and training keep, the soft top-k, pools, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from stts.pruners.base import soft_in_training
from stts.pruners.check import HOST, example_video
from stts.pruners.ops import soft_top_k
from stts.pruners.stts import STTS
from stts.pruners.visionselector import VisionSelector
from stts.tokens import Budget, Grid


def stage_of(**options: object) -> VisionSelector:
    torch.manual_seed(0)
    return VisionSelector(8, std=0.5, **options)  # type: ignore[arg-type]


VIDEOS = [example_video(stage_of(), grid, seed=seed) for seed, grid in enumerate((Grid(2, 2, 3), Grid(5, 1, 4)))]
BUDGETS = [Budget(5, 5 / 12, True), Budget(20, 1.0, True)]


def test_scores_equal_the_product_of_all_queries_and_keys() -> None:
    stage = stage_of().eval()
    scorer, x_ND = stage.importance_scorer, VIDEOS[0].x_ND
    pairs_NN = F.linear(x_ND, scorer.q_proj.weight, scorer.q_proj.bias) @ scorer.k_proj(x_ND).T / 2  # width 4
    [kept] = stage(VIDEOS[:1], BUDGETS[:1])
    torch.testing.assert_close(kept.scores_G, pairs_NN.mean(1), atol=1e-5, rtol=0)
    assert kept.index_K.tolist() == pairs_NN.mean(1).topk(5).indices.sort().values.tolist()


def test_training_keeps_every_token_weighted_and_evaluation_the_best() -> None:
    stage = stage_of()
    first, second = stage(VIDEOS, BUDGETS)
    assert len(first.index_K) == 12 and len(second.index_K) == 20 and not stage.count_known
    assert first.x_KD is not None and second.x_KD is not None
    share_G = (first.x_KD / VIDEOS[0].x_ND).mean(1)
    assert float(share_G.detach().sum()) == pytest.approx(5, abs=1e-3)
    torch.testing.assert_close(second.x_KD, VIDEOS[1].x_ND)
    assert list(first.losses) == ["sharpen"] and not second.losses
    with torch.no_grad():
        assert len(stage(VIDEOS, BUDGETS)[0].index_K) == 5, "validation drops what evaluation drops"
    assert (
        soft_in_training(stage) and not soft_in_training(stage_of(soft=False)) and not soft_in_training(STTS(8, 8, 2))
    )


def test_without_soft_training_drops_and_the_gate_carries_gradient() -> None:
    stage = stage_of(soft=False)
    first, _ = stage(VIDEOS, BUDGETS)
    assert len(first.index_K) == 5 and first.x_KD is None and first.gate_G is not None
    assert first.gate_G.tolist() == [1.0] * 12
    first.gate_G[first.index_K].sum().backward()
    assert stage.importance_scorer.k_proj.weight.grad is not None
    assert float(stage.importance_scorer.k_proj.weight.grad.abs().max()) > 0


def test_a_constant_on_all_scores_changes_nothing() -> None:
    score_N = torch.randn(9, dtype=torch.float64, requires_grad=True)
    [weight_N], loss = soft_top_k([score_N], [4])
    [moved_N], moved = soft_top_k([score_N + 3], [4])
    torch.testing.assert_close(weight_N, moved_N)
    [gradient] = torch.autograd.grad((weight_N * torch.randn(9)).sum() + loss, score_N)
    assert abs(float(gradient.sum())) < 1e-9
    assert loss.item() == pytest.approx(moved.item())
    assert torch.autograd.gradcheck(lambda s: soft_top_k([s], [4])[1], score_N, eps=1e-6, atol=1e-6)


def test_pools_side_by_side_are_pools_alone() -> None:
    scores = [torch.randn(7), torch.randn(3), torch.randn(12)]
    together, loss = soft_top_k(scores, [2, 3, 5])
    alone = [soft_top_k([s], [k]) for s, k in zip(scores, (2, 3, 5), strict=True)]
    for found, (expected, _) in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected[0])
    assert loss.item() == pytest.approx(sum(float(one) for _, one in alone) / 3)
    assert together[1].tolist() == [1, 1, 1] and float(alone[1][1]) == 0, "k = N"


def test_every_parameter_takes_part_in_every_batch() -> None:
    stage = stage_of()
    row = stage(VIDEOS[:1], [Budget(12, 1.0, True)])
    (row[0].x_KD.sum() + row[0].losses["sharpen"]).backward()  # type: ignore[union-attr]
    assert all(parameter.grad is not None for parameter in stage.parameters())


def test_the_host_sizes_it() -> None:
    stage = VisionSelector.for_host(HOST)
    assert (stage.dim, stage.width, stage.positions) == (8, 4, "compact")
    assert VisionSelector.for_host(replace(HOST, mrope=True)).positions == "original"
    assert stage.flops(Grid(2, 2, 3), 8, 5) == 2 * (4 * (2 * 8 + 1) + 12 * 8)
    with pytest.raises(ValueError, match="compat='offical'"):
        VisionSelector(8, compat="offical")  # type: ignore[arg-type]
