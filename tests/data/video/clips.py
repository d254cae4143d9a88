"""Small video files for tests: every frame carries its own number, as black and white stripes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.video.stream import VideoStream

_BITS = 8
# Matrices of the MP4 track header, (a, b, c, d): x' = a x + c y, y' = b x + d y.
TURNS = {"none": (1, 0, 0, 1), "right": (0, 1, -1, 0), "left": (0, -1, 1, 0), "half": (-1, 0, 0, -1)}
MIRRORS = {"horizontal": (-1, 0, 0, 1), "vertical": (1, 0, 0, -1)}


def numbered_images(num_frames: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """uint8 (H, W, 3) images; eight upright stripes write the number in binary, which survives any codec."""
    bits = (np.arange(num_frames)[:, None] >> np.arange(_BITS)) & 1
    rows = (40 + 170 * bits).astype(np.uint8).repeat(width // _BITS, axis=1)
    return [np.ascontiguousarray(np.broadcast_to(row[None, :, None], (height, len(row), 3))) for row in rows]


def frame_numbers(frames: np.ndarray) -> list[int]:
    """Which frames of `numbered_images` these uint8 (T, H, W, 3) pictures are."""
    num_frames, height, width, channels = frames.shape
    stripes = frames.reshape(num_frames, height, _BITS, width // _BITS, channels).mean(axis=(1, 3, 4))
    return ((stripes > 125) << np.arange(_BITS)).sum(axis=1).tolist()


def write_video(
    path: Path,
    images: Sequence[np.ndarray],
    *,
    fps: int = 25,
    times_ms: Sequence[int] | None = None,
    gop: int = 12,
    b_frames: int = 2,
    codec: str = "libx264",
    movflags: str = "",
) -> Path:
    """Encode `images` at `fps`, or each at its own time in milliseconds, with a keyframe every `gop` frames."""
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=fps)
        assert isinstance(stream, VideoStream)
        stream.height, stream.width = images[0].shape[:2] if images else (48, 64)
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        if codec == "libx264":
            # No scene cuts: keyframes stand where `gop` puts them.
            stream.options = {"preset": "ultrafast", "qp": "4", "sc_threshold": "0", "bf": str(b_frames)}
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number if times_ms is None else times_ms[number]
            if times_ms is not None:
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        if images:
            container.mux(stream.encode())
        else:
            container.start_encoding()  # a header that announces a video stream, and nothing in it
    return path


def write_sound(path: Path, codec: str) -> Path:
    """A tenth of a second of silence, and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8000, layout="mono")
        assert isinstance(stream, AudioStream)
        sample_format = stream.codec_context.format.name
        frame = av.AudioFrame(sample_format, "mono", 800)
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        frame.sample_rate = 8000
        frame.pts = 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """Overwrite the matrix in the track header of a one-track MP4: players turn the picture by it."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # tag 4, version and flags 4, times and ids 20, reserved 8, layer to volume 8
    a, b, c, d = (value * 65536 for value in matrix)
    values = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4")
    data[start : start + 36] = values.tobytes()
    path.write_bytes(data)
    return path


def packet_places(path: Path) -> list[tuple[int, int]]:
    """(byte position, size) of every video packet, in file order."""
    with av.open(str(path)) as container:
        packets = container.demux(container.streams.video[0])
        return [(int(packet.pos or 0), packet.size) for packet in packets if packet.size]


def overwrite_packet(path: Path, packet: int) -> Path:
    """Overwrite one packet's payload with bytes that no decoder accepts."""
    data = bytearray(path.read_bytes())
    position, size = packet_places(path)[packet]
    data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    return path
