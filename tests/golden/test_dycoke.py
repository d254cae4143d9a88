"""DyCoke against vectors of the release: tokens before the LLM through the stage, keys of the cache as a function."""

from __future__ import annotations

import pytest
import torch

from stts.pruners.base import Shown
from stts.pruners.dycoke import DyCoke
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import Case, cases

TOKENS = cases("dycoke", containing="features")
CACHE = cases("dycoke", containing="step0.attn")


def video_of(case: Case) -> VideoTokens:
    x_TSD = case["features"]
    side = round(x_TSD.shape[1] ** 0.5)
    grid = Grid(len(x_TSD), side, side)
    return VideoTokens(x_ND=x_TSD.flatten(0, 1), grid=grid, cell_G=torch.arange(grid.num_groups))


@pytest.mark.parametrize("case", TOKENS, ids=str)
def test_similarities_are_those_of_the_release(case: Case) -> None:
    video = video_of(case)
    found_TS = DyCoke().similarity(video, [t & (t - 1) for t in range(video.grid.t)])
    pair, quad = case["pair_similarity"], case["quad_similarity"]
    torch.testing.assert_close(found_TS[1::2][: len(pair)], pair, atol=1e-5, rtol=0)
    torch.testing.assert_close(found_TS[2::4][: len(quad)], quad, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", TOKENS, ids=str)
def test_keeps_what_the_release_keeps(case: Case) -> None:
    video, per_frame = video_of(case), video_of(case).grid.per_frame
    for name in case.names(".index"):
        frame_ratio, expected = round(1 - float(name[1:-6]), 6), case[name]
        [official] = DyCoke(frame_ratio=frame_ratio, compat="official")([video], [Budget(1, 0.5)])
        assert torch.equal(official.index_K, expected)
        assert torch.equal(video.x_ND[official.index_K], case[name.replace("index", "tokens")])
        # The default prunes the third frame of the last group too, keeps an odd last frame, and raster order.
        [kept] = DyCoke(frame_ratio=frame_ratio)([video], [Budget(1, 0.5)])
        same = [t for t in range(video.grid.t - video.grid.t % 2) if t % 4 != 2 or t - 2 < video.grid.t - 4]
        wanted = expected[torch.isin(expected // per_frame, torch.tensor(same))].sort().values
        assert torch.equal(kept.index_K[torch.isin(kept.index_K // per_frame, torch.tensor(same))], wanted)


@pytest.mark.parametrize("case", CACHE, ids=str)
def test_hides_the_keys_that_the_release_hides(case: Case) -> None:
    start, num_keys = int(case.meta["image_start"]), int(case.meta["image_len"])
    stage = DyCoke(hidden=float(case.meta["p"]), compat="official")
    number_M = torch.arange(start + num_keys)  # what follows is never hidden
    inside_BM, last = (number_M >= start)[None], None
    for step in range(len(case.names(".attn"))):
        attention_HM = case[f"step{step}.attn"][0, :, 0].float()
        attention_BM = attention_HM[:, : len(number_M)].mean(0)[None]
        visible_M = stage.show(attention_BM, inside_BM, num_keys, last)[0] | (number_M < start)
        behind = torch.arange(len(number_M), attention_HM.shape[1])
        assert torch.equal(torch.cat([number_M[visible_M], behind]), case[f"step{step}.visible"])
        assert bool(visible_M.all()) != bool(case[f"step{step}.pruned"])
        now_BM = attention_BM * inside_BM
        similarity = 0.0 if last is None else float(torch.cosine_similarity(now_BM, last.attention_BM))
        assert similarity == pytest.approx(float(case[f"step{step}.similarity"]), abs=1e-5)
        last = Shown(visible_M[None], now_BM)
