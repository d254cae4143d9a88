"""AdaTP (our reconstruction): segments, relevance, counts and choice worked out by hand, and against plain loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stts.budget import plan
from stts.pruners.adatp import AdaTP
from stts.pruners.base import HostInfo
from stts.pruners.check import HOST, example_video
from stts.pruners.naive.adatp import adatp
from stts.tokens import Budget, Grid, Kept, VideoTokens

RED, BLUE = [1.0, 0.0], [0.0, 1.0]


def video(grid: Grid, attention: list[float], frames: list[list[float]], text: list[float] | None = None, cells=None):
    cell_G = torch.arange(grid.num_groups) if cells is None else torch.tensor(cells)
    return VideoTokens(
        x_ND=torch.zeros(len(cell_G), 2),
        grid=grid,
        cell_G=cell_G,
        salience_G=torch.tensor(attention),
        frame_TC=torch.tensor(frames),
        text_C=None if text is None else torch.tensor(text),
    )


def cut(video: VideoTokens, num_kept: int, **options) -> Kept:
    [stage] = AdaTP(layers=(2,), **options).stages
    [kept] = stage([video], [Budget(num_kept, num_kept / video.num_groups, exact=True)])
    return kept


def kept(video: VideoTokens, num_kept: int, **options) -> list[int]:
    return cut(video, num_kept, **options).index_K.tolist()


# --- what is kept ------------------------------------------------------------------------------------------------


def test_attention_at_the_end_does_not_starve_the_other_scenes():
    # Two scenes of one frame each; all attention is on the second. Competition is inside scenes only: two of each.
    scenes = video(Grid(2, 1, 4), [0.01, 0.02, 0.04, 0.03, 0.2, 0.3, 0.1, 0.25], [RED, BLUE])
    assert kept(scenes, 4) == [2, 3, 5, 7]


def test_similar_frames_are_one_scene():
    # cos = 0.96 and 0.9 on either side of tau_s = 0.95
    attention = [0.1, 0.2, 0.3, 0.4]
    assert kept(video(Grid(2, 1, 2), attention, [[1.0, 0.0], [0.96, 0.28]]), 2, max_copies=2) == [2, 3]
    assert kept(video(Grid(2, 1, 2), attention, [[1.0, 0.0], [0.90, 0.436]]), 2, max_copies=2) == [1, 3]


def test_a_place_offers_its_strongest_frame_before_any_second_one():
    # One scene of 3 frames with 2 places; place 0 wins in every frame, but is kept once while place 1 is not.
    attention = [0.9, 0.1, 0.8, 0.3, 0.7, 0.2]
    scene = video(Grid(3, 1, 2), attention, [RED] * 3)
    assert kept(scene, 2) == [0, 3]
    assert kept(scene, 3) == [0, 2, 3]
    assert kept(scene, 4) == [0, 2, 3, 5]
    assert kept(scene, 2, max_copies=2) == [0, 2]
    assert kept(scene, 3, max_copies=2) == [0, 2, 3]
    assert kept(scene, 4, max_copies=2) == [0, 2, 3, 5]
    assert kept(scene, 5, max_copies=2) == [0, 2, 3, 4, 5]


def test_a_scene_that_resembles_the_question_gets_more():
    # 4 scenes of 10: rho (30 + 1.5 * 10) = 18 gives 0.4: 4, 4, 4 and 6.
    grid, frames = Grid(4, 2, 5), [RED, BLUE, [-1.0, 0.0], [0.0, -1.0]]
    scenes = video(grid, [0.0] * 40, frames, text=[0.0, -3.0])
    # scores 0, -1, 0, 1: scaled 0.5, 0, 0.5, 1
    counts = lambda **options: [sum(g // 10 == t for g in kept(scenes, 18, **options)) for t in range(4)]  # noqa: E731
    assert counts(tau_t=0.6) == [4, 4, 4, 6]
    # At tau_t = 0.5 three scenes are relevant: rho (10 + 1.5 * 30) = 18, rho = 0.327: 4.909 three times, 3.273.
    assert counts() == [5, 3, 5, 5]
    assert counts(tau_t=0.6, tau_t_mode="raw") == [4, 4, 4, 6]
    # tau_t = -2 is below every cosine: all are boosted, so none gains. Largest remainder of 4.5 each: the first two.
    assert counts(tau_t=-2, tau_t_mode="raw") == [5, 5, 4, 4]
    scenes = replace(scenes, text_C=None)  # no aligned text tower: no global debiasing
    assert counts(tau_t=0.6) == [5, 5, 4, 4]


def test_the_boost_ends_at_the_cap_and_never_turns_against_a_relevant_scene():
    # Two scenes of 10, the second relevant. Boosted while 1.5 rho <= 0.9: 15 of 20 are 6 + 9. Then held at 9 until
    # rho reaches 0.9 too: 17 are 8 + 9, 18 are 9 + 9, and beyond that both grow alike: 19 are 10 + 9.
    scenes = video(Grid(2, 2, 5), [0.0] * 20, [RED, BLUE], text=BLUE)
    second = {k: sum(g >= 10 for g in kept(scenes, k)) for k in (5, 10, 15, 17, 18, 19, 20)}
    assert second == {5: 3, 10: 6, 15: 9, 17: 9, 18: 9, 19: 9, 20: 10}


def test_nothing_is_relevant_where_all_scenes_are_equally_so():
    scenes = video(Grid(2, 1, 4), [0.0] * 8, [RED, BLUE], text=[1.0, 1.0])
    assert kept(scenes, 4) == [0, 1, 4, 5]
    one = video(Grid(2, 1, 4), [0.0] * 8, [RED, RED], text=RED)
    assert kept(one, 3) == [0, 1, 2]


def test_every_scene_keeps_one_token_while_the_budget_has_that_many():
    # Scenes of 1 and of 9 frames with 2 places; 0.2 and 1.8 of 2 tokens are due, yet each gets one.
    scenes = video(Grid(10, 1, 2), [0.1 * g for g in range(20)], [RED] + [BLUE] * 9)
    assert kept(scenes, 2) == [1, 19]
    assert kept(scenes, 1) == [19]  # not enough for both: the scene that is owed more


def test_scenes_count_what_is_left_of_them():
    # 2 of 4 cells of the first scene are left and 4 of the second: 1 and 2 of 3.
    left = video(Grid(2, 1, 4), [0.1, 0.2, 0.1, 0.2, 0.3, 0.4], [RED, BLUE], cells=[1, 3, 4, 5, 6, 7])
    assert kept(left, 3) == [1, 4, 5]
    gone = video(Grid(3, 1, 2), [0.1, 0.2, 0.4, 0.3], [RED, BLUE, RED], cells=[0, 1, 4, 5])  # nothing left of BLUE
    assert kept(gone, 2) == [1, 2]


def test_scores_rank_what_is_kept():
    stage = AdaTP.for_host(HOST).stages[0]
    clip = example_video(stage, Grid(6, 3, 4), seed=3)
    for num_kept in (1, 7, 20):
        found = cut(clip, num_kept)
        dropped = torch.ones(clip.num_groups, dtype=torch.bool)
        dropped[found.index_K] = False
        assert found.scores_G[found.index_K].min() >= found.scores_G[dropped].max()


@settings(max_examples=150, deadline=None)
@given(
    grid=st.builds(Grid, st.integers(1, 6), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 10**6),
    kept_share=st.floats(0, 1),
    scene=st.sampled_from(["cuts", "still", "flat"]),
    with_text=st.booleans(),
    coarse=st.booleans(),
    options=st.fixed_dictionaries(
        {},
        optional={
            "alpha_boost": st.sampled_from([1.0, 1.25, 2.0]),
            "gamma_cap": st.sampled_from([0.5, 0.7, 1.0]),
            "max_copies": st.sampled_from([2, 3]),
            "tau_t": st.sampled_from([0.3, 0.7]),
        },
    ),
)
def test_equal_to_plain_loops(grid, seed, kept_share, scene, with_text, coarse, options):
    stage = AdaTP.for_host(HOST).stages[0]
    clip = example_video(stage, grid, seed=seed, scene=scene)
    if coarse:  # many equal attentions: ties go to the earlier token
        clip = replace(clip, salience_G=(clip.salience_G * 20).round() / 20)
    if not with_text:
        clip = replace(clip, text_C=None)
    num_kept = max(1, round(kept_share * clip.num_groups))
    naive = adatp(clip, Budget(num_kept, kept_share), **options)
    assert kept(clip, num_kept, **options) == naive.index_K.tolist()


# --- where it cuts -----------------------------------------------------------------------------------------------


def host(llm_layers: int) -> HostInfo:
    return replace(HOST, llm_layers=llm_layers)


@pytest.mark.parametrize(
    ("num_layers", "first", "last"), [(28, 2, 16), (24, 2, 12), (36, 2, 24), (14, 1, 8), (8, 1, 5), (3, 1, 2)]
)
def test_layers_follow_the_host(num_layers, first, last):
    stages = AdaTP.for_host(host(num_layers)).stages
    assert [stage.site.layer for stage in stages] == list(range(first, last + 1))
    assert all(stage.site.kind == "llm" and stage.site.share is None for stage in stages)
    [only] = AdaTP.for_host(host(num_layers), single_stage=True).stages
    assert only.site.layer == first


@pytest.mark.parametrize(
    ("num_layers", "ratio", "share", "last"),
    [  # of the specification's table; where the final share is below 3 %, layers fall away and the share differs
        (28, 0.25, 0.8232, 0.0541),
        (28, 0.273, 0.8394, 0.0724),
        (28, 0.366, 0.8853, 0.1609),
        (24, 0.25, 0.7788, 0.0640),
        (24, 0.273, 0.7984, 0.0840),
        (24, 0.366, 0.8545, 0.1774),
    ],
)
def test_the_schedule_is_geometric(num_layers, ratio, share, last):
    sites = [stage.site for stage in AdaTP.for_host(host(num_layers)).stages]
    budgets = [row[0] for row in plan(sites, ratio, [Grid(100, 100, 100)], num_layers)]
    assert all(budget.retention_ratio == pytest.approx(share, abs=5e-5) for budget in budgets)
    assert budgets[-1].num_kept / 10**6 == pytest.approx(last, abs=5e-4)


def test_deep_layers_fall_away_rather_than_leave_nothing():
    sites = [stage.site for stage in AdaTP.for_host(host(28)).stages]
    budgets = [row[0] for row in plan(sites, 0.15, [Grid(100, 100, 100)], 28)]
    assert budgets[-1].num_kept >= 0.03 * 10**6
    assert [budget.retention_ratio for budget in budgets[-5:]] == [1.0] * 5


# --- declared ----------------------------------------------------------------------------------------------------


def test_flops_are_three_products_per_frame():
    stage = AdaTP.for_host(HOST).stages[0]
    assert stage.flops(Grid(4, 2, 3), 8, 5) == 2 * 3 * 4 * 8


def test_everything_says_that_it_is_a_reconstruction():
    pruner = AdaTP.for_host(HOST)
    assert pruner.label == "our reconstruction"
    for part in (AdaTP, type(pruner.stages[0]), adatp):
        assert "our reconstruction" in (part.__doc__ or "").lower()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ()}, "increasing"),
        ({"layers": (3, 2)}, "increasing"),
        ({"tau_t_mode": "max"}, "minmax"),
        ({"alpha_boost": 0.5}, "boost of 1 or more"),
        ({"gamma_cap": 0.0}, r"cap in \(0, 1\]"),
        ({"max_copies": 0}, "at least one copy"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaTP(**options)


@pytest.mark.parametrize("missing", ["salience_G", "frame_TC"])
def test_a_missing_signal_is_named(missing):
    clip = video(Grid(1, 1, 2), [0.1, 0.2], [RED])
    with pytest.raises(ValueError, match="signal; the stage declares"):
        kept(replace(clip, **{missing: None}), 1)
