"""The forms of ShapesQA that separate methods: asked by colour, small or brief evidence, bright distractors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, replace

import numpy as np
import pytest

from stts import cli
from stts.data.datasets import VideoJsonl
from stts.data.shapes.clips import Clip, Question, ShapesConfig, ShapesFrames, make_clip, sampled_indices, vocabulary
from stts.data.shapes.draw import COLOURS
from stts.data.shapes.files import shapes, write_shapes
from tests.data.shapes.test_clips import answer_from_scene, seen_ticks

FAMILIES = ("colour", "existence", "order", "count", "flash")
HARD = ShapesConfig(
    families=FAMILIES, families_per_clip=5, grid=4, ask_by="colour", questions_per_family=2, num_glares=3,
    active_share=0.5, pair_ticks=(1, 2),
)  # fmt: skip
CLIPS = [make_clip(1, split, index, HARD) for split in ("train", "long") for index in range(60)]


def answer_by_colour(clip: Clip, question: Question) -> str:
    words = question.text.split()
    things = [thing for thing in clip.things if thing.shape not in ("flash", "glare")]
    if question.family == "count":
        return str(sum(thing.colour == words[2] for thing in things))
    if question.family == "existence":
        return "yes" if any(thing.colour == words[3] for thing in things) else "no"
    if question.family == "direction":
        [mover] = [thing for thing in things if any(thing.velocity)]
        assert mover.colour == words[4]
        dy, dx = mover.velocity
        return {(0, -1): "left", (0, 1): "right", (-1, 0): "up", (1, 0): "down"}[int(np.sign(dy)), int(np.sign(dx))]
    return answer_from_scene(clip, question)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_by_colour_follows_from_the_scene(family):
    asked = [(clip, question) for clip in CLIPS for question in clip.questions if question.family == family]
    assert len(asked) == len(CLIPS) * (1 if family in ("existence", "flash") else 2)
    for clip, question in asked:
        assert answer_by_colour(clip, question) == question.answer, (clip.uid, question)
        assert {*question.text.split(), *question.options} <= set(vocabulary())


def test_direction_by_colour_follows_from_the_scene():
    config = ShapesConfig(families=("direction", "order", "existence"), ask_by="colour")
    for index in range(60):
        clip = make_clip(0, "val", index, config)
        assert len(clip.questions) == 3
        assert all(answer_by_colour(clip, question) == question.answer for question in clip.questions)


def test_question_alone_is_worth_nothing_by_colour():
    questions = [q for index in range(3000) for q in make_clip(0, "train", index, HARD).questions]
    half = len(questions) // 2
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions[:half]:
        votes[question.text][question.answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for question in questions[half:]:
        right[question.family].append(votes[question.text].most_common(1)[0][0] == question.answer)
    for family, hits in right.items():
        chance = 1 / len(next(q for q in questions if q.family == family).options)
        assert np.mean(hits) < chance + 3.5 * np.sqrt(chance * (1 - chance) / len(hits)), family


def test_hard_evidence_is_small_brief_and_in_one_stretch():
    for clip in CLIPS:
        new = [thing for thing in clip.things if thing.start > 0]
        ticks = [seen_ticks(clip, thing) for thing in new]
        assert len(new) == 3 and all(1 <= len(seen) <= 2 for seen in ticks), "a pair and a flash"
        assert max(max(seen) for seen in ticks) - min(min(seen) for seen in ticks) < 8, "half of 16 sampled frames"
        assert all(thing.radius <= 48 / 4 / 2 for thing in clip.things)


def test_frames_outside_the_active_stretch_are_near_duplicates():
    for clip in CLIPS[:20]:
        frames = clip.render(sampled_indices(clip.num_frames, 16)).astype(int)
        changed = np.abs(np.diff(frames, axis=0)).max(axis=(1, 2, 3)) > 8  # more than the frame noise of 4 each way
        assert changed.sum() <= 6 and np.flatnonzero(changed).max() - np.flatnonzero(changed).min() <= 8


def test_glares_are_the_brightest_things_and_rest():
    for clip in CLIPS[:20]:
        glares = [thing for thing in clip.things if thing.shape == "glare"]
        assert len(glares) == 3
        frames = clip.render(np.arange(0, clip.num_frames, 7)).astype(int)
        for glare in glares:
            y, x, r = (round(float(value)) for value in (glare.y, glare.x, glare.radius / 2))
            assert frames[:, y - r, x + r].min() > 245 and frames[:, y - r, x - r].max() < 10


def test_resting_things_never_touch_in_a_finer_grid():
    for clip in CLIPS:
        for number, one in enumerate(clip.things):
            for other in clip.things[number + 1 :]:
                assert max(abs(one.x - other.x), abs(one.y - other.y)) >= one.radius + other.radius


def test_a_conversation_gives_no_later_answer_away():
    told = [clip.conversation for clip in CLIPS]
    assert any(len(turns) < len(clip.questions) for turns, clip in zip(told, CLIPS, strict=True))
    for turns in told:
        families = [question.family for question in turns]
        assert "existence" not in families or families.index("existence") < families.index("order")


def test_more_questions_ask_about_every_colour():
    dense = replace(HARD, questions_per_family=6)
    clips = [make_clip(1, "train", index, dense) for index in range(60)]
    for clip in clips:
        assert all(answer_by_colour(clip, question) == question.answer for question in clip.questions)
        texts = [question.text for question in clip.questions]
        assert len(set(texts)) == len(texts) and sum(q.family == "existence" for q in clip.questions) == 6
        assert clip.conversation[0] == clip.questions[0] and set(clip.conversation) <= set(clip.questions)
    assert np.mean([len(clip.conversation) for clip in clips]) > 11
    first = [next(q.answer for q in clip.questions if q.family == "existence") for clip in clips]
    assert 0.3 < np.mean([answer == "yes" for answer in first]) < 0.7


def test_few_frames_ask_only_what_rests():
    config = ShapesConfig(families=("colour", "existence", "count"), ask_by="colour", num_sampled=2)
    for index in range(60):
        clip = make_clip(0, "train", index, config)
        assert all(len(seen_ticks(clip, thing)) == 2 for thing in clip.things)
        assert all(answer_by_colour(clip, question) == question.answer for question in clip.questions)
    assert ShapesFrames("train", 2, 0, config)[1].frames.shape == (2, 48, 48, 3)


def test_controls_show_one_frame_or_nothing_and_ask_the_same():
    clip, still, blank = (
        make_clip(1, "test", 3, replace(HARD, show=show)) for show in ("clip", "one_frame", "nothing")
    )
    assert clip.questions == still.questions == blank.questions
    index_T = sampled_indices(clip.num_frames, 16)
    frames = clip.render(index_T).astype(int)
    assert np.abs(still.render(index_T).astype(int) - frames[8]).max() <= 8, "only the frame noise differs"
    colours = np.array(list(COLOURS.values()))
    distance = np.abs(blank.render(index_T)[..., None, :].astype(int) - colours).max(-1)
    assert distance.min() > 40, "nothing has a colour"


def test_the_command_line_explains_every_form(tmp_path, capsys):
    assert cli.main(["data", "shapes", "--help"]) == 0
    assert "Bright black-and-white things" in capsys.readouterr().out
    out = tmp_path / "data"
    argv = ["data", "shapes", "--out", str(out), "--train", "0", "--test", "0", "--val", "1", "--form.show", "nothing"]
    assert cli.main([*argv, "--form.ask_by", "colour", "--form.pair_ticks", "[1, 2]", "--files", "png"]) == 0
    config = json.loads((out / "shapes.json").read_text())["config"]
    assert (config["show"], config["ask_by"], config["pair_ticks"]) == ("nothing", "colour", [1, 2])


def test_files_name_each_question_once(tmp_path):
    out = shapes(tmp_path / "data", train=0, val=2, test=0, form=HARD)
    rows = [json.loads(line) for line in (out / "val.jsonl").read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == 16
    assert json.loads((out / "shapes.json").read_text())["config"] == json.loads(json.dumps(asdict(HARD)))


def test_pictures_hold_the_sampled_frames_exactly(tmp_path):
    out = write_shapes(tmp_path / "data", sizes={"val": 2}, config=HARD, files="png", progress=False)
    assert len(list((out / "val" / "val-000001").iterdir())) == 16 and not list((out / "val").glob(".*"))
    drawn = ShapesFrames("val", 2, 0, HARD)[1]
    read = next(example for example in VideoJsonl(out / "val.jsonl") if example.sample.uid == drawn.sample.uid)
    assert np.array_equal(read.frames, drawn.frames)
    np.testing.assert_allclose(read.timestamps_s, drawn.timestamps_s, atol=drawn.duration_s / 16)
    with pytest.raises(ValueError, match="holds ShapesQA with settings"):
        write_shapes(out, sizes={"val": 2}, config=HARD, progress=False)


def test_drawing_reading_pictures_and_training_data_need_no_video_decoder(tmp_path):
    code = (
        "import sys; sys.modules['av'] = None\n"
        "import stts_train.data_module, stts_train.module, stts.eval.compare\n"
        "from stts.data.datasets import VideoJsonl\n"
        "from stts.data.shapes.files import shapes\n"
        f"out = shapes({str(tmp_path / 'data')!r}, train=0, val=1, test=0, files='png')\n"
        "print(VideoJsonl(out / 'val.jsonl')[0].frames.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("(16, 48, 48, 3)"), done.stderr


def test_a_folder_from_before_a_setting_existed_goes_on(tmp_path):
    out = write_shapes(tmp_path / "data", sizes={"val": 1}, progress=False)
    manifest = json.loads((out / "shapes.json").read_text())
    del manifest["config"]["num_glares"]
    (out / "shapes.json").write_text(json.dumps(manifest))
    write_shapes(out, sizes={"val": 2}, progress=False)
    with pytest.raises(ValueError, match="holds ShapesQA with settings"):
        write_shapes(out, sizes={"val": 2}, config=HARD, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ask_by": "size"}, "ask_by='size'"),
        ({"show": "none"}, "show='none'"),
        ({"questions_per_family": 2}, "ask_by='colour'"),
        ({"questions_per_family": 7, "ask_by": "colour"}, "1 to 6"),
        ({"grid": 1}, "grid=1"),
        ({"num_glares": 1}, "raise grid"),
        ({"grid": 8}, "fewer than 8 pixels"),
        ({"active_share": 0.0}, "active_share=0.0"),
        ({"active_share": 0.25}, "raise the share or lower pair_ticks"),
        ({"pair_ticks": (5, 9)}, "for 5 to 9 frames"),
        ({"pair_ticks": (0, 2)}, "for 0 to 2 frames"),
        ({"num_sampled": 4, "ask_by": "colour"}, "at least 8"),
    ],
)
def test_hard_forms_refuse(settings, message):
    with pytest.raises(ValueError, match=message):
        ShapesConfig(**settings)
