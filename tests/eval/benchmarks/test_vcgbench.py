from __future__ import annotations

import json
from pathlib import Path

import pytest

from stts.eval.benchmarks.tasks import get_task
from stts.eval.benchmarks.vcgbench import VCGBench, mean_of_five
from tests.eval.benchmarks.folders import touch, write_parquet

TABLE = "test-00000-of-00001.parquet"


def task_at(root: Path, name: str) -> tuple[VCGBench, dict[str, str]]:
    task = get_task(name)
    assert isinstance(task, VCGBench)
    return task, {question.uid: "a man cooks" for question in task.load(root).questions}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    one = {"video_name": "v_1", "question": "What happens?", "answer": "A man cooks."}
    write_parquet(tmp_path, f"Generic/{TABLE}", [one, one])
    write_parquet(tmp_path, f"Temporal/{TABLE}", [one])
    pair = [
        {"video_name": "v_1", "question_1": "What happens?", "question_2": "None", "answer": "A man cooks."},
        {"video_name": "v_1", "question_1": "None", "question_2": "What is done?", "answer": "A man cooks."},
    ]
    write_parquet(tmp_path, f"Consistency/{TABLE}", pair)
    touch(tmp_path, "Test_Videos/v_1.mkv")
    return tmp_path


def test_five_aspects(root: Path) -> None:
    ratings = iter([4, 2, 5, None, 3, 3])

    def judge(prompt: str) -> int | None:
        return next(ratings)

    task, answers = task_at(root, "videochatgpt_gen")
    generic = task.score(task.load(root).questions, answers, judge=judge, judge_name="mine")
    # correctness 4, 2; detail 5 and a failure, which is left out; context 3, 3
    assert [generic.metrics[name] for name in ("correctness", "detail", "context")] == [3, 5, 3]
    assert generic.metrics["judge_failures"] == 1 and generic.scoring == "judge mine"
    assert generic.headline == pytest.approx(11 / 3)
    asked: list[str] = []
    task, answers = task_at(root, "videochatgpt_consistency")
    questions = task.load(root).questions
    assert [q.question for q in questions] == ["What happens?", "What is done?"]

    def note(prompt: str) -> int:
        asked.append(prompt)
        return 1

    consistency = task.score(questions, answers, judge=note, judge_name="mine")
    assert consistency.metrics["consistency"] == 1 and len(asked) == 1, "a pair is judged once"
    assert "What happens?" in asked[0] and "What is done?" in asked[0]
    assert mean_of_five([generic, consistency]) is None
    task, answers = task_at(root, "videochatgpt_temporal")
    temporal = task.score(task.load(root).questions, answers, judge=lambda _: 0, judge_name="mine")
    assert mean_of_five([generic, temporal, consistency]) == pytest.approx((3 + 5 + 3 + 0 + 1) / 5)


def test_without_a_judge_there_are_answers_and_no_score(root: Path, tmp_path: Path) -> None:
    task, answers = task_at(root, "videochatgpt_gen")
    questions = task.load(root).questions
    found = task.score(questions, answers)
    assert found.headline is None and found.metrics["correctness"] is None and found.scoring == "no judge"
    task.dump(tmp_path / "answers.jsonl", questions, answers)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "uid": "v_1/1",
        "question": "What happens?",
        "answer": "A man cooks.",
        "prediction": "a man cooks",
    }


def test_errors(root: Path) -> None:
    task, answers = task_at(root, "videochatgpt_gen")
    questions = task.load(root).questions
    with pytest.raises(ValueError, match="give judge_name"):
        task.score(questions, answers, judge=lambda _: 3)
    with pytest.raises(ValueError, match="the judge gave 7, expected 0 to 5"):
        task.score(questions, answers, judge=lambda _: 7, judge_name="mine")
    task, answers = task_at(root, "videochatgpt_consistency")
    [first, _] = task.load(root).questions
    with pytest.raises(ValueError, match="1 consistency questions have no second wording, first v_1"):
        task.score([first], {first.uid: "x"}, judge=lambda _: 3, judge_name="mine")
