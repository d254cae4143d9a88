from __future__ import annotations

import pickle
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch

from stts.data.shapes.clips import (
    Clip,
    Question,
    ShapesConfig,
    ShapesFrames,
    Thing,
    make_clip,
    sampled_indices,
    vocabulary,
)
from stts.data.shapes.draw import COLOURS
from stts.data.video.samplers import Timeline, choose_frames

CONFIG = ShapesConfig()
CLIPS = [
    make_clip(3, split, index, CONFIG) for split, count in (("train", 300), ("long", 60)) for index in range(count)
]


def seen_ticks(clip: Clip, thing: Thing) -> np.ndarray:
    frame_T = sampled_indices(clip.num_frames, clip.config.num_sampled)
    return np.flatnonzero((frame_T >= thing.start) & (frame_T < thing.stop))


def answer_from_scene(clip: Clip, question: Question) -> str:
    """Answers from the list of things and the words of the question alone, as a careful viewer would."""
    words = question.text.split()
    things = [thing for thing in clip.things if thing.shape != "flash"]
    if question.family == "colour":
        [thing] = [thing for thing in things if thing.shape == words[-2]]
        return thing.colour
    if question.family == "existence":
        colour, shape = words[-3:-1]
        assert any(thing.colour == colour for thing in things) and any(thing.shape == shape for thing in things)
        return "yes" if any((thing.colour, thing.shape) == (colour, shape) for thing in things) else "no"
    if question.family == "order":
        coming = sorted((thing for thing in things if seen_ticks(clip, thing)[0] > 0), key=lambda thing: thing.start)
        assert len(coming) == 2
        return coming[0 if words[-2] == "first" else 1].colour
    if question.family == "direction":
        [thing] = [thing for thing in things if (thing.colour, thing.shape) == (words[4], words[5])]
        dy, dx = thing.velocity
        return {(0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down"}[int(np.sign(dy)), int(np.sign(dx))]
    if question.family == "count":
        return str(sum(thing.shape == words[2].removesuffix("s").replace("crosse", "cross") for thing in things))
    [flash] = [thing for thing in clip.things if thing.shape == "flash"]
    return flash.colour


@pytest.mark.parametrize("family", CONFIG.families)
def test_every_answer_follows_from_the_scene(family):
    asked = [(clip, question) for clip in CLIPS for question in clip.questions if question.family == family]
    assert len(asked) > 100
    for clip, question in asked:
        assert answer_from_scene(clip, question) == question.answer, (clip.uid, question)
        assert question.answer in question.options
        assert {*question.text.split(), *question.options} <= set(vocabulary())


def test_clips_ask_three_different_families():
    for clip in CLIPS:
        assert len({question.family for question in clip.questions}) == len(clip.questions) == 3


def test_evidence_is_as_brief_as_promised():
    for clip in CLIPS:
        frame_T = sampled_indices(clip.num_frames, 16)
        assert len(set(frame_T)) == 16
        for thing in clip.things:
            ticks = seen_ticks(clip, thing)
            if thing.shape == "flash":
                assert len(ticks) == 1, "a flash is on exactly one sampled frame"
            elif thing.start > 0:
                assert 3 <= len(ticks) <= 5, "the two things of a pair come and go"
        comes = [set(seen_ticks(clip, thing)) for thing in clip.things if thing.start > 0 and thing.shape != "flash"]
        assert len(comes) in (0, 2) and not set.intersection(*comes or [set()]), "one after the other"


def test_flash_can_be_seen_in_the_pixels_of_one_sampled_frame():
    config = ShapesConfig(families=("flash",))
    for index in range(40):
        clip = make_clip(0, "val", index, config)
        [flash] = clip.things
        frames = clip.render(sampled_indices(clip.num_frames, 16)).astype(int)
        at = round(float(flash.y)), round(float(flash.x + 0.7 * flash.radius))  # on the ring, beside the white core
        near = np.abs(frames[:, at[0], at[1]] - COLOURS[clip.questions[0].answer]).max(axis=1) < 40
        assert near.sum() == 1
        assert (frames[:, at[0], round(float(flash.x))].min(axis=1) > 230).tolist() == near.tolist()


def test_resting_things_never_touch():
    for clip in CLIPS:
        resting = [thing for thing in clip.things if not any(thing.velocity)]
        for number, one in enumerate(resting):
            assert one.radius <= min(one.x, one.y) and max(one.x, one.y) + one.radius <= 48
            for other in resting[number + 1 :]:
                apart = max(abs(one.x - other.x), abs(one.y - other.y))
                assert apart >= one.radius + other.radius + 0.49
        for mover in (thing for thing in clip.things if any(thing.velocity)):
            assert mover.radius <= min(mover.x, mover.y) and max(mover.x, mover.y) + mover.radius <= 48, (
                "seen from the start"
            )
            axis = "y" if mover.velocity[1] else "x"
            assert all(abs(getattr(mover, axis) - getattr(o, axis)) >= mover.radius + o.radius for o in resting)


@pytest.mark.parametrize("split", ["val", "long"])
def test_moving_thing_goes_where_the_answer_says(split):
    # In the picture: the centre of the coloured pixels moves 2.6 to 3.4 pixels a tick while no edge cuts the thing.
    config = ShapesConfig(families=("direction",))
    steps = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for index in range(30):
        clip = make_clip(1, split, index, config)
        [thing] = clip.things
        frames = clip.render(sampled_indices(clip.num_frames, 16)).astype(int)
        inside = np.abs(frames - COLOURS[thing.colour]).max(axis=-1) < 40
        step = np.array(steps[clip.questions[0].answer])
        along = inside.any(axis=2 if step[0] else 1)  # (T, 48): where on its way it is
        whole = along.any(axis=1) & ~along[:, [0, 1, -2, -1]].any(axis=1)
        centres = {tick: np.argwhere(inside[tick]).mean(axis=0) for tick in np.flatnonzero(whole)}
        moved = [(centres[t + 1] - centres[t]) @ step for t in centres if t + 1 in centres]
        assert len(moved) >= 3 and 2.3 < np.mean(moved) < 3.7


def test_same_numbers_same_clip_and_any_other_number_another():
    clip, again = make_clip(5, "train", 8, CONFIG), make_clip(5, "train", 8, CONFIG)
    frames = clip.render(np.arange(clip.num_frames))
    assert clip == again and np.array_equal(frames, again.render(np.arange(clip.num_frames)))
    assert frames.shape == (clip.num_frames, 48, 48, 3) and frames.dtype == np.uint8
    some = np.array([9, 2, 2, 15])
    assert np.array_equal(frames[some], make_clip(5, "train", 8, CONFIG).render(some)), "frames are independent"
    for other in (make_clip(6, "train", 8, CONFIG), make_clip(5, "val", 8, CONFIG), make_clip(5, "train", 9, CONFIG)):
        assert not np.array_equal(other.render(np.arange(4)), frames[:4])


def test_corners_hold_bright_blobs_that_do_not_move():
    clip = make_clip(0, "val", 0, ShapesConfig(families=("flash",)))
    frames = clip.render(np.arange(clip.num_frames)).astype(int)
    corners = np.stack([frames[:, y, x] for y in (slice(0, 3), slice(45, 48)) for x in (slice(0, 3), slice(45, 48))])
    assert corners.max() > 240
    assert np.abs(corners - corners[:, :1]).max() <= 8, "only the frame noise of at most 4 each way changes"


def test_question_alone_is_worth_nothing():
    """The majority answer per question text, learned on 12,000 questions, scores chance on 6,000 others."""
    questions = [q for index in range(6000) for q in make_clip(0, "train", index, CONFIG).questions]
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions[:12000]:
        votes[question.text][question.answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for question in questions[12000:]:
        right[question.family].append(votes[question.text].most_common(1)[0][0] == question.answer)
        assert len(votes[question.text]) == len(question.options), "every answer occurs for every question"
    for family, hits in right.items():
        chance = 1 / len(next(q for q in questions if q.family == family).options)
        assert len(hits) > 800 and np.mean(hits) < chance + 3.5 * np.sqrt(chance * (1 - chance) / len(hits)), family


def test_frames_dataset_uses_the_samplers_frames():
    dataset = ShapesFrames("val", 20, 0, CONFIG)
    for index in range(20):
        example = dataset[index]
        clip = make_clip(0, "val", index, CONFIG)
        chosen_T = choose_frames(Timeline.constant(clip.num_frames, CONFIG.fps), "uniform_inclusive", 16)
        assert np.array_equal(example.frames, clip.render(chosen_T))
        assert np.array_equal(example.timestamps_s, chosen_T / CONFIG.fps)
        user, assistant = example.sample.messages
        assert user.text == f"<video>\n{clip.questions[0].text}" and assistant.text == clip.questions[0].answer
    with pytest.raises(IndexError):
        dataset[20]


def test_frames_dataset_survives_loader_workers():
    dataset = ShapesFrames("train", 8, 0, CONFIG, weights={"order": 1.0})
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1)
    for here, there in zip((pickle.loads(pickle.dumps(dataset))[i] for i in range(8)), loader, strict=True):
        assert here.sample == there.sample and np.array_equal(here.frames, np.asarray(there.frames))


def test_weights_choose_the_family_and_families_thin_the_scene():
    weighted = ShapesFrames("train", 600, 0, CONFIG, weights={"direction": 3, "count": 1})
    found = Counter(weighted[index].sample.meta["family"] for index in range(600))
    assert set(found) == {"direction", "count"} and 0.68 < found["direction"] / 600 < 0.82
    alone = ShapesFrames("train", 5, 0, CONFIG, families=("direction",))
    assert all(len(make_clip(0, "train", index, alone.config).things) == 1 for index in range(5))


def test_several_questions_become_turns_of_one_conversation():
    clip = make_clip(0, "train", 4, CONFIG)
    sample = ShapesFrames("train", 5, 0, CONFIG, questions_per_item=3)[4].sample
    assert [m.role for m in sample.messages] == ["user", "assistant"] * 3
    assert [m.text.removeprefix("<video>\n") for m in sample.messages[::2]] == [q.text for q in clip.questions]
    assert sum(m.text.count("<video>") for m in sample.messages) == 1


def test_scenes_scale_with_the_frame_and_the_sampler():
    config = ShapesConfig(frame_size=96, fps=32, num_sampled=64)
    clip = make_clip(0, "val", 2, config)
    frames = clip.render(sampled_indices(clip.num_frames, 64))
    assert frames.shape == (64, 96, 96, 3)
    assert all(10.9 <= thing.radius <= 14 for thing in clip.things)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"families": ("colour", "smell")}, "families="),
        ({"families": ()}, "families="),
        ({"families": ("count", "count")}, "families="),
        ({"frame_size": 47}, "even"),
        ({"num_sampled": 4}, "at least 8"),
        ({"num_sampled": 32}, "set fps to 16 or more"),
        ({"fps": float("nan")}, "set fps"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**settings)


def test_bad_requests_are_refused():
    clip = make_clip(0, "val", 0, CONFIG)
    with pytest.raises(ValueError, match="frame_indices"):
        clip.render(np.array([clip.num_frames]))
    with pytest.raises(ValueError, match="split='dev'"):
        ShapesFrames("dev", 4, 0, CONFIG)
    with pytest.raises(ValueError, match="focus='flash'"):
        make_clip(0, "val", 0, ShapesConfig(families=("count",)), focus="flash")
    with pytest.raises(ValueError, match="weights="):
        ShapesFrames("val", 4, 0, CONFIG, weights={"flesh": 1.0})
    with pytest.raises(ValueError, match="num_clips=0"):
        ShapesFrames("val", 0, 0, CONFIG)
