"""What STTS shares with its relatives, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stts.pruners import temporal
from stts.pruners.base import HostInfo


def test_rescale_by_hand():
    # Two ranges: 0.2 .. 0.6 and a constant one.
    scores_G = torch.tensor([0.2, 0.4, 0.6, 0.9, 0.9])
    weight_G = temporal.rescale(scores_G, torch.tensor([0, 0, 0, 1, 1]), 2, floor=0.5)
    assert_close(weight_G, torch.tensor([0.5, 0.75, 1.0, 0.5, 0.5]), atol=1e-5, rtol=0)


def test_a_shared_patch_takes_the_larger_weight_and_a_free_patch_none():
    # Patches 0 1 2 3 4 in a line; windows {0, 1}, {1, 2} and {3, outside}; patch 4 belongs to none.
    group_GW = torch.tensor([[0, 1], [1, 2], [3, -1]])
    weight_G = torch.tensor([0.5, 0.25, 1.0], requires_grad=True)
    bias_N = temporal.key_bias(weight_G, group_GW, 5)
    assert_close(bias_N, torch.tensor([0.5, 0.5, 0.25, 1.0, 1.0]).log())
    bias_N.sum().backward()
    assert_close(weight_G.grad, torch.tensor([2 / 0.5, 1 / 0.25, 1.0]))  # d log a / d a, once per patch that takes it


def test_temporal_loss_by_hand():
    # Three frames, one patch each: a repeat (target 0), then the opposite (target 2, clamped to 1 by default).
    x_ND = torch.tensor([[1.0, 0.0], [3.0, 0.0], [-2.0, 0.0]])
    feature_GE = temporal.window_features(x_ND, torch.arange(3)[:, None])
    target_G = temporal.temporal_target(feature_GE, torch.tensor([-1, 0, 1]))
    assert target_G.tolist() == [1.0, 0.0, 2.0]
    assert temporal.window_change(x_ND, torch.arange(3)[:, None], torch.tensor([-1, 0, 1])).tolist() == [1.0, 0.0, 2.0]
    scores_G = torch.tensor([0.5, 0.25, 0.5])
    loss = temporal.temporal_loss(scores_G, target_G, torch.tensor([False, True, True]))
    assert loss.item() == (0.25**2 + 1.5**2) / 2
    assert temporal.temporal_loss(scores_G, target_G, torch.zeros(3, dtype=torch.bool)) == 0


def test_slots_outside_the_grid_are_zeros_or_as_in_the_release_row_0():
    x_ND = torch.tensor([[3.0], [4.0]])
    group_GW = torch.tensor([[1, -1]])
    assert temporal.gather_windows(x_ND, group_GW).tolist() == [[[4.0], [0.0]]]
    assert_close(temporal.window_features(x_ND, group_GW), torch.tensor([[1.0, 0.0]]))
    assert_close(temporal.window_features(x_ND, group_GW, missing_is_first=True), torch.tensor([[0.8, 0.6]]))


@pytest.mark.parametrize(("depth", "tap", "largest"), [(6, 5, 3), (26, 25, 23), (27, 8, 6)])
def test_the_host_says_how_late_a_decision_may_come(depth, tap, largest):
    host = HostInfo(
        family="tiny",
        vit_width=8,
        vit_mlp=12,
        vit_heads=2,
        vit_depth=depth,
        lowest_tap=tap,
        llm_width=8,
        llm_layers=8,
        patches_per_group=4,
    )
    temporal.check_prune_block(host, largest)
    with pytest.raises(ValueError, match=f"set prune_block={largest}"):
        temporal.check_prune_block(host, largest + 1)
