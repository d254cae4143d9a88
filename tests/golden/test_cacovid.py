"""CaCoVID against vectors of the release: logits both ways, the choice through the stage, the loss and its gradient.

Indices are exact, logits to 1e-5 of their range, losses to 1e-5, gradients to 2e-3 of their size.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from stts.pruners.cacovid import CaCoVID, advantages, policy_loss
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
    (token_loss + frame_loss).backward()
    for ours, parameter in stage.named_parameters():
        expected = case[f"grad.{ours}"]
        assert parameter.grad is not None
        near(parameter.grad, expected, 2e-3 * float(expected.abs().max()))
