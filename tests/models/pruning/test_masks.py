"""The dense mask of packed and two-way rows: what it says, and what making it takes."""

from __future__ import annotations

import pytest
import torch

from stts.models.pruning.masks import dense_mask
from tests.scripts import load_script


@pytest.mark.parametrize("two_way", [False, True])
def test_every_pair_is_as_the_rule_says(two_way: bool) -> None:
    row_RM = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 2, 2, 2, 2]])
    valid_RM = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    both_RM = torch.tensor([[False, True, True, True, True, False], [True, True, True, False, True, False]])
    keep = dense_mask(row_RM, valid_RM, both_RM if two_way else None)
    for b in range(2):
        for q in range(6):
            for k in range(6):
                order = q >= k or (two_way and bool(both_RM[b, q] and both_RM[b, k]))
                inside = bool(valid_RM[b, k]) and bool(row_RM[b, q] == row_RM[b, k])
                assert keep[b, q, k] == ((inside and order) or q == k), (b, q, k)


@pytest.mark.parametrize("two_way", [False, True])
@pytest.mark.parametrize("length", [512, 1024])
def test_making_it_takes_twice_its_size(two_way: bool, length: int) -> None:
    row_RM = torch.zeros(1, length, dtype=torch.long)
    valid_RM = torch.ones(1, length, dtype=torch.bool)
    peak = load_script("benchmarks/measure").extra_mib(
        lambda: dense_mask(row_RM, valid_RM, valid_RM if two_way else None), row_RM.device
    )
    assert peak < 2.1 * length**2 / 2**20
