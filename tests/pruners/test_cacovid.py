"""`cacovid`: shares and stride by hand, what the question reaches, batches, the loss of its training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stts.pruners.cacovid import CaCoVID, advantages, capped, frame_odds, frame_samples, policy_loss, token_samples
from stts.pruners.check import HOST, example_video
from stts.tokens import Budget, Grid, Words


def stage_of(**options: object) -> CaCoVID:
    torch.manual_seed(0)
    return CaCoVID(8, heads=2, kv_heads=1, mlp=12, **options).eval()  # type: ignore[arg-type]


def test_half_are_chosen_by_score_and_half_by_an_even_stride() -> None:
    stage, grid = stage_of(), Grid(2, 1, 10)
    score_N, score_T = torch.zeros(20), torch.tensor([1.0, -1.0])
    score_N[[3, 7, 15]] = 1.0
    # p = softmax(3, -3) clipped to [1/4, 3/4], so 3 : 1 of 4; frame 0 holds 3, frame 1 one.
    assert stage.frame_counts(score_T, grid, 8, Budget(8, 0.4, True)) == [3, 1]
    index = stage.choose(score_N, score_T, grid, Budget(8, 0.4, True)).tolist()
    # Frame 0: 3, 7 and the first of the equal ones; frame 1: 15. Of the 16 others every fifth: places 0, 5, 10, 15.
    rest = [n for n in range(20) if n not in (0, 3, 7, 15)]
    assert index == sorted([0, 3, 7, 15, *(rest[place] for place in (0, 5, 10, 15))])


def test_equal_frames_share_evenly_where_the_release_fails() -> None:
    assert stage_of().frame_counts(torch.zeros(4), Grid(4, 2, 2), 8, Budget(8, 0.5, True)) == [1, 1, 1, 1]


@pytest.mark.parametrize(("attention", "reached"), [("causal", False), ("full", True)])
def test_the_question_reaches_the_policy_only_where_it_may(attention: str, reached: bool) -> None:
    stage = stage_of(attention=attention)
    video = example_video(stage, Grid(3, 2, 2))
    assert video.words is not None
    other = replace(video, words=Words(video.words.before_LD, -video.words.behind_LD))
    with torch.no_grad():
        [(token_N2, _)], [(changed_N2, _)] = stage.logits([video]), stage.logits([other])
    assert torch.equal(token_N2, changed_N2) != reached


def test_a_video_is_ranked_alike_alone_and_beside_a_longer_one() -> None:
    for attention in ("causal", "full"):
        stage = stage_of(attention=attention)
        videos = [example_video(stage, grid, seed=seed) for seed, grid in enumerate((Grid(2, 2, 2), Grid(5, 1, 4)))]
        with torch.no_grad():
            beside = stage.logits(videos)
            for number, video in enumerate(videos):
                [(token_N2, frame_T2)] = stage.logits([video])
                torch.testing.assert_close(token_N2, beside[number][0], atol=1e-5, rtol=0)
                torch.testing.assert_close(frame_T2, beside[number][1], atol=1e-5, rtol=0)


def test_training_may_not_read_the_answer() -> None:
    stage = stage_of(attention="full").train()
    video = example_video(stage, Grid(2, 2, 2))
    with pytest.raises(ValueError, match="answer in training"):
        stage([video], [Budget(4, 0.5)])
    with torch.no_grad():
        assert len(stage([video], [Budget(4, 0.5)])[0].index_K) == 4


def test_the_loss_falls_as_rewarded_choices_grow_likelier() -> None:
    token_N2 = torch.zeros(4, 2, requires_grad=True)
    frame_T2, old = torch.zeros(2, 2), torch.full((4, 2), 0.5).log()
    sampled_SN = torch.tensor([[True, False, False, False], [False, True, False, False]])
    advantage_S = advantages(torch.tensor([1.0, 0.0]))
    loss, frame_loss = policy_loss(
        token_N2, frame_T2, old, old[:2], sampled_SN, torch.tensor([[True, False]]), advantage_S, torch.zeros(1)
    )
    assert frame_loss == 0 and loss.item() == pytest.approx(0, abs=1e-6)
    loss.backward()
    assert token_N2.grad is not None
    assert token_N2.grad[0, 1] < 0 < token_N2.grad[1, 1], "keep token 0, not token 1"
    # Past 1.28 of its old likelihood a rewarded choice gains nothing more.
    far_N2 = torch.tensor([[-9.0, 9.0]] + [[0.0, 0]] * 3, requires_grad=True)
    loss, _ = policy_loss(
        far_N2, frame_T2, old, old[:2], sampled_SN[:1], torch.ones(1, 2).bool(), torch.ones(1), torch.ones(1)
    )
    loss.backward()
    assert far_N2.grad is not None and far_N2.grad[0].abs().max() < 1e-6


def test_the_host_sizes_it() -> None:
    stage = CaCoVID.for_host(HOST)
    assert stage.compression_policy.layers[0].mlp["up_proj"].weight.shape == (HOST.llm_mlp, HOST.llm_width)  # type: ignore[union-attr,index]
    with pytest.raises(ValueError, match="attention='both'"):
        stage_of(attention="both")
    with pytest.raises(ValueError, match="'words' signal"):
        stage([replace(example_video(stage, Grid(2, 2, 2)), words=None)], [Budget(4, 0.5)])


def test_odds_above_the_cap_are_shared_out_among_the_others() -> None:
    odds_BM = torch.tensor([[0.6, 0.2, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    torch.testing.assert_close(capped(odds_BM, 0.4), torch.tensor([[0.4, 0.3, 0.15, 0.15], [0.25] * 4]))
    # The excess of the first takes the second over the cap too.
    torch.testing.assert_close(capped(torch.tensor([[0.6, 0.3, 0.1]]), 0.4), torch.tensor([[0.4, 0.4, 0.2]]))
    torch.testing.assert_close(capped(torch.tensor([[1.0, 0.0]]), 0.5), torch.tensor([[0.5, 0.5]]))


def test_samples_of_tokens_draw_within_one_group_of_ranks() -> None:
    grid, rate = Grid(3, 4, 5), 0.1  # two tokens a frame, five groups of four ranks
    score_N = torch.arange(60.0).view(3, 20).flip(1).flatten() / 20
    logits_N2 = torch.stack([torch.zeros(60), score_N], 1)
    kept_QN = token_samples(logits_N2, grid, rate, 400, generator=torch.Generator().manual_seed(0))
    kept_QTP = kept_QN.view(400, 3, 20)
    assert (kept_QTP.sum(-1) == 2).all()
    assert kept_QTP[0].nonzero()[:, 1].tolist() == [0, 1] * 3, "the first sample holds the best"
    per_group_QTG = kept_QTP.view(400, 3, 5, 4).sum(-1)  # ranks are places here
    assert set(per_group_QTG.unique().tolist()) == {0, 2}
    share_G = per_group_QTG.float().mean((0, 1)) / 2
    odds_G = score_N[:20].softmax(0).view(5, 4).sum(1)
    torch.testing.assert_close(share_G, odds_G, atol=0.05, rtol=0)
    again_QN = token_samples(logits_N2, grid, rate, 400, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kept_QN, again_QN)
    assert token_samples(logits_N2, grid, 0.01, 2).view(2, 3, 20).sum(-1).eq(1).all(), "at least one token a frame"
    with pytest.raises(ValueError, match=r"rate=1.5 is not in \(0, 1\]"):
        token_samples(logits_N2, grid, 1.5, 2)


def test_samples_of_frames_and_the_cap_that_the_release_misses() -> None:
    frame_T2 = torch.stack([torch.zeros(8), torch.tensor([0.0, 9.0, 0, 0, 0, 1.0, 0, 0])], 1)
    kept_FT = frame_samples(frame_T2, 50, generator=torch.Generator().manual_seed(0))
    assert (kept_FT.sum(1) == 2).all() and kept_FT[0].nonzero()[:, 0].tolist() == [1, 5]
    odds_T = frame_odds(frame_T2, 50)[0]
    assert float(odds_T[1]) == pytest.approx(3 / 8) and float(odds_T.sum()) == pytest.approx(1)
    assert frame_odds(frame_T2, 50, compat="official")[0, 1] * 50 > 0.9
