"""Rows in the forms of other trainers: every key is read, refused by name, or named once."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from stts.data.rows import Message, Sample, Samples

ANSWER = {"role": "assistant", "content": "rain"}


def read(folder: Path, *rows: dict[str, Any], **settings: Any) -> list[Sample]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), **row}) + "\n" for n, row in enumerate(rows)))
    return list(Samples(path, **settings))


def messages(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}, ANSWER]


@pytest.mark.parametrize("text", ["what ?", "<video>\nwhat ?", "<video>what ?"])
def test_media_beside_messages(tmp_path: Path, text: str) -> None:
    """ms-swift and LLaMA-Factory write lists `videos` and `images` beside the messages."""
    [sample] = read(tmp_path, {"messages": messages(text), "videos": ["v.mp4"], "system": "be brief"})
    assert sample.video == tmp_path / "v.mp4" and sample.meta == {}
    assert sample.messages[0] == Message("system", "be brief")
    assert sample.messages[1].text.count("<video>") == 1 and sample.messages[1].text.endswith("what ?")
    turns = [{"from": "human", "value": text.replace("video", "image")}, {"from": "gpt", "value": "rain"}]
    [sample] = read(tmp_path, {"conversations": turns, "images": ["a.png"], "videos": []})
    assert sample.images == (tmp_path / "a.png",) and sample.video is None
    assert sample.messages[0].text.count("<image>") == 1


@pytest.mark.parametrize(
    ("row", "part", "clip"),
    [
        ({}, {"video_start": 1.0, "video_end": 3}, (1.0, 3.0)),
        ({}, {"video_start": 1.5}, (1.5, math.inf)),
        ({}, {"video_end": 2.5}, (0.0, 2.5)),
        ({"start": 1, "end": 3}, {}, (1.0, 3.0)),
        ({"video_start": 1, "video_end": 3}, {}, (1.0, 3.0)),
        ({"clip": [1, 3], "start": 1.0, "end": 3.0}, {"video_start": 1.0, "video_end": 3.0}, (1.0, 3.0)),
    ],
)
def test_clips_by_every_name(tmp_path: Path, row: dict[str, Any], part: dict[str, Any], clip: Any) -> None:
    parts = [
        {"type": "video", "video": "file://" + str(tmp_path / "v.mp4"), **part},
        {"type": "text", "text": "what ?"},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no key is left over
        [sample] = read(tmp_path, {"messages": messages(parts), **row})
    assert sample.clip == clip and sample.video == tmp_path / "v.mp4" and sample.meta == {}


def test_content_parts_of_transformers(tmp_path: Path) -> None:
    parts = [{"type": "video", "path": "v.mp4"}, {"type": "text", "text": "what ?"}]
    [sample] = read(tmp_path, {"messages": messages(parts)})
    assert sample.video == tmp_path / "v.mp4"
    frames = [{"type": "video", "video": ["f1.jpg", "f2.jpg"]}, {"type": "text", "text": "what ?"}]
    [sample] = read(tmp_path, {"messages": messages(frames)})
    assert sample.video == (tmp_path / "f1.jpg", tmp_path / "f2.jpg")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": messages("x"), "videos": ["a.mp4", "b.mp4"]}, "names 2 videos"),
        ({"messages": messages("x"), "video": "a.mp4", "videos": ["b.mp4"]}, "names 2 videos"),
        ({"messages": messages("x"), "audios": ["a.wav"]}, "key 'audios' names sound"),
        ({"messages": messages("x"), "videos": [{"path": "a.mp4"}]}, "key 'videos' is"),
        ({"messages": messages([{"type": "video", "url": "http://x/a.mp4"}])}, "with a path"),
        ({"messages": messages([{"type": "video_url", "video_url": {"url": "x"}}])}, "with a path"),
        ({"messages": messages("x"), "video": "a.mp4", "start": 2, "end": 2}, "key 'start' and 'end' is"),
        ({"messages": messages("x"), "video": "a.mp4", "start": "00:01"}, "key 'start' and 'end' is"),
        ({"messages": messages("x"), "video": "a.mp4", "start": 1, "clip": [2, 3]}, "several clips"),
        ({"messages": messages("x"), "start": 1, "end": 2}, "needs a 'video'"),
        ({"messages": messages("x"), "system": ["a"]}, "key 'system' is"),
        ({"messages": [{"role": "system", "content": "a"}, *messages("x")], "system": "b"}, "at most one system"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 1: .*{message}"):
        read(tmp_path, row)


def test_keys_that_nothing_reads_are_named_once(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "x", "fps": 2.0}]}, {**ANSWER, "loss": False}]
    rows = [{"messages": turns, "rejected_response": "no", "family": "f", "fps": 2.0}] * 3
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        samples = read(tmp_path, *rows)
    [warning] = said
    text = str(warning.message)
    assert "rows.jsonl: nothing reads the keys messages[].content[].fps, messages[].loss, rejected_response;" in text
    assert samples[0].meta == {"rejected_response": "no", "family": "f", "fps": 2.0}


def test_bad_rows_are_left_out_when_asked_for(tmp_path: Path) -> None:
    good = {"messages": messages("x"), "video": "a.mp4"}
    rows = [good, {**good, "clip": [7.5, 7.5]}, good, {**good, "video": "../a.mp4"}, good]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"id": str(n), **row}) for n, row in enumerate(rows)]
    path.write_text("\n".join([*lines[:3], "{broken", *lines[3:], lines[0]]) + "\n")
    with pytest.raises(ValueError, match="line 2: key 'clip'"):
        Samples(path)
    with pytest.warns(UserWarning, match=r"3 of 7 rows are left out; first: .*line 2: key 'clip'"):
        samples = Samples(path, on_error="skip")
    assert [sample.uid for sample in samples] == ["0#1", "2", "4", "0#7"], "a repeated id gets its row's number"
    assert [fault.partition(": ")[0].rpartition(" ")[2] for fault in samples.left_out] == ["2", "4", "5"]
    assert samples[1].uid == "2" and [sample.uid for sample in samples[2:]] == ["4", "0#7"]
    path.write_text("\n".join([lines[1], lines[3]]))
    with pytest.raises(ValueError, match=r"not one row can be used; first: .*line 1"):
        Samples(path, on_error="skip")
