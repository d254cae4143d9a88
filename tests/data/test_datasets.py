from __future__ import annotations

import json
import pickle
import sys
import tracemalloc

import av
import numpy as np
import pytest
from PIL import Image

from stts.data import formats
from stts.data.datasets import Example, Skipped, VideoJsonl
from stts.data.rows import Message, Samples, read_jsonl
from stts.data.video.sample import VideoError

ASK = [{"from": "human", "value": "<video>\nwhat happens ?"}, {"from": "gpt", "value": "rain"}]
ROW = {"id": "a", "video": "a.mp4", "conversations": ASK}


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def make_video(path, num_frames=20):
    """Frame n is grey with level 10 n, at 5 frames per second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"crf": "1"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv444p"
        for level in range(num_frames):
            picture = np.full((32, 32, 3), 10 * level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def test_conversations_form(tmp_path):
    turns = [{"from": "system", "value": "be brief"}, *ASK, {"from": "human", "value": "and then ?"}]
    [sample] = read_jsonl(write(tmp_path, {**ROW, "conversations": turns, "clip": [1, 2.5], "family": "x", "n": [1]}))
    assert sample.uid == "a" and sample.video == tmp_path.resolve() / "a.mp4" and sample.images == ()
    assert sample.clip == (1.0, 2.5) and sample.meta == {"family": "x", "n": [1]}
    assert sample.messages == (
        Message("system", "be brief"),
        Message("user", "<video>\nwhat happens ?"),
        Message("assistant", "rain"),
        Message("user", "and then ?"),
    )


def test_messages_form_says_the_same(tmp_path):
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "what happens ?"}]
    answer = {"role": "assistant", "content": "rain"}
    inline = {"id": "a", "messages": [{"role": "user", "content": parts}, answer]}
    apart = {
        "id": "a",
        "video": "a.mp4",
        "messages": [{"role": "user", "content": [{"type": "video"}, parts[1]]}, answer],
    }
    plain = {"id": "a", "video": "a.mp4", "messages": [{"role": "user", "content": "what happens ?"}, answer]}
    expected = read_jsonl(write(tmp_path, ROW))
    for row in (inline, apart, plain):
        assert read_jsonl(write(tmp_path, row)) == expected


def test_images_and_markers(tmp_path):
    two = {
        "id": 7,
        "image": ["a.png", "b/c.png"],
        "conversations": [{"from": "human", "value": "compare <image> <image>"}],
    }
    [sample] = read_jsonl(write(tmp_path, two))
    assert sample.uid == "7" and sample.images == (tmp_path.resolve() / "a.png", tmp_path.resolve() / "b/c.png")
    assert sample.messages == (Message("user", "compare <image> <image>"),)
    [sample] = read_jsonl(write(tmp_path, {**two, "conversations": [{"from": "human", "value": "compare"}]}))
    assert sample.messages == (Message("user", "<image>\n<image>\ncompare"),)


def test_llava_video_rows(tmp_path):
    # LLaVA-Video-178K writes the image marker in front of videos and splits the path in two keys.
    ask = [{"from": "human", "value": "<image>\nwhat happens ?"}, ASK[1]]
    [sample] = read_jsonl(write(tmp_path, {"id": "a", "data_source": "s", "video": "/v/a.mp4", "conversations": ask}))
    assert sample.video == tmp_path.resolve() / "s/v/a.mp4"
    assert sample.messages[0].text == "<video>\nwhat happens ?"


def test_llava_video_folders_as_published(tmp_path):
    """The JSON array lies inside its source's folder, videos beside it; the same video is asked about twice."""
    folder = tmp_path / "0_30_s_academic_v0_1"
    (folder / "academic_source").mkdir(parents=True)
    ask = [{"from": "human", "value": "<image>\nwhat happens ?"}, ASK[1]]
    row = {"id": "c", "data_source": folder.name, "video": "academic_source/c.mp4", "conversations": ask}
    path = folder / "0_30_s_academic_oe_v0_1_qa_processed.json"
    path.write_text(json.dumps([row, row, {**row, "id": "d"}, {k: v for k, v in row.items() if k != "id"}], indent=2))
    for samples in (Samples(path), Samples(path, root=folder), Samples(path, root=tmp_path)):
        assert {sample.video for sample in samples} == {folder.resolve() / "academic_source/c.mp4"}
        assert [sample.uid for sample in samples] == ["c#1", "c#2", "d", "#4"], "unique, also where the file is not"
        assert samples[2].messages[0].text == "<video>\nwhat happens ?"


def test_videochat_pairs(tmp_path):
    pairs = [{"i": "pick one", "q": "what ?", "a": "(B)"}, {"i": "ignored", "q": "", "a": "a cat"}]
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"video": "a.mp4", "QA": pairs, "start": 3.0, "end": 9.5}]))
    [sample] = Samples(path)
    assert sample.clip == (3.0, 9.5) and sample.meta == {}
    assert [(message.role, message.text) for message in sample.messages] == [
        ("system", "pick one"), ("user", "<video>\nwhat ?"), ("assistant", "(B)"), ("user", ""), ("assistant", "a cat"),
    ]  # fmt: skip
    path.write_text(json.dumps([{"video": "a.mp4", "QA": [{"q": "what ?"}]}]))
    with pytest.raises(ValueError, match=r"train\.json, row 1: .*'value' is NoneType"):
        Samples(path)


@pytest.mark.parametrize("chunk", [7, 64, formats._CHUNK])
def test_arrays_say_the_same_as_lines(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(formats, "_CHUNK", chunk)  # rows and characters then lie across the ends of chunks
    texts = ['<video>\nquote " and [brackets], {braces}', "<video>\né ü 漢字 🎬", "<video>\n\\"]
    rows = [
        {**ROW, "id": str(n), "conversations": [{"from": "human", "value": text}, ASK[1]], "n": [n, {"m": []}]}
        for n, text in enumerate(texts * 3)
    ]
    expected = read_jsonl(write(tmp_path, *rows))
    for name, text in (
        ("compact", json.dumps(rows, ensure_ascii=False, separators=(",", ":"))),
        ("escaped", json.dumps(rows, indent=1)),
        ("bom", "\ufeff \n" + json.dumps(rows, ensure_ascii=False)),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(text, encoding="utf-8")
        assert list(Samples(path)) == expected, name
        assert Samples(path)[-1] == expected[-1] and Samples(path)[2:5] == expected[2:5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1}, 3]', "row 2: '3' stands where an object"),
        ('[{"id": 1} {"id": 2}]', "row 2: '{' stands where"),
        ('[{"id": 1}, ]', "row 2: ']' stands where"),
        ('[{"id": 1},', "row 2: the array has no end"),
        ('[{"id": 1}, {"id": ', "row 2: .*cut off"),
        ("[]", "has no rows"),
        ('[{"id": "a", "conversations": []}]', "row 1: key 'conversations'"),
    ],
)
def test_bad_arrays_name_file_row_and_fault(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=rf"rows\.json.*{message}"):
        Samples(tmp_path / "rows.json")


def test_parquet_says_the_same_as_lines(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    plain = {"id": "b", "image": "a.png", "conversations": [{"from": "human", "value": "what ?"}]}
    rows = [{**ROW, "clip": [0.5, 2.0], "family": "x"}, plain, {**ROW, "id": "c"}]
    columns = {name: None for row in rows for name in row}  # a table has every column in every row
    table = pyarrow.Table.from_pylist([columns | row for row in rows])
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    samples, expected = Samples(tmp_path / "rows.parquet"), read_jsonl(write(tmp_path, *rows))
    assert [samples[n] for n in (2, 0, 1)] == [expected[n] for n in (2, 0, 1)]
    assert list(pickle.loads(pickle.dumps(samples))) == expected
    bad = [*rows, {**ROW, "id": "d", "video": "../a.mp4"}]
    parquet.write_table(pyarrow.Table.from_pylist(bad), tmp_path / "bad.parquet", row_group_size=2)
    with pytest.raises(ValueError, match=r"bad\.parquet, row 4: path '../a.mp4' leaves the root"):
        Samples(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 and so on PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"rows\.parquet is a Parquet file, which needs pyarrow: pip install"):
        Samples(tmp_path / "rows.parquet")


def test_limits_leave_the_rest_unread(tmp_path):
    path = write(tmp_path, *({**ROW, "id": str(n)} for n in range(10)), "no JSON")
    assert [sample.uid for sample in Samples(path, limit="first:3")] == ["0", "1", "2"]
    assert [sample.uid for sample in Samples(path, limit="first:11%", uid_prefix="p:")] == ["p:0", "p:1"]
    with pytest.raises(ValueError, match="line 11"):
        Samples(path)


def test_a_file_that_changes_while_in_use_is_refused(tmp_path):
    samples = Samples(write(tmp_path, ROW, {**ROW, "id": "b"}))
    write(tmp_path, {**ROW, "id": "longer"}, {**ROW, "id": "b"})
    with pytest.raises(ValueError, match="changed after it was indexed"):
        samples[1]


def test_rows_stay_on_disk(tmp_path):
    """16 bytes a row to find it, 25 with what tells ids apart and where the row stands; a parsed row takes over 700."""

    def traced(make):
        tracemalloc.start()
        made = make()
        kept, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(made)
        return kept, peak

    path = write(tmp_path, *({**ROW, "id": str(n)} for n in range(100_000)))
    kept, peak = traced(lambda: formats.open_rows(path))
    assert kept < 17 * 100_000 and peak < 5e6
    path = write(tmp_path, *({**ROW, "id": str(n)} for n in range(3_000)))
    kept, peak = traced(lambda: Samples(path))
    parsed, _ = traced(lambda: read_jsonl(path))
    assert kept < 80 * 3_000 and peak < 160 * 3_000 and parsed > 700 * 3_000


def test_root_may_be_elsewhere(tmp_path):
    (tmp_path / "media").mkdir()
    [sample] = read_jsonl(write(tmp_path, ROW), root=tmp_path / "media")
    assert sample.video == tmp_path.resolve() / "media/a.mp4"
    inside = str(tmp_path / "media/b.mp4")
    [sample] = read_jsonl(write(tmp_path, {**ROW, "video": inside}), root=tmp_path / "media")
    assert str(sample.video) == str((tmp_path / "media/b.mp4").resolve()), "absolute is fine inside the root"


@pytest.mark.parametrize("video", ["/etc/hostname", "../a.mp4", "b/../../a.mp4", "b/../a.mp4", "out/a.mp4", "link.mp4"])
def test_paths_stay_inside_the_root(tmp_path, video):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (outside / "a.mp4").write_bytes(b"")
    (root / "out").symlink_to(outside)
    (root / "link.mp4").symlink_to(outside / "a.mp4")
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: path .* leaves the root .* set root"):
        read_jsonl(write(root, {**ROW, "id": "fine"}, {**ROW, "video": video}))
    with pytest.raises(ValueError, match="leaves the root"):
        read_jsonl(write(root, {"id": "i", "image": [video], "conversations": [{"from": "human", "value": "what ?"}]}))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not a JSON object"),
        ("[1]", "expected a JSON object, got list"),
        ({**ROW, "id": None}, "key 'id' is None"),
        ({**ROW, "id": True}, "key 'id'"),
        ({**ROW, "id": "first"}, "already on line 1"),
        ({**ROW, "video": 3}, "key 'video' is 3"),
        ({**ROW, "video": ["a.mp4", "b.mp4"]}, "names 2 videos"),
        ({"id": "a", "video": "a.mp4"}, "'conversations' and 'messages', got"),
        ({**ROW, "messages": []}, "'conversations' and 'messages', got"),
        ({**ROW, "conversations": []}, "one or more objects"),
        ({**ROW, "conversations": ["hi"]}, "one or more objects"),
        ({**ROW, "conversations": [{"from": "robot", "value": "x"}]}, "'from' is 'robot'"),
        ({**ROW, "conversations": [{"from": ["human"], "value": "x"}]}, "'from' is"),
        ({**ROW, "conversations": [{"from": "human", "value": ["x"]}]}, "'value' is list, expected text"),
        ({**ROW, "conversations": ASK[::-1]}, "user, assistant, user"),
        ({**ROW, "conversations": [ASK[0], ASK[0]]}, "user, assistant, user"),
        ({**ROW, "conversations": [*ASK, {"from": "system", "value": "x"}]}, "at most one system"),
        ({**ROW, "conversations": [{"from": "system", "value": "x"}]}, "user, assistant, user"),
        ({"id": "a", "messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "content part"),
        ({"id": "a", "messages": [{"role": "user", "content": [{"type": "text"}]}]}, "lacks its key 'text'"),
        ({"id": "a", "conversations": ASK}, r"1 <video> in the first user message and 0 elsewhere for 0 video"),
        ({**ROW, "conversations": [*ASK, {"from": "human", "value": "<video> again"}]}, "1 elsewhere"),
        ({**ROW, "image": "a.png", "conversations": [{"from": "human", "value": "<image> <image>"}]}, "2 <image>"),
        ({**ROW, "clip": [2, 1]}, "key 'clip'"),
        ({**ROW, "clip": [-1, 1]}, "key 'clip'"),
        ({**ROW, "clip": 5}, "key 'clip'"),
        (
            '{"id": "a", "video": "a.mp4", "conversations": [{"from": "human", "value": "x"}], "clip": [0, NaN]}',
            "'clip'",
        ),
        ({"id": "a", "conversations": [{"from": "human", "value": "x"}], "clip": [0, 1]}, "needs a 'video'"),
    ],
)
def test_bad_rows_name_file_line_and_fault(tmp_path, row, message):
    path = write(tmp_path, {**ROW, "id": "first"}, "", row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: .*{message}"):
        read_jsonl(path)


def test_a_missing_id_is_the_number_of_the_row(tmp_path):
    rows = [{key: value for key, value in ROW.items() if key != "id"}, {**ROW, "id": ""}, {**ROW, "id": "own"}]
    assert [sample.uid for sample in Samples(write(tmp_path, *rows))] == ["#1", "#2", "own"]


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="no JSONL, JSON or Parquet file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="has no rows"):
        read_jsonl(write(tmp_path, "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"id": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"line 1: .*UTF-8"):
        read_jsonl(tmp_path / "latin.jsonl")


def test_video_rows_are_decoded(tmp_path):
    make_video(tmp_path / "a.mp4")
    rows = VideoJsonl(write(tmp_path, ROW, {**ROW, "id": "b", "clip": [1.0, 2.0]}), num_frames=4)
    assert len(rows) == 2
    whole, cut = rows[0], rows[1]
    assert isinstance(whole, Example) and whole.frames.shape == (4, 32, 32, 3)
    np.testing.assert_allclose(whole.frames.mean(axis=(1, 2, 3)), [0, 60, 120, 190], atol=3)
    np.testing.assert_allclose(whole.timestamps_s, [0, 1.2, 2.4, 3.8])
    np.testing.assert_allclose(cut.timestamps_s, [1.0, 1.2, 1.6, 2.0])
    limited = VideoJsonl(write(tmp_path, ROW), num_frames=16, max_fps=1.0)[0]
    assert 3 <= len(limited.timestamps_s) <= 5


def test_images_are_rgb_arrays(tmp_path):
    Image.new("L", (5, 3), 100).save(tmp_path / "grey.png")
    row = {"id": "a", "image": "grey.png", "conversations": [{"from": "human", "value": "what ?"}]}
    example = VideoJsonl(write(tmp_path, row))[0]
    assert example.frames is None and example.timestamps_s is None
    [image] = example.images
    assert image.shape == (3, 5, 3) and image.dtype == np.uint8 and (image == 100).all()


def test_missing_and_broken_media_raise_or_are_skipped(tmp_path):
    make_video(tmp_path / "a.mp4")
    (tmp_path / "broken.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:200])
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    (tmp_path / "gone.mp4").unlink(missing_ok=True)
    picture = {"id": "picture", "image": "broken.png", "conversations": [{"from": "human", "value": "what ?"}]}
    bad = [{**ROW, "id": "gone", "video": "gone.mp4"}, {**ROW, "id": "broken", "video": "broken.mp4"}, picture]
    path = write(tmp_path, ROW, *bad)
    strict, lenient = VideoJsonl(path), VideoJsonl(path, on_error="skip")
    assert isinstance(strict[0], Example) and isinstance(lenient[0], Example)
    for index, row in enumerate(bad, start=1):
        with pytest.raises(VideoError, match=f"sample '{row['id']}'"):
            strict[index]
        skipped = lenient[index]
        assert isinstance(skipped, Skipped) and skipped.uid == row["id"]
        assert row.get("video", row.get("image")) in skipped.reason
    with pytest.raises(ValueError, match="on_error='ignore'"):
        VideoJsonl(path, on_error="ignore")
