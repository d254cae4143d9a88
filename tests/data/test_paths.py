"""Links in data folders: followed inside the root and inside a Hugging Face cache, elsewhere only when asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stts.data.datasets import Example, VideoJsonl
from stts.data.paths import confined, following_links
from stts.data.rows import Samples
from stts.data.video.files import read_video
from stts.data.video.sample import VideoError
from tests.data.video.clips import frame_numbers, numbered_images, write_video

ASK = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "rain"}]


def write_frames(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(numbered_images(count)):
        Image.fromarray(image).save(folder / f"{number + 1}.png")
    return folder


def link_all(folder: Path, target: Path) -> Path:
    folder.mkdir(parents=True)
    for path in target.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


def write_rows(root: Path, video: object) -> Path:
    path = root / "rows.jsonl"
    path.write_text(json.dumps({"id": "a", "video": video, "conversations": ASK}) + "\n")
    return path


def test_a_hugging_face_cache_is_one_root(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "datasets--a--b"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "videos").mkdir(parents=True)
    write_video(tmp_path / "c.mp4", numbered_images(8)).rename(repository / "blobs" / "f00d")
    (snapshot / "videos" / "c.mp4").symlink_to("../../../blobs/f00d")
    data = VideoJsonl(write_rows(snapshot, "videos/c.mp4"), num_frames=3, on_error="raise")
    example = data[0]
    assert isinstance(example, Example) and example.frames is not None
    assert frame_numbers(example.frames) == [0, 3, 7]
    assert data.samples[0].video == snapshot / "videos" / "c.mp4", "by its name, not that of the blob"
    (tmp_path / "data").symlink_to(snapshot)
    assert Samples(tmp_path / "data" / "rows.jsonl")[0].video == snapshot / "videos" / "c.mp4"
    (snapshot / "videos" / "d.mp4").symlink_to(tmp_path / "hub" / "other.mp4")
    with pytest.raises(ValueError, match="is a link to"):
        Samples(write_rows(snapshot, "videos/d.mp4"))


def test_other_links_are_followed_when_asked_for(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    write_video(outside / "c.mp4", numbered_images(8))
    (root / "link.mp4").symlink_to(outside / "c.mp4")
    (root / "folder").symlink_to(outside)
    (root / "own.mp4").symlink_to(root / "sub" / "c.mp4")
    for name in ("link.mp4", "folder/c.mp4"):
        path = write_rows(root, name)
        with pytest.raises(ValueError, match=rf"line 1: path '{name}' leaves the root .*: it is a link to {outside}/c"):
            Samples(path)
        assert Samples(path, follow_links=True)[0].video == root / name
        with following_links(True):
            samples = Samples(path)
        assert samples[0].video == root / name, "rows are parsed later, and as the file was opened"
    assert confined(root, "own.mp4") == root / "sub" / "c.mp4", "inside the root"
    elsewhere = str(outside / "c.mp4")
    assert confined(root, elsewhere, follow_links=True) == outside / "c.mp4", "written out by whoever asks for it"
    with pytest.raises(ValueError, match=r"leaves the root .*--follow_links true"):
        confined(root, elsewhere)
    for name in ("../outside/c.mp4", "a\0b"):
        with pytest.raises(ValueError, match=r"leaves the root|cannot be followed"):
            confined(root, name, follow_links=True)


def test_folders_of_frames_that_are_links_or_come_from_a_mac(tmp_path: Path) -> None:
    frames = write_frames(tmp_path / "outside" / "clip", 12)
    (frames / "._1.png").write_bytes(b"\0\5\x16\7Mac OS X")
    (frames / ".hidden.png").write_bytes(b"no picture")
    (frames / "notes.txt").write_text("no picture")
    root = tmp_path / "root"
    linked = link_all(root / "clip", frames)
    for folder in (frames, linked):  # a folder that the caller names is read as it is
        video = read_video(folder, sampler="uniform_inclusive", num_frames=4, clip=None, max_fps=None, timeout_s=None,
                           folder_fps=3.0)  # fmt: skip
        assert frame_numbers(video.frames) == [0, 3, 7, 11] and video.source.num_frames_in_file == 12
    rows = write_rows(root, "clip")
    with pytest.raises(VideoError, match=r"link to .* follow_links"):
        VideoJsonl(rows, num_frames=4)[0]
    example = VideoJsonl(rows, num_frames=4, follow_links=True)[0]
    assert isinstance(example, Example) and example.frames is not None
    assert frame_numbers(example.frames) == [0, 3, 7, 11]


def test_a_list_of_frame_files_is_a_video(tmp_path: Path) -> None:
    write_frames(tmp_path / "clip", 10)
    names = [f"clip/{number}.png" for number in (3, 1, 2, 9)]  # the order of the list
    for video in (names, [names]):
        data = VideoJsonl(write_rows(tmp_path, video), num_frames=4)
        example = data[0]
        assert isinstance(example, Example) and example.frames is not None and example.timestamps_s is not None
        assert frame_numbers(example.frames) == [2, 0, 1, 8] and example.timestamps_s.tolist() == [0, 1, 2, 3]
        assert data.samples[0].messages[0].text == "<video>\nwhat ?"
    one = VideoJsonl(write_rows(tmp_path, names[:1]), num_frames=4)[0]
    assert isinstance(one, Example) and one.frames is not None and frame_numbers(one.frames) == [2, 2, 2, 2]
    (tmp_path / "clip" / "1.png").unlink()
    with pytest.raises(VideoError, match=r"cannot read the image .*clip/1\.png"):
        VideoJsonl(write_rows(tmp_path, names), num_frames=4)[0]
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "clip" / "1.png")
    with pytest.raises(VideoError, match=r"4 frames from .*3\.png on: frames of several sizes"):
        VideoJsonl(write_rows(tmp_path, names), num_frames=4)[0]
    with pytest.raises(ValueError, match="leaves the root"):
        Samples(write_rows(tmp_path, ["clip/1.png", "../secret.png"]))
