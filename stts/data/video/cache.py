"""Decoded frames shared by all loader workers of a process: bounded memory, the least recently used go first.

It pays where all clips of an epoch fit and decoding is what training waits for. Measured on 300 clips of the quick
start, 16 frames of each, one process, CPU time a sample: 20 ms without the cache; with it 25 ms in the first epoch,
which fills it, and 1.7 ms in the second.

One anonymous shared mapping, made before workers are forked: every worker sees what the others decoded, also the fresh
workers of the next epoch, and the kernel frees it with the last process, however that one ends.

Shape suffixes beside those of `stts.tokens`: H, W = pixels."""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ENTRY = np.dtype(
    [
        ("key", np.uint64, 2),
        ("start", np.int64),
        ("size", np.int64),  # bytes; 0: the entry is free
        ("used", np.int64),  # number of the newest look-up that found it
        ("shape", np.int64, 4),
        ("duration_s", np.float64),
    ]
)
_ALIGN = 64  # bytes
_BYTES_PER_ENTRY = 1 << 16  # of the mapping: smaller videos than this run out of entries first


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """The chosen frames of a video, with their times."""

    frames: NDArray[np.uint8]
    """(T, H, W, 3)"""
    timestamps_s: NDArray[np.float64]
    """(T,)"""
    duration_s: float

    @property
    def num_bytes(self) -> int:
        return self.frames.nbytes + self.timestamps_s.nbytes


def frames_key(path: Path, choice: Any) -> bytes:
    """Key of the frames that `choice` (anything whose repr tells all settings) takes from a file as it is now."""
    status = os.stat(path)
    text = repr((str(path), status.st_mtime_ns, status.st_size, choice))
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


class FrameCache:
    """At most `num_bytes` of frames; ValueError below one page. Processes share it by forking, and by nothing else."""

    def __init__(self, num_bytes: int) -> None:
        if num_bytes < mmap.PAGESIZE:
            raise ValueError(f"a frame cache of {num_bytes} bytes holds nothing; give more, or 0 for none")
        self.num_bytes = num_bytes
        num_entries = max(num_bytes // _BYTES_PER_ENTRY, 16)
        self._data = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
        self._entry_E = np.frombuffer(mmap.mmap(-1, num_entries * _ENTRY.itemsize), _ENTRY)
        self._count = np.frombuffer(mmap.mmap(-1, 16), np.int64)  # look-ups, hits
        self._lock = multiprocessing.get_context("fork").Lock()

    def __getstate__(self) -> Any:
        raise TypeError("a frame cache is shared by forking; use data.cache_gib=0 with other start methods of workers")

    @property
    def lookups(self) -> int:
        return int(self._count[0])

    @property
    def hits(self) -> int:
        return int(self._count[1])

    @property
    def used_bytes(self) -> int:
        return int(self._entry_E["size"].sum())

    def get(self, key: bytes) -> Decoded | None:
        """A copy, made under the lock so that nothing is overwritten meanwhile."""
        with self._lock:
            self._count[0] += 1
            entry = self._find(key)
            if entry is None:
                return None
            self._count[1] += 1
            entry["used"] = self._count[0]
            shape, start = entry["shape"].tolist(), int(entry["start"])
            middle = start + shape[0] * np.dtype(np.float64).itemsize
            timestamps = self._data[start:middle].copy().view(np.float64)
            frames = self._data[middle : middle + int(np.prod(shape))].copy().reshape(shape)
            return Decoded(frames, timestamps, float(entry["duration_s"]))

    def put(self, key: bytes, video: Decoded) -> None:
        """Stores a copy, unless it is there already or larger than the whole cache."""
        size = -(-video.num_bytes // _ALIGN) * _ALIGN
        if size > self.num_bytes:
            return
        with self._lock:
            if self._find(key) is not None:
                return
            while (start := self._gap(size)) is None:
                taken_E = np.where(self._entry_E["size"] > 0, self._entry_E["used"], np.iinfo(np.int64).max)
                self._entry_E["size"][taken_E.argmin()] = 0
            middle = start + video.timestamps_s.nbytes
            self._data[start:middle] = np.ascontiguousarray(video.timestamps_s).view(np.uint8)
            self._data[middle : middle + video.frames.nbytes] = video.frames.reshape(-1)
            free = int((self._entry_E["size"] == 0).argmax())
            number = np.frombuffer(key, np.uint64)
            self._entry_E[free] = (number, start, size, self._count[0], video.frames.shape, video.duration_s)

    def _find(self, key: bytes) -> Any:
        same_E = (self._entry_E["key"] == np.frombuffer(key, np.uint64)).all(1) & (self._entry_E["size"] > 0)
        return self._entry_E[int(same_E.argmax())] if same_E.any() else None

    def _gap(self, size: int) -> int | None:
        """First byte of the first gap of `size` bytes; None where there is none, or no free entry."""
        entries = self._entry_E[self._entry_E["size"] > 0]
        if len(entries) == len(self._entry_E):
            return None
        entries = np.sort(entries[["start", "size"]], order="start")
        begins = np.append(0, entries["start"] + entries["size"])
        fits = np.append(entries["start"], self.num_bytes) - begins >= size
        return int(begins[fits.argmax()]) if fits.any() else None
