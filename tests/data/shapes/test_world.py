"""The world of ShapesQA in which change is not relevance: distractors, camera, exposure, and labels of every cell."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from stts.data.shapes.clips import ShapesConfig, make_clip, sampled_indices
from stts.data.shapes.draw import COLOURS
from stts.data.shapes.files import read_cells, write_shapes
from stts.data.shapes.world import BACKGROUND, DISTRACTOR, FLASH, LETTERS, MOVING, PAIR, RESTING
from tests.data.shapes.test_hard import HARD, answer_by_colour

CONFIG = ShapesConfig(families=("order", "count", "flash"), ask_by="colour", active_share=0.75, distractors=(3, 5))
QUIET = replace(CONFIG, distractors=(0, 0))
CLIPS = [make_clip(1, "test", index, CONFIG) for index in range(40)]


def pictures(clip):
    return clip.render(sampled_indices(clip.num_frames, clip.config.num_sampled)).astype(int)


def cell_of(frame, y, x, grid=3):
    side = frame.shape[0] // grid
    return frame[y * side : (y + 1) * side, x * side : (x + 1) * side]


@pytest.mark.parametrize(
    ("config", "digest"),
    [
        (ShapesConfig(), "656e89925681963d826ec4f7e76212c2004b8d6af3792678a611c8ae8444e42d"),
        (HARD, "7135e855b9fb65fdf7472f50f6a349e780c6a4a13e51903fd643cd41659fb635"),
    ],
)
def test_clips_without_the_options_are_those_of_before(config, digest):
    # Taken from the generator before it had distractors: published figures are of these clips.
    found = hashlib.sha256()
    for split in ("train", "long"):
        for index in range(4):
            clip = make_clip(3, split, index, config)
            things = [f"{thing.shape}{thing.colour}{thing.start}-{thing.stop}" for thing in clip.things]
            found.update(repr((clip.questions, things)).encode())
            found.update(clip.render(sampled_indices(clip.num_frames, 16)).tobytes())
    assert found.hexdigest() == digest


def test_as_many_distractors_as_asked_for_in_free_cells():
    for clip in CLIPS:
        free_T = (np.isin(clip.labels, (BACKGROUND, DISTRACTOR))).sum((1, 2))
        count_T = (clip.labels == DISTRACTOR).sum((1, 2))
        assert (count_T >= np.minimum(free_T, 3)).all() and count_T.max() <= 5
        quiet = make_clip(1, "test", clip.index, replace(clip.config, distractors=(0, 1)))
        assert quiet.questions == clip.questions, "how many there are changes no question"
    assert 50 < np.mean([(clip.labels[1:] == DISTRACTOR).sum() for clip in CLIPS]) < 65


def test_labels_say_what_the_pixels_show():
    colours = np.array(list(COLOURS.values()))
    for clip in CLIPS[:15]:
        frames = pictures(clip)
        plain = pictures(replace(clip, config=replace(clip.config, distractors=(0, 0))))  # the same things
        for place, y, x in np.ndindex(clip.labels.shape):
            here, before = cell_of(frames[place], y, x), cell_of(plain[place], y, x)
            label = clip.labels[place, y, x]
            if label != DISTRACTOR:
                assert np.array_equal(here, before), "a distractor keeps to its cell"
                coloured = (np.abs(here[..., None, :] - colours).max(-1) < 30).any(-1).sum()
                assert (coloured > 20) == (label != BACKGROUND)
            else:
                assert (np.abs(here - before).max(-1) > 12).mean() > 0.2


def test_labels_follow_the_things():
    for clip in CLIPS:
        tick_T = sampled_indices(clip.num_frames, 16)
        for thing in clip.things:
            label_T = clip.labels[:, int(thing.y // 16), int(thing.x // 16)]
            shown_T = (tick_T >= thing.start) & (tick_T < thing.stop)
            kind = FLASH if thing.shape == "flash" else PAIR if thing.start else RESTING
            assert (label_T[shown_T] == kind).all() and (shown_T.sum() == 1) == (kind == FLASH)
        assert (clip.labels == FLASH).sum() == 1 and 4 <= (clip.labels == PAIR).sum() <= 8


def test_every_frame_has_new_distractors_and_answers_stand():
    for clip in CLIPS:
        assert all(answer_by_colour(clip, question) == question.answer for question in clip.questions)
        frames, label_T = pictures(clip), clip.labels == DISTRACTOR
        both = np.argwhere(label_T[1:] & label_T[:-1])
        assert len(both) > 10
        moved = [np.abs(cell_of(frames[t + 1] - frames[t], y, x)).max() > 30 for t, y, x in both]
        assert np.mean(moved) > 0.9


def test_native_frames_never_mix_a_thing_with_a_distractor():
    for clip in CLIPS[:5]:
        with_them = clip.render(np.arange(clip.num_frames)).astype(int)
        without = replace(clip, config=QUIET).render(np.arange(clip.num_frames)).astype(int)
        for thing in clip.things:
            y, x = int(thing.y // 16), int(thing.x // 16)
            for frame in range(thing.start, thing.stop):
                assert np.array_equal(cell_of(with_them[frame], y, x), cell_of(without[frame], y, x))
        some = np.array([7, 3])
        assert np.array_equal(clip.render(some), with_them[some]), "frames are independent"


@pytest.mark.parametrize("kind", CONFIG.distractor_kinds)
def test_kinds_of_distractors(kind):
    colours = np.array(list(COLOURS.values()))
    worn = []
    for index in range(10):
        clip = make_clip(2, "test", index, replace(CONFIG, distractor_kinds=(kind,)))
        frames = pictures(clip)
        for place, y, x in np.argwhere(clip.labels == DISTRACTOR):
            near = (np.abs(cell_of(frames[place], y, x)[..., None, :] - colours).max(-1) < 25).sum((0, 1))
            worn.append((near > 5).sum())
    assert {"grey": max(worn) == 0, "answer": set(worn) == {1}, "confetti": np.mean(worn) > 4}[kind]


def test_the_background_moves_and_things_do_not():
    clips = (make_clip(3, "test", index, replace(QUIET, camera_drift=2.0, camera_shake=1)) for index in range(99))
    clip = next(clip for clip in clips if (clip.labels == BACKGROUND).all(0).any())
    still = replace(clip, config=QUIET)
    frames, before = pictures(clip), pictures(still)
    resting = [thing for thing in clip.things if thing.start == 0]
    for thing in resting:
        r, y, x = 1, int(thing.y), int(thing.x)
        assert np.abs(frames - before)[:, y - r : y + r, x - r : x + r].max() <= 8, "frame noise alone"
    free = np.argwhere((clip.labels == BACKGROUND).all(0))
    [y, x] = free[0]
    texture = np.stack([cell_of(frame, y, x) for frame in frames])
    rest = np.stack([cell_of(frame, y, x) for frame in before])
    assert np.abs(np.diff(texture, axis=0)).mean() > 1.3 * np.abs(np.diff(rest, axis=0)).mean()
    assert np.array_equal(clip.labels, still.labels)


def test_flicker_changes_the_exposure_of_whole_frames():
    bright, even = (pictures(make_clip(3, "test", 1, replace(QUIET, flicker=share))) for share in (0.4, 0.0))
    dark = even.max(-1) < 120  # nothing is cut off at 255
    gain_T = [(one[mask].mean() / two[mask].mean()) for one, two, mask in zip(bright, even, dark, strict=True)]
    assert min(gain_T) > 0.58 and max(gain_T) < 1.42 and np.std(gain_T) > 0.1


def test_a_share_of_the_clips_is_distracted():
    config = replace(CONFIG, distracted_share=0.7)
    distracted = [(make_clip(1, "train", index, config).labels == DISTRACTOR).any() for index in range(80)]
    assert 0.5 < np.mean(distracted) < 0.87


def test_labels_of_controls_are_those_of_what_they_show():
    clip, still, blank = (
        make_clip(1, "test", 3, replace(CONFIG, show=show)) for show in ("clip", "one_frame", "nothing")
    )
    assert not blank.labels.any() and blank.labels.shape == clip.labels.shape
    assert all(np.array_equal(label_YX, clip.labels[8]) for label_YX in still.labels)


def test_controls_show_no_more_than_they_should():
    shown = {show: pictures(make_clip(1, "test", 3, replace(CONFIG, show=show))) for show in ("one_frame", "nothing")}
    for frames in shown.values():
        assert np.abs(frames - frames[:1]).max() <= 8, "frame noise alone"
    assert np.abs(shown["one_frame"] - pictures(make_clip(1, "test", 3, CONFIG))[8]).max() <= 8
    distance = np.abs(shown["nothing"][..., None, :] - np.array(list(COLOURS.values()))).max(-1)
    assert distance.min() > 40, "nothing has a colour"


def test_things_grow_with_the_frame_and_so_do_distractors():
    clip = make_clip(1, "test", 0, replace(CONFIG, frame_size=96))
    frames = pictures(clip)
    plain = pictures(replace(clip, config=replace(clip.config, distractors=(0, 0))))
    changed = (frames != plain).any(-1).reshape(16, 3, 32, 3, 32).any((2, 4))
    assert np.array_equal(changed, clip.labels == DISTRACTOR)


def test_a_moving_thing_is_labelled_where_it_is():
    clip = make_clip(1, "val", 0, ShapesConfig(families=("direction",)))
    frames, [thing] = pictures(clip), clip.things
    seen = np.abs(frames - COLOURS[thing.colour]).max(-1).reshape(16, 3, 16, 3, 16) < 40
    touched = seen.any((2, 4))
    assert (clip.labels == MOVING)[touched].all() and (clip.labels == MOVING).sum() <= touched.sum() + 8


def test_labels_lie_beside_the_clips(tmp_path):
    out = write_shapes(tmp_path / "data", sizes={"val": 3}, config=CONFIG, files="png", progress=False)
    cells = read_cells(out / "val.jsonl")
    assert cells.keys() == read_cells(out / "val_conversations.jsonl").keys()
    rows = [json.loads(line) for line in (out / "val.jsonl").read_text().splitlines()]
    assert {row["video"] for row in rows} == set(cells)
    for index in range(3):
        assert np.array_equal(cells[f"val/val-{index:06d}"], make_clip(0, "val", index, CONFIG).labels)
    assert read_cells(tmp_path / "other.jsonl") == {}
    [row, *others] = (out / "val_cells.jsonl").read_text().splitlines()
    short = {**json.loads(row), "cells": [LETTERS[0] * 8] * 16}
    (out / "val_cells.jsonl").write_text("\n".join([json.dumps(short), *others]))
    with pytest.raises(ValueError, match="8 cells a frame"):
        read_cells(out / "val.jsonl")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distractors": (5, 3)}, "fewest and the most"),
        ({"distractors": (3, 10)}, "0 to 9"),
        ({"distractors": (3,)}, "such as"),
        ({"distractor_kinds": ("stripes",)}, "distractor_kinds="),
        ({"distractor_kinds": ()}, "distractor_kinds="),
        ({"families": ("order", "direction")}, "leave direction out"),
        ({"distracted_share": 2.0}, "distracted_share=2"),
        ({"camera_drift": -1.0}, "camera_drift=-1"),
        ({"flicker": 1.0}, "flicker=1"),
    ],
)
def test_worlds_refuse(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)
