"""TOMATO, MotionBench, LVBench, VideoEval-Pro."""

from __future__ import annotations

from pathlib import Path

import pytest

from stts.eval.benchmarks.tomato import KINDS
from tests.eval.benchmarks.folders import accs, load, score, touch, write_json, write_jsonl, write_parquet


def test_tomato(tmp_path: Path) -> None:
    for kind in KINDS:
        made = {
            "question": "How often?",
            "options": ["once", "twice", "never"],
            "answer": 1,
            "key": "0390-01",
            "demonstration_type": "object",
            "motion_type": "x",
        }
        write_json(tmp_path, f"data/{kind}.json", {"0": made} | ({"1": made} if kind == "count" else {}))
    touch(tmp_path, "videos/object/0390-01.mp4")
    questions = load("tomato", tmp_path)
    assert [q.uid for q in questions[:3]] == ["count/0", "count/1", "direction/0"]
    found = score("tomato", questions, ["B", "A", "twice", "B", "B", "C", "many"])
    assert found.headline == found.metrics["tomato_score"] == pytest.approx(4 / 7)
    assert accs(found, "kind")["count"] == 0.5 and accs(found, "demonstration_type") == {"object": 4 / 7}
    write_json(tmp_path, "data/count.json", [1])
    with pytest.raises(ValueError, match="expected an object of id -> question"):
        load("tomato", tmp_path)


def test_motionbench(tmp_path: Path) -> None:
    text = "How does it move?\nA. up\nB. down\nC. it does\nnot move"
    rows = [
        {
            "key": "k1",
            "video_path": "k1.mp4",
            "question_type": "Camera Motion",
            "video_type": "web",
            "qa": [{"uid": "q1", "question": text, "answer": "B"}, {"uid": "q2", "question": text, "answer": "NA"}],
        },
        {
            "key": "k2",
            "video_path": "k2.mp4",
            "question_type": "Action Order",
            "video_type": "own",
            "qa": [{"uid": "q3", "question": text, "answer": "C"}],
        },
    ]
    write_jsonl(tmp_path, "MotionBench/video_info.meta.jsonl", rows)
    touch(tmp_path, "MotionBench/self-collected/k1.mp4", "MotionBench/public-dataset/k2.mp4")
    questions = load("motionbench_full", tmp_path)
    assert [(q.uid, q.doc_id, q.answer) for q in questions] == [("q1", 0, "B"), ("q3", 1, "C")], "NA is hidden"
    assert questions[0].question == "How does it move?" and questions[0].options == ("up", "down", "it does not move")
    found = score("motionbench_full", questions, ["b) down", "up"])
    assert found.headline == 0.5 and accs(found, "question_type") == {"Action Order": 0.0, "Camera Motion": 1.0}
    write_jsonl(
        tmp_path,
        "MotionBench/video_info.meta.jsonl",
        [{**rows[0], "qa": [{"uid": "q", "question": "How?", "answer": "A"}]}],
    )
    with pytest.raises(ValueError, match=r"no options in the question 'How\?'"):
        load("motionbench_full", tmp_path)


def test_lvbench_labels_are_many(tmp_path: Path) -> None:
    text = "What is drawn?\n(A) a cup\n(B) a hat\n(C) a key\n(D) an owl"
    asked = [
        {"uid": "1", "question": text, "answer": "D", "question_type": ["reasoning", "event"], "time_reference": "0-9"},
        {"uid": "2", "question": text, "answer": "A", "question_type": ["event"], "time_reference": "0-9"},
    ]
    write_jsonl(tmp_path, "video_info.meta.jsonl", [{"key": "vid", "type": "cartoon", "qa": asked}])
    touch(tmp_path, "all_videos/vid.mp4")
    found = score("lvbench", load("lvbench", tmp_path), ["(D)", "B"])
    assert found.headline == found.metrics["lvbench_score"] == 0.5
    assert accs(found, "question_type") == {"event": 0.5, "reasoning": 1.0} and accs(found, "type") == {"cartoon": 0.5}


def test_videoevalpro(tmp_path: Path) -> None:
    made = {
        "video": "v1.mp4",
        "question": "Who wins?",
        "options": ["A. Ann", "B. Bob"],
        "answer": "B",
        "answer_text": "Bob",
        "qa_type": "Local Perception",
        "qa_subtype": "Needle",
        "source": "x",
    }
    write_parquet(tmp_path, "data/test-00000-of-00001.parquet", [made, {**made, "qa_type": "Holistic Reasoning"}])
    touch(tmp_path, "videos/videos_filtered/v1.mp4")
    questions = load("videoevalpro_mcq", tmp_path)
    assert questions[0].options == ("Ann", "Bob")
    found = score("videoevalpro_mcq", questions, ["Bob", "A"])
    assert found.headline == 0.5 and accs(found, "qa_type") == {"Holistic Reasoning": 0.0, "Local Perception": 1.0}
