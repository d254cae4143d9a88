"""`earlytom`: segments, merging and selection by hand, exact budgets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stts.pruners.check import HOST, example_video
from stts.pruners.earlytom import EarlyTom, frame_cosines, select
from stts.tokens import Budget, Grid


def frames(*degrees: float) -> torch.Tensor:
    """(T, 1, 2) one patch a frame, of unit length."""
    angle_T = torch.tensor(degrees).deg2rad()
    return torch.stack([angle_T.cos(), angle_T.sin()], -1)[:, None]


def test_a_segment_ends_at_a_cut_or_after_five_frames() -> None:
    still = frame_cosines(frames(*[0] * 12))
    assert EarlyTom().segments(still) == [(0, 4), (5, 9), (10, 11)]
    assert EarlyTom().segments(frame_cosines(frames(0, 0, 90, 90))) == [(0, 1), (2, 3)]
    assert EarlyTom().segments(frame_cosines(frames(0))) == [(0, 0)]


def test_two_alike_between_the_ends_become_their_mean_and_nothing_is_lost() -> None:
    # Ends 0 and 40 degrees apart (cosine 0.77); 10 and 12 are closer than that, 39 is not part of a pair.
    x_TSD = frames(0, 10, 12, 39, 40)
    mix = EarlyTom().merge(x_TSD)
    assert mix.place_M.tolist() == [0, 1, 3, 4]
    first, last = 1 / (1 + 0.8910 / 0.9994), 1 - 1 / (1 + 0.8910 / 0.9994)
    torch.testing.assert_close(mix.weight_MT[1], torch.tensor([0, first, last, 0, 0]), atol=1e-3, rtol=0)
    assert mix.weight_MT.sum(0).gt(0).all()
    official = EarlyTom(compat="official").merge(x_TSD)
    assert len(official.weight_MT) == 3 and official.weight_MT[:, 3].sum() == 0, "the release forgets the frame at 39"


def test_the_last_pair_is_halved_here_and_its_first_frame_alone_in_the_release() -> None:
    x_TSD = frames(0, 20, 21, 40)
    assert EarlyTom().merge(x_TSD).weight_MT[1].tolist() == [0, 0.5, 0.5, 0]
    assert EarlyTom(compat="official").merge(x_TSD).weight_MT[1].tolist() == [0, 1, 0, 0]


def test_frames_at_ends_keep_the_most_attended_and_those_inside_one_a_window() -> None:
    attention_MP = torch.tensor([[4.0, 3, 2, 1, 0]] * 3)
    keep_MP, inside_MP = select(attention_MP, [(0, 2)], 3, 0.5)
    # ceil(2.5) = 3 at the ends; round(2.5) = 2 windows of 3 and 2 places inside.
    assert keep_MP.long().tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 1, 1, 0, 0]]
    assert inside_MP.long().tolist() == [[0] * 5, [1, 0, 0, 1, 0], [0] * 5]
    everything, _ = select(attention_MP, [(0, 2)], 30, 0.5)
    assert everything.all(), "as many frames are gone as the ratio asks for"


@pytest.mark.parametrize("scene", ["cuts", "still", "flat"])
def test_every_exact_budget_is_met(scene: str) -> None:
    stage = EarlyTom()
    video = example_video(stage, Grid(7, 2, 3), scene=scene)  # type: ignore[arg-type]
    for num_kept in range(6, 43):
        [kept] = stage([video], [Budget(num_kept, num_kept / 42, True)])
        assert len(kept.index_K) == num_kept and (kept.index_K.diff() > 0).all() and kept.x_ND is not None


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="limit=1"):
        EarlyTom(limit=1)
    with pytest.raises(ValueError, match="prune_block=9"):
        EarlyTom.for_host(HOST, prune_block=9)
    video = example_video(EarlyTom(), Grid(2, 2, 2))
    with pytest.raises(ValueError, match="vit site"):
        EarlyTom()([replace(video, group_GW=None)], [Budget(4, 0.5)])
    with pytest.raises(ValueError, match="'attn' signal"):
        EarlyTom()([replace(video, salience_G=None)], [Budget(4, 0.5)])
