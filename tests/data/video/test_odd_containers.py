"""Containers that promise, count or time their frames in odd ways: the right frames and times, or a clear refusal."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition

from stts.data.video.sample import FrameStream, VideoError, sample_frames
from tests.data.video.clips import frame_numbers, numbered_images, packet_places, write_video

IMAGES = numbered_images(200)


def write(
    path: Path,
    codec: str,
    numbers: Sequence[int],
    *,
    start: int = 0,
    places: Sequence[int] | None = None,
    sound_s: float = 0.0,
    options: dict[str, str] | None = None,
) -> Path:
    """Frames of these numbers at 25 a second from place `start` on, or at `places`, beside `sound_s` of silence."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 12
        stream.codec_context.time_base = Fraction(1, 25)
        stream.codec_context.max_b_frames = 0
        sound: Any = None
        if sound_s:
            sound = container.add_stream("wmav2" if path.suffix == ".wmv" else "mp2", rate=44100, layout="stereo")
            sound.bit_rate = 128000
        for number, place in zip(numbers, places or range(start, start + len(numbers)), strict=True):
            frame = av.VideoFrame.from_ndarray(IMAGES[number], format="rgb24")
            frame.pts = place
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for begin in range(0, int(sound_s * 44100), 1152 * 8):
            samples = np.zeros((sound.layout.nb_channels, 1152 * 8))
            form = sound.codec_context.format
            kind: Any = np.int16 if form.name.startswith("s16") else np.float32
            samples = samples.astype(kind) if form.is_planar else samples.astype(kind).reshape(1, -1)
            frame = av.AudioFrame.from_ndarray(samples, form.name, sound.layout.name)
            frame.sample_rate, frame.pts, frame.time_base = 44100, begin, Fraction(1, 44100)
            container.mux(sound.encode(frame))
        if sound is not None:
            container.mux(sound.encode())
    return path


def check(path: Path, numbers: Sequence[int], times_s: Sequence[float], **choice: Any) -> None:
    """`sample_frames` and a `FrameStream`, read in pieces, give these frames at these times."""
    choice = {"num_frames": len(numbers)} | choice
    video = sample_frames(path, **choice)
    assert frame_numbers(video.frames) == list(numbers)
    np.testing.assert_allclose(video.timestamps_s, times_s, atol=2e-3)
    stream = FrameStream(path, **choice)
    assert stream.source == video.source and np.array_equal(stream.timestamps_s, video.timestamps_s)
    for size in (1, 3):
        pieces = [stream.read(at, min(at + size, len(stream))) for at in range(0, len(stream), size)]
        assert np.array_equal(np.concatenate(pieces), video.frames)
    again = pickle.loads(pickle.dumps(stream))
    assert np.array_equal(again.read(1, 2), video.frames[1:2])


# ---- promises about the length


@pytest.mark.parametrize("name", ["late.mkv", "late.webm"])
def test_video_that_starts_after_the_sound(tmp_path: Path, name: str) -> None:
    if name.endswith("webm"):  # no sound: a lone stream that starts late
        path = write(tmp_path / name, "libvpx-vp9", range(100), start=75)
    else:
        path = write(tmp_path / name, "libx264", range(100), start=75, sound_s=7.5)
    check(path, [0, 24, 49, 74, 99], [0, 0.96, 1.96, 2.96, 3.96])


def test_sound_much_longer_than_the_video(tmp_path: Path) -> None:
    check(write(tmp_path / "a.wmv", "wmv2", range(100), sound_s=8.0), [0, 49, 99], [0, 1.96, 3.96])
    check(write(tmp_path / "a.flv", "flv", range(100), sound_s=0), [0, 49, 99], [0, 1.96, 3.96])


def test_a_complete_file_with_a_wrong_header_is_read_and_named_once(tmp_path: Path) -> None:
    matroska = write(tmp_path / "a.mkv", "libx264", range(100))
    data = matroska.read_bytes()
    assert data.count(b"00:00:04.000000000") == 1
    matroska.write_bytes(data.replace(b"00:00:04.000000000", b"00:00:30.000000000"))
    avi = write(tmp_path / "a.avi", "mpeg4", range(100))
    data = bytearray(avi.read_bytes())
    at = data.index(b"strh") + 8 + 32  # dwLength of the stream, in frames
    assert data[at : at + 4] == (100).to_bytes(4, "little")
    data[at : at + 4] = (900).to_bytes(4, "little")
    avi.write_bytes(data)
    for path in (matroska, avi):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            for _ in range(2):
                video = sample_frames(path, num_frames=3)
        assert frame_numbers(video.frames) == [0, 49, 99]
        [told] = said
        assert str(path) in str(told.message) and "promises 3" in str(told.message) and "4.00 s" in str(told.message)


def test_what_is_cut_off_is_still_refused(tmp_path: Path) -> None:
    sound = write(tmp_path / "a.wmv", "wmv2", range(150), sound_s=8.0)
    sound.write_bytes(sound.read_bytes()[: packet_places(sound)[40][0]])
    plain = write(tmp_path / "a.avi", "mpeg4", range(150))
    plain.write_bytes(plain.read_bytes()[: packet_places(plain)[60][0]])
    live = write(tmp_path / "a.mkv", "libx264", range(150))
    live.write_bytes(live.read_bytes()[: packet_places(live)[60][0]])
    for path in (sound, plain, live):
        with pytest.raises(VideoError, match="cut off"):
            sample_frames(path, num_frames=4)


# ---- times


def test_dropped_frames_of_an_avi_keep_their_time(tmp_path: Path) -> None:
    # The muxer writes an empty chunk for every place that is left out.
    places = [*range(40), *range(60, 100)]
    path = write(tmp_path / "a.avi", "mpeg4", places, places=places)
    check(path, [0, 19, 39, 79, 99], [0, 0.76, 1.56, 3.16, 3.96])
    check(path, [75, 80, 85, 90], [3, 3.2, 3.4, 3.6], clip=(3.0, 3.6))
    check(path, [0, 25, 39, 75, 99], [0, 1, 1.56, 3, 3.96], sampler="time_last")


@pytest.mark.parametrize(("codec", "b_frames"), [("mpeg1video", 2), ("mpeg2video", 2), ("mpeg1video", 0)])
def test_program_streams(tmp_path: Path, codec: str, b_frames: int) -> None:
    path = write_video(tmp_path / "a.mpg", IMAGES, codec=codec, b_frames=b_frames)
    check(path, [0, 33, 66, 99, 132, 165, 199], [0, 1.32, 2.64, 3.96, 5.28, 6.6, 7.96])
    check(path, [125, 137, 150], [5, 5.48, 6], clip=(5.0, 6.0))


@pytest.mark.parametrize(("suffix", "codec"), [("ts", "libx264"), ("ts", "mpeg2video"), ("mpg", "mpeg2video")])
@pytest.mark.parametrize("order", ["early_first", "late_first"])
def test_joined_files_are_read_on(tmp_path: Path, suffix: str, codec: str, order: str) -> None:
    parts = []
    for name, numbers, late in (("a", IMAGES[:40], order == "late_first"), ("b", IMAGES[40:100], False)):
        times = [1000 * 100 * late + 40 * number for number in range(len(numbers))] if codec == "libx264" else None
        parts.append(write_video(tmp_path / f"{name}.{suffix}", numbers, codec=codec, times_ms=times, b_frames=0))
    path = tmp_path / f"both.{suffix}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    check(path, [0, 24, 49, 74, 99], [0, 0.96, 1.96, 2.96, 3.96])


def test_a_recording_that_starts_amid_a_group(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.ts", IMAGES[:150], gop=60, b_frames=0)
    path.write_bytes(path.read_bytes()[188 * 40 :])  # the keyframe of frames 0 to 59 is gone
    check(path, [60, 89, 119, 149], [0, 1.16, 2.36, 3.56])
    check(path, [85, 97, 110], [1, 1.48, 2], clip=(1.0, 2.0))


# ---- which stream


def _two_streams(path: Path, first: tuple[str, int], second_is_default: bool = False) -> Path:
    """A stream of `first` (codec, frames), all of them frame 7; behind it the clip of frames 0 to 99."""
    with av.open(str(path), "w") as container:
        streams: list[Any] = [container.add_stream(codec, rate=25) for codec in (first[0], "libx264")]
        for stream in streams:
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuvj420p" if stream.codec_context.name == "mjpeg" else "yuv420p"
        if second_is_default:
            streams[0].disposition, streams[1].disposition = Disposition.dub, Disposition.default
        packets = []
        for stream, numbers in zip(streams, ([7] * first[1], range(100)), strict=True):
            for place, number in enumerate(numbers):
                frame = av.VideoFrame.from_ndarray(IMAGES[number], format="rgb24")
                frame.pts = place
                packets += stream.encode(frame)
            packets += stream.encode()
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            container.mux(packet)
    return path


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_the_default_stream_is_shown_and_no_cover(tmp_path: Path, name: str) -> None:
    expected = [0, 33, 66, 99], [0, 1.32, 2.64, 3.96]
    check(_two_streams(tmp_path / f"default_{name}", ("libx264", 100), second_is_default=True), *expected)
    check(_two_streams(tmp_path / f"cover_{name}", ("mjpeg", 1)), *expected)
    both = _two_streams(tmp_path / f"first_{name}", ("libx264", 100))
    assert set(frame_numbers(sample_frames(both, num_frames=4).frames)) == {7}, "the first of equals"
