"""FastV against vectors of the release, and Tango's inner stage against those of its own variant of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stts.pruners.fastv import FastV
from stts.pruners.tango import TangoInner
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import Case, cases

FASTV = cases("fastv", containing="fastv.prune0.5.kept_video")
MERGE = cases("fastv", containing="mergevariant.retain0.5.hidden")


def last_row(case: Case) -> Tensor:
    """(heads, S) attention of the last position; query heads share keys in consecutive groups."""
    query_HE, keys_JSE = case["query_last"], case["keys"]
    keys_HSE = keys_JSE.repeat_interleave(len(query_HE) // len(keys_JSE), 0)
    logits_HS = torch.einsum("he,hse->hs", query_HE, keys_HSE) / query_HE.shape[-1] ** 0.5
    return logits_HS.softmax(-1)


def video_of(case: Case) -> VideoTokens:
    start, length = case["video_range"].tolist()
    span, grid = slice(start, start + length), Grid(*case["grid_thw"].tolist())
    return VideoTokens(
        x_ND=case["hidden_states"][0, span],
        grid=grid,
        cell_G=torch.arange(grid.num_groups),
        salience_G=last_row(case).mean(0)[span],
    )


def in_sequence(case: Case, index_K: Tensor) -> Tensor:
    """Kept positions of the whole sequence: what is not video stays."""
    start, length = case["video_range"].tolist()
    everything = torch.arange(case["hidden_states"].shape[1])
    return torch.cat([everything[:start], index_K + start, everything[start + length :]])


@pytest.mark.parametrize("case", FASTV, ids=str)
def test_the_last_row_is_softmax_over_the_whole_prompt(case: Case) -> None:
    torch.testing.assert_close(last_row(case), case["attn_last_query"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("removed", ["0.25", "0.5", "0.75", "0.9"])
@pytest.mark.parametrize("case", FASTV, ids=str)
def test_keeps_what_the_release_keeps(case: Case, removed: str) -> None:
    video, expected = video_of(case), case.group(f"fastv.prune{removed}")
    ratio = 1 - float(removed)
    [kept] = FastV()([video], [Budget(round(video.num_groups * ratio), ratio)])
    assert torch.equal(kept.index_K, expected["kept_video"])
    assert torch.equal(in_sequence(case, kept.index_K), expected["keep_indexes"])
    assert FastV().positions == "original" and torch.equal(expected["position_ids"][0], expected["keep_indexes"])


@pytest.mark.parametrize("retained", ["0.25", "0.5"])
@pytest.mark.parametrize("case", MERGE, ids=str)
def test_tango_folds_the_rest_into_what_is_kept(case: Case, retained: str) -> None:
    video, expected = video_of(case), case.group(f"mergevariant.retain{retained}")
    ratio = float(retained)
    [kept] = TangoInner()([video], [Budget(round(video.num_groups * ratio), ratio)])
    places = in_sequence(case, kept.index_K)
    assert kept.x_KD is not None
    assert torch.equal(places, expected["keep_indexes"])
    hidden = case["hidden_states"][0].index_copy(0, kept.index_K + int(case["video_range"][0]), kept.x_KD)
    torch.testing.assert_close(hidden[places], expected["hidden"][0], atol=1e-5, rtol=0)
