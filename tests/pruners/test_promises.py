"""What every pruner of the registry promises, and that a pruner which breaks its word is found out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stts.cli import main
from stts.pruners.base import PerVideo, Pruner, Stage, keep_top
from stts.pruners.check import GRIDS, HOST, Promise, check_pruner, example_budgets, example_video, try_call
from stts.pruners.listing import EXAMPLE_HOST, describe_pruner, describe_pruners
from stts.pruners.registry import PRUNERS, make_pruner
from stts.tokens import Budget, Grid, Kept, Site, VideoTokens


def broken(promises: Sequence[Promise]) -> list[str]:
    return [promise.name for promise in promises if not promise.ok]


# --- ours --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_keeps_its_promises(name):
    promises = check_pruner(lambda host: make_pruner(name, host))
    assert not broken(promises), "\n".join(f"{promise.name}: {promise.found}" for promise in promises)
    assert len(promises) == (1 if name == "none" else 11)


STAGES = [
    pytest.param(stage, id=f"{name}-{number}")
    for name in PRUNERS
    for number, stage in enumerate(make_pruner(name, HOST).stages)
    if name != "adatp" or number == 0  # its stages differ in the layer only
]


@pytest.mark.parametrize("stage", STAGES)
@settings(max_examples=12, deadline=None)
@given(
    grid=st.builds(Grid, st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)),
    number=st.integers(0, 12),
    scene=st.sampled_from(["cuts", "still", "flat"]),
    seed=st.integers(0, 1000),
)
def test_promises_hold_at_any_shape_and_ratio(stage, grid, number, scene, seed):
    video = example_video(stage, grid, seed=seed, scene=scene)
    budgets = example_budgets(stage, video)
    faults = try_call(stage, video, budgets[number % len(budgets)])
    assert not any(faults.values()), faults


@pytest.mark.parametrize("name", PRUNERS)
def test_a_pruner_made_twice_decides_alike(name):
    for number in range(len(make_pruner(name, HOST).stages)):
        kept = []
        for _ in range(2):
            torch.manual_seed(0)  # a learned pruner starts from random weights
            stage = make_pruner(name, HOST).stages[number]
            video = example_video(stage, Grid(4, 2, 3))
            kept += stage([video], [Budget(9, 9 / video.num_groups, exact=True)])
        assert torch.equal(kept[0].index_K, kept[1].index_K)
        assert kept[0].x_KD is None or torch.equal(kept[0].x_KD, kept[1].x_KD)


# --- whoever breaks a promise is named ---------------------------------------------------------------------------


class Honest(PerVideo):
    """Keeps the first ones; each of the classes below breaks one promise of it."""

    signals = frozenset({"attn"})

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        return keep_top(video, -torch.arange(video.num_groups).float(), budget.num_kept)


class Unsorted(Honest):
    def prune(self, video, budget):
        return Kept(index_K=super().prune(video, budget).index_K.flip(0))


class Repeats(Honest):
    def prune(self, video, budget):
        return Kept(index_K=torch.zeros(budget.num_kept, dtype=torch.int64))


class Outside(Honest):
    def prune(self, video, budget):
        return Kept(index_K=super().prune(video, budget).index_K + 1)


class Writes(Honest):
    def prune(self, video, budget):
        video.salience_G[0] += 1
        return super().prune(video, budget)


class OneTooFew(Honest):
    def prune(self, video, budget):
        return Kept(index_K=super().prune(video, budget).index_K[: max(1, budget.num_kept - 1)])


class SaysItKnows(Honest):
    """Meets exact budgets, but its own count is not the planned one, as it claims."""

    def prune(self, video, budget):
        kept = super().prune(video, budget).index_K
        return Kept(index_K=kept if budget.exact else kept[: (len(kept) + 1) // 2])


class NaNOut(Honest):
    def prune(self, video, budget):
        kept = super().prune(video, budget)
        return Kept(kept.index_K, x_KD=video.x_ND[kept.index_K] / 0 * 0)


class AlwaysFloat32(Honest):
    def prune(self, video, budget):
        kept = super().prune(video, budget)
        return Kept(kept.index_K, x_KD=video.x_ND[kept.index_K].float())


class ScoresWithGradient(Honest):
    def prune(self, video, budget):
        return Kept(super().prune(video, budget).index_K, scores_G=torch.ones(video.num_groups, requires_grad=True))


class LooksAtTheBatch(Honest):
    def __call__(self, videos, budgets):
        mean = torch.stack([video.x_ND.mean() for video in videos]).mean()
        kept = super().__call__(videos, budgets)
        return [Kept(k.index_K, scores_G=mean.float().expand(v.num_groups)) for k, v in zip(kept, videos, strict=True)]


class Noisy(Honest):
    def prune(self, video, budget):
        return keep_top(video, torch.rand(video.num_groups), budget.num_kept)


class AcceptsNaN(Honest):
    def __call__(self, videos, budgets):
        return [self.prune(video, budget) for video, budget in zip(videos, budgets, strict=True)]


class TakesWhatThereIs(Honest):
    def __call__(self, videos, budgets):
        fitting = [Budget(min(b.num_kept, v.num_groups), 1.0) for v, b in zip(videos, budgets, strict=True)]
        return super().__call__(videos, fitting)


class FailsOnOneFrame(Honest):
    def prune(self, video, budget):
        if video.grid.t == 1:
            raise IndexError("no neighbour")
        return super().prune(video, budget)


class FlopsShrink(Honest):
    def flops(self, grid, width, num_kept):
        return 1000 // grid.num_groups


class FlopsFloat(Honest):
    def flops(self, grid, width, num_kept):
        return 1.5 * grid.num_groups


class UnknownPositions(Honest):
    positions = "shuffled"  # type: ignore[assignment]


INDEX = "index: int64, increasing, inside the grid"
COUNT = "the count: exact, or the plan's where known"
OUTPUT = "features and scores: shape, dtype, finite"
BATCH = "alone or in a batch: the same"
AGAIN = "a second call gives the same"
BREAKS = [
    (Honest, set()),
    (Unsorted, {INDEX}),
    (Repeats, {INDEX}),
    (Outside, {INDEX}),
    (Writes, {"inputs are not written"}),
    (OneTooFew, {COUNT}),
    (SaysItKnows, {COUNT}),
    (NaNOut, {OUTPUT}),
    (AlwaysFloat32, {OUTPUT}),
    (ScoresWithGradient, {OUTPUT}),
    (LooksAtTheBatch, {BATCH}),
    (Noisy, {AGAIN, BATCH}),
    (AcceptsNaN, {"NaN is refused"}),
    (TakesWhatThereIs, {"more than the video has is refused"}),
    (FailsOnOneFrame, {"every shape is handled", BATCH}),
    (FlopsShrink, {"flops: an int that does not shrink"}),
    (FlopsFloat, {"flops: an int that does not shrink"}),
    (UnknownPositions, {"declares itself"}),
]


@pytest.mark.parametrize(("method", "names"), BREAKS, ids=lambda value: getattr(value, "__name__", ""))
def test_whoever_breaks_a_promise_is_named(method: Callable[[], Pruner], names: set[str]):
    assert set(broken(check_pruner(lambda host: method()))) == names


def test_a_class_that_is_no_pruner_is_named():
    [promise] = check_pruner(lambda host: object())
    assert not promise.ok and "stages" in promise.found


def test_a_stage_without_its_members_is_named():
    @dataclass(frozen=True)
    class Half:
        stages: tuple[object, ...] = (object(),)

    [promise] = check_pruner(lambda host: Half())
    assert promise.name == "declares itself" and not promise.ok and "object lacks a member of Stage" in promise.found


def test_a_fault_says_where_and_how():
    [promise] = [promise for promise in check_pruner(lambda host: OneTooFew()) if not promise.ok]
    assert "stage 0, 1x2x3 cuts, keep exactly 2 of 6: kept 1" in promise.found


def test_a_fault_of_any_stage_is_found():
    @dataclass(frozen=True)
    class Two:
        stages: tuple[Stage, ...] = (Honest(), Unsorted())

    assert broken(check_pruner(lambda host: Two())) == [INDEX]


# --- the examples are what they claim ----------------------------------------------------------------------------


class At(Honest):
    """A stage somewhere, that wants everything."""

    signals = frozenset({"attn", "frame", "keys", "text", "prompt"})

    def __init__(self, site: Site = Honest.site) -> None:
        self.site = site  # type: ignore[misc]  # a class variable elsewhere


def test_examples_hold_static_places_and_a_cut():
    video = example_video(At(), Grid(8, 3, 3), seed=1)
    x_TSD = torch.nn.functional.normalize(video.x_ND, dim=-1).view(8, 9, 8)
    similarity_TS = (x_TSD[1:] * x_TSD[:-1]).sum(-1)
    static_TS = similarity_TS > 0.95
    assert not static_TS[3].any(), "a cut between frames 3 and 4"
    assert static_TS[:3].all(0).any() and not static_TS[:3].all(), "some places stand still, some move"
    frame_TC = torch.nn.functional.normalize(video.frame_TC, dim=-1)
    assert frame_TC[3] @ frame_TC[4] < 0.9 < frame_TC[4] @ frame_TC[5]


def test_examples_follow_the_site():
    inside = example_video(At(Site("llm", layer=2)), Grid(4, 3, 3))
    assert 0 < inside.num_groups < 36 and (inside.cell_G.diff() > 0).all()
    assert len(inside.x_ND) == len(inside.salience_G) == len(inside.keys_GD) == inside.num_groups
    assert inside.prompt is not None and float(inside.salience_G.sum()) < 1
    tower = example_video(At(Site("vit", layer=1, drop_after=2)), Grid(2, 1, 2))
    assert tower.group_GW.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    still = example_video(At(), Grid(3, 2, 2), scene="still")
    assert torch.equal(still.x_ND[:4], still.x_ND[8:]) and torch.equal(still.salience_G[:4], still.salience_G[8:])
    flat = example_video(At(), Grid(3, 2, 2), scene="flat")
    assert len(flat.x_ND.unique()) == len(flat.salience_G.unique()) == 1


def test_example_budgets_are_tiny_whole_and_one_less():
    counts = {budget.num_kept for budget in example_budgets(At(), example_video(At(), GRIDS[3]))}
    assert counts == {1, 2, 6, 12, 22, 23, 24}
    vit = At(Site("vit", layer=1, drop_after=2))  # a tower keeps the first frame: 6 of 24
    assert {budget.num_kept for budget in example_budgets(vit, example_video(vit, GRIDS[3]))} == {6, 12, 22, 23, 24}


# --- listings and the command ------------------------------------------------------------------------------------


def test_the_listing_names_every_pruner_within_its_width():
    listing = describe_pruners()
    rows = [line.split()[0] for line in listing.split("\n\n")[0].splitlines()[2:] if not line.startswith(" ")]
    assert rows == list(PRUNERS)
    assert max(map(len, listing.splitlines())) <= 120
    [adatp] = [line for line in listing.splitlines() if line.startswith("adatp")]
    assert "llm 2-16" in adatp and "frame last_row text" in adatp and "original" in adatp and "2505.20100" in adatp
    assert "our reconstruction: " in listing


@pytest.mark.parametrize("name", PRUNERS)
def test_a_description_shows_docstring_and_defaults(name):
    text = describe_pruner(name)
    assert "Options:" in text and all(part.split(":")[0].isidentifier() for part in text.splitlines()[:1])
    options = {line.split(" = ")[0].strip() for line in text.splitlines() if line.startswith("  ") and " = " in line}
    if name == "stts":
        assert {"prune_block", "rescale_scope", "soft_only"} <= options
    if name == "holitom+inner":
        assert {"tau", "share"} <= options
    if name == "stop-fastvid":
        assert {"power", "min_segments"} <= options


def test_the_command_prints_a_line_per_promise_and_its_exit_code_is_the_verdict(capsys):
    assert main(["pruners", "--check", "novelty"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and all(line.startswith("ok ") for line in lines)
    assert main(["pruners", "--check", f"{__name__}:Unsorted"]) == 1
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED  index")]


def test_the_command_refuses_what_it_does_not_know(capsys):
    assert main(["pruners", "nonsense"]) == 2 and "known: none, random" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["pruners", "--chek", "novelty"])
    assert stop.value.code == 2 and "--chek" in capsys.readouterr().err
    assert main(["pruners"]) == 0 and capsys.readouterr().out == describe_pruners() + "\n"


# --- names and options -------------------------------------------------------------------------------------------


def test_a_pruner_by_dotted_path_and_unknown_names():
    assert make_pruner("stts.pruners.novelty:Novelty", HOST).stages
    with pytest.raises(ValueError, match="known: none, random"):
        make_pruner("nonsense", HOST)
    with pytest.raises(ValueError, match=r"could not be loaded.*expected 'file.py:Class', or 'module:Class'"):
        make_pruner("stts.pruners.novelty:Nothing", HOST)


@pytest.mark.parametrize("name", PRUNERS)
def test_an_unknown_option_is_refused(name):
    with pytest.raises(ValueError, match="does not take the options"):
        make_pruner(name, HOST, nonsense=3)


def test_options_reach_the_part_that_has_them():
    [outer, inner] = make_pruner("holitom+inner", EXAMPLE_HOST, beta=0.5, layer=9).stages
    assert (outer.beta, inner.layer) == (0.5, 9)
    [stop] = make_pruner("stop-holitom", EXAMPLE_HOST, beta=0.5, power=1.3, compat="official").stages
    assert (stop.base.beta, stop.base.tau, stop.power) == (0.5, 0.8, 1.3)
    assert stop.compat == stop.base.compat == "official"
