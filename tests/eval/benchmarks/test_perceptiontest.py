from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stts.eval.benchmarks.perceptiontest import PerceptionTest
from stts.eval.benchmarks.tasks import get_task
from tests.eval.benchmarks.folders import accs, load, score, touch, write_parquet


def row(uid: int, answer: int, area: str, reasoning: str) -> dict[str, Any]:
    return {
        "video_name": "video_7",
        "question": "Which letter is shown?",
        "question_id": uid,
        "options": ["b", "d", "it is hidden"],
        "answer_id": answer,
        "area": area,
        "reasoning": reasoning,
        "tag": ["letters"],
    }


def test_validation(tmp_path: Path) -> None:
    rows = [
        row(0, 1, "memory", "descriptive"),
        row(1, 0, "memory", "predictive"),
        row(2, 2, "physics", "descriptive"),
    ]
    write_parquet(tmp_path, "mc_question_val/validation-00000-of-00001.parquet", rows)
    touch(tmp_path, "videos/video_7.mp4")
    questions = load("perceptiontest_val_mc", tmp_path)
    # "b" is the letter B, although option A reads "b"; "D" is no letter here but option B's text
    found = score("perceptiontest_val_mc", questions, ["D", "b", "it is hidden"])
    assert [item.parsed for item in found.scored] == ["B", "B", "C"]
    assert found.headline == found.metrics["accuracy"] == pytest.approx(2 / 3)
    assert accs(found, "area") == {"memory": 0.5, "physics": 1.0}
    assert accs(found, "reasoning") == {"descriptive": 1.0, "predictive": 0.0}


def test_the_test_split_makes_a_submission(tmp_path: Path) -> None:
    hidden = {key: value for key, value in row(3, 0, "memory", "descriptive").items() if key != "answer_id"}
    write_parquet(tmp_path, "mc_question/test-00000-of-00001.parquet", [hidden])
    touch(tmp_path, "videos/video_7.mp4")
    questions = load("perceptiontest_test_mc", tmp_path)
    task = get_task("perceptiontest_test_mc")
    assert isinstance(task, PerceptionTest)
    assert task.submission(questions, {"video_7_3": "C"}) == [
        {"video_name": "video_7", "question": "Which letter is shown?", "question_id": 3, "pred_id": 2}
    ]
