from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stts.eval.benchmarks.tasks import get_task
from stts.eval.benchmarks.tempcompass import Captioning, overall
from tests.eval.benchmarks.folders import accs, load, score, touch, write_parquet

WHEEL = "How does the wheel turn?\nA. clockwise\nB. counter-clockwise"
CAPTIONS = "Which caption fits?\nCaption A: the ball rolls\nCaption B: the ball rests"


def write(root: Path, folder: str, *rows: dict[str, Any]) -> None:
    write_parquet(root, f"{folder}/test-00000-of-00001.parquet", [{"video_id": "10001", **row} for row in rows])
    touch(root, "videos/10001.mp4")


def test_multiple_choice(tmp_path: Path) -> None:
    rows = [{"question": WHEEL, "answer": "A. clockwise", "dim": dim} for dim in ("direction", "direction", "speed")]
    write(tmp_path, "multi-choice", *rows)
    questions = load("tempcompass_multi_choice", tmp_path)
    assert get_task("tempcompass_multi_choice").prompt(questions[0]) == (
        f"{WHEEL}\nReply with the letter of the correct option only."
    )
    found = score("tempcompass_multi_choice", questions, ["A", "b", "the answer is A"])
    assert found.headline == pytest.approx(2 / 3) and accs(found, "dim") == {"direction": 0.5, "speed": 1.0}
    theirs = score("tempcompass_multi_choice", questions, ["A) x", "b", "the answer is A"], "official")
    assert theirs.headline == pytest.approx(1 / 3) and theirs.metrics["parse_failures"] == 2, "no judge: wrong, counted"


def test_yes_no(tmp_path: Path) -> None:
    rows = [{"question": "Does it roll?", "answer": word, "dim": "action"} for word in ("yes", "no", "no")]
    write(tmp_path, "yes_no", *rows)
    questions = load("tempcompass_yes_no", tmp_path)
    assert get_task("tempcompass_yes_no").prompt(questions[0]) == "Does it roll?\nAnswer with yes or no."
    found = score("tempcompass_yes_no", questions, ["Yes, it does.", "No", "It does not"])
    assert found.headline == pytest.approx(2 / 3) and found.metrics["avg_accuracy"] == pytest.approx(200 / 3)
    write(tmp_path, "yes_no", {"question": "Does it?", "answer": "maybe", "dim": "action"})
    with pytest.raises(ValueError, match="'maybe' is neither yes nor no"):
        load("tempcompass_yes_no", tmp_path)


def test_caption_matching(tmp_path: Path) -> None:
    rows = [{"question": CAPTIONS, "answer": "Caption B: the ball rests", "dim": "action"}] * 4
    write(tmp_path, "caption_matching", *rows)
    questions = load("tempcompass_caption_matching", tmp_path)
    assert get_task("tempcompass_caption_matching").prompt(questions[0]) == (
        f"{CAPTIONS}\nReply with the best option only."
    )
    found = score("tempcompass_caption_matching", questions, ["Caption B", "the ball rests", "A", "the ball"])
    assert (found.headline, found.metrics["parse_failures"]) == (0.5, 1)


def test_captioning_needs_a_judge(tmp_path: Path) -> None:
    row = {
        "question": "Describe it.",
        "answer": "-",
        "dim": "action",
        "mc_question": WHEEL,
        "mc_answer": "B. counter-clockwise",
    }
    write(tmp_path, "captioning", row, row)
    task = get_task("tempcompass_captioning")
    assert isinstance(task, Captioning)
    questions = load("tempcompass_captioning", tmp_path)
    assert task.prompt(questions[0]) == "Describe it." and task.max_new_tokens == 1024
    answers = {questions[0].uid: "the wheel turns left", questions[1].uid: "a wheel"}
    assert task.score(questions, answers).headline is None
    asked: list[str] = []

    def judge(prompt: str) -> bool:
        asked.append(prompt)
        return "turns left" in prompt

    found = task.score(questions, answers, judge=judge)
    assert found.headline == 0.5 and accs(found, "dim") == {"action": 0.5}
    assert "B. counter-clockwise?" in asked[0]


def test_overall_pools_the_questions(tmp_path: Path) -> None:
    write(tmp_path, "multi-choice", {"question": WHEEL, "answer": "A", "dim": "speed"})
    write(tmp_path, "yes_no", *[{"question": "Does it?", "answer": "yes", "dim": "action"}] * 3)
    one = score("tempcompass_multi_choice", load("tempcompass_multi_choice", tmp_path), ["A"])
    three = score("tempcompass_yes_no", load("tempcompass_yes_no", tmp_path), ["no", "no", "no"])
    assert overall([one, three]) == 0.25 and overall([]) is None
