"""Passes over one video file: list its frames from packet headers, then decode the chosen ones. Used by `video.py`.

Damage is an error, never a grey picture: a packet that the decoder refuses, or a frame that it marks as patched up,
spoils everything until the next keyframe. (What no decoder can see: flipped bits that still form a legal stream.)

Shape suffixes:  N = frames in the file,  T = frames returned,  H, W = pixels after rotation"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stts.data.video.samplers import Indices, Timeline

# Files only, and no playlists: a text file named .mp4 must not make ffmpeg open other files or the network.
_OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,mxf,nut,ivf,h264,hevc,m4v,wav,mp3",
}
_PYAV_17 = int(av.__version__.split(".")[0]) >= 17  # shows tables of samples; converts on several threads unless told
_MIN_JUMP = 8  # frames that a jump must save: it flushes the decoder and looks up the container's index


class UnusableFileError(ValueError):
    """The file cannot give the frames asked for. The message lacks the file's name and the remedy."""


class DamagedError(UnusableFileError):
    """The file is cut off, or damaged between a keyframe and a frame that was asked for."""


class NotShownError(UnusableFileError):
    """The packets do not say which frames are shown, or the decoder passed over one without a complaint."""


@dataclass(frozen=True, slots=True, eq=False)
class FrameIndex:
    """All frames of a file, in the order in which they are shown."""

    timeline: Timeline
    pts_N: npt.NDArray[np.int64] | None = None
    """Presentation times in stream units; None: frames are known by counting only."""
    keyframes: tuple[tuple[int, int], ...] = ()
    """(presentation time, place in the file counted in packets), by time."""


@dataclass(frozen=True, slots=True)
class _Damage:
    """Stands in the stream of frames where a packet was refused or a frame was patched up."""

    pts: int | None


class Reader:
    """One file. Every pass opens it afresh, so that none depends on where another one stopped."""

    def __init__(self, path: str, deadline_s: float) -> None:
        """`deadline_s` is on the clock of `time.monotonic()`; after it every pass raises TimeoutError."""
        self.path = path
        self.deadline_s = deadline_s

    def index_packets(self) -> FrameIndex:
        """List all frames from packet headers. Raises NotShownError where packets do not tell their times."""
        pts: list[int] = []
        keyframes: list[tuple[int, int]] = []
        end = 0
        with self._open() as (container, stream):
            if container.format.name == "avi":
                raise NotShownError("AVI stores no times, and guessed ones are wrong where frames are reordered")
            for packet in self._packets(container, stream):
                if not packet.size or packet.is_discard:  # is_discard: cut away by an edit list, decoded, never shown
                    continue
                if packet.is_corrupt:
                    raise DamagedError(f"the file is cut off inside frame {len(pts)}")
                if packet.pts is None:
                    raise NotShownError("packets carry no times")
                if packet.is_keyframe:
                    keyframes.append((packet.pts, len(pts)))
                pts.append(packet.pts)
                end = max(end, packet.pts + (packet.duration or 0))
            if pts:
                pts_N = np.sort(np.array(pts, np.int64))
                if (np.diff(pts_N) == 0).any():
                    raise NotShownError("several packets claim one time")
                tick_s = float(stream.time_base or 1)
                timeline = _timeline((pts_N - pts_N[0]) * tick_s, float(end - pts_N[0]) * tick_s, stream)
                self._refuse_cut_off(container, stream, timeline.duration_s)
                return FrameIndex(timeline, pts_N, tuple(sorted(keyframes)))
            self._refuse_cut_off(container, stream, 0.0)
        raise UnusableFileError("the video stream holds no frames")

    def index_by_decoding(self) -> FrameIndex:
        """List all frames by decoding the whole file and keeping nothing."""
        pts: list[int | None] = []
        with self._open() as (container, stream):
            for frame in self._frames(container, stream):
                if isinstance(frame, _Damage):
                    raise DamagedError(f"the stream is damaged after frame {len(pts)}")
                pts.append(frame.pts)
            if not pts:
                raise UnusableFileError("no frame could be decoded")
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            shown_N = np.array([math.nan if value is None else value for value in pts])
            if container.format.name != "avi" and not np.isnan(shown_N).any() and (np.diff(shown_N) > 0).all():
                times_N = (shown_N - shown_N[0]) * float(stream.time_base or 1)
            elif rate > 0:
                times_N = np.arange(len(pts)) / rate
            else:
                raise UnusableFileError("the file states neither frame times nor a frame rate")
            self._refuse_cut_off(container, stream, len(pts) / rate if rate > 0 else math.inf)
            return FrameIndex(_timeline(times_N, 0.0, stream))

    def collect(self, index: FrameIndex, chosen_T: Indices) -> npt.NDArray[np.uint8]:
        """Decode the chosen frames, each once, into one uint8 (T, H, W, 3) array.

        Raises DamagedError or NotShownError when one of them cannot be had."""
        try:
            return self._fill(index, chosen_T, shortcuts=True)
        except (DamagedError, NotShownError):
            # Some streams cannot be entered at the keyframes they list; the long way round settles it.
            return self._fill(index, chosen_T, shortcuts=False)

    def _fill(self, index: FrameIndex, chosen_T: Indices, shortcuts: bool) -> npt.NDArray[np.uint8]:
        frames: npt.NDArray[np.uint8] | None = None
        numbers = np.unique(chosen_T)
        for number, frame in zip(numbers, self._decode(index, numbers, shortcuts), strict=True):
            image = _upright_rgb(frame)
            if frames is None:
                frames = np.empty((len(chosen_T), *image.shape), np.uint8)
            if image.shape != frames.shape[1:]:
                raise UnusableFileError(
                    f"the picture changes from {frames.shape[1:3]} to {image.shape[:2]} (height, width)"
                )
            frames[chosen_T == number] = image
        assert frames is not None, "samplers choose at least one frame"
        return frames

    def _decode(self, index: FrameIndex, numbers: Indices, shortcuts: bool) -> Iterator[VideoFrame]:
        """The frames with these increasing numbers. Shortcuts: jump to keyframes, and never decode an H.264 frame that
        is neither chosen nor a reference of others (half of an ordinary file)."""
        with self._open() as (container, stream):
            if index.pts_N is None:
                yield from _counted(self._frames(container, stream), numbers)
                return
            key_pts = [pts for pts, _ in index.keyframes] or [int(index.pts_N[0])]
            # Only H.264 says so strictly: in HEVC a picture of a higher layer may refer to such a frame.
            sparse = shortcuts and stream.codec_context.name == "h264"
            wanted = frozenset(index.pts_N[numbers].tolist()) if sparse else None
            position = 0  # frames shown, or jumped over
            frames = self._frames(container, stream, wanted)
            damage: list[int] = []
            for number in numbers:
                pts = int(index.pts_N[number])
                group = int(np.searchsorted(key_pts, pts, side="right")) - 1
                start = index.keyframes[group][1] if group >= 0 and index.keyframes else 0
                if shortcuts and start - position >= _MIN_JUMP:
                    container.seek(key_pts[group], stream=stream)
                    frames = self._frames(container, stream, wanted)
                after = key_pts[group + 1] if group + 1 < len(key_pts) else math.inf
                before = key_pts[group] if group >= 0 else -math.inf
                while True:
                    if any(before <= spoilt < after for spoilt in damage):
                        raise DamagedError(f"the stream is damaged at or before frame {number}")
                    frame = next(frames, None)
                    if isinstance(frame, _Damage):
                        damage.append(pts if frame.pts is None else frame.pts)
                        continue
                    if frame is None or frame.pts is None or frame.pts > pts:
                        raise NotShownError(f"frame {number} is listed but the decoder never shows it")
                    if frame.pts == pts:
                        break
                if sparse and frame.interlaced_frame:
                    raise NotShownError(f"the second field of frame {number} may have been left out")
                position = int(number) + 1
                yield frame

    def _frames(
        self, container: InputContainer, stream: VideoStream, wanted: frozenset[int] | None = None
    ) -> Iterator[VideoFrame | _Damage]:
        """Decoded frames in the order shown; a `_Damage` before the frames that it may have spoilt.

        wanted: presentation times outside of which a frame is decoded only if others refer to it; None: decode all."""
        for packet in self._packets(container, stream):
            if wanted is not None:
                needed = packet.pts in wanted or not packet.size
                stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            try:
                frames = packet.decode()
            except av.FFmpegError:
                yield _Damage(packet.pts)
                continue
            for frame in frames:
                if frame.is_corrupt:
                    yield _Damage(frame.pts)
                yield frame

    def _packets(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
        """Packets in file order; the last one is empty and drains the decoder."""
        for packet in container.demux(stream):
            if time.monotonic() > self.deadline_s:
                raise TimeoutError
            yield packet

    def _refuse_cut_off(self, container: InputContainer, stream: VideoStream, found_s: float) -> None:
        """To ffmpeg a file that stops early looks like a short one: compare with what its header promises."""
        if _PYAV_17 and container.format.name.startswith("mov"):  # the table of samples is exact
            size = os.stat(self.path).st_size
            missing = sum(entry.pos + entry.size > size for entry in stream.index_entries)
            if missing:
                raise DamagedError(f"the file is cut off: {missing} of {len(stream.index_entries)} frames are missing")
            return
        promised_s = _promised_s(container, stream)
        if promised_s - found_s > max(1.0, 0.02 * promised_s):
            raise DamagedError(
                f"the file is cut off: it promises {promised_s:.2f} s of video and holds {found_s:.2f} s"
            )

    @contextmanager
    def _open(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        limit_s = None if self.deadline_s == math.inf else max(self.deadline_s - time.monotonic(), 0.001)
        # "file:" keeps a name such as "concat:a|b" a name; tags in an odd encoding must not stop us.
        with av.open(
            f"file:{self.path}", "r", container_options=_OPEN_OPTIONS, metadata_errors="replace", timeout=limit_s
        ) as container:
            # Cover pictures of audio files are video streams too.
            streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not streams:
                found = " and ".join(sorted({stream.type for stream in container.streams})) or "nothing at all"
                raise UnusableFileError(f"found no video stream, only {found}")
            if streams[0].codec_context is None:  # av's annotations do not know this case
                raise UnusableFileError("found a video codec that this FFmpeg build cannot decode")
            streams[0].codec_context.thread_type = "NONE"  # loader workers are processes: one thread each
            streams[0].codec_context.thread_count = 1
            yield container, streams[0]


def _counted(frames: Iterator[VideoFrame | _Damage], numbers: Indices) -> Iterator[VideoFrame]:
    """Pick frames by their place in the order shown."""
    wanted = iter(numbers)
    number = next(wanted, None)
    shown = -1
    while number is not None:
        frame = next(frames, None)
        if frame is None or isinstance(frame, _Damage):
            raise DamagedError(f"the stream is damaged or ends before frame {number}")
        shown += 1
        if shown == number:
            yield frame
            number = next(wanted, None)


def _timeline(times_N: npt.NDArray[np.float64], end_s: float, stream: VideoStream) -> Timeline:
    """Times with the mean rate. The container's rate wins where the times agree with it: it is exact (30000/1001)."""
    stated = float(stream.average_rate or stream.guessed_rate or 0)
    num_gaps = len(times_N) - 1
    measured = num_gaps / float(times_N[-1]) if num_gaps else stated or 1.0
    # Half a frame over the whole file; times in milliseconds alone move the measured rate by less.
    rate = stated if stated > 0 and abs(stated / measured - 1) * num_gaps < 0.5 else measured
    # A last frame without a stated length is shown for one mean interval.
    return Timeline(times_N, rate, end_s if end_s > times_N[-1] else float(times_N[-1]) + 1 / rate)


def _promised_s(container: InputContainer, stream: VideoStream) -> float:
    """Seconds of video that the header states; 0 where it says nothing about this stream."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    hours, minutes, seconds = (["0"] * 3 + stream.metadata.get("DURATION", "0").split(":"))[-3:]  # Matroska's tag
    try:
        tagged_s = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        tagged_s = 0.0
    if tagged_s == 0.0 and len(container.streams) == 1:
        return float(container.duration or 0) / av.time_base
    return tagged_s


def _upright_rgb(frame: VideoFrame) -> npt.NDArray[np.uint8]:
    """uint8 (H, W, 3) with the file's colour matrix and range, turned the way it is meant to be seen.

    Untagged video is read as BT.601 limited range, as every public loader does through swscale."""
    if _PYAV_17:
        options: dict[str, Any] = {"threads": 1}
    elif frame.colorspace == 1:  # it would read BT.709 as BT.601 unless the target's matrix is named, which RGB has not
        options = {"src_color_range": frame.color_range, "dst_color_range": 2, "dst_colorspace": "ITU601"}
    else:
        options = {}
    image = np.asarray(frame.to_ndarray(format="rgb24", **options), np.uint8)
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # x' = a x + c y and y' = b x + d y in 16.16 fixed point: quarter turns and mirrors are swaps and sign changes.
    (a, b, _), (c, d, _) = np.frombuffer(cast(bytes, matrix), np.int32).reshape(3, 3)[:2].tolist()
    if abs(b) > abs(a):
        image, a, d = image.transpose(1, 0, 2), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
