from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stts.eval.benchmarks.longvideobench import LongVideoBench
from stts.eval.benchmarks.subtitles import Subtitle, interleave
from stts.eval.benchmarks.tasks import get_task
from tests.eval.benchmarks.folders import accs, load, score, touch, write_json, write_parquet


def row(uid: str, correct: int, group: int, category: str, **more: Any) -> dict[str, Any]:
    return {
        "id": uid,
        "video_id": uid[:3],
        "video_path": f"{uid[:3]}.mp4",
        "subtitle_path": f"{uid[:3]}_en.json",
        "question": "What is on the table?",
        "candidates": ["a cup", "a hat", "a key"],
        "correct_choice": correct,
        "duration": 8.0,
        "duration_group": group,
        "starting_timestamp_for_subtitles": 10.0,
        "question_category": category,
        "topic_category": "KH",
        "level": "L2",
        **more,
    }


ROWS = [
    row("abc_0", 1, 15, "S2E"),
    row("abc_1", 0, 15, "T3E", question="When the Subtitle says so, what is on the table?"),
    row("def_0", 2, 3600, "T3E", candidates=["x", "y", "z", "v", "w"]),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_json(tmp_path, "lvb_val.json", ROWS)
    touch(tmp_path, "videos/abc.mp4", "videos/def.mp4")
    return tmp_path


def test_both_releases_read_alike(root: Path) -> None:
    questions = load("longvideobench_val_v", root)
    assert [(q.uid, q.answer, len(q.options)) for q in questions] == [
        ("abc_0", "B", 3),
        ("abc_1", "A", 3),
        ("def_0", "C", 5),
    ]
    flat = []
    for made in ROWS:
        options = [*made["candidates"], "N/A", "N/A"][:5]
        kept = {key: value for key, value in made.items() if key != "candidates"}
        flat.append(kept | {f"option{place}": option for place, option in enumerate(options)})
    (root / "lvb_val.json").unlink()
    write_parquet(root, "validation-00000-of-00001.parquet", flat)
    again = load("longvideobench_val_v", root)
    assert [(q.uid, q.options, q.answer, q.group) for q in again] == [
        (q.uid, q.options, q.answer, q.group) for q in questions
    ]


def test_scores_by_length_and_category(root: Path) -> None:
    found = score("longvideobench_val_v", load("longvideobench_val_v", root), ["B", "(C)", "(C)"])
    assert found.headline == pytest.approx(2 / 3) and found.metrics["lvb_acc"] == found.headline
    assert accs(found, "duration_group") == {"15": 0.5, "3600": 1.0} and found.metrics["macro"] == 0.75
    assert accs(found, "question_category") == {"S2E": 1.0, "T3E": 0.5}
    assert accs(found, "kind") == {"perception": 1.0, "relation": 0.5}


def test_lmms_eval_guesses_the_same_for_the_same_sample(root: Path) -> None:
    questions = load("longvideobench_val_v", root)
    first = score("longvideobench_val_v", questions, ["", "", ""], "lmms-eval")
    again = score("longvideobench_val_v", questions[::-1], ["", "", ""], "lmms-eval")
    assert {item.uid: item.parsed for item in first.scored} == {item.uid: item.parsed for item in again.scored}
    assert all(item.parsed in "ABCDE" for item in first.scored if item.parsed) and first.metrics["parse_failures"] == 0
    assert score("longvideobench_val_v", questions, ["", "", ""]).metrics["parse_failures"] == 3, "strict never guesses"


def test_questions_about_subtitles_can_be_left_out(root: Path) -> None:
    loaded = LongVideoBench(name="lvb", drop_subtitle_questions=True).load(root)
    assert [(q.uid, q.doc_id) for q in loaded.questions] == [("abc_0", 0), ("def_0", 1)]
    assert get_task("longvideobench_val_v").load(root).notes == ("longvideobench_val_v: 3 rows, published 1337",)


def test_subtitles_go_between_the_frames(root: Path) -> None:
    # seconds in the file are 10 later than in the video
    write_json(
        root,
        "subtitles/abc_en.json",
        [
            {"timestamp": [10.5, 12.5], "text": "one"},  # 0.5 to 2.5 in the video, middle 1.5: after frame 0; holds 2
            {"timestamp": [12.9, 13.1], "text": "short"},  # middle 3.0, widened to 2.5 .. 3.5: no frame inside
            {"timestamp": [14.0, None], "text": "open"},  # 4 to 8 - 10 = -2: middle 1, widened 0.5 .. 1.5: none
            {"start": "0:0:13.5", "end": "0:0:16", "line": "last"},  # 3.5 to 6, middle 4.75: after frame 4
        ],
    )
    write_json(root, "subtitles/def_en.json", [])
    task = get_task("longvideobench_val_i")
    questions = load("longvideobench_val_i", root)
    text = task.prompt(questions[0], [0.0, 2.0, 4.0, 6.0])
    assert text.splitlines()[:7] == ["<image>", "one", "<image>", "<image>", "last", "<image>", "What is on the table?"]
    assert task.prompt(questions[2], [0.0, 1.0]).startswith("<image>\n<image>\nWhat is on")
    assert (task.sampler, task.max_new_tokens) == ("bins_left", 32)
    with pytest.raises(ValueError, match="give times_s"):
        task.prompt(questions[0])


def test_a_subtitle_under_a_second_is_widened() -> None:
    assert interleave([Subtitle(1.9, 2.1, "x")], [0.0, 2.3, 9.0], "F") == ["F", "x", "F", "F"]
    assert interleave([Subtitle(1.0, 2.0, "x")], [1.0, 2.0], "F") == ["F", "F"], "a frame on its edge is not inside"
    assert interleave([Subtitle(1.0, 3.0, "x")], [0.0, 2.0, 4.0], "F") == ["F", "F", "x", "F"], "a frame at its middle"


def test_errors(root: Path) -> None:
    with pytest.raises(ValueError, match=r"no subtitles at .*abc_en.json; fetch them, or use longvideobench_val_v"):
        load("longvideobench_val_i", root)
    write_json(root, "lvb_val.json", [ROWS[0]])
    write_json(root, "subtitles/abc_en.json", [{"begin": 1}])
    with pytest.raises(ValueError, match="neither"):
        load("longvideobench_val_i", root)
    write_json(root, "lvb_val.json", [row("abc_0", 3, 15, "S2E")])
    with pytest.raises(ValueError, match="answer 3 names none of the 3 options"):
        load("longvideobench_val_v", root)
    write_json(root, "lvb_val.json", [ROWS[0], ROWS[0]])
    loaded = get_task("longvideobench_val_v").load(root)
    assert len(loaded.questions) == 1, "the first of two rows with one uid"
    [bad] = loaded.bad_rows
    assert re.search(r"row 1: uid 'abc_0' is already on .*row 0", bad)
