from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.eval.benchmarks.folders import accs, load, score, touch, write_jsonl


def row(uid: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<video>\nWhich colour?"}, {"from": "gpt", "value": answer}]
    return {"id": uid, "video": "a.mp4", "conversations": turns, **more}


def test_answers_are_graded_whole(tmp_path: Path) -> None:
    options = ["red", "blue"]
    rows = [
        row("1", "red", options=options, family="colour", clip=[1, 2]),
        row("2", "blue", options=options, family="colour"),
        row("3", "two dogs"),
    ]
    write_jsonl(tmp_path, "questions.jsonl", rows)
    touch(tmp_path, "a.mp4")
    questions = load("jsonl", tmp_path)
    assert questions[0].question == "Which colour?" and questions[0].clip == (1.0, 2.0)
    found = score("jsonl", questions, ["Red.", "it is blue", "two dogs"])
    assert found.headline == pytest.approx(2 / 3) and found.metrics["parse_failures"] == 1
    assert accs(found, "family") == {"colour": 0.5}


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)no questions.jsonl in .*accepted under the root"):
        load("jsonl", tmp_path)
    for bad, message in (
        (row("1", "green", options=["red", "blue"]), "none of the options"),
        ({"id": "1", "conversations": [{"from": "human", "value": "Who?"}]}, "must show one video"),
        (row("1", "red", video="b.mp4"), "no video file at"),
    ):
        write_jsonl(tmp_path, "questions.jsonl", [bad])
        touch(tmp_path, "a.mp4")
        with pytest.raises(ValueError, match=message):
            load("jsonl", tmp_path)
