"""STTS against the authors' code (arXiv 2603.18004), in our default and with `compat="official"`.

Known difference, in both modes: the release brings a slot without survivors back as one more row, refilled, when it is
the only one in the batch; ours never gives it a row (`revived`).
Tolerances: 1e-5 for scores, cosines and losses, 1e-4 for the bias (narrow rows amplify rounding), hidden states and
features, 1e-3 relative for gradients; masks, counts and layouts are exact.

Shape suffixes: S = slots of the batch (frames, tiles, padding), N = patches, P = groups per slot.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from stts.pruners.temporal import temporal_target, window_features
from tests.golden.conftest import cases
from tests.golden.stts_case import (
    Host,
    decide,
    keep_groups,
    make_stage,
    pack,
    parts,
    patch_bias,
    patch_mask,
    scorer_names,
)
from tests.golden.stts_rows import reference_rows

MODES = [None, "official"]
TOWER = cases("stts", containing="patches")
PRUNED = cases("stts", containing="attn_bias")
TRAINED = cases("stts", containing="grad_aux.x_scorer_in")


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert_close(actual, expected, atol=tolerance, rtol=0)


def close_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """1e-3 of the largest entry of the tensor: entries near zero are differences of large ones."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert_close(
            actual[name], want, rtol=1e-3, atol=1e-3 * want.abs().max().item() + 1e-8, msg=lambda m, n=name: f"{n}: {m}"
        )


def video_slots(case: Any) -> Tensor:
    """bool (S,): the slot belongs to a video."""
    mask_S = torch.zeros(case.meta["B"] * case.meta["T"], dtype=torch.bool)
    for part in parts(case):
        mask_S[part.start : part.start + part.num_frames] = part.kind == "video"
    return mask_S


def revived(keep_SN: Tensor) -> Tensor:
    """bool (S,): the slot that the release revives."""
    empty_S = ~keep_SN.any(1)
    return empty_S & (empty_S.sum() == 1)


# --- the scorer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("stts", containing="scores"), ids=str)
def test_pooled_groups_and_scores_of_every_slot(case):
    stage = make_stage(case, compat="official")
    x_SND, index_PW = case["x_scorer_in"], case["window_index"]
    offset_S = torch.arange(len(x_SND))[:, None, None] * case.meta["N"]
    index_GW = torch.where(index_PW < 0, -1, index_PW + offset_S).flatten(0, 1)
    if "scorer_window_index" in case:
        assert torch.equal(index_GW, case["scorer_window_index"])
    previous_G = (torch.arange(len(index_GW)) - case.meta["P"]).clamp_min(-1)

    pooled_GD = stage.scorer.pooling(x_SND.flatten(0, 1), index_GW)
    close(pooled_GD.view_as(case["scorer_pooled"]), case["scorer_pooled"], 1e-5)
    scores_G = stage.scorer(x_SND.flatten(0, 1), index_GW, previous_G)
    close(scores_G.view_as(case["scores"]), case["scores"], 1e-5)


@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_default_scores_equal_the_release_except_at_the_border_between_videos(case):
    for number, (part, kept) in enumerate(decide(case, make_stage(case), case["x_scorer_in"])):
        scores_TP = kept.scores_G.view(part.num_frames, -1)
        expected_TP = case["scores"][part.start : part.start + part.num_frames]
        close(scores_TP[1:], expected_TP[1:], 1e-5)
        if number == 0 and part.start == 0:
            close(scores_TP[0], expected_TP[0], 1e-5)  # nothing comes before the very first slot in the release either
        else:
            assert (scores_TP[0] - expected_TP[0]).abs().max() > 1e-4, "the release looks at the slot before"


# --- cosines and the temporal loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("stts", containing="cosine_all"), ids=str)
def test_cosines(case):
    x_SND, index_PW = case["x_scorer_in"], case["window_index"]
    offset_S = torch.arange(len(x_SND))[:, None, None] * case.meta["N"]
    index_GW = torch.where(index_PW < 0, -1, index_PW + offset_S).flatten(0, 1)
    feature_GE = window_features(x_SND.flatten(0, 1), index_GW, missing_is_first=True)
    close(feature_GE @ feature_GE.T, case["cosine_all"], 1e-5)
    if "cosine_neighbors" in case:
        previous_G = torch.arange(len(index_GW)) - case.meta["P"]
        target_SP = temporal_target(feature_GE, previous_G).view(-1, case.meta["P"])
        close(1 - target_SP[1:], case["cosine_neighbors"], 1e-5)


# By default only where the batch is one video: the release compares across borders, see the next test.
@pytest.mark.parametrize(
    ("case", "compat"),
    [pytest.param(c, None, id=f"{c.name}-default") for c in TRAINED if len(parts(c)) == 1]
    + [pytest.param(c, "official", id=f"{c.name}-official") for c in TRAINED],
)
def test_temporal_loss_and_its_gradients(case, compat):
    options = {"compat": "official"} if compat else {"detach_target": False, "clamp_target": False}
    stage = make_stage(case, **options)
    x_SND = case["x_scorer_in"].requires_grad_()
    loss = decide(case, stage, x_SND)[0][1].losses["temporal"]
    close(loss, case["aux_loss_unweighted"].squeeze(), 1e-5)
    weighted = case.meta["aux_coefficient"] * loss
    close(weighted, case["aux_loss_weighted"].squeeze(), 1e-5)
    weighted.backward()

    gradients = {name: parameter.grad for name, parameter in stage.scorer.named_parameters()}
    assert None not in gradients.values(), "zero, not missing: every rank takes part in the same collectives"
    close_gradients(gradients, scorer_names(case.group("grad_aux.scorer")))
    close_gradients({"x": x_SND.grad}, {"x": case["grad_aux.x_scorer_in"]})
    if not case["prunable_frame_mask"].any():
        assert loss == 0 and not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("case", [c for c in TRAINED if sum(p.kind == "video" for p in parts(c)) > 1], ids=str)
def test_default_loss_leaves_the_border_between_videos_out(case):
    stage = make_stage(case, detach_target=False, clamp_target=False)
    loss = decide(case, stage, case["x_scorer_in"])[0][1].losses["temporal"]
    total, count = torch.tensor(0.0), 0
    for part in parts(case):
        if part.kind == "video":
            frames = slice(part.start + 1, part.start + part.num_frames)
            target_TP = 1 - case["cosine_neighbors"][part.start : part.start + part.num_frames - 1]
            total, count = total + (case["scores"][frames] - target_TP).square().sum(), count + target_TP.numel()
    close(loss, total / count, 1e-5)
    assert abs(loss - case["aux_loss_unweighted"]) > 1e-4


# --- the choice and the bias -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PRUNED, ids=str)
@pytest.mark.parametrize("compat", MODES)
def test_survivors_and_bias(case, compat):
    decided = decide(case, make_stage(case, compat=compat), case["x_scorer_in"])
    keep_SP = keep_groups(case, decided)
    keep_SN, video_S = patch_mask(case, keep_SP), video_slots(case)
    assert torch.equal(video_S, case["prunable_frame_mask"])
    assert [p.num_frames for p in parts(case) if p.kind == "video"] == case["prunable_num_frames"].tolist()
    assert torch.equal(keep_SP[video_S], case["keep_groups_prunable"])
    assert torch.equal(keep_SN[video_S], case["keep_tokens_prunable"])
    assert torch.equal(keep_SN, case["keep_tokens_all"])
    close(patch_bias(case, decided), case["attn_bias"][:, 0, 0], 1e-4)


# --- the tower and the connector ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TOWER, ids=str)
@pytest.mark.parametrize("compat", MODES)
def test_hidden_states_and_features_on_exact_lengths(case, compat):
    stage, host = make_stage(case, compat=compat), Host(case)
    with torch.no_grad():
        hidden, decided = host.run(stage)
        keep_SP = keep_groups(case, decided)
        features = host.connect(hidden, keep_SP)
    close(hidden[stage.site.layer], case["x_scorer_in"], 1e-4)
    pruned = "attn_bias" in case
    prefix = "norefill_" if pruned else ""
    for number in range(stage.site.layer, case.meta["layers"]):
        name = f"hidden_states_{number}" if number <= stage.site.drop_after else f"{prefix}hidden_states_{number}"
        close(hidden[number], case[name], 1e-4)
    close(features, case[f"{prefix}llm_features"], 1e-4)
    if pruned:
        close(hidden[stage.site.drop_after], case["x_before_pack"], 1e-4)
    else:
        assert (
            case["keep_tokens_prunable"].numel() == len(case["num_to_prune"]) == len(case["prunable_num_frames"]) == 0
        )
        assert not case["prunable_frame_mask"].any()
        assert case["num_rows"].item() == len(keep_SP), "one row per slot: nothing was packed"


@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_hidden_states_and_features_with_refill(case):
    stage, host = make_stage(case, compat="official"), Host(case)
    with torch.no_grad():
        hidden, decided = host.run(stage)
        keep_SP = keep_groups(case, decided)
        first = stage.site.drop_after + 1
        hidden |= host.run_refilled(hidden[first - 1], patch_mask(case, keep_SP), first)
        features = host.connect(hidden, keep_SP)
    for number in range(first, case.meta["layers"]):
        close(hidden[number], case[f"hidden_states_{number}"], 1e-4)
    close(features, case["llm_features"], 1e-4)
    if case["refill_over_kept"] == 0:
        close(features, case["norefill_llm_features"], 1e-4)


@pytest.mark.parametrize("case", cases("stts", containing="probe_weights"), ids=str)
def test_answer_gradient_reaches_the_scorer_through_the_bias(case):
    stage, host = make_stage(case, compat="official"), Host(case)
    hidden, decided = host.run(stage)
    keep_SP = keep_groups(case, decided)
    if "attn_bias" in case:
        first = stage.site.drop_after + 1
        hidden |= host.run_refilled(hidden[first - 1], patch_mask(case, keep_SP), first)
    probe = (host.connect(hidden, keep_SP) * case["probe_weights"]).sum()
    # The unused loss keeps every parameter in the graph, as it does in training.
    (probe + 0 * decided[0][1].losses["temporal"]).backward()
    gradients = {name: parameter.grad for name, parameter in stage.scorer.named_parameters()}
    close_gradients(gradients, scorer_names(case.group("grad_probe.scorer")))


# --- rows of the release -----------------------------------------------------------------------------------------


def check_rows(vectors: Any, prefix: str, x_SND: Tensor, keep_SN: Tensor) -> None:
    """`prefix` + packed_row, packed_slot, packed_x, packed_attn_mask, refill_mask, apart from a revived slot."""
    rows = reference_rows(keep_SN)
    expected = {key: vectors[prefix + key] for key in ("packed_row", "packed_slot", "packed_x", "packed_attn_mask")}
    expected["refill_mask"] = vectors[prefix + "refill_mask"]
    usual_S = ~revived(keep_SN)
    assert expected["refill_mask"][~usual_S].all() and not rows.refill_FN[~usual_S].any()
    assert len(expected["packed_x"]) == rows.num_rows + (~usual_S).sum()
    present_SN = (keep_SN | rows.refill_FN)[usual_S]
    assert torch.equal(rows.refill_FN[usual_S], expected["refill_mask"][usual_S])
    for ours, key in ((rows.row_FN, "packed_row"), (rows.slot_FN, "packed_slot")):
        assert torch.equal(ours[usual_S][present_SN], expected[key][usual_S][present_SN])
        assert (ours[usual_S][~present_SN] == -1).all()
        assert (expected[key][usual_S][~present_SN] < 0).all()
    close(pack(x_SND, rows.row_FN, rows.slot_FN, rows.num_rows), expected["packed_x"][: rows.num_rows], 1e-4)
    assert torch.equal(rows.mask(), expected["packed_attn_mask"][: rows.num_rows])


@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_rows(case):
    keep_SN = case["keep_tokens_all"]
    check_rows(case, "", case["x_before_pack"], keep_SN)
    rows = reference_rows(keep_SN)
    num_revived = revived(keep_SN).sum()
    assert case["num_rows"].item() == rows.num_rows + num_revived
    context = rows.refill_FN.sum() + num_revived * case.meta["N"]
    close(context / case["keep_tokens_prunable"].sum(), case["refill_over_kept"].squeeze(), 1e-6)


@pytest.mark.parametrize("case", cases("stts", containing="random_groups.keep"), ids=str)
@pytest.mark.parametrize(
    "mask", ["random_groups", "all_full", "lone_frame", "several_empty", "one_empty", "many_small"]
)
def test_rows_of_single_masks(case, mask):
    check_rows(case, f"{mask}.", case[f"{mask}.x"], case[f"{mask}.keep"])
