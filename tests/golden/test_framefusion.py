"""FrameFusion against vectors of the release: its first merging, and every call, through stages and through loops."""

from __future__ import annotations

import pytest
import torch

from stts.budget import close, plan
from stts.pruners.framefusion import FrameFusion, FrameFusionInner, chain_similarity, merge_runs
from stts.pruners.naive.framefusion import Release
from stts.tokens import Budget, Grid, VideoTokens
from tests.golden.conftest import Case, cases

CASES = cases("framefusion", containing="call0.kept")


def layout(case: Case) -> tuple[Grid, int, list[int]]:
    """Grid, rows of text before the video, and the place of every row, -1 for text."""
    grid = Grid(int(case.meta["frames"]), *map(int, case.meta["grid"].split("x")))
    prefix, suffix = int(case.meta["prefix"]), int(case.meta["suffix"])
    return grid, prefix, [-1] * prefix + list(range(grid.per_frame)) * grid.t + [-1] * suffix


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_stage_merges_what_the_first_call_merges(case: Case) -> None:
    grid, prefix, places = layout(case)
    rows = slice(prefix, prefix + grid.num_groups)
    video = VideoTokens(x_ND=case["call0.hidden_in"][0, rows], grid=grid, cell_G=torch.arange(grid.num_groups))
    expected = case["call0.kept"]
    expected = expected[(expected >= rows.start) & (expected < rows.stop)]
    num_kept = grid.num_groups - int((1 - float(case.meta["cost"])) * grid.num_groups)
    stage = FrameFusion(threshold=float(case.meta["similarity_lower_bound"]))
    [kept] = stage([video], [Budget(num_kept, float(case.meta["cost"]))])
    assert torch.equal(kept.index_K + prefix, expected)
    where = torch.isin(case["call0.kept"], expected)
    torch.testing.assert_close(kept.x_KD, case["call0.hidden_out"][0, where], atol=1e-5, rtol=0)
    [exact] = stage([video], [Budget(len(expected), 0.3, exact=True)])
    assert torch.equal(exact.index_K, kept.index_K), "the same tokens at the same count"
    assert len(places) == case["call0.hidden_in"].shape[1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_call_of_the_release(case: Case) -> None:
    _, _, places = layout(case)
    release = Release(
        float(case.meta["cost"]), float(case.meta["similarity_lower_bound"]), float(case.meta["ratio_lower_bound"]),
        int(case.meta["num_layers"]),
    )  # fmt: skip
    for call in range(len(case.names(".kept"))):
        name = f"call{call}."
        x_ND, prune = case[f"{name}hidden_in"][0], bool(case[f"{name}is_prune"])
        attention_N = case[f"{name}attn"][0, :, 0].mean(0) if prune else None
        assert prune == release.merging_done
        kept, x_KD = release.call(x_ND, places, attention_N)
        assert kept == case[f"{name}kept"].tolist()
        torch.testing.assert_close(x_KD, case[f"{name}hidden_out"][0], atol=1e-5, rtol=0)
        removed = case[f"{name}sparsity_list"]
        torch.testing.assert_close(torch.tensor(release.removed), removed[removed >= 0], atol=1e-6, rtol=0)
        assert [release.merging_done, release.pruning_done] == case[f"{name}flags"].bool().tolist()
        if not prune:  # the fast functions on what a call saw
            visual_N = torch.tensor([n for n, place in enumerate(places) if place >= 0])
            place_N = torch.tensor([places[int(n)] for n in visual_N])
            similarity_N = chain_similarity(x_ND[visual_N], place_N)
            merged_N = ~torch.isin(visual_N, torch.tensor(kept))
            if not release.pruning_done:
                assert torch.equal(merged_N, similarity_N >= release.threshold)
            index_K, fast_KD = merge_runs(x_ND[visual_N], place_N, merged_N)
            rows = torch.isin(torch.tensor(kept), visual_N[index_K])
            torch.testing.assert_close(fast_KD, x_KD[rows], atol=1e-5, rtol=0)
        places = [places[n] for n in kept]
    assert release.pruning_done


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_call_through_its_stage(case: Case) -> None:
    grid, prefix, _ = layout(case)
    cost, num_layers = float(case.meta["cost"]), int(case.meta["num_layers"])
    stages = FrameFusionInner(
        num_layers=num_layers, threshold=float(case.meta["similarity_lower_bound"]),
        least=float(case.meta["ratio_lower_bound"]),
    ).stages  # fmt: skip
    planned = plan([stage.site for stage in stages], cost, [grid], num_layers)
    cell_G, seen, before = torch.arange(grid.num_groups), list[int](), None
    for number, stage in enumerate(stages):
        [budget], name, present = planned[number], f"call{number}.", len(cell_G)
        budget = close(budget, seen, grid.num_groups, num_layers, present) if number else budget
        if f"{name}kept" not in case:
            assert budget.num_kept == present, "the account is closed: the stage is not asked again"
            continue
        rows = slice(prefix, prefix + present)
        salience_G = case[f"{name}attn"][0, :, 0, rows].mean(0) if case[f"{name}is_prune"] else torch.rand(present)
        video = VideoTokens(
            x_ND=case[f"{name}hidden_in"][0, rows], grid=grid, cell_G=cell_G, salience_G=salience_G,
            num_before=before,
        )  # fmt: skip
        [kept] = stage([video], [budget])
        expected = case[f"{name}kept"]
        inside = (expected >= rows.start) & (expected < rows.stop)
        assert torch.equal(kept.index_K + prefix, expected[inside])
        x_KD = video.x_ND[kept.index_K] if kept.x_KD is None else kept.x_KD
        torch.testing.assert_close(x_KD, case[f"{name}hidden_out"][0, inside], atol=1e-5, rtol=0)
        cell_G, before = cell_G[kept.index_K], present
        seen.append(len(cell_G))
    mean = (sum(seen) + len(cell_G) * (num_layers - len(seen))) / num_layers
    assert abs(mean / grid.num_groups - cost) < 0.5 / grid.num_groups
