from __future__ import annotations

from pathlib import Path

import pytest

from stts.eval.benchmarks.mlvu import FOLDERS
from tests.eval.benchmarks.folders import accs, load, score, touch, write_json, write_parquet

CANDIDATES = ["a dog", "a cat", "a fox", "an owl"]


def write_folders(root: Path) -> None:
    """plotQA has three questions with answer B, every other task one."""
    for task, folder in FOLDERS.items():
        made = {
            "video": "movie_1.mp4",
            "duration": 480.0,
            "question": "Who runs?",
            "candidates": CANDIDATES,
            "answer": "a cat",
            "question_type": task,
        }
        write_json(root, f"MLVU/json/{folder}.json", [made] * (3 if task == "plotQA" else 1))
        touch(root, f"MLVU/video/{folder}/movie_1.mp4")


def test_m_avg_weighs_tasks_and_micro_weighs_questions(tmp_path: Path) -> None:
    write_folders(tmp_path)
    questions = load("mlvu_dev", tmp_path)
    assert questions[0].options == tuple(CANDIDATES) and questions[3].video == (
        tmp_path / "MLVU/video/2_needle/movie_1.mp4"
    )
    right = {"plotQA/0", "needle/0", "ego/0", "topic_reasoning/0"}
    found = score("mlvu_dev", questions, ["(B)" if q.uid in right else "(A)" for q in questions])
    # tasks: plotQA 1/3, needle 1, ego 1, count 0, order 0, anomaly 0, topic 1
    assert found.headline == pytest.approx((1 / 3 + 3) / 7)
    assert found.metrics["m_avg"] == found.headline
    assert found.metrics["mlvu_percetion_score"] == pytest.approx(100 * (1 / 3 + 3) / 7)
    assert found.metrics["micro"] == found.metrics["acc"] == pytest.approx(4 / 9)
    assert found.metrics["holistic"] == 0.5
    assert found.metrics["single_detail"] == pytest.approx((1 / 3 + 2) / 3)
    assert found.metrics["multi_detail"] == 0
    assert accs(found, "task")["plotQA"] == pytest.approx(1 / 3)


def test_the_parquet_release_holds_options_in_the_question(tmp_path: Path) -> None:
    made = [
        {
            "video_name": "movie_1.mp4",
            "duration": 480.0,
            "question": "Who runs?\n(A) a dog\n(B) a cat\n(C) a fox\n(D) an owl",
            "candidates": CANDIDATES,
            "answer": "B",
            "task_type": task,
        }
        for task in [*FOLDERS, "sub_scene"]
    ]
    write_parquet(tmp_path, "mlvu/test-00000-of-00001.parquet", made)
    touch(tmp_path, "video/movie_1.mp4")
    questions = load("mlvu_dev", tmp_path)
    assert len(questions) == 7, "generation tasks are left out"
    assert (questions[0].question, questions[0].options, questions[0].answer) == ("Who runs?", tuple(CANDIDATES), "B")
    assert score("mlvu_dev", questions, ["B"] * 7).headline == 1


def test_six_tasks_have_no_m_avg(tmp_path: Path) -> None:
    write_folders(tmp_path)
    questions = [q for q in load("mlvu_dev", tmp_path) if q.group["task"] != "count"]
    found = score("mlvu_dev", questions, ["B"] * len(questions))
    assert found.headline is None and found.metrics["mlvu_percetion_score"] is None
    assert found.metrics["multi_detail"] is None and found.metrics["holistic"] == 1


def test_public_scorings(tmp_path: Path) -> None:
    write_folders(tmp_path)
    questions = load("mlvu_dev", tmp_path)
    assert score("mlvu_dev", questions, ["B) a cat"] * 9, "official").headline == 1
    assert score("mlvu_dev", questions, ["It is B"] * 9, "official").metrics["parse_failures"] == 9
    assert score("mlvu_dev", questions, ["It is B"] * 9, "lmms-eval").headline == 1
    assert score("mlvu_dev", questions, ["beats me"] * 9, "molmo2").headline == 1, "starts with b"


def test_an_absent_folder_names_both_layouts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)no MLVU/json/1_plotQA.json in .*MLVU/video/.*mlvu/test-00000"):
        load("mlvu_dev", tmp_path)
