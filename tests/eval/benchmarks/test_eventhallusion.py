from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from stts.eval.benchmarks.tasks import get_task
from tests.eval.benchmarks.folders import accs, load, score, touch, write_json


def row(uid: str, *answers: str) -> dict[str, Any]:
    asked = [{"type": "hallucination", "question": "Does it rain?", "answer": answer} for answer in answers]
    return {"id": uid, "category": "vehicle", "length": "00:09", "event_info": {}, "questions": asked}


@pytest.mark.parametrize("older", [False, True])
def test_both_releases(tmp_path: Path, older: bool) -> None:
    write_json(tmp_path, "questions/entire_questions.json", [row("entire_001", "No.", "No.")])
    middle = "mix" if older else "interleave"
    write_json(tmp_path, f"questions/{middle}_questions.json", [row(f"{middle}_001", "Yes.")])
    write_json(tmp_path, "questions/misleading_questions.json", [row("misleading_001", "No.")])
    folder = "videos/mix/mix_001" if older else "videos/interleave/interleave_001"
    touch(tmp_path, "videos/entire/entire_001.mp4", f"{folder}.mp4", "videos/misleading/misleading_001.mp4")
    loaded = get_task("eventhallusion").load(tmp_path)
    questions = loaded.questions
    assert [q.uid for q in questions] == ["entire_001/0", "entire_001/1", "interleave_001/0", "misleading_001/0"]
    content = (tmp_path / f"questions/{middle}_questions.json").read_bytes()
    assert loaded.files[f"questions/{middle}_questions.json"] == hashlib.sha1(content).hexdigest()
    assert get_task("eventhallusion").prompt(questions[0]) == "Does it rain?\nAnswer with yes or no."
    found = score("eventhallusion", questions, ["No, it is dry", "yes", "Yes", "It does not"])
    assert (found.headline, found.metrics["yes_rate"], found.metrics["parse_failures"]) == (0.5, 0.5, 1)
    assert accs(found, "split") == {"entire": 0.5, "interleave": 1.0, "misleading": 0.0}
    assert found.metrics["macro"] == 0.5
    unsure = ["Not sure", "Nothing", "**No**", "<think>no</think>"]
    assert score("eventhallusion", questions, unsure).metrics["parse_failures"] == 3
    assert score("eventhallusion", questions, unsure, "official").metrics["parse_failures"] == 2


def test_errors(tmp_path: Path) -> None:
    write_json(tmp_path, "questions/entire_questions.json", [{"id": "entire_001", "questions": "x"}])
    for split in ("interleave", "misleading"):
        write_json(tmp_path, f"questions/{split}_questions.json", [])
    with pytest.raises(ValueError, match="'questions' must be a list of objects"):
        load("eventhallusion", tmp_path)
    write_json(tmp_path, "questions/entire_questions.json", [row("entire_001", "Perhaps")])
    with pytest.raises(ValueError, match="'Perhaps' is neither yes nor no"):
        load("eventhallusion", tmp_path)
