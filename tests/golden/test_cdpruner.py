"""CDPruner against vectors of the release, through the stage; a batch of crops there is a batch of videos here."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stts.pruners.cdpruner import CDPruner
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import Case, cases

CASES = cases("cdpruner", containing="image_embeds")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_keeps_what_the_release_keeps(case: Case) -> None:
    features, image_BNC, kept_BK = case["features"], case["image_embeds"], case["kept"]
    text_C = F.normalize(case["text_embeds"], dim=-1).mean(0)  # the mean of cosines is one with the mean direction
    videos = [
        VideoTokens(x_ND, Grid(1, 1, len(x_ND)), torch.arange(len(x_ND)), aligned_GC=v_NC, text_C=text_C)
        for x_ND, v_NC in zip(features, image_BNC, strict=True)
    ]
    num_kept = kept_BK.shape[1]
    assert num_kept == int(case.meta["num_kept"])
    budgets = [Budget(num_kept, num_kept / features.shape[1])] * len(videos)
    row = CDPruner(compat="official")(videos, budgets)
    assert torch.equal(torch.stack([kept.index_K for kept in row]), kept_BK)
    torch.testing.assert_close(torch.stack([k.scores_G for k in row]), case["relevance"], atol=1e-5, rtol=0)  # type: ignore[misc]
    together, [alone] = CDPruner()(videos, budgets), CDPruner()(videos[:1], budgets[:1])
    assert torch.equal(together[0].index_K, alone.index_K), "by default a video does not depend on its batch"
