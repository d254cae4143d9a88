"""The vocabulary refuses what cannot be meant."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from stts.tokens import Budget, Grid, Kept, Site, VideoTokens


def test_grid_counts():
    grid = Grid(4, 2, 3)
    assert (grid.per_frame, grid.num_groups) == (6, 24)


@pytest.mark.parametrize("sides", [(0, 2, 3), (4, 0, 3), (4, 2, -1)])
def test_grid_needs_at_least_one_cell(sides):
    with pytest.raises(ValueError, match="at least 1"):
        Grid(*sides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tower",), "expected 'vit', 'pre_llm' or 'llm'"),
        (("vit",), "needs `layer`"),
        (("vit", 3), "drop_after"),
        (("vit", 3, 2), "before the decision"),
        (("vit", -1, -1), "before the decision"),  # block 0 is the earliest that can run on everything
        (("llm",), "needs `layer`"),
        (("llm", 2, None, 0.0), r"\(0, 1\]"),
        (("llm", 2, None, 1.5), r"\(0, 1\]"),
    ],
)
def test_site_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        Site(*arguments)


@pytest.mark.parametrize("arguments", [("vit", 3, 4), ("vit", 3, 3), ("vit", -1, 0), ("pre_llm",), ("llm", 2)])
def test_site_accepts(arguments):
    assert Site(*arguments).kind == arguments[0]


def test_values_are_frozen():
    for value in (Grid(1, 1, 1), Site("pre_llm"), Budget(1, 0.5)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, dataclasses.fields(value)[0].name, None)


def test_groups_present_are_counted_by_cell_not_by_grid():
    video = VideoTokens(torch.zeros(3, 2), Grid(2, 1, 2), cell_G=torch.tensor([0, 2, 3]))
    assert video.num_groups == 3


def test_losses_are_empty_unless_given():
    assert Kept(torch.arange(2)).losses == {}
