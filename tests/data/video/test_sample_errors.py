"""Bad files and bad requests: one clear error each, quickly and quietly."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from stts.data.video.sample import VideoError, sample_frames
from tests.data.video.clips import (
    frame_numbers,
    numbered_images,
    overwrite_packet,
    packet_places,
    write_sound,
    write_video,
)


def _text(path: Path) -> Path:
    path.write_text("not a video\n" * 50)
    return path


def _playlist(path: Path) -> Path:
    target = write_video(path.with_name("target.mp4"), numbered_images(3))
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n")
    return path


def _empty(path: Path) -> Path:
    path.touch()
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _without_header(path: Path) -> Path:
    """The header of an MP4 comes last: cutting the end leaves data that nothing describes."""
    data = write_video(path, numbered_images(30)).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def _cut(path: Path) -> Path:
    """The header comes first, and the data of the last frames is missing."""
    data = write_video(path, numbered_images(60), movflags="faststart").read_bytes()
    position, size = packet_places(path)[40]
    path.write_bytes(data[: position + size // 2])
    return path


def _cut_matroska(path: Path) -> Path:
    data = write_video(path, numbered_images(100)).read_bytes()
    path.write_bytes(data[: packet_places(path)[50][0]])
    return path


def _damaged(path: Path) -> Path:
    return overwrite_packet(write_video(path, numbered_images(60), gop=250), 30)


def _damaged_avi(path: Path) -> Path:
    return overwrite_packet(write_video(path, numbered_images(60), gop=250, codec="mpeg4"), 30)


def _unknown_codec(path: Path) -> Path:
    path.write_bytes(write_video(path, numbered_images(3)).read_bytes().replace(b"avc1", b"zzzz"))
    return path


BAD_FILES = [
    ("missing.mp4", lambda path: path, ["No such file", "check the path"]),
    ("folder.mp4", _folder, ["directory", "regular video file"]),
    ("pipe.mp4", _pipe, ["directory or device", "regular video file"]),
    ("empty.mp4", _empty, ["0 bytes", "fetch the file again"]),
    ("text.mp4", _text, ["not readable as a video", "expected a complete MP4", "fetch the file again"]),
    ("playlist.mp4", _playlist, ["not readable as a video"]),
    ("no_header.mp4", _without_header, ["not readable as a video", "complete", "fetch the file again"]),
    ("cut.mp4", _cut, ["cut off", "whole video", "fetch the file again"]),
    ("cut.mkv", _cut_matroska, ["cut off", "promises 4.00 s", "fetch the file again"]),
    ("damaged.mp4", _damaged, ["damaged", "decode cleanly", "re-encode it"]),
    ("damaged.avi", _damaged_avi, ["damaged", "decode cleanly", "re-encode it"]),
    ("no_frames.mp4", lambda path: write_video(path, []), ["no video stream, only nothing at all", "re-encode it"]),
    (
        "no_frames_but_a_track.mp4",
        lambda path: write_video(path, [], movflags="empty_moov"),
        ["no frames", "re-encode"],
    ),
    ("no_frames.mkv", lambda path: write_video(path, []), ["not readable as a video", "re-encode it"]),
    ("no_frames.avi", lambda path: write_video(path, [], codec="mpeg4"), ["no frame", "re-encode it"]),
    ("unknown_codec.mp4", _unknown_codec, ["cannot decode", "re-encode it"]),
    ("sound.wav", lambda path: write_sound(path, "pcm_s16le"), ["no video stream, only audio"]),
    ("sound.mp4", lambda path: write_sound(path, "aac"), ["no video stream, only audio"]),
]


@pytest.mark.parametrize(("name", "make", "words"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_files_give_one_clear_error(tmp_path: Path, capfd, name: str, make, words: list[str]) -> None:
    path = make(tmp_path / name)
    capfd.readouterr()  # what the encoder had to say
    with pytest.raises(VideoError) as caught:
        sample_frames(path, num_frames=8)
    message = str(caught.value)
    assert str(path) in message and all(word in message for word in words), message
    assert capfd.readouterr() == ("", ""), "ffmpeg keeps quiet"
    assert str(pickle.loads(pickle.dumps(caught.value))) == message, "crosses from a loader worker"


def test_damage_counts_only_where_it_reaches_a_chosen_frame(tmp_path: Path) -> None:
    path = overwrite_packet(write_video(tmp_path / "a.mp4", numbered_images(60), gop=20, b_frames=0), 30)
    assert frame_numbers(sample_frames(path, num_frames=2).frames) == [0, 59], "both outside frames 30 to 39"
    assert frame_numbers(sample_frames(path, num_frames=2, clip=(0.8, 1.16)).frames) == [20, 29], "before it"
    with pytest.raises(VideoError, match="damaged at or before frame 39"):
        sample_frames(path, num_frames=2, clip=(0.0, 1.56))  # frame 39 is built upon frame 30


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_frames": 0}, ["num_frames=0"]),
        ({"num_frames": 4, "clip": (9.0, 10.0)}, ["outside the video", "0.400 s"]),
        ({"num_frames": 4, "clip": (0.3, 0.1)}, ["clip=(0.3, 0.1)"]),
        ({"num_frames": 4, "max_fps": -1}, ["max_fps=-1"]),
        ({"num_frames": 4, "sampler": "middle"}, ["'middle'", "uniform_inclusive"]),
        ({"num_frames": 4, "timeout_s": 0}, ["timeout_s=0"]),
        ({"num_frames": 4, "timeout_s": 1e-9}, ["timeout_s=1e-09", "raise it"]),
    ],
)
def test_bad_requests_name_the_file(tmp_path: Path, arguments: dict[str, object], words: list[str]) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_images(10))
    with pytest.raises(VideoError) as caught:
        sample_frames(path, **arguments)  # type: ignore[arg-type]
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)
