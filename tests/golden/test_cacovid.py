"""CaCoVID against vectors of the release: logits, the choice through the stage, odds of samples, loss and gradient.

Indices are exact, logits to 1e-5 of their range, losses to 1e-5, gradients to 2e-3 of their size.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stts.pruners.cacovid import CaCoVID, advantages, centres, frame_odds, group_odds, policy_loss
from stts.tokens import Budget, Grid, VideoTokens, Words
from tests.golden.conftest import Case, cases

CASES = cases("cacovid", containing="token_logits")
TRAINING = cases("cacovid", containing="iter1.loss")
PREFIX = "compression_policy."


def stage_of(case: Case, weights: str = "", **options: Any) -> CaCoVID:
    meta, mlp = case.meta, case[f"{PREFIX}layers.0.mlp.up_proj.weight"].shape[0]
    stage = CaCoVID(
        case["inputs_embeds"].shape[1], heads=meta["heads"], kv_heads=meta["kv_heads"], mlp=mlp,
        theta=meta["rope_theta"], eps=meta["rms_norm_eps"], important_share=meta.get("imp_ratio", 0.5), **options,
    )  # fmt: skip
    stage.load_state_dict({name: case[weights + name] for name in stage.state_dict()})
    if weights:  # both copies in the file are those of the later step
        assert all(torch.equal(case[name], case[weights + name]) for name in stage.state_dict())
    return stage


def video_of(case: Case) -> VideoTokens:
    x_LD, mask_L = case["inputs_embeds"], case["video_mask"].bool()
    first = int(mask_L.long().argmax())
    last = first + int(mask_L.sum())
    grid = Grid(*case["grid"].tolist())
    return VideoTokens(
        x_ND=x_LD[first:last], grid=grid, cell_G=torch.arange(grid.num_groups), words=Words(x_LD[:first], x_LD[last:])
    )


def near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected.view_as(actual), atol=tolerance, rtol=0)


@pytest.mark.parametrize("attention", ["full", "causal"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_and_choice_are_those_of_the_release(case: Case, attention: Literal["full", "causal"]) -> None:
    stage, video = stage_of(case, attention=attention, compat="official").eval(), video_of(case)
    end = "_causal" * (attention == "causal")
    with torch.no_grad():
        [(token_N2, frame_T2)] = stage.logits([video])
    for found, name in ((token_N2, f"token_logits{end}"), (frame_T2, f"frame_logits{end}")):
        near(found, case[name], 1e-5 * max(1.0, float(case[name].max() - case[name].min())))
    for ratio in case.meta["topk"]:
        [kept] = stage([video], [Budget(1, ratio)])
        assert torch.equal(kept.index_K, case[f"r{ratio}.index{end}"])
        if attention == "full":
            score_T = frame_T2[:, 1] - frame_T2[:, 0]
            total = int(ratio * video.grid.num_groups)
            counts = stage.frame_counts(score_T, video.grid, total, Budget(total, ratio))
            assert counts == case[f"r{ratio}.important_per_frame"].tolist() == case.meta["per_frame"][str(ratio)]
            important = case[f"r{ratio}.important"]
            assert torch.isin(important, kept.index_K).all() and len(important) == sum(counts)
        planned = stage_of(case, attention=attention).eval()([video], [Budget(len(kept.index_K), ratio, exact=True)])[0]
        assert len(planned.index_K) == len(kept.index_K)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_words_leave_the_layer_as_in_the_release(case: Case) -> None:
    # By the release's third head, which reads the mean of the words; ours leaves it out, as nothing uses it.
    x_LD, mask_L = case["inputs_embeds"], case["video_mask"].bool()
    real_1L = torch.ones(1, len(x_LD), dtype=torch.bool)
    with torch.no_grad():
        [h_LD] = stage_of(case).compression_policy.layers[0](x_LD[None], real_1L)
    mean_D = h_LD[~mask_L].mean(0)
    near(100 * mode_head(case, mean_D), case["mode_logits"], 1e-3)


def mode_head(case: Case, x_D: Tensor) -> Tensor:
    for number in (0, 2, 4, 6, 8):
        name = f"{PREFIX}mode_selection.{number}."
        x_D = F.linear(x_D if number == 0 else F.silu(x_D), case[f"{name}weight"], case[f"{name}bias"])
    return x_D


@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_odds_of_samples_are_those_of_the_release(case: Case) -> None:
    grid, number = Grid(*case["grid"].tolist()), case.meta["modes"]["frame"]
    odds_TP, order_TP, group_P, odds_TG = group_odds(case["iter0.token_logits"], grid, case.meta["rate"])
    near(odds_TP, case["sampler.token_prob"], 1e-6)
    sums_G = [float(odds_TP[0, order_TP[0, group_P == group]].sum()) for group in range(case.meta["num_group"])]
    near(torch.tensor(sums_G), case["sampler.group_prob_frame0"], 1e-6)
    near(odds_TG[0], case["sampler.group_prob_frame0_clipped"], 1e-6)
    assert odds_TG.max() <= case.meta["max_prob"] + 1e-6
    frame_T2 = case["iter0.frame_logits"]
    odds_T = (frame_T2[:, 1] - frame_T2[:, 0]).softmax(0)
    near(odds_T, case["sampler.frame_prob"], 1e-6)
    for row_T in frame_odds(frame_T2, number, compat="official"):
        near(row_T, case["sampler.frame_prob_clipped"], 1e-6)
    near(frame_odds(frame_T2, number)[0], odds_T, 1e-6)  # none is above 3/T or below 1/T^2: nothing is to be capped
    x_TPD = case["inputs_embeds"][case["video_mask"].bool()].unflatten(0, (grid.t, -1))
    kept_TP = centres(x_TPD, round(case.meta["rate"] * grid.per_frame))
    assert torch.equal(kept_TP.flatten(), case["sampler.content_no_noise"].bool())


@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_the_loss_and_its_gradient_are_those_of_the_release(case: Case) -> None:
    modes = case.meta["modes"]
    first, end = modes["content"], modes["content"] + modes["token"]
    sampled: list[Tensor] = []
    frames: list[Tensor] = []
    rewards: list[Tensor] = []
    stage = stage_of(case, "iter1.", attention="full")
    for step in (0, 1):
        name = f"iter{step}."
        token_N2, frame_T2 = case[f"{name}token_logits"], case[f"{name}frame_logits"]
        if step == 0:  # of weights that are not in the file
            near(token_N2.log_softmax(-1), case["iter0.old_token_logps"], 1e-5)
            near(frame_T2.log_softmax(-1), case["iter0.old_frame_logps"], 1e-5)
        else:
            [(made_N2, made_T2)] = stage.logits([video_of(case)])
            near(made_N2, token_N2, 1e-4)
            near(made_T2, frame_T2, 1e-4)
            token_N2, frame_T2 = made_N2, made_T2
        sampled.append(case[f"{name}sampled"][first:end].bool())
        frames.append(case[f"{name}sampled_frames"].bool())
        rewards.append(case[f"{name}reward"].float())
        advantage_S = advantages(torch.cat([reward[first:end] for reward in rewards]))
        advantage_F = advantages(torch.cat([reward[end:] for reward in rewards]))
        near(advantage_S, case[f"{name}advantage_token"], 1e-4)
        near(advantage_F, case[f"{name}advantage_frame"], 1e-4)
        token_loss, frame_loss = policy_loss(
            token_N2, frame_T2, case["iter0.old_token_logps"], case["iter0.old_frame_logps"], torch.cat(sampled),
            torch.cat(frames), advantage_S, advantage_F, low=case.meta["epsilon_low"], high=case.meta["epsilon_high"],
        )  # fmt: skip
        near(token_loss, case[f"{name}token_loss"], 1e-5)
        near(frame_loss, case[f"{name}frame_loss"], 1e-5)
        near(token_loss + frame_loss, case[f"{name}loss"], 1e-5)
        # The third head has a loss, huge at the second step as its logits are; it is no part of the sum above.
        mode_loss = float(case[f"{name}mode_loss_unused"])
        assert abs(mode_loss) < 1e-6 if step == 0 else mode_loss > 1e5
    ours = {name.removeprefix(PREFIX) for name in stage.state_dict()}
    theirs = set(case.group("compression_policy"))
    assert theirs - ours == {f"mode_selection.{n}.{kind}" for n in (0, 2, 4, 6, 8) for kind in ("weight", "bias")}
    assert ours <= theirs
    (token_loss + frame_loss).backward()
    for ours, parameter in stage.named_parameters():
        expected = case[f"grad.{ours}"]
        assert parameter.grad is not None
        near(parameter.grad, expected, 2e-3 * float(expected.abs().max()))
