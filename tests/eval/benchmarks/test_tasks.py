"""What every task shares: names, suites, prompts, bad input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from stts.data.video.samplers import SAMPLERS
from stts.eval.benchmarks.files import confined, find_video, frame_files, rows_of
from stts.eval.benchmarks.options import split_inline, unmarked
from stts.eval.benchmarks.subtitles import Subtitle, read_srt
from stts.eval.benchmarks.tasks import SUITES, TASKS, get_task, suite_score
from tests.eval.benchmarks.folders import load, score, touch, write_json


def count_row(answer: str = "one", **more: Any) -> dict[str, Any]:
    return {"video": "x.mp4", "question": "How many?", "candidates": ["one", "two"], "answer": answer, **more}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_json(tmp_path, "json/action_count.json", [count_row(), count_row("two", video="y.mp4")])
    touch(tmp_path, "perception/videos/x.mp4", "perception/videos/y.mp4")
    return tmp_path


def test_suites_name_tasks() -> None:
    assert {name: len(tasks) for name, tasks in SUITES.items()} == {
        "molmo2_short": 7,
        "molmo2_long": 6,
        "molmo2_13": 13,
        "prune4": 4,
    }
    assert {task for tasks in SUITES.values() for task in tasks} <= set(TASKS)
    assert SUITES["prune4"] == ("mvbench", "longvideobench_val_v", "mlvu_dev", "videomme")
    assert all(task.sampler in SAMPLERS and task.name == name for name, task in TASKS.items())


def test_a_suite_with_a_missing_task_has_no_score() -> None:
    four = {"mvbench": 0.5, "longvideobench_val_v": 0.25, "mlvu_dev": 0.75, "videomme": 1.0}
    assert suite_score("prune4", four) == 0.625
    assert suite_score("prune4", {**four, "mvbench": None}) is None
    assert suite_score("prune4", {name: four[name] for name in ("mvbench", "mlvu_dev")}) is None
    assert suite_score("prune4", {**four, "videomme": 0.0}) == 0.375, "a score of nought is a score"
    with pytest.raises(ValueError, match="suite 'all' is unknown; known: molmo2_short"):
        suite_score("all", {})
    with pytest.raises(ValueError, match="task 'mme' is unknown; known: videomme"):
        get_task("mme")


@pytest.mark.parametrize("name", TASKS)
def test_an_empty_folder_names_the_task_the_path_and_the_layouts(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        load(name, tmp_path)
    text = str(error.value)
    assert name in text and str(tmp_path) in text and all(layout in text for layout in TASKS[name].layouts)


def test_wording_is_the_users(root: Path) -> None:
    task = get_task("mvbench_action_count")
    [question, _] = load("mvbench_action_count", root)
    assert task.prompt(question, wording="Q: {question}\n{options}\nA:") == "Q: How many?\nA. one\nB. two\nA:"
    with pytest.raises(ValueError, match=r"must hold \{question\}"):
        task.prompt(question, wording="Answer:")


def test_text_of_a_question_is_never_filled_in(tmp_path: Path) -> None:
    write_json(tmp_path, "json/action_count.json", [count_row(question="What does {options} mean?")])
    touch(tmp_path, "perception/videos/x.mp4")
    [question] = load("mvbench_action_count", tmp_path)
    assert get_task("mvbench_action_count").prompt(question).startswith("What does {options} mean?\nA. one\n")


def test_missing_videos_are_skipped_only_when_asked(root: Path) -> None:
    (root / "perception/videos/x.mp4").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 rows have no video, first .*row 0: no video at .*x.mp4; fetch"):
        load("mvbench_action_count", root)
    loaded = get_task("mvbench_action_count").load(root, skip_missing=True)
    assert [(q.uid, q.doc_id) for q in loaded.questions] == [("action_count/1", 1)] and len(loaded.missing_video) == 1
    (root / "perception/videos/y.mp4").unlink()
    with pytest.raises(ValueError, match="no questions in"):
        get_task("mvbench_action_count").load(root, skip_missing=True)


def test_predictions_and_questions_must_match(root: Path) -> None:
    task = get_task("mvbench_action_count")
    questions = load("mvbench_action_count", root)
    with pytest.raises(ValueError, match=r"1 of 2 questions have no prediction \(first \['action_count/1'\]\)"):
        task.score(questions, {"action_count/0": "A", "z": "B"})
    with pytest.raises(ValueError, match="1 questions come twice"):
        task.score([*questions, questions[0]], {})
    with pytest.raises(
        ValueError, match="scoring 'loose' is unknown for mvbench_action_count; known: strict, lmms-eval"
    ):
        score("mvbench_action_count", questions, ["A", "B"], "loose")


def test_rows_cannot_leave_their_folder(root: Path) -> None:
    outside = root.parent / "secret.mp4"
    outside.touch()
    (root / "perception/videos/link.mp4").symlink_to(outside)
    for name in ("../../../secret.mp4", str(outside), "link.mp4", "a\0b"):
        write_json(root, "json/action_count.json", [count_row(video=name)])
        with pytest.raises(ValueError, match=r"row 0: path .* (leaves|cannot be followed)"):
            load("mvbench_action_count", root)


def test_the_folder_of_videos_may_be_a_link(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("disk")
    touch(elsewhere, "a.mp4")
    (root / "videos").symlink_to(elsewhere)
    assert find_video(root, ("videos",), "a") == elsewhere / "a.mp4"
    assert confined(root / "videos", "b/c.mp4") == elsewhere / "b/c.mp4"


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # what an import finds where it is not installed
    touch(tmp_path, "Subset/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"test-00000-of-00001.parquet needs pyarrow: pip install pyarrow"):
        load("egoschema_subset", tmp_path)


def test_a_broken_parquet_file_is_named(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    touch(tmp_path, "Subset/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match="is no readable Parquet file"):
        load("egoschema_subset", tmp_path)


def test_rows_of_every_kind(tmp_path: Path) -> None:
    write_json(tmp_path, "a.json", {"x": 1})
    with pytest.raises(ValueError, match="expected a list of rows, got dict"):
        list(rows_of(tmp_path, "a.json"))
    (tmp_path / "a.jsonl").write_text('{"x": "1", "n": 2}\n\n{"x": true, "n": "y"}\n')
    first, second = rows_of(tmp_path, "none.csv", "a.jsonl")
    assert (first.text("x"), first.text("n"), first.integer("n"), first.seconds("n")) == ("1", "2", 2, 2.0)
    for read, message in (
        (second.text, "'x' is True"),
        (second.integer, "'x' is True"),
        (second.seconds, "'x' is True"),
    ):
        with pytest.raises(ValueError, match=message):
            read("x")
    with pytest.raises(ValueError, match="'n' is 'y', expected an integer"):
        second.integer("n")
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x": \n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        list(rows_of(tmp_path, "a.jsonl"))


def test_options_inside_a_question() -> None:
    assert split_inline("Why?\nA. x\nB) y\n(C) z\nand more") == ("Why?", ("x", "y", "z and more"))
    assert split_inline("Read:\nA. Smith wrote it.\nWho?\nA. x\nB. y") == (
        "Read:\nA. Smith wrote it.\nWho?",
        ("x", "y"),
    )
    with pytest.raises(ValueError, match="no options in the question"):
        split_inline("Why?")
    assert unmarked(["A. x", "y"]) == ("A. x", "y"), "only where every option has a letter"


def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    touch(tmp_path, "f10.jpg", "f9.JPG", "f2b.png", "f2.jpeg", "note.txt")
    assert [path.name for path in frame_files(tmp_path)] == ["f2.jpeg", "f2b.png", "f9.JPG", "f10.jpg"]


def test_srt_oddities(tmp_path: Path) -> None:
    blocks = ("no times here", "2\n0:00:05.500 --> 0:00:06\n<i>b</i> {\\an8}c", "1\n00:00:01,000 --> 00:00:02,000\na")
    text = "\n\n".join([*blocks, "3\n00:00:03,000 --> 00:00:04,000\n"])
    (tmp_path / "a.srt").write_text(text)
    assert read_srt(tmp_path / "a.srt") == (Subtitle(1.0, 2.0, "a"), Subtitle(5.5, 6.0, "b c"))
