from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.container import InputContainer
from av.packet import Packet
from av.video.stream import VideoStream

from stts.data.video.decode import Reader
from stts.data.video.sample import VideoError, sample_frames
from stts.data.video.samplers import SAMPLERS, Timeline
from tests.data.video.clips import (
    MIRRORS,
    TURNS,
    frame_numbers,
    numbered_images,
    set_display_matrix,
    write_video,
)

REAL_CLIPS = sorted(Path(os.environ["STTS_VIDEO_DIR"]).iterdir()) if os.environ.get("STTS_VIDEO_DIR") else []


def all_frames(path: Path) -> list[tuple[float, np.ndarray]]:
    """Oracle: decode everything from the start, keep everything."""
    with av.open(str(path)) as container:
        frames = list(container.decode(container.streams.video[0]))
    return [(f.time - frames[0].time, np.asarray(f.to_ndarray(format="rgb24"))) for f in frames]


# ---- the right frames, at the right times


@pytest.mark.parametrize(
    ("name", "codec", "gop", "b_frames"),
    [
        ("long_gop.mp4", "libx264", 250, 2),
        ("short_gop.mp4", "libx264", 5, 2),
        ("intra.mp4", "libx264", 1, 0),
        ("matroska.mkv", "libx264", 12, 2),
        ("stream.ts", "libx264", 12, 2),
        ("fragments.mp4", "libx264", 12, 2),
        ("old.avi", "mpeg4", 12, 2),  # AVI stores no presentation times
        ("reordered.avi", "libx264", 12, 2),
        ("raw.h264", "libx264", 12, 2),  # no container, no times at all
        ("vp9.webm", "libvpx-vp9", 12, 0),
    ],
)
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_every_frame_is_the_one_asked_for(
    tmp_path: Path, name: str, codec: str, gop: int, b_frames: int, sampler: str
) -> None:
    movflags = "frag_keyframe+empty_moov" if name.startswith("fragments") else ""
    path = write_video(tmp_path / name, numbered_images(60), gop=gop, b_frames=b_frames, codec=codec, movflags=movflags)
    video = sample_frames(path, sampler=sampler, num_frames=7)
    assert video.source.num_frames_in_file == 60
    assert video.source.native_fps == pytest.approx(25, abs=1e-6)
    assert video.source.duration_s == pytest.approx(2.4, abs=0.002)
    expected = SAMPLERS[sampler](Timeline.constant(60, 25), 7).tolist()
    assert frame_numbers(video.frames) == expected
    np.testing.assert_allclose(video.timestamps_s, np.array(expected) / 25, atol=1e-3)


def test_shapes_and_types(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_images(10, height=32, width=64))
    video = sample_frames(path, num_frames=4)
    assert (video.frames.shape, video.frames.dtype) == ((4, 32, 64, 3), np.uint8)
    assert (video.timestamps_s.shape, video.timestamps_s.dtype) == ((4,), np.float64)
    assert (video.source.path, video.source.sampler) == (str(path), "uniform_inclusive")


def test_short_file_repeats_frames(tmp_path: Path) -> None:
    video = sample_frames(write_video(tmp_path / "a.mp4", numbered_images(3)), num_frames=5)
    assert frame_numbers(video.frames) == [0, 0, 1, 1, 2]
    np.testing.assert_allclose(video.timestamps_s, [0, 0, 0.04, 0.04, 0.08], atol=1e-3)


def test_single_frame(tmp_path: Path) -> None:
    video = sample_frames(write_video(tmp_path / "a.mp4", numbered_images(1)), sampler="time_last", num_frames=8)
    assert set(frame_numbers(video.frames)) == {0}
    assert video.source.native_fps == 25


@pytest.mark.parametrize("name", ["variable.mp4", "variable.mkv"])
def test_variable_rate_has_exact_times(tmp_path: Path, name: str) -> None:
    times_ms = [0, 40, 80, 1000, 1017, 2500, 2533, 4000]
    path = write_video(tmp_path / name, numbered_images(8), times_ms=times_ms, gop=3)
    video = sample_frames(path, num_frames=8)
    assert frame_numbers(video.frames) == list(range(8))
    np.testing.assert_allclose(video.timestamps_s, np.array(times_ms) / 1000, atol=1e-3)
    by_time = sample_frames(path, sampler="time_last", num_frames=3, clip=(0.0, 4.0))
    assert frame_numbers(by_time.frames) == [0, 4, 7], "on screen at 0, 2 and 4 s"
    np.testing.assert_allclose(by_time.timestamps_s, [0, 1.017, 4.0], atol=1e-3)


def test_clip_and_max_fps(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_images(100))
    video = sample_frames(path, num_frames=3, clip=(1.0, 2.0))
    assert frame_numbers(video.frames) == [25, 37, 50]
    np.testing.assert_allclose(video.timestamps_s, [1.0, 1.48, 2.0], atol=1e-3)
    sparse = sample_frames(path, num_frames=64, clip=(1.0, 3.0), max_fps=2)
    assert frame_numbers(sparse.frames) == [25, 37, 50, 62, 75]


# ---- the work: jumps, memory, threads


class CountingReader(Reader):
    """A reader that also tells how many packets went to the decoder."""

    num_packets = 0

    def _packets(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
        for packet in super()._packets(container, stream):
            self.num_packets += 1
            yield packet


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
@pytest.mark.parametrize(("gop", "most_packets"), [(10, 30), (250, 100)])
def test_jumping_gives_the_same_frames_for_less_work(tmp_path: Path, name: str, gop: int, most_packets: int) -> None:
    path = write_video(tmp_path / name, numbered_images(110), gop=gop)
    index = Reader(str(path), math.inf).index_packets()
    chosen_T = np.array([3, 52, 91, 91])
    jumping, walking = CountingReader(str(path), math.inf), CountingReader(str(path), math.inf)
    jumped = jumping._fill(index, chosen_T, shortcuts=True)
    walked = walking._fill(index, chosen_T, shortcuts=False)
    assert np.array_equal(jumped, walked)
    assert frame_numbers(jumped) == [3, 52, 91, 91]
    assert jumping.num_packets <= most_packets < walking.num_packets + 10
    assert walking.num_packets >= 92


def test_every_choice_equals_decoding_everything(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_images(40), gop=10)
    index = Reader(str(path), math.inf).index_packets()
    oracle = all_frames(path)
    rng = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 8):
        chosen_T = np.sort(rng.integers(0, 40, size))
        frames = Reader(str(path), math.inf).collect(index, chosen_T)
        assert np.array_equal(frames, np.stack([oracle[i][1] for i in chosen_T]))


@pytest.mark.parametrize("params", ["bframes=3:b-pyramid=normal", "bframes=0", "bframes=3:tff=1"])
def test_frames_that_no_other_needs_are_left_out(tmp_path: Path, params: str) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 250
        stream.options = {"preset": "medium", "x264-params": f"scenecut=0:{params}"}
        for number, image in enumerate(numbered_images(90)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    index = Reader(str(path), math.inf).index_packets()
    shown: list[int] = []

    class Counting(Reader):
        def _frames(self, *args: Any) -> Iterator[Any]:
            shown.append(0)
            for frame in super()._frames(*args):
                shown[-1] += 1
                yield frame

    chosen_T = np.array([7, 21, 22, 40, 83])
    frames = Counting(str(path), math.inf).collect(index, chosen_T)
    oracle = all_frames(path)
    assert np.array_equal(frames, np.stack([oracle[i][1] for i in chosen_T]))
    if "tff" in params:
        assert len(shown) == 2 and shown[-1] >= 84, "fields may be packets of their own, so everything was decoded"
    else:
        assert len(shown) == 1 and (shown[0] < 60) == ("pyramid" in params)


def test_memory_is_the_result_not_the_video(tmp_path: Path) -> None:
    # 100 decoded frames of 1280 x 720 are 132 MiB, as RGB 264 MiB; the two asked for take 5 MiB.
    path = write_video(tmp_path / "big.mp4", numbered_images(100, 720, 1280), gop=250)
    program = f"""
import re
from stts.data.video.sample import sample_frames
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
sample_frames({str(path)!r}, num_frames=2, clip=(0.0, 0.2))
before = peak()
assert sample_frames({str(path)!r}, num_frames=2).timestamps_s[-1] > 3.9
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 40, f"peak memory grew by {done.stdout} MiB"


def test_decoding_starts_no_threads(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_images(20, 360, 640))
    seen: list[int] = []

    class Watching(Reader):
        def _packets(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
            for packet in super()._packets(container, stream):
                seen.append(len(os.listdir("/proc/self/task")))
                yield packet

    reader = Watching(str(path), math.inf)
    index = reader.index_packets()
    before = len(os.listdir("/proc/self/task"))
    reader.collect(index, np.arange(20))
    assert max(seen) <= before


# ---- the picture: turned, mirrored, coloured


def _corner_video(path: Path) -> Path:
    """Bright upper left quarter, dark rest, wider than high."""
    image = np.full((32, 64, 3), 40, np.uint8)
    image[:16, :32] = 220
    return write_video(path, [image] * 4)


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        (TURNS["none"], lambda image: image),
        (TURNS["right"], lambda image: np.rot90(image, -1)),
        (TURNS["left"], lambda image: np.rot90(image, 1)),
        (TURNS["half"], lambda image: np.rot90(image, 2)),
        (MIRRORS["horizontal"], lambda image: image[:, ::-1]),
        (MIRRORS["vertical"], lambda image: image[::-1]),
    ],
)
def test_pictures_are_upright(tmp_path: Path, matrix: tuple[int, int, int, int], upright) -> None:
    plain = sample_frames(_corner_video(tmp_path / "plain.mp4"), num_frames=2)
    turned = sample_frames(set_display_matrix(_corner_video(tmp_path / "turned.mp4"), matrix), num_frames=2)
    assert plain.frames[0, :16, :32].min() > 180 and plain.frames[0, 20:, 40:].max() < 80
    assert np.array_equal(turned.frames[1], upright(plain.frames[1]))


@pytest.mark.parametrize(("matrix", "red", "blue"), [("bt709", 0.2126, 0.0722), ("smpte170m", 0.299, 0.114)])
@pytest.mark.parametrize("full_range", [False, True])
def test_colours_follow_the_tags(tmp_path: Path, matrix: str, red: float, blue: float, full_range: bool) -> None:
    luma, cb, cr = 120, 100, 170
    path = tmp_path / "colour.mp4"
    with av.open(str(path), "w") as container:
        tags = f"colormatrix={matrix}:fullrange={'on' if full_range else 'off'}"
        stream = container.add_stream("libx264", rate=25, options={"qp": "1", "x264-params": tags})
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        frame = av.VideoFrame(64, 48, "yuv420p")
        for plane, value in zip(frame.planes, (luma, cb, cr), strict=True):
            plane.update(bytes([value]) * plane.buffer_size)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    y = luma / 255 if full_range else (luma - 16) / 219
    u, v = ((value - 128) / (255 if full_range else 224) for value in (cb, cr))
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    found = sample_frames(path, num_frames=1).frames[0, 24, 32]
    np.testing.assert_allclose(found, np.array([r, g, b]) * 255, atol=2.5)


def test_works_in_many_threads_at_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_images(60), gop=10)
    found: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: found.append(frame_numbers(sample_frames(path, num_frames=4).frames)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[0, 19, 39, 59]] * 8


# ---- real clips too: STTS_VIDEO_DIR=/folder/of/clips pytest tests/data/video/test_sample.py


@pytest.mark.parametrize("path", [Path("encoded_here.mp4"), *REAL_CLIPS], ids=lambda path: path.name)
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_whole_files_against_decoding_everything(tmp_path: Path, path: Path, sampler: str) -> None:
    if not path.is_absolute():
        path = set_display_matrix(write_video(tmp_path / path.name, numbered_images(50)), TURNS["left"])
    try:
        oracle = all_frames(path)
    except av.FFmpegError:
        with pytest.raises(VideoError, match=r"damaged|readable|cut off"):
            sample_frames(path, sampler=sampler, num_frames=8, timeout_s=60)
        return
    video = sample_frames(path, sampler=sampler, num_frames=8, timeout_s=60)
    assert video.source.num_frames_in_file == len(oracle)
    for image, shown_s in zip(video.frames, video.timestamps_s, strict=True):
        nearest_s, expected = min(oracle, key=lambda pair: abs(pair[0] - shown_s))
        assert nearest_s == pytest.approx(shown_s, abs=1e-3)
        turns = [np.rot90(expected, quarter) for quarter in range(4)]
        assert any(np.array_equal(image, turned) for turned in turns), "the same pixels, maybe turned"
