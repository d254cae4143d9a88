"""`budget.plan`: counts worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stts.budget import check_ratio, close, from_removed, plan
from stts.tokens import Budget, Grid, Site

VIT, PRE = Site("vit", layer=3, drop_after=4), Site("pre_llm")


def counts(sites, ratio, grids, layers=28):
    return [[budget.num_kept for budget in row] for row in plan(sites, ratio, grids, layers)]


# --- ratios ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("removed", "kept"), [(0.9, 0.1), (0.7, 0.3), (0.3, 0.7), (0.5, 0.5), (0, 1.0), (0.95, 0.05)])
def test_from_removed_is_exact_in_decimals(removed, kept):
    assert from_removed(removed) == kept


@pytest.mark.parametrize("removed", [-0.1, 1.0, 1.5])
def test_from_removed_refuses(removed):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        from_removed(removed)


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, 50, True, "0.5", None, float("nan")])
def test_ratio_is_what_is_kept(ratio):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        check_ratio(ratio)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        plan([PRE], ratio, [Grid(1, 1, 10)], 4)


# --- in the ViT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "grid", "num_kept"),
    [
        (0.5, Grid(8, 3, 3), 36),
        (0.2, Grid(6, 3, 3), 11),  # 54 - trunc(43.2): the 80 % of the paper
        (0.7, Grid(5, 2, 2), 14),  # 20 - trunc(6.0)
        (0.7, Grid(9, 1, 1), 7),  # 9 - trunc(2.7)
        (0.1, Grid(10, 1, 1), 1),  # 10 - trunc(9.0)
        (0.9, Grid(10, 1, 1), 9),  # int(10 * (1 - 0.9)) is 0 in floats
        (0.5, Grid(1, 3, 3), 9),  # one frame is never cut
        (0.2, Grid(2, 3, 3), 9),  # 18 - 14 = 4 would cut the first frame
        (0.01, Grid(100, 9, 9), 81),  # 8100 - 8019
        (1.0, Grid(4, 3, 3), 36),
    ],
)
def test_vit_keeps_the_first_frame_and_truncates_what_it_removes(ratio, grid, num_kept):
    assert counts([VIT], ratio, [grid]) == [[num_kept]]


# --- before the LLM ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "num_groups", "num_kept"),
    [(0.5, 5, 2), (0.5, 7, 4), (0.1, 10, 1), (0.01, 10, 1), (0.3, 10, 3), (0.35, 10, 4), (0.25, 10, 2), (1.0, 7, 7)],
)
def test_pre_llm_rounds_halves_to_even_and_keeps_one(ratio, num_groups, num_kept):
    assert counts([PRE], ratio, [Grid(1, 1, num_groups)]) == [[num_kept]]


def test_every_video_has_its_own_count():
    assert counts([PRE], 0.25, [Grid(4, 2, 2), Grid(1, 10, 10)]) == [[4, 25]]
    [row] = plan([PRE], 0.25, [Grid(4, 2, 2), Grid(1, 10, 10)], 28, exact=False)
    assert [(budget.retention_ratio, budget.exact) for budget in row] == [(0.25, False)] * 2


def test_the_first_of_two_sites_before_the_llm_takes_the_whole_ratio():
    assert counts([VIT, PRE], 0.5, [Grid(8, 3, 3)]) == [[36], [36]]
    assert plan([VIT, PRE], 0.5, [Grid(8, 3, 3)], 28)[1][0].retention_ratio == 1.0


def test_no_stage_no_budget():
    assert plan([], 0.5, [Grid(2, 2, 2)], 28) == []


# --- inside the LLM ----------------------------------------------------------------------------------------------


def test_one_cut_is_solved_for_the_layers_it_shortens():
    # 2 of 10 layers see everything: 0.2 + 0.8 share = 0.5, so share = 0.375 of 80 groups.
    assert counts([Site("llm", layer=2)], 0.5, [Grid(1, 8, 10)], 10) == [[30]]


def test_a_cut_cannot_go_below_the_layers_before_it():
    with pytest.raises(ValueError, match=r"lowest reachable value is just above 0\.2000"):
        plan([Site("llm", layer=2)], 0.2, [Grid(1, 8, 10)], 10)
    assert counts([Site("llm", layer=2)], 0.21, [Grid(1, 8, 100)], 10) == [[10]]  # 0.01 / 0.8 of 800


@pytest.mark.parametrize("layer", [0, 10, 99])
def test_a_cut_lies_inside_the_llm(layer):
    with pytest.raises(ValueError, match=r"outside \[1, 9\]"):
        plan([Site("llm", layer=layer)], 0.5, [Grid(1, 8, 10)], 10)


def test_a_fixed_share_inside_raises_the_ratio_before_it():
    # 4 of 8 layers see everything, 4 see half: 0.75 r = 0.3, so r = 0.4: 40 of 100, then 20.
    assert counts([PRE, Site("llm", layer=4, share=0.5)], 0.3, [Grid(1, 10, 10)], 8) == [[40], [20]]
    # 0.75 r = 0.9 would need r = 1.2: nothing is dropped before the LLM.
    assert counts([PRE, Site("llm", layer=4, share=0.5)], 0.9, [Grid(1, 10, 10)], 8) == [[100], [50]]


def test_two_cuts_share_one_ratio():
    # (2 + 4 s + 4 s^2) / 10 = 0.5 => s^2 + s - 0.75 = 0 => s = 0.5
    assert counts([Site("llm", layer=2), Site("llm", layer=6)], 0.5, [Grid(1, 10, 10)], 10) == [[50], [25]]


def test_fixed_shares_alone_cost_what_they_cost():
    site = Site("llm", layer=4, share=0.5)
    assert counts([site], 0.75, [Grid(1, 10, 10)], 8) == [[50]]
    with pytest.raises(ValueError, match=r"0\.7500"):
        plan([site], 0.5, [Grid(1, 10, 10)], 8)


def test_a_floor_lets_the_deepest_cuts_fall_away():
    sites = [Site("llm", layer=layer, floor=0.3) for layer in (2, 4, 6)]
    # Three cuts: 2 + 2 s + 2 s^2 + 4 s^3 = 5 gives s = 0.624 and leaves 0.24: too little. Two: 2 + 2 s + 6 s^2 = 5
    # gives s = 0.56 and leaves 0.31, so the cut at layer 6 falls away.
    assert counts(sites, 0.5, [Grid(1, 100, 100)], 10) == [[5598], [3134], [3134]]
    ratios = [row[0].retention_ratio for row in plan(sites, 0.5, [Grid(1, 100, 100)], 10)]
    assert ratios == [pytest.approx(0.55982, abs=1e-5)] * 2 + [1.0]
    lower = [Site("llm", layer=layer, floor=0.2) for layer in (2, 4, 6)]
    ratios = [row[0].retention_ratio for row in plan(lower, 0.5, [Grid(1, 10, 10)], 10)]
    assert ratios == [pytest.approx(0.62415, abs=1e-5)] * 3


def test_a_floor_leaves_the_first_cut_whatever_it_keeps():
    sites = [Site("llm", layer=layer, floor=0.5) for layer in (2, 4, 6)]
    # One cut: 2 + 8 s = 3 gives s = 0.125, below the floor, but there is nothing left to let fall away.
    assert counts(sites, 0.3, [Grid(1, 8, 10)], 10) == [[10], [10], [10]]
    with pytest.raises(ValueError, match=r"LLM layer 2 of 10.*just above 0\.2000"):
        plan(sites, 0.2, [Grid(1, 8, 10)], 10)


def test_a_floor_spares_cuts_of_fixed_share():
    sites = [Site("llm", layer=2, floor=0.5), Site("llm", layer=4, floor=0.5), Site("llm", layer=8, share=0.5)]
    # Both free: 2 + 2 s + 4 s^2 + s^2 = 4.5 leaves 0.29. One: 2 + 6 s + s = 4.5 gives s = 0.357; the fixed half stays.
    assert counts(sites, 0.45, [Grid(1, 10, 100)], 10) == [[357], [357], [178]]


def test_everything_kept_is_kept_at_any_floor():
    sites = [Site("llm", layer=layer, floor=0.03) for layer in (2, 4)]
    assert counts(sites, 1.0, [Grid(1, 8, 10)], 10) == [[80], [80]]


@given(
    ratio=st.integers(1, 1000).map(lambda n: n / 1000),
    grid=st.builds(Grid, st.integers(1, 20), st.integers(1, 5), st.integers(1, 5)),
    site=st.sampled_from([VIT, PRE]),
)
def test_a_count_is_never_empty_and_never_too_many(ratio, grid, site):
    [[budget]] = plan([site], ratio, [grid], 28)
    least = grid.per_frame if site is VIT else 1
    assert least <= budget.num_kept <= grid.num_groups
    assert abs(budget.num_kept - ratio * grid.num_groups) < max(1.0, grid.per_frame if site is VIT else 0)


def test_a_site_that_closes_keeps_what_the_layers_before_left_of_the_ratio() -> None:
    sites = [PRE, Site("llm", layer=1, share=1.0, closes=True), Site("llm", layer=2, share=1.0, closes=True)]
    [[first], [second], [last]] = plan(sites, 0.3, [Grid(1, 10, 10)], 8)
    assert (first, second) == (Budget(30, 0.3, False), Budget(30, 0.3, False)), "the data say what they keep"
    assert last == Budget(30, 0.3, True)
    # 240 token layers in all; the first layer saw 80, so seven may see 160 / 7 = 22.9; a second of 50 leaves 110 / 6.
    assert close(second, [80], 100, 8, 80).num_kept == 23
    assert close(last, [80, 50], 100, 8, 50).num_kept == 18
    assert close(last, [80, 23], 100, 8, 23).num_kept == 23, "less than one token too many: nothing is dropped"
    assert close(last, [30, 30], 100, 8, 30).num_kept == 30
    assert close(last, [100, 100], 100, 8, 100).num_kept == 7 and close(last, [240], 100, 8, 100).num_kept == 1
    for wrong in ({"kind": "pre_llm"}, {"kind": "llm", "layer": 2, "share": 0.5}):
        with pytest.raises(ValueError, match="closes=True"):
            Site(**wrong, closes=True)  # type: ignore[arg-type]
