"""A fault in a published file does not block the rest: it is left out, counted and listed, or read as it is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stts.eval.benchmarks.files import read_text, rows_of
from stts.eval.benchmarks.subtitles import read_json_subtitles, read_srt
from stts.eval.benchmarks.tasks import get_task
from tests.eval.benchmarks.folders import load, score, touch, write_json, write_jsonl

CLIP = {"question": "What turns?", "candidates": ["a wheel", "a key"], "answer": "a key", "start": 2.0, "end": 4.5}


def mvbench(root: Path, *changes: Any) -> None:
    rows = [
        {**CLIP, "video": f"{n}.mp4", **change} if isinstance(change, dict) else change
        for n, change in enumerate(changes)
    ]
    write_json(root, "json/action_sequence.json", rows)
    touch(root, *(f"video/star/Charades_v1_480/{n}.mp4" for n in range(len(rows))))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"start": 3.5, "end": 3.5}, "start 3.5 and end 3.5 are no range"),
        ({"start": 4.0, "end": 1.0}, "are no range"),
        ({"answer": "a door"}, "'a door' is none of the options"),
        ({"candidates": None}, "expected a list of texts"),
        ({"question": ""}, "expected a text"),
        ("not a row", "expected an object with columns, got 'not a row'"),
        ({"video": "../../../../x.mp4"}, "leaves"),
    ],
)
def test_a_bad_row_is_left_out_counted_and_listed(tmp_path: Path, change: Any, reason: str) -> None:
    mvbench(tmp_path, {}, change, {"answer": "a wheel"})
    task = get_task("mvbench_action_sequence")
    loaded = task.load(tmp_path)
    assert [question.doc_id for question in loaded.questions] == [0, 2], "places in the file do not move"
    [bad] = loaded.bad_rows
    assert "action_sequence.json, row 1: " in bad and reason in bad
    assert any(
        "left out 1 of 3 rows, which cannot be asked: json/action_sequence.json, row 1" in n for n in loaded.notes
    )
    assert not any("published" in note and " 2 rows" in note for note in loaded.notes), "it still is a row of the file"
    found = score("mvbench_action_sequence", loaded.questions, ["B", "B"])
    assert (found.metrics["n"], found.metrics["acc"]) == (2, 0.5)


def test_more_bad_rows_than_good_are_another_release(tmp_path: Path) -> None:
    mvbench(tmp_path, {}, {"answer": "x"}, {"answer": "y"})
    with pytest.raises(ValueError, match=r"2 of 3 rows cannot be asked, first .*row 1: answer 'x'.*another release"):
        load("mvbench_action_sequence", tmp_path)


def test_a_video_with_no_list_of_questions_does_not_stop_the_next(tmp_path: Path) -> None:
    asked = {"question": "When?\nA. now\nB. then", "answer": "B", "question_type": ["x"]}
    rows = [
        {"key": "v0", "type": "t", "qa": [{**asked, "uid": "1"}, {**asked, "uid": "2", "answer": "E"}]},
        {"key": "v1", "type": "t", "qa": "none"},
        {"key": "v2", "type": "t", "qa": [{**asked, "uid": "3"}]},
    ]
    write_jsonl(tmp_path, "video_info.meta.jsonl", rows)
    touch(tmp_path, "v0.mp4", "v2.mp4")
    loaded = get_task("lvbench").load(tmp_path)
    assert [question.uid for question in loaded.questions] == ["1", "3"] and len(loaded.bad_rows) == 2


def test_your_own_file_is_yours_to_correct(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": str(n), "video": "v.mp4", "conversations": turns, "options": ["red", "blue"]} for n in range(3)]
    write_jsonl(tmp_path, "questions.jsonl", [*rows, {**rows[0], "id": "4", "options": ["green", "blue"]}])
    touch(tmp_path, "v.mp4")
    with pytest.raises(ValueError, match=r"questions.jsonl, row 3: '4': answer 'red' is empty or none of the options"):
        load("jsonl", tmp_path)


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_rows_end_at_line_feeds_alone(tmp_path: Path, end: str) -> None:
    row = {"key": "v", "type": "t", "qa": [{"uid": "1", "question": f"Which{end}one?\nA. a\nB. b", "answer": "A",
           "question_type": ["x"]}]}  # fmt: skip
    text = json.dumps(row, ensure_ascii=False)
    (tmp_path / "video_info.meta.jsonl").write_bytes(f"{text}\r\n\r\n".encode())
    touch(tmp_path, "v.mp4")
    [question] = load("lvbench", tmp_path)
    assert question.question == f"Which{end}one?" and question.options == ("a", "b")


def test_tables_of_other_encodings(tmp_path: Path) -> None:
    header, line = "video,question", 'v,"Où est le café – ici?"'
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"):
        (tmp_path / "test.csv").write_bytes(f"{header}\r\n{line}\r\n".encode(encoding))
        [row] = rows_of(tmp_path, "test.csv")
        assert row.text("question") == "Où est le café – ici?", encoding
    (tmp_path / "a.json").write_bytes('["café"]'.encode("cp1252"))
    with pytest.raises(ValueError, match=r"a\.json is not utf-8-sig text .*save it as UTF-8"):
        list(rows_of(tmp_path, "a.json"))
    (tmp_path / "test.csv").write_bytes(b"a\x81b\n")
    with pytest.raises(ValueError, match=r"test\.csv is not utf-8-sig or cp1252 text"):
        read_text(tmp_path / "test.csv", legacy=True)


def test_a_broken_table_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("a,b\n1," + "x" * 200_000 + "\n")
    with pytest.raises(ValueError, match=r"test\.csv is no readable CSV file \(field larger"):
        list(rows_of(tmp_path, "test.csv"))
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    parquet.write_table(Table.from_pylist([{"a": 1}] * 1000), tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(whole[:40] + b"\0" * 60 + whole[100:])
    with pytest.raises(ValueError, match=r"t\.parquet is no readable Parquet file"):
        list(rows_of(tmp_path, "t.parquet"))


# --- subtitles -------------------------------------------------------------------------------------------------------

TWO = "1\n00:00:01,000 --> 00:00:02,500\nA wet road\n\n2\n00:01:03,000 --> 01:00:04,000\nno cars\n"


def srt(folder: Path, content: str | bytes) -> list[tuple[float, float, str]]:
    path = folder / "s.srt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [tuple(entry) for entry in read_srt(path)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("change", [("", ""), ("\n\n", "\n"), ("\n", "\r\n"), ("\n\n", "\n\n\n")])
def test_encodings_and_ends_of_entries(tmp_path: Path, encoding: str, change: tuple[str, str]) -> None:
    text = TWO.replace(*change) if change[0] else TWO
    assert srt(tmp_path, text.encode(encoding)) == [(1.0, 2.5, "A wet road"), (63.0, 3604.0, "no cars")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TWO.replace("A wet road", "A wet\n\nroad"), ["A wet road", "no cars"]),
        (TWO.replace("A wet road", "42"), ["42", "no cars"]),
        (TWO.replace("A wet road", "5 < 6 and 7 > 3"), ["5 < 6 and 7 > 3", "no cars"]),
        (TWO.replace("A wet road", "I <3 you -> me"), ["I <3 you -> me", "no cars"]),
        (TWO.replace("A wet road", "<i>A</i> <font color='red'>wet</font> {\\an8}road"), ["A wet road", "no cars"]),
        (TWO.replace("A wet road", "A &lt;wet&gt; road &amp; rain"), ["A <wet> road & rain", "no cars"]),
        (TWO.replace("2,500", "2,500  X1:10 X2:20"), ["A wet road", "no cars"]),
        (TWO.replace("A wet road", ""), ["no cars"]),
        ("WEBVTT\n\nNOTE 2\nlines\n\n00:01.000 --> 00:02.000 align:left\n<v A>Hi <0:01.5><c.x>you</c>\n", ["Hi you"]),
        ("WEBVTT\n\n00:01.000 --> 00:02.000\nHi\n00:03.000 --> 00:04.000\nthere\n", ["Hi", "there"]),
        ("WEBVTT\n\nfirst\n00:01.000 --> 00:02.000\nHi\n\nsecond\n00:03.000 --> 00:04.000\nthere\n", ["Hi", "there"]),
        ("", []),
        ("no times here", []),
    ],
)  # fmt: skip
def test_what_is_said(tmp_path: Path, text: str, said: list[str]) -> None:
    assert [entry[2] for entry in srt(tmp_path, text)] == said


def test_times_without_hours_and_old_encodings(tmp_path: Path) -> None:
    assert srt(tmp_path, "WEBVTT\n\n01:02.250 --> 01:03.000\nx\n") == [(62.25, 63.0, "x")]
    assert srt(tmp_path, TWO.replace("wet road", "caf\u00e9").encode("cp1252"))[0][2] == "A caf\u00e9"
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"start": "1:02.5", "end": "0:01:04", "line": "x"}]))
    assert read_json_subtitles(path, 0.5, 99.0) == ((62.0, 63.5, "x"),)
