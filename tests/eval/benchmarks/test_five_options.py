"""EgoSchema and NExT-QA."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from stts.eval.benchmarks.egoschema import EgoSchema
from stts.eval.benchmarks.tasks import get_task
from tests.eval.benchmarks.folders import accs, load, score, touch, write_json, write_parquet

OPTIONS = ["feed the ducks", "paint a fence", "fold a kite", "tie a boat", "whisk eggs"]
EGO = "test-00000-of-00001.parquet"


def ego(uid: str, answer: str | None, marked: bool = False) -> dict[str, Any]:
    return {
        "question_idx": uid,
        "question": "What does C do?",
        "video_idx": f"v{uid}",
        "option": [f"{letter}. {text}" for letter, text in zip("ABCDE", OPTIONS, strict=True)] if marked else OPTIONS,
        "answer": answer,
    }


def test_egoschema_subset(tmp_path: Path) -> None:
    write_parquet(tmp_path, f"Subset/{EGO}", [ego("0", "4", marked=True), ego("1", "0"), ego("2", "1")])
    touch(tmp_path, "videos/v0.mp4", "videos/v1.MP4", "videos/v2.mp4")
    questions = load("egoschema_subset", tmp_path)
    assert [q.options for q in questions] == [tuple(OPTIONS)] * 3 and [q.answer for q in questions] == ["E", "A", "B"]
    answers = ["They whisk eggs slowly", "It must be D, not A", "b."]
    found = score("egoschema_subset", questions, answers)
    assert found.headline == found.metrics["score"] == pytest.approx(2 / 3) and found.scored[1].parsed == "D"
    # the first has 4 words and so is a guess there; "D, not A": the first of the last occurrences is A's " A "
    theirs = score("egoschema_subset", questions, answers, "lmms-eval")
    assert theirs.scored[1].correct and theirs.metrics["parse_failures"] == 0


def test_egoschema_full_set_makes_a_submission(tmp_path: Path) -> None:
    write_parquet(tmp_path, f"MC/{EGO}", [ego("0", None), ego("1", None)])
    touch(tmp_path, "videos/v0.mp4", "videos/v1.mp4")
    task = get_task("egoschema")
    assert isinstance(task, EgoSchema)
    questions = load("egoschema", tmp_path)
    answers = {"0": "(C)", "1": "no idea"}
    assert task.submission(questions, answers) == {"v0": 2, "v1": -1}
    with pytest.raises(ValueError, match="'0' is not public; see submission"):
        task.score(questions, answers)


def next_row(video: str, qid: int, kind: str, answer: int) -> dict[str, Any]:
    options = {f"a{place}": text for place, text in enumerate(OPTIONS)}
    more = {"frame_count": 300, "width": 640, "height": 480, "question": "why did he stop", "qid": qid, "type": kind}
    return {"video": video, "answer": answer, **more, **options}


NEXT = [
    next_row("4010", 0, "CW", 1),
    next_row("4010", 1, "CH", 0),
    next_row("5020", 0, "TN", 2),
    next_row("5020", 1, "DL", 4),
]


def check_nextqa(root: Path, task: str) -> None:
    questions = load(task, root)
    assert [q.uid for q in questions] == ["4010_0", "4010_1", "5020_0", "5020_1"]
    found = score(task, questions, ["B", "B", "(C) fold a kite", "fold or whisk"])
    assert found.headline == found.metrics["exact_match"] == 0.5
    assert accs(found, "kind") == {"causal": 0.5, "descriptive": 0.0, "temporal": 1.0}
    assert accs(found, "type") == {"CH": 0.0, "CW": 1.0, "DL": 0.0, "TN": 1.0}
    assert found.metrics["parse_failures"] == 1


def test_nextqa_parquet_with_flat_videos(tmp_path: Path) -> None:
    write_parquet(tmp_path, "MC/test-00000-of-00001.parquet", NEXT)
    touch(tmp_path, "NExTVideo/4010.mp4", "NExTVideo/5020.mp4")
    check_nextqa(tmp_path, "nextqa_mc_test")


@pytest.mark.parametrize("split", ["test", "val"])
def test_nextqa_csv_with_nested_videos(tmp_path: Path, split: str) -> None:
    with (tmp_path / f"{split}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(NEXT[0]))
        writer.writeheader()
        writer.writerows(NEXT)
    write_json(tmp_path, "map_vid_vidorID.json", {"4010": "1164/77", "5020": "0001/88"})
    touch(tmp_path, "NExTVideo/1164/77.mp4", "NExTVideo/88.mp4")
    check_nextqa(tmp_path, f"nextqa_mc_{split}")


def test_nextqa_errors(tmp_path: Path) -> None:
    write_parquet(tmp_path, "MC/test-00000-of-00001.parquet", [next_row("1", 0, "XX", 1)])
    with pytest.raises(ValueError, match="type is 'XX', expected one that starts with C, T or D"):
        load("nextqa_mc_test", tmp_path)
    with pytest.raises(ValueError, match=r"no val\.csv in"):
        load("nextqa_mc_val", tmp_path)
