"""Passes over one video file: list its frames from packet headers, then decode the chosen ones. Used by `sample.py`.

Damage is an error, never a grey picture: a packet that the decoder refuses, or a frame that it marks as patched up,
spoils everything until the next keyframe. (What no decoder can see: flipped bits that still form a legal stream.)

Shape suffixes beside those of `stts.tokens`: H, W = pixels after rotation."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from stts.data.video.container import (
    JOINABLE,
    DamagedError,
    UnusableFileError,
    choose_stream,
    open_container,
    refuse_cut_off,
)
from stts.data.video.picture import PictureMaker
from stts.data.video.samplers import Indices, Timeline

_MIN_JUMP = 8  # frames that a jump must save: it flushes the decoder and looks up the container's index
_LARGEST_GAP_S = 10.0  # between two frames of a joinable stream; a larger one is a join, as it is to ffmpeg
_GUESSES_TIMES = frozenset({"mpeg", "ogg"})  # times of most packets are counted on from the last one that states it


class NotShownError(UnusableFileError):
    """The packets do not say which frames are shown, or the decoder passed over one without a complaint."""


@dataclass(frozen=True, slots=True, eq=False)
class FrameIndex:
    """All frames of a file, in the order in which they are shown."""

    timeline: Timeline
    pts_F: npt.NDArray[np.int64] | None = None
    """Presentation times in stream units; None: frames are known by counting only."""
    size_F: npt.NDArray[np.int64] | None = None
    """Bytes of each packet, to recognise it after a jump."""
    keyframes: tuple[tuple[int, int], ...] = ()
    """(presentation time, place in the file counted in packets), by time."""
    can_jump: bool = False
    """Whether the times of packets are the same behind a jump; else the file is decoded in order."""


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
        self._stream_number: int | None = None

    def index(self) -> FrameIndex:
        """List all frames: from packet headers where they tell the times, else by decoding."""
        try:
            return self.index_packets()
        except NotShownError:
            return self.index_by_decoding()

    def index_packets(self) -> FrameIndex:
        """List all frames from packet headers. Raises NotShownError where packets do not tell their times."""
        pts: list[int] = []
        sizes: list[int] = []
        keyframes: list[tuple[int, int]] = []
        end, last_dts, is_corrupt = 0, None, False
        with self._open() as (container, stream):
            name, tick_s = container.format.name, float(stream.time_base or 1)
            if name == "avi":
                raise NotShownError("AVI stores no times, and guessed ones are wrong where frames are reordered")
            for packet in self._packets(container, stream):
                if not packet.size or packet.is_discard:  # is_discard: cut away by an edit list, decoded, never shown
                    continue
                if packet.pts is None:
                    raise NotShownError("packets carry no times")
                if packet.dts is not None:
                    if name in JOINABLE and _is_join(last_dts, packet.dts, tick_s):
                        raise NotShownError("several streams were joined, each with times of its own")
                    last_dts = packet.dts
                if packet.is_keyframe:
                    keyframes.append((packet.pts, len(pts)))
                pts.append(packet.pts)
                sizes.append(packet.size)
                end, is_corrupt = max(end, packet.pts + (packet.duration or 0)), packet.is_corrupt
            if not pts:
                self._refuse_cut_off(container, stream, 0.0)
                raise UnusableFileError("the video stream holds no frames")
            if is_corrupt:
                raise DamagedError(f"the file is cut off inside frame {len(pts) - 1}")
            if name in JOINABLE and keyframes:
                pts, sizes, keyframes = _from_first_keyframe(pts, sizes, keyframes)
            order_F = np.argsort(np.array(pts, np.int64), kind="stable")
            pts_F, size_F = np.array(pts, np.int64)[order_F], np.array(sizes, np.int64)[order_F]
            if (np.diff(pts_F) == 0).any():
                raise NotShownError("several packets claim one time")
            times_F = (pts_F - pts_F[0]) * tick_s
            if name in _GUESSES_TIMES:
                times_F = _even(times_F, float(stream.average_rate or stream.guessed_rate or 0))
            timeline = _timeline(times_F, float(end - pts_F[0]) * tick_s, stream)
            self._refuse_cut_off(container, stream, max(end * tick_s, pts_F[0] * tick_s + timeline.duration_s))
            return FrameIndex(timeline, pts_F, size_F, tuple(sorted(keyframes)), name not in _GUESSES_TIMES)

    def index_by_decoding(self) -> FrameIndex:
        """List all frames by decoding the whole file and keeping nothing."""
        pts: list[int | None] = []
        chunks_F = self._avi_chunks()
        with self._open() as (container, stream):
            for frame in self._frames(container, stream):
                if isinstance(frame, _Damage):
                    raise DamagedError(f"the stream is damaged after frame {len(pts)}")
                pts.append(frame.pts)
            if not pts:
                raise UnusableFileError("no frame could be decoded")
            rate, tick_s = float(stream.average_rate or stream.guessed_rate or 0), float(stream.time_base or 1)
            shown_F = np.array([math.nan if value is None else value for value in pts]) * tick_s
            if container.format.name in JOINABLE and not np.isnan(shown_F).any():
                times_F = _joined(shown_F)
            elif chunks_F is not None and len(chunks_F) == len(pts):
                # One chunk a frame: the places of chunks, null ones counted, are the times.
                times_F = (chunks_F - chunks_F[0]) * tick_s
            elif container.format.name != "avi" and not np.isnan(shown_F).any() and (np.diff(shown_F) > 0).all():
                times_F = shown_F - shown_F[0]
            elif rate > 0:
                times_F = np.arange(len(pts)) / rate
            else:
                raise UnusableFileError("the file states neither frame times nor a frame rate")
            if chunks_F is None:
                first_s = 0.0 if np.isnan(shown_F[0]) else float(shown_F[0])
                self._refuse_cut_off(container, stream, first_s + len(pts) / rate if rate > 0 else math.inf)
            return FrameIndex(_timeline(times_F, 0.0, stream))

    def _avi_chunks(self) -> npt.NDArray[np.int64] | None:
        """Places of an AVI's chunks that hold a frame, in increasing order; None for other containers.

        A chunk of no bytes repeats the frame before it; capture programs write one for every frame they drop."""
        with self._open() as (container, stream):
            if container.format.name != "avi":
                return None
            places = [packet.dts for packet in self._packets(container, stream) if packet.size]
            numbers = [place for place in places if place is not None]
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            if rate > 0:
                self._refuse_cut_off(container, stream, (max(numbers, default=-1) + 1) / rate)
            is_counted = len(numbers) == len(places) and (np.diff(numbers) > 0).all()
            return np.array(numbers if is_counted else [], np.int64)

    def collect(
        self, index: FrameIndex, chosen_T: Indices, shape: tuple[int, ...] | None = None
    ) -> npt.NDArray[np.uint8]:
        """Decode the chosen frames, each once, into one uint8 (T, H, W, 3) array; `shape` as in `PictureMaker`.

        Raises DamagedError or NotShownError when one of them cannot be had."""
        if not index.can_jump:
            return self._fill(index, chosen_T, shortcuts=False, shape=shape)
        try:
            return self._fill(index, chosen_T, shortcuts=True, shape=shape)
        except (DamagedError, NotShownError):
            # Some streams cannot be entered at the keyframes they list; the long way round settles it.
            return self._fill(index, chosen_T, shortcuts=False, shape=shape)

    def _fill(
        self, index: FrameIndex, chosen_T: Indices, shortcuts: bool, shape: tuple[int, ...] | None = None
    ) -> npt.NDArray[np.uint8]:
        frames: npt.NDArray[np.uint8] | None = None
        for number, image in self.pictures(index, np.unique(chosen_T), shortcuts, shape):
            if frames is None:
                frames = np.empty((len(chosen_T), *image.shape), np.uint8)
            frames[chosen_T == number] = image
        assert frames is not None, "samplers choose at least one frame"
        return frames

    def pictures(
        self, index: FrameIndex, numbers: Indices, shortcuts: bool, shape: tuple[int, ...] | None = None
    ) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """The frames with these increasing numbers, one by one, as uint8 (H, W, 3)."""
        with self._open() as (container, stream):
            make = PictureMaker(stream, shape)
            decoded = self._decode(container, stream, index, numbers, shortcuts)
            for number, frame in zip(numbers.tolist(), decoded, strict=True):
                yield number, make(frame)

    def _decode(
        self, container: InputContainer, stream: VideoStream, index: FrameIndex, numbers: Indices, shortcuts: bool
    ) -> Iterator[VideoFrame]:
        """The frames with these increasing numbers. Shortcuts: jump to keyframes, and never decode an H.264 frame that
        is neither chosen nor a reference of others (half of an ordinary file)."""
        if index.pts_F is None:
            yield from _counted(self._frames(container, stream), numbers)
            return
        key_pts = [pts for pts, _ in index.keyframes] or [int(index.pts_F[0])]
        # Only H.264 says so strictly: in HEVC a picture of a higher layer may refer to such a frame.
        sparse = shortcuts and stream.codec_context.name == "h264"
        wanted = frozenset(index.pts_F[numbers].tolist()) if sparse else None
        position = 0  # frames shown, or jumped over
        frames = self._frames(container, stream, wanted)
        damage: list[int] = []
        for number in numbers:
            pts = int(index.pts_F[number])
            group = int(np.searchsorted(key_pts, pts, side="right")) - 1
            start = index.keyframes[group][1] if group >= 0 and index.keyframes else 0
            if shortcuts and start - position >= _MIN_JUMP:
                container.seek(key_pts[group], stream=stream)
                frames = self._frames(container, stream, wanted, index)
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
        self,
        container: InputContainer,
        stream: VideoStream,
        wanted: frozenset[int] | None = None,
        listed: FrameIndex | None = None,
    ) -> Iterator[VideoFrame | _Damage]:
        """Decoded frames in the order shown; a `_Damage` before the frames that it may have spoilt.

        wanted: presentation times outside of which a frame is decoded only if others refer to it; None: decode all.
        listed: raise NotShownError for a packet that is not listed there, which happens where a demuxer guesses times
        behind a jump."""
        is_joinable, met_keyframe = container.format.name in JOINABLE, listed is not None
        for packet in self._packets(container, stream):
            if listed is not None and packet.size and not packet.is_discard and not _is_listed(packet, listed):
                raise NotShownError("packets have other times behind a jump")
            met_keyframe = met_keyframe or packet.is_keyframe
            if wanted is not None:
                needed = packet.pts in wanted or not packet.size
                stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if met_keyframe or not is_joinable:  # a recording starts anywhere: what comes before is no damage
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

    def _refuse_cut_off(self, container: InputContainer, stream: VideoStream, end_s: float) -> None:
        def last_end() -> float:
            ends = [0.0]
            with open_container(self.path, self._timeout_s) as again:
                for packet in again.demux():
                    if time.monotonic() > self.deadline_s:
                        raise TimeoutError
                    if packet.pts is not None and packet.time_base is not None:
                        ends.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
            return max(ends)

        refuse_cut_off(self.path, container, stream, end_s, last_end)

    @property
    def _timeout_s(self) -> float | None:
        return None if self.deadline_s == math.inf else max(self.deadline_s - time.monotonic(), 0.001)

    @contextmanager
    def _open(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        with open_container(self.path, self._timeout_s) as container:
            if self._stream_number is None:
                self._stream_number = choose_stream(container, self.path, self._timeout_s)
            stream = container.streams.video[self._stream_number]
            stream.codec_context.thread_type = "NONE"  # loader workers are processes: one thread each
            stream.codec_context.thread_count = 1
            yield container, stream


def _is_join(last_dts: int | None, dts: int, tick_s: float) -> bool:
    return last_dts is not None and not 0 <= (dts - last_dts) * tick_s <= _LARGEST_GAP_S


def _even(times_F: npt.NDArray[np.float64], rate: float) -> npt.NDArray[np.float64]:
    """Guessed times put back on the even grid of the stated rate, where none is more than a frame and a half off."""
    even_F = np.arange(len(times_F)) / (rate or 1.0)
    return even_F if rate > 0 and np.abs(times_F - even_F).max() * rate <= 1.5 else times_F


def _joined(shown_F: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Times in seconds from 0 where the clock was set anew at joins: each join is as long as the median frame."""
    gap_F = np.diff(shown_F)
    is_join_F = (gap_F < 0) | (gap_F > _LARGEST_GAP_S)
    plain_F = gap_F[~is_join_F & (gap_F > 0)]
    gap_F[is_join_F] = np.median(plain_F) if len(plain_F) else 0.0
    return np.append(0.0, np.cumsum(gap_F))


def _from_first_keyframe(
    pts: list[int], sizes: list[int], keyframes: list[tuple[int, int]]
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """A recording that starts amid a group: what comes before its first keyframe, or is shown before it, cannot be
    decoded."""
    first = keyframes[0][1]
    if not first:
        return pts, sizes, keyframes
    places = [place for place in range(first, len(pts)) if pts[place] >= pts[first]]
    moved = {place: number for number, place in enumerate(places)}
    return (
        [pts[place] for place in places],
        [sizes[place] for place in places],
        [(time, moved[place]) for time, place in keyframes if place in moved],
    )


def _is_listed(packet: Packet[VideoStream], index: FrameIndex) -> bool:
    assert index.pts_F is not None and index.size_F is not None
    place = int(np.searchsorted(index.pts_F, packet.pts)) if packet.pts is not None else len(index.pts_F)
    return place < len(index.pts_F) and index.pts_F[place] == packet.pts and index.size_F[place] == packet.size


def _counted(frames: Iterator[VideoFrame | _Damage], numbers: Indices) -> Iterator[VideoFrame]:
    """Pick frames by their place in the order shown."""
    rest = iter(numbers)
    number = next(rest, None)
    position = -1
    while number is not None:
        frame = next(frames, None)
        if frame is None or isinstance(frame, _Damage):
            raise DamagedError(f"the stream is damaged or ends before frame {number}")
        position += 1
        if position == number:
            yield frame
            number = next(rest, None)


def _timeline(times_F: npt.NDArray[np.float64], end_s: float, stream: VideoStream) -> Timeline:
    """Times with the mean rate. The container's rate wins where the times agree with it: it is exact (30000/1001)."""
    stated = float(stream.average_rate or stream.guessed_rate or 0)
    num_gaps = len(times_F) - 1
    measured = num_gaps / float(times_F[-1]) if num_gaps else stated or 1.0
    # Half a frame over the whole file; times in milliseconds alone move the measured rate by less.
    rate = stated if stated > 0 and abs(stated / measured - 1) * num_gaps < 0.5 else measured
    # A last frame without a stated length is shown for one mean interval.
    return Timeline(times_F, rate, end_s if end_s > times_F[-1] else float(times_F[-1]) + 1 / rate)
