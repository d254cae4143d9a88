"""Pictures as they are meant to be seen: HDR brought to SDR, square pixels, one size for all frames."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from stts.data.video.picture import _HLG, _PQ, tone_map
from stts.data.video.sample import FrameStream, sample_frames
from tests.data.video.clips import TURNS, frame_numbers, numbered_images, set_display_matrix, write_video


def _write_grey(path: Path, transfer: str, signal: float) -> Path:
    """One grey frame of 10 bits; `signal` in [0, 1] is the coded luma."""
    tags = f"transfer={transfer}:colorprim=bt2020:colormatrix=bt2020nc"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"qp": "1", "x264-params": tags})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        frame = av.VideoFrame(64, 48, "yuv420p10le")
        for plane, value in zip(frame.planes, (round(64 + 876 * signal), 512, 512), strict=True):
            plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("transfer", "signal", "shown"),
    [
        # ITU-R BT.2408: an 18 % grey card is 26 cd/m2, 38 % in PQ and in HLG; SDR shows it at (26/203)^(1/2.4).
        ("smpte2084", 0.38, 0.425),
        ("arib-std-b67", 0.38, 0.425),
        # Diffuse white, 203 cd/m2: above the knee, so a little room is left for highlights.
        ("smpte2084", 0.58, 0.93),
        ("arib-std-b67", 0.75, 0.93),
        ("smpte2084", 0.7518, 1.0),  # 1000 cd/m2
        ("bt709", 0.5, 0.5),  # SDR stays as it is
    ],
)
def test_hdr_is_tone_mapped(tmp_path: Path, suffix: str, transfer: str, signal: float, shown: float) -> None:
    path = _write_grey(tmp_path / f"a.{suffix}", transfer, signal)
    pixel = sample_frames(path, num_frames=1).frames[0, 24, 32]
    np.testing.assert_allclose(pixel / 255, shown, atol=0.012)


def test_tone_mapping_keeps_order_and_hue() -> None:
    signal_N = np.linspace(0, 65535, 4096).astype(np.uint16)
    for transfer in (_PQ, _HLG):
        grey = tone_map(np.repeat(signal_N[None, :, None], 3, 2), transfer, primaries=9)[0, :, 1].astype(int)
        assert (np.diff(grey) >= 0).all() and grey[0] == 0 and grey[-1] == 255
    # BT.709 red at 100 and at 400 cd/m2, in PQ with primaries of BT.709: the second is brighter and still pure red.
    dim, bright = (tone_map(np.array([[[code, 0, 0]]], np.uint16), _PQ, primaries=1)[0, 0] for code in (33297, 42800))
    assert dim[0] < bright[0] and dim[1:].max() == bright[1:].max() == 0


def _write_anamorphic(path: Path, aspect: Fraction, size: tuple[int, int] = (48, 64)) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options={"qp": "4"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for number, image in enumerate(numbered_images(10, *size)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(
    ("aspect", "width"),
    [
        (Fraction(4, 3), 85),
        (Fraction(2, 1), 128),
        (Fraction(1, 2), 32),
        (Fraction(1280, 1279), 64),  # what encoders write to reach exactly 16:9
        (Fraction(200, 1), 64),  # no pixel has this form
    ],
)
def test_pixels_become_square(tmp_path: Path, suffix: str, aspect: Fraction, width: int) -> None:
    path = _write_anamorphic(tmp_path / f"a.{suffix}", aspect)
    video = sample_frames(path, num_frames=3)
    assert video.frames.shape == (3, 48, width, 3)
    centres = (np.arange(8) * width / 8 + width / 16).astype(int)
    stripes = video.frames[:, 20:28][:, :, centres].mean((1, 3))
    assert ((stripes > 125) << np.arange(8)).sum(1).tolist() == [0, 4, 9]
    if suffix == "mp4" and width == 128:
        turned = sample_frames(set_display_matrix(path, TURNS["right"]), num_frames=3)
        assert np.array_equal(turned.frames, np.rot90(video.frames, -1, axes=(1, 2)))


def test_a_change_of_size_is_scaled_to_the_first_frame(tmp_path: Path) -> None:
    images, large = numbered_images(60), numbered_images(60, 96, 128)
    parts = [
        write_video(tmp_path / "a.ts", images[:30]),
        write_video(tmp_path / "b.ts", large[30:]),
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    video = sample_frames(path, num_frames=7)
    assert video.frames.shape == (7, 48, 64, 3) and frame_numbers(video.frames) == [0, 9, 19, 29, 39, 49, 59]
    stream = FrameStream(path, num_frames=7)
    assert np.array_equal(np.concatenate([stream.read(0, 4), stream.read(4, 7)]), video.frames)
    late = sample_frames(path, num_frames=2, clip=(1.3, 2.0))
    assert late.frames.shape == (2, 96, 128, 3), "the first frame that was chosen"


def test_a_change_of_size_behind_a_jump(tmp_path: Path) -> None:
    # The second file goes on with the times of the first, so packets alone tell all times.
    times_ms = [list(range(0, 1200, 40)), list(range(1200, 2400, 40))]
    parts = [
        write_video(tmp_path / name, numbered_images(60, *size)[first : first + 30], times_ms=times, gop=6, b_frames=0)
        for name, size, first, times in (
            ("a.ts", (48, 64), 0, times_ms[0]),
            ("b.ts", (96, 128), 30, times_ms[1]),
        )
    ]
    path = tmp_path / "both.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    stream, whole = FrameStream(path, num_frames=5), sample_frames(path, num_frames=5).frames
    assert stream._index.can_jump and whole.shape == (5, 48, 64, 3) and frame_numbers(whole) == [0, 14, 29, 44, 59]
    assert np.array_equal(np.concatenate([stream.read(number, number + 1) for number in range(5)]), whole)
