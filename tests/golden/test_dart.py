"""DART against vectors of a public port of it, in the plain order of pivots and in the port's own."""

from __future__ import annotations

import pytest
import torch

from stts.pruners.dart import DART
from stts.tokens import Budget, Grid, PromptTokens, VideoTokens
from tests.golden.conftest import Case, cases

CASES = cases("dart", containing="r0.5.canonical_kept")


def video_of(case: Case) -> VideoTokens:
    start, length = case["video_range"].tolist()
    video, text = slice(start, start + length), slice(start + length, None)
    x_SD, keys_SD = case["hidden_states"][0], case["key_states"][0].transpose(0, 1).flatten(1)
    grid = Grid(*case["grid_thw"].tolist())
    return VideoTokens(
        x_ND=x_SD[video],
        grid=grid,
        cell_G=torch.arange(grid.num_groups),
        keys_GD=keys_SD[video],
        prompt=PromptTokens(x_SD[text], keys_SD[text], torch.ones(x_SD.shape[1])),
    )


@pytest.mark.parametrize("removed", ["0.5", "0.75", "0.9"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeps_what_the_port_keeps_in_both_orders(case: Case, removed: str) -> None:
    video, expected = video_of(case), case.group(f"r{removed}")
    ratio = 1 - float(removed)
    budget = Budget(round(video.num_groups * ratio), ratio)
    [kept] = DART()([video], [budget])
    assert torch.equal(kept.index_K, expected["canonical_kept"])

    start = int(case["video_range"][0])
    plain = [*(case["pivots_image"] + start).tolist(), *case["pivots_text"].tolist()]
    order = tuple(plain.index(place) for place in expected["port_pivot_order"].tolist())
    [kept] = DART(pivot_order=order)([video], [budget])
    assert torch.equal(kept.index_K, expected["port_kept"])
    assert not torch.equal(kept.index_K, expected["canonical_kept"]), "the order matters"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_image_pivot_alone_keeps_itself(case: Case) -> None:
    [kept] = DART()([video_of(case)], [Budget(1, 0.001, exact=True)])
    assert torch.equal(kept.index_K, case["pivots_image"][:1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_scale_of_the_norm_does_not_matter(case: Case) -> None:
    # The port normalises hidden states as the final RMS norm does; the stage sees them as they are.
    video, normed_SD = video_of(case), case["normed_hidden"][0]
    start, length = case["video_range"].tolist()
    assert video.prompt is not None
    prompt = PromptTokens(normed_SD[start + length :], video.prompt.keys_LD, video.prompt.norm_D)
    normed = VideoTokens(
        normed_SD[start : start + length], video.grid, video.cell_G, keys_GD=video.keys_GD, prompt=prompt
    )
    [plain], [scaled] = (DART()([v], [Budget(100, 100 / v.num_groups, exact=True)]) for v in (video, normed))
    assert torch.equal(plain.index_K, scaled.index_K)
