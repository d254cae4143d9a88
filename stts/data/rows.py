"""Rows of one data file as samples, parsed when asked for; nothing is decoded here."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from stts.data.conversations import Message, Role, Sample, parse_row, unread_keys
from stts.data.formats import open_rows
from stts.data.mixture import limited
from stts.data.paths import follows_links

__all__ = ["Message", "OnError", "Role", "Sample", "Samples", "read_jsonl"]

OnError = Literal["raise", "skip"]


class Samples(Sequence[Sample]):
    """The rows of one data file (see `stts.data.formats`), parsed when asked for; in memory is where they lie.

        {"id", "video" | "image", "conversations": [{"from": "human" | "gpt" | "system", "value": str}, ...]}
        {"id", "messages": [{"role", "content": str | [{"type": "text" | "video" | "image", <type>: str}, ...]}, ...]}
        {"video", "QA": [{"i": instruction, "q": question, "a": answer}, ...]}  (VideoChat2-IT)

    Every form may name its media as `video`, `videos`, `image`, `images` (ms-swift, LLaMA-Factory), a `system` text,
    and the part of the video to look at as `"clip": [start_s, end_s]`, as `start` and `end`, or as `video_start` and
    `video_end`, also in a content part. A list of pictures in place of a video holds its frames, shown at the row's
    `fps`. Keys that nothing reads land in `meta`, and are named once per file.

    A missing marker is put at the start of the first user message, and `<image>` in front of a video becomes `<video>`
    (LLaVA-Video-178K). A video's path is root / `data_source` / `video` where a row has a `data_source`, or root /
    `video` where the root is that source's own folder already. Media are relative to `root` (default: the folder of
    `path`) and must stay inside it (see `stts.data.paths`). A missing `id` becomes the number of
    the row, as in `#3`. A repeated one is an error in JSONL; elsewhere it gets its row number behind it.

    The constructor parses every row once. ValueError, with file and line, for anything else than these forms; with
    `on_error="skip"` such rows are left out and listed in `left_out`, unless that leaves none. Media files are looked
    for only when loaded."""

    def __init__(
        self,
        path: str | Path,
        root: str | Path | None = None,
        *,
        limit: str = "all",
        seed: int = 0,
        uid_prefix: str = "",
        on_error: OnError = "raise",
        follow_links: bool | None = None,
    ) -> None:
        """limit: rows to use, as in `stts.data.mixture.Source`; seed: of a random limit. follow_links: links may lead
        out of the root; None: as `following_links` says."""
        path = Path(path)
        self.base = os.path.realpath(path.parent if root is None else root)
        """The root, with links followed."""
        self.follow_links = follows_links() if follow_links is None else follow_links
        self.left_out: tuple[str, ...] = ()
        self._rows = open_rows(path)
        self._prefix = uid_prefix
        self._number_N = limited(limit, len(self._rows), seed)
        self._renamed_N = np.zeros(len(self), bool)
        digest_N = self._parse_all(path, on_error)
        self._renamed_N = self._repeated(digest_N, on_error)

    def _parse_all(self, path: Path, on_error: OnError) -> NDArray[np.uint64]:
        """Digests of all ids; rows that cannot be parsed raise or are left out, and unread keys are named."""
        digest_N, usable_N = np.zeros(len(self), np.uint64), np.ones(len(self), bool)
        faults: list[str] = []
        unread: set[str] = set()
        place = 0
        while place < len(self):  # a fault ends the reader, so reading starts again behind it
            try:
                for sample in self._parsed(range(place, len(self)), unread):
                    digest = hashlib.blake2b(sample.uid.encode(), digest_size=8).digest()
                    digest_N[place] = int.from_bytes(digest, "little")
                    place += 1
            except ValueError as error:
                if on_error == "raise":
                    raise
                faults.append(str(error))
                usable_N[place] = False
                place += 1
        if faults and not usable_N.any():
            raise ValueError(f"not one row can be used; first: {faults[0]}")
        if faults:
            warnings.warn(f"{len(faults)} of {len(self)} rows are left out; first: {faults[0]}", stacklevel=3)
        if unread:
            warnings.warn(
                f"{path}: nothing reads the keys {', '.join(sorted(unread))}; they are kept in `meta` only, so check "
                "that the rows mean no more than `Samples` says",
                stacklevel=3,
            )
        self.left_out = tuple(faults)
        self._number_N, self._renamed_N = self._number_N[usable_N], self._renamed_N[usable_N]
        return digest_N[usable_N]

    def _repeated(self, digest_N: NDArray[np.uint64], on_error: OnError) -> NDArray[np.bool_]:
        """Which rows share their id with another one. Digests stand in for the ids: a million of those fill 100 MB."""
        order_N = np.argsort(digest_N, kind="stable")
        same = np.flatnonzero(np.diff(digest_N[order_N]) == 0)
        repeated_N = np.zeros(len(digest_N), bool)
        repeated_N[order_N[same]] = repeated_N[order_N[same + 1]] = True
        if len(same) and self._rows.strict_ids and on_error == "raise":
            later = int(order_N[same + 1].min())
            first = int(np.flatnonzero(digest_N == digest_N[later])[0])
            raise ValueError(
                f"{self._rows.where(int(self._number_N[later]))}: id {self[later].uid!r} is already on line "
                f"{self._rows.where(int(self._number_N[first])).rpartition(' ')[2]}; make ids unique"
            )
        return repeated_N

    def __len__(self) -> int:
        return len(self._number_N)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        places = range(len(self))[index]
        return list(self._parsed(places)) if isinstance(places, range) else next(self._parsed([places]))

    def __iter__(self) -> Iterator[Sample]:
        return self._parsed(range(len(self)))

    def _parsed(self, places: Iterable[int], unread: set[str] | None = None) -> Iterator[Sample]:
        """The samples at these places; keys that nothing reads are added to `unread`."""
        places = list(places) if not isinstance(places, range) else places
        rows = self._rows.read(self._number_N[place].item() for place in places)
        for place in places:
            number = int(self._number_N[place])
            try:
                row = next(rows)
                sample = parse_row(row, self.base, follow_links=self.follow_links)
            except ValueError as error:
                raise ValueError(f"{self._rows.where(number)}: {error}") from error
            if unread is not None:
                unread |= unread_keys(row)
            suffix = f"#{number + 1}" if self._renamed_N[place] or not sample.uid else ""
            yield replace(sample, uid=f"{self._prefix}{sample.uid}{suffix}") if self._prefix or suffix else sample


def read_jsonl(path: str | Path, root: str | Path | None = None) -> list[Sample]:
    """All `Samples` of a file at once."""
    return list(Samples(path, root))
