"""Video files as containers: opened without surprises, the stream to show, and whether the file was cut off.

A file that stops early looks like a short one to ffmpeg, so what is there is compared with what the container promises.
Containers promise different things, and many headers are wrong: a file is refused only on a promise about its video, or
where bytes are missing too; else it is read as it is, with one warning."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

# Files only, and no playlists: a text file named .mp4 must not make ffmpeg open other files or the network.
_OPEN_OPTIONS = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,mxf,nut,ivf,h264,hevc,m4v,wav,mp3",
}
PYAV_17 = int(av.__version__.split(".")[0]) >= 17  # shows tables of samples; converts on several threads unless told
JOINABLE = frozenset({"mpegts", "mpeg"})
"""Streams without a header: files written one behind the other are one file, whose times start again at each join."""
_NO_PROMISE = JOINABLE | {"ogg", "gif", "h264", "hevc", "m4v", "mpegvideo"}
"""What ffmpeg calls their duration is an estimate from the times that are there, or nothing."""
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_SIDE_PICTURES = Disposition.timed_thumbnails | Disposition.still_image | Disposition.dependent


class UnusableFileError(ValueError):
    """The file cannot give the frames asked for. The message lacks the file's name and the remedy."""


class DamagedError(UnusableFileError):
    """The file is cut off, or damaged between a keyframe and a frame that was asked for."""


def open_container(path: str, timeout_s: float | None) -> AbstractContextManager[InputContainer]:
    """The file opened for reading; `timeout_s` bounds every read."""
    # "file:" keeps a name such as "concat:a|b" a name; tags in an odd encoding must not stop us.
    return av.open(f"file:{path}", "r", container_options=_OPEN_OPTIONS, metadata_errors="replace", timeout=timeout_s)


def choose_stream(container: InputContainer, path: str, timeout_s: float | None) -> int:
    """Place in `container.streams.video` of the stream to show.

    The first of those marked as default; before that count: a codec that this FFmpeg decodes, more than one frame (a
    cover is one), no thumbnails or enhancement layers. Pictures attached to audio are no video."""
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos:
        kinds = " and ".join(sorted({stream.type for stream in container.streams})) or "nothing at all"
        raise UnusableFileError(f"found no video stream, only {kinds}")
    moving = _moving(videos, path, timeout_s) if len(videos) > 1 else set()

    def rank(stream: VideoStream) -> tuple[bool, bool, bool, bool]:
        flags = stream.disposition
        decodable = stream.codec_context is not None  # av's annotations do not know this case
        return decodable, stream.index in moving, not flags & _SIDE_PICTURES, bool(flags & Disposition.default)

    best = max(videos, key=rank)
    if best.codec_context is None:
        raise UnusableFileError("found a video codec that this FFmpeg build cannot decode")
    return list(container.streams.video).index(best)


def _moving(videos: list[VideoStream], path: str, timeout_s: float | None) -> set[int]:
    """Indices of the streams with two frames or more. Reads packets where the header does not tell."""
    if all(stream.frames for stream in videos):
        return {stream.index for stream in videos if stream.frames > 1}
    counts = {stream.index: 0 for stream in videos}
    with open_container(path, timeout_s) as container:
        for packet in container.demux(*(stream for stream in container.streams.video if stream.index in counts)):
            counts[packet.stream_index] += packet.size > 0
            if min(counts.values()) > 1:
                break
    return {index for index, count in counts.items() if count > 1}


def refuse_cut_off(
    path: str, container: InputContainer, stream: VideoStream, end_s: float, last_end: Callable[[], float]
) -> None:
    """DamagedError where the video ends before it should.

    end_s: end of the last video frame, in seconds on the clock of the file. last_end: the same of the last packet of
    any stream; asked for in doubt only, because it reads the whole file."""
    if PYAV_17 and container.format.name.startswith("mov"):  # the table of samples is exact
        size = os.stat(path).st_size
        missing = sum(entry.pos + entry.size > size for entry in stream.index_entries)
        if missing:
            raise DamagedError(f"the file is cut off: {missing} of {len(stream.index_entries)} frames are missing")
        return
    promised_s = _promised_video_s(container, stream)
    of_file = promised_s is None
    if promised_s is None:
        is_stated = container.format.name not in _NO_PROMISE
        promised_s = float(container.duration or 0) / av.time_base if is_stated else 0.0
    slack_s = max(1.0, 0.02 * promised_s)
    if not promised_s:  # ffmpeg does not tell the duration of an ASF file of another size than its header states
        lacking, size = _missing_bytes(path, container.format.name) or 0, os.stat(path).st_size
        if lacking > 0.02 * (size + lacking):
            raise DamagedError(f"the file is cut off: {lacking} of {size + lacking} bytes are missing")
    if promised_s - end_s <= slack_s:
        return
    if of_file and len(container.streams) > 1 and promised_s - last_end() <= slack_s:
        return  # a file lasts as long as its longest stream
    if _missing_bytes(path, container.format.name) == 0:
        warnings.warn(
            f"{path}: the header promises {promised_s:.2f} s of video, and the file, which is complete, holds "
            f"{end_s:.2f} s; read as it is",
            stacklevel=2,
        )
        return
    raise DamagedError(f"the file is cut off: it promises {promised_s:.2f} s of video and holds {end_s:.2f} s")


def _promised_video_s(container: InputContainer, stream: VideoStream) -> float | None:
    """End of the video in seconds as the header states it for this stream; None where it speaks of the file only."""
    name = container.format.name
    if name.startswith("matroska"):
        # The tag is an end time as ffmpeg writes it, a length as mkvmerge does, and a length is never later.
        tag = next((value for key, value in stream.metadata.items() if key.partition("-")[0] == "DURATION"), "")
        hours, minutes, seconds = (["0"] * 3 + tag.split(":"))[-3:]
        try:
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds) or None
        except ValueError:
            return None
    if name == "avi" and stream.frames and stream.average_rate:
        return stream.frames / float(stream.average_rate)  # null chunks, which repeat a frame, included
    if name.startswith("mov") and stream.duration is not None and stream.time_base is not None:
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base)
    return None


def _missing_bytes(path: str, name: str) -> int | None:
    """How many bytes the file lacks by its own structure; None where that does not tell."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        if name == "avi":  # RIFF chunks one behind the other: tag, size of the rest
            end = 0
            while end < size:
                file.seek(end)
                head = file.read(8)
                if len(head) < 8 or not head.startswith(b"RIFF"):
                    break
                end += 8 + int.from_bytes(head[4:], "little")
            return max(end - size, 0) if end > 8 else None
        head = file.read(1 << 16)
    if name == "asf":
        at = head.find(_ASF_PROPERTIES)
        fields = head[at + 40 : at + 92] if at >= 0 else b""  # size of the file 8, ..., flags 4
        live = len(fields) < 52 or fields[48] & 1  # written while being sent: no field holds
        return None if live else max(int.from_bytes(fields[:8], "little") - size, 0)
    if name.startswith("matroska"):
        header = _element_end(head, 4)  # behind the four bytes of its id
        is_segment = header is not None and head[header : header + 4] == bytes.fromhex("18538067")
        segment = _element_end(head, header + 4) if header is not None and is_segment else None
        return None if segment is None else max(segment - size, 0)
    return None


def _element_end(head: bytes, at: int) -> int | None:
    """End of the EBML element whose size starts at `at`; None for a size that was left open."""
    if at >= len(head) or not head[at]:
        return None
    width = 9 - head[at].bit_length()
    size = int.from_bytes(head[at : at + width], "big") & ((1 << 7 * width) - 1)
    return None if size == (1 << 7 * width) - 1 else at + width + size
