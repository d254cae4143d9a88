from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stts.eval.benchmarks.mvbench import FOLDERS, MVBench
from stts.eval.benchmarks.tasks import get_task
from tests.eval.benchmarks.folders import accs, load, score, touch, write_json


def row(video: str = "x1.mp4", answer: str = "sits", **more: Any) -> dict[str, Any]:
    return {
        "video": video,
        "question": "What happens next?",
        "candidates": ["walks", "sits", "jumps"],
        "answer": answer,
        **more,
    }


def write_all(root: Path, layout: int) -> None:
    """Two questions per task, the first answered by B, the second by A."""
    for task, folders in FOLDERS.items():
        bounds: dict[str, Any] = {"start": 3.2, "end": 9.8}
        write_json(root, f"json/{task}.json", [row(**bounds), row("x2.mp4", "walks", **bounds)])
        for name in ("x1.mp4", "x2.mp4"):
            frames = task == "episodic_reasoning" and layout == 0
            touch(root, f"video/{folders[layout]}/{name}" + ("/00001.jpg" if frames else ""))


@pytest.mark.parametrize("layout", [0, 1])
def test_both_releases(tmp_path: Path, layout: int) -> None:
    write_all(tmp_path, layout)
    questions = load("mvbench", tmp_path)
    assert len(questions) == 40
    assert all(
        q.video == tmp_path / "video" / FOLDERS[str(q.group["task"])][layout] / q.doc["video"] for q in questions
    )
    bounded = {str(q.group["task"]) for q in questions if q.clip == (3.2, 9.8)}
    whole = {"action_sequence", "action_prediction", "object_interaction", "action_localization", "episodic_reasoning"}
    assert bounded == (whole if layout == 0 else set()), "pre-cut clips are not cut again"
    assert {q.group["task"] for q in questions if q.fps} == ({"episodic_reasoning"} if layout == 0 else set())
    # B everywhere: the first question of each task is right, the second wrong
    found = score("mvbench", questions, ["B"] * 40)
    assert (found.headline, found.metrics["mvbench_accuracy"], found.metrics["tasks_scored"]) == (0.5, 50, 20)


def test_the_headline_is_the_mean_of_tasks_of_unequal_size(tmp_path: Path) -> None:
    write_all(tmp_path, 1)
    write_json(tmp_path, "json/action_count.json", [row()] * 4 + [row(answer="walks")])
    found = score("mvbench", load("mvbench", tmp_path), ["B"] * 43)
    assert accs(found, "task")["action_count"] == 0.8
    assert found.headline == pytest.approx((19 * 0.5 + 0.8) / 20)
    assert found.metrics["acc"] == pytest.approx((19 + 4) / 43)


def test_nineteen_tasks_are_not_mvbench(tmp_path: Path) -> None:
    write_all(tmp_path, 1)
    for name in ("x1.mp4", "x2.mp4"):
        (tmp_path / "video/nturgbd_convert" / name).unlink()
    with pytest.raises(ValueError, match=r"2 of 40 rows have no video, first .*fine_grained_pose.json, row 0"):
        load("mvbench", tmp_path)
    loaded = get_task("mvbench").load(tmp_path, skip_missing=True)
    assert len(loaded.questions) == 38 and len(loaded.missing_video) == 2
    assert loaded.notes[0] == "mvbench: skipped 2 rows without video"
    assert [q.doc_id for q in loaded.questions if q.group["task"] == "egocentric_navigation"] == [38, 39]
    found = score("mvbench", loaded.questions, ["B"] * 38)
    assert found.headline is None and found.metrics["mvbench_accuracy"] is None
    assert (found.metrics["tasks_scored"], found.metrics["macro"]) == (19, 0.5)


def test_one_task_alone(tmp_path: Path) -> None:
    write_json(tmp_path, "json/action_count.json", [row(), row("x2.mp4", "walks")])
    touch(tmp_path, "perception/videos/x1.mp4", "perception/videos/x2.mp4")
    found = score("mvbench_action_count", load("mvbench_action_count", tmp_path), ["B. sits", ""])
    assert found.headline == 0.5 and found.metrics["parse_failures"] == 1
    lenient = score("mvbench_action_count", load("mvbench_action_count", tmp_path), ["B. sits", ""], "lmms-eval")
    assert lenient.headline == 1 and lenient.metrics["left_out"] == 1
    wordy = score("mvbench_action_count", load("mvbench_action_count", tmp_path), ["B. sits", "none"], "lmms-eval")
    assert wordy.headline == 0.5 and wordy.metrics["left_out"] == 0, "only empty answers are left out there"


def test_archives_that_unpack_one_level_deeper(tmp_path: Path) -> None:
    write_json(tmp_path, "json/moving_count.json", [row()])
    touch(tmp_path, "video/data0613/clevrer/video_validation/x1.mp4")
    [question] = load("mvbench_moving_count", tmp_path)
    assert question.video.parts[-4:] == ("data0613", "clevrer", "video_validation", "x1.mp4")


def test_equal_candidates_mean_the_first(tmp_path: Path) -> None:
    write_json(tmp_path, "json/action_count.json", [row(candidates=["walks", "sits", "sits"])])
    touch(tmp_path, "perception/videos/x1.mp4")
    assert load("mvbench_action_count", tmp_path)[0].answer == "B"


def test_a_folder_of_frames_is_sampled_at_three_per_second(tmp_path: Path) -> None:
    write_json(tmp_path, "json/episodic_reasoning.json", [row("show", start=1.0, end=3.0)])
    touch(
        tmp_path, *(f"video/tvqa/frames_fps3_hq/show/{n}.jpg" for n in range(1, 13)), "video/tvqa/frames_fps3_hq/show/x"
    )
    [question] = load("mvbench_episodic_reasoning", tmp_path)
    files, times = question.frame_files("uniform_inclusive", 3)
    # 12 frames at 0, 1/3, ...; the clip [1, 3] holds frames 3 to 9, of which the ends and the middle are taken
    assert [path.name for path in files] == ["4.jpg", "7.jpg", "10.jpg"] and times == [1.0, 2.0, 3.0]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)no json/action_sequence.json in .*accepted under the root:\n  json/"):
        load("mvbench", tmp_path)
    touch(tmp_path, "perception/videos/x1.mp4")
    for bad, message in (
        (row(answer="flies"), "answer 'flies' is none of the options"),
        (row(candidates="walks"), "'candidates' is 'walks', expected a list"),
        (row(video="../../../x1.mp4"), "leaves"),
        ({"video": "x1.mp4"}, "column 'candidates' is missing"),
        ("x", "expected an object"),
    ):
        write_json(tmp_path, "json/action_count.json", [bad])
        with pytest.raises(ValueError, match=rf"row 0: .*{message}"):
            load("mvbench_action_count", tmp_path)
    write_json(tmp_path, "json/action_sequence.json", [row(start=5, end=2)])
    touch(tmp_path, "video/star/Charades_v1_480/x1.mp4")
    with pytest.raises(ValueError, match=r"start 5.0 and end 2.0 are no range"):
        load("mvbench_action_sequence", tmp_path)
    (tmp_path / "json/action_count.json").write_text("[{")
    with pytest.raises(ValueError, match="is not JSON"):
        MVBench(name="x", tasks=("action_count",)).load(tmp_path)
