from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stts.data.video.samplers import SAMPLERS, Timeline, choose_frames, fps_then_uniform

VARIABLE = Timeline(np.array([0.0, 0.1, 0.2, 2.0, 3.0]), native_fps=4 / 3, duration_s=4.0)  # a burst, then slow


def chosen(sampler: str, num: int, fps: float, num_frames: int, **limits: object) -> list[int]:
    return choose_frames(Timeline.constant(num, fps), sampler, num_frames, **limits).tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sampler", "num", "fps", "num_frames", "expected"),
    [
        ("uniform_inclusive", 10, 10, 4, [0, 3, 6, 9]),
        ("uniform_inclusive", 10, 10, 3, [0, 4, 9]),  # 4.5 is truncated
        ("uniform_inclusive", 10, 10, 1, [0]),
        ("uniform_inclusive", 3, 10, 5, [0, 0, 1, 1, 2]),  # 0, 0.5, 1, 1.5, 2
        ("uniform_inclusive", 1, 10, 3, [0, 0, 0]),
        ("fps_then_uniform", 10, 3, 8, [0, 3, 6, 9]),
        ("fps_then_uniform", 10, 3, 4, [0, 3, 6, 9]),
        ("fps_then_uniform", 10, 3, 3, [0, 4, 9]),  # four are too many: falls back
        ("fps_then_uniform", 5, 0.4, 8, [0, 1, 2, 3, 4]),  # slower than the target: every frame
        ("fps_then_uniform", 60, 29.97, 8, [0, 30]),  # round(29.97)
        ("interior", 10, 10, 4, [2, 4, 6, 8]),
        ("interior", 10, 10, 1, [5]),
        ("interior", 3, 10, 5, [0, 1, 1, 2, 2]),  # 0.5, 1, 1.5, 2, 2.5
        ("bins_left", 40, 10, 8, [0, 10, 20, 30]),  # four whole seconds: four bins
        ("bins_left", 45, 10, 3, [0, 15, 30]),
        ("bins_left", 47, 10, 4, [0, 11, 22, 33]),  # 47 / 4 = 11.75 is truncated before it is multiplied
        ("bins_left", 5, 10, 8, [0]),  # half a second: still one bin
        ("time_last", 40, 10, 3, [0, 20, 39]),  # 0, 2, 4 s; the end is the last frame
        ("time_last", 15, 10, 8, [0, 5, 10, 14]),  # 0, 0.5, 1 s, and the end at 1.5 s
        ("time_last", 13, 10, 8, [0, 5, 10, 12]),
        ("time_last", 15, 10, 1, [0]),
    ],
)
def test_indices_by_hand(sampler: str, num: int, fps: float, num_frames: int, expected: list[int]) -> None:
    assert chosen(sampler, num, fps, num_frames) == expected


def test_interior_rounds_the_step_first():
    # 45/33 is a little under 15/11 in binary: the published loop gives 14 where exact arithmetic gives 15.
    assert chosen("interior", 45, 25, 32)[10] == 14


def test_variable_rate_uses_true_times():
    def pick(sampler: str, num_frames: int) -> list[int]:
        return choose_frames(VARIABLE, sampler, num_frames).tolist()

    assert pick("time_last", 3) == [0, 3, 4]  # 0, 2, 4 s
    assert pick("time_last", 16) == [0, 2, 2, 2, 3, 3, 4, 4, 4]  # every half second, and the end
    assert pick("bins_left", 4) == [0, 2, 2, 3], "5 frames in 4 bins: 0, 0.75, 1.5, 2.25 s"
    assert pick("fps_then_uniform", 8) == [0, 2, 2, 3, 4, 4], "every frame length of 0.75 s"
    assert pick("uniform_inclusive", 5) == [0, 1, 2, 3, 4], "frame numbers, whatever their times"


def test_millisecond_rounding_does_not_move_frames():
    exact = Timeline.constant(300, 30)
    rounded = Timeline(exact.timestamps_F.round(3), 30.0, 10.0)  # 0.0333.. becomes 0.033
    assert choose_frames(rounded, "bins_left", 7).tolist() == choose_frames(exact, "bins_left", 7).tolist()
    assert choose_frames(rounded, "fps_then_uniform", 64).tolist() == list(range(0, 300, 30))


def test_target_fps():
    assert fps_then_uniform(Timeline.constant(10, 10), 8, target_fps=5).tolist() == [0, 2, 4, 6, 8]


def test_clip_holds_both_ends():
    assert chosen("uniform_inclusive", 100, 10, 3, clip=(2.0, 3.0)) == [20, 25, 30]
    assert chosen("interior", 100, 10, 1, clip=(2.0, 2.9)) == [25], "ten frames from 20 on"
    assert chosen("time_last", 100, 10, 2, clip=(2.0, 3.0)) == [20, 30]
    assert chosen("uniform_inclusive", 100, 10, 2, clip=(9.5, 12.0)) == [95, 99], "annotations are rounded up"


def test_clip_between_two_frames_is_the_frame_on_screen():
    assert chosen("uniform_inclusive", 10, 1, 2, clip=(4.2, 4.6)) == [4, 4]


def test_max_fps():
    assert chosen("uniform_inclusive", 41, 10, 64, max_fps=2) == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert chosen("uniform_inclusive", 41, 10, 5, max_fps=2) == [0, 10, 20, 30, 40], "already sparse enough"
    assert chosen("uniform_inclusive", 3, 10, 8, max_fps=2) == [0], "0.2 s hold no second frame at 2 fps"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sampler": "random"}, ["'random'", *SAMPLERS]),
        ({"num_frames": 0}, ["num_frames=0", "at least 1"]),
        ({"num_frames": 2.5}, ["num_frames=2.5", "whole number"]),
        ({"num_frames": True}, ["num_frames=True", "whole number"]),
        ({"max_fps": 0}, ["max_fps=0", "positive"]),
        ({"max_fps": float("nan")}, ["max_fps=nan", "positive"]),
        ({"clip": (2.0, 2.0)}, ["clip=(2.0, 2.0)", "start_s < end_s"]),
        ({"clip": (3.0, 2.0)}, ["clip=(3.0, 2.0)", "start_s < end_s"]),
        ({"clip": (0.0, float("nan"))}, ["nan", "start_s < end_s"]),
        ({"clip": (-1.0, 2.0)}, ["clip=(-1.0, 2.0)", "outside the video", "10.000 s"]),
        ({"clip": (10.0, 12.0)}, ["clip=(10.0, 12.0)", "outside the video", "10.000 s"]),
    ],
)
def test_refusals_say_what_to_change(arguments: dict[str, object], words: list[str]) -> None:
    request = {"sampler": "uniform_inclusive", "num_frames": 4, **arguments}
    with pytest.raises(ValueError) as caught:
        choose_frames(Timeline.constant(100, 10), **request)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_timeline_refuses_no_frames():
    with pytest.raises(ValueError, match="needs frames"):
        Timeline(np.array([]), 25.0, 0.0)


@given(
    sampler=st.sampled_from(sorted(SAMPLERS)),
    gaps_ms=st.lists(st.integers(1, 2000), max_size=40),
    num_frames=st.integers(1, 70),
    start=st.floats(0, 0.99),
    length=st.floats(0.001, 1),
    max_fps=st.none() | st.floats(0.1, 60),
)
def test_every_sampler_stays_inside(
    sampler: str, gaps_ms: list[int], num_frames: int, start: float, length: float, max_fps: float | None
) -> None:
    times_N = np.cumsum([0, *gaps_ms]) / 1000
    duration_s = float(times_N[-1]) + 0.04
    timeline = Timeline(times_N, len(times_N) / duration_s, duration_s)
    clip = (start * duration_s, (start + length) * duration_s)
    chosen_T = choose_frames(timeline, sampler, num_frames, clip, max_fps)
    assert chosen_T.dtype == np.int64
    assert 1 <= len(chosen_T) <= num_frames
    assert (np.diff(chosen_T) >= 0).all(), "time order"
    shown_at_start = timeline.shown_at(clip[0])
    assert (chosen_T >= shown_at_start).all()
    assert (times_N[chosen_T] <= clip[1] + 1e-5).all()
    if max_fps is not None and len(chosen_T) > 1:
        assert len(chosen_T) - 1 <= (times_N[chosen_T[-1]] - times_N[chosen_T[0]]) * (max_fps + 1e-4) + 1e-9
