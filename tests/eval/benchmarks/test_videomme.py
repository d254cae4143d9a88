from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stts.eval.benchmarks.tasks import get_task
from tests.eval.benchmarks.folders import accs, load, score, touch, write_parquet

TABLE = "videomme/test-00000-of-00001.parquet"


def row(uid: str, video: str, duration: str, answer: str, **more: Any) -> dict[str, Any]:
    return {
        "video_id": uid.split("-")[0],
        "duration": duration,
        "domain": "Life Record",
        "sub_category": "Food",
        "url": "-",
        "videoID": video,
        "question_id": uid,
        "task_type": "Counting Problem",
        "question": "How many plums are cut?",
        "options": ["A. Two.", "B. Four.", "C. Five.", "D. Nine."],
        "answer": answer,
        **more,
    }


ROWS = [
    row("001-1", "aaa", "short", "C"),
    row("001-2", "aaa", "short", "A", task_type="Object Recognition"),
    row("301-1", "bbb", "medium", "B", domain="Knowledge"),
    row("601-1", "ccc", "long", "D"),
]
SRT = (
    '1\r\n00:00:01,000 --> 00:00:02,500\r\n<font color="white">two plums</font>\r\n\r\n'
    "2\r\n00:00:02,500 --> 00:00:04,000\r\nand\r\nfour more\r\n\r\n3\r\n01:00:00,000 --> 01:00:01,000\r\nlate\r\n"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_parquet(tmp_path, TABLE, ROWS)
    touch(tmp_path, "data/aaa.mp4", "data/bbb.MP4", "video/ccc.mp4", "subtitle/aaa.srt")
    (tmp_path / "subtitle/aaa.srt").write_bytes(b"\xef\xbb\xbf" + SRT.encode())
    return tmp_path


def test_rows_become_questions(root: Path) -> None:
    questions = load("videomme", root)
    assert [q.video.relative_to(root).as_posix() for q in questions[1:]] == [
        "data/aaa.mp4",
        "data/bbb.MP4",
        "video/ccc.mp4",
    ]
    first = questions[0]
    assert (first.uid, first.doc_id, first.options, first.answer) == (
        "001-1",
        0,
        ("Two.", "Four.", "Five.", "Nine."),
        "C",
    )
    assert get_task("videomme").prompt(first).splitlines() == [
        "How many plums are cut?",
        *("A. Two.", "B. Four.", "C. Five.", "D. Nine."),
        "Reply with the letter of the correct option only.",
    ]


def test_scores_by_length_and_task(root: Path) -> None:
    found = score("videomme", load("videomme", root), ["C", "(B)", "no idea", "Answer: D"])
    # right: 001-1, 601-1; wrong: 001-2; unparsed and so wrong: 301-1
    assert found.headline == 0.5 and found.metrics["videomme_perception_score"] == 50
    assert (found.metrics["n"], found.metrics["parse_failures"]) == (4, 1)
    assert accs(found, "duration") == {"short": 0.5, "medium": 0.0, "long": 1.0}
    assert found.metrics["macro"] == 0.5
    assert accs(found, "lengths") == {"medium_long": 0.5}
    assert accs(found, "task_type") == {"Counting Problem": 2 / 3, "Object Recognition": 0.0}
    assert accs(found, "domain") == {"Knowledge": 0.0, "Life Record": 2 / 3}
    assert [(item.uid, item.correct) for item in found.scored][:2] == [("001-1", True), ("001-2", False)]


def test_the_official_scoring_leaves_unparsed_answers_out(root: Path) -> None:
    answers = ["C", "(B)", "no idea", "Answer: D"]
    found = score("videomme", load("videomme", root), answers, "official")
    assert found.headline == pytest.approx(2 / 3) and found.metrics["n"] == 3 and found.metrics["left_out"] == 1
    assert score("videomme", load("videomme", root), answers, "compat").scoring == "official"
    assert score("videomme", load("videomme", root), answers, "lmms-eval").headline == 0.5


def test_standard_errors_know_the_shared_video(root: Path) -> None:
    # 001-1 and 001-2 share a video; all of it right, the other two wrong: p = 1/2, n = 4.
    # clustered by hand: r = (1, -1/2, -1/2), V = 3/2 * (1 + 1/4 + 1/4) / 16 = 9/64; independent: 1 / 12
    # n_eff = 4 * (1/12) * (64/9) = 64/27
    found = score("videomme", load("videomme", root), ["C", "A", "A", "A"])
    assert found.metrics["stderr"] == pytest.approx((0.25 / 4) ** 0.5)
    assert found.metrics["stderr_clustered"] == pytest.approx((0.25 * 27 / 64) ** 0.5)


def test_only_the_long_videos(root: Path) -> None:
    assert [(q.uid, q.doc_id) for q in load("videomme_long", root)] == [("601-1", 0)]


def test_subtitles_of_the_frames_that_are_seen(root: Path) -> None:
    task = get_task("videomme_w_subtitle")
    first, _, other, _ = load("videomme_w_subtitle", root)
    cue = "Reply with the letter of the correct option only."
    # [1, 2.5) and [2.5, 4): 2.5 belongs to the second only
    assert task.prompt(first, [0.0, 2.5, 3.0]).startswith("Subtitles of these frames:\nand four more\nHow many")
    assert task.prompt(first, [1.0, 2.4, 2.6]).startswith("Subtitles of these frames:\ntwo plums\nand four more\nHow")
    assert task.prompt(first, [0.0, 4.0]).startswith("Subtitles of these frames:\nThere are none.\nHow many")
    assert task.prompt(other, []).startswith("Subtitles of these frames:\nThere are none.\n")  # no file for this video
    assert task.prompt(first, [1.0]).endswith(cue)
    with pytest.raises(ValueError, match="give times_s"):
        task.prompt(first)


def test_without_its_subtitle_folder_the_task_says_so(root: Path) -> None:
    (root / "subtitle/aaa.srt").unlink()
    (root / "subtitle").rmdir()
    with pytest.raises(ValueError, match=r"no folder .*subtitle; accepted under the root"):
        load("videomme_w_subtitle", root)


def test_wrong_option_letters_are_refused(root: Path) -> None:
    write_parquet(root, TABLE, [row("1-1", "aaa", "short", "A", options=["A. x", "C. y", "B. z", "D. w"])])
    with pytest.raises(ValueError, match=r"row 0: options are lettered A, C, B, D"):
        load("videomme", root)
    write_parquet(root, TABLE, [row("1-1", "aaa", "short", "E")])
    with pytest.raises(ValueError, match=r"row 0: answer 'E' names none of the 4 options"):
        load("videomme", root)
