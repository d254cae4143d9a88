"""Rows of a data file, read from disk one at a time: JSON lines, one JSON array, or Parquet.

Memory holds only where each row lies, 16 bytes a row. The first bytes of a file decide its format, not its name.

Shape suffixes beside those of `stts.tokens`: R = row groups of a Parquet file, B = rows of the file."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 22  # bytes
_LARGEST_ROW = 1 << 26  # bytes: a file broken at its start must not be read into memory whole
_LARGEST_GROUP = 1 << 26  # bytes
_SPACE = re.compile(r"[ \t\r\n]*")


class Rows(Protocol):
    """The rows of one file; picklable, and usable from several processes at once."""

    strict_ids: bool
    """Whether every row must bring an `id` of its own: true for JSON lines, our form. Published JSON arrays and Parquet
    files often name the video there, or nothing at all."""

    def __len__(self) -> int: ...

    def read(self, numbers: Iterable[int]) -> Iterator[Any]:
        """The values of these rows. ValueError, without the place, where one is not JSON."""

    def where(self, number: int) -> str:
        """The place of a row, for messages."""


def open_rows(path: Path) -> Rows:
    """ValueError for a missing, empty or unreadable file; rows are parsed when read."""
    if not path.is_file():
        raise ValueError(f"no JSONL, JSON or Parquet file at {path}; check the path")
    with path.open("rb") as file:
        head = file.read(256).removeprefix(_BOM).lstrip()
    is_table, is_array = head.startswith(b"PAR1"), head.startswith(b"[")
    rows: Rows = ParquetRows(path) if is_table else JsonRows(path, array=is_array)
    if not len(rows):
        raise ValueError(f"{path} has no rows; expected one JSON object per line, a JSON array or a Parquet table")
    return rows


class JsonRows:
    """Rows of a JSON file: one value per line, or the elements of one array."""

    def __init__(self, path: Path, *, array: bool) -> None:
        self.path, self.strict_ids = path, not array
        with path.open("rb") as file:
            self._stamp = _stamp(file)
            spans = _element_spans(file, path) if array else _line_spans(file)
            self._span_B2 = np.fromiter(spans, np.dtype((np.int64, 2)))

    def __len__(self) -> int:
        return len(self._span_B2)

    def read(self, numbers: Iterable[int]) -> Iterator[Any]:
        with self.path.open("rb") as file:
            if _stamp(file) != self._stamp:
                raise ValueError("the file was changed after it was indexed; start again")
            for number in numbers:
                start, end = self._span_B2[number].tolist()
                file.seek(start)
                try:
                    row = json.loads(file.read(end - start).decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"not a JSON object in UTF-8 ({error}); write one object per line, or one array of objects"
                    ) from error
                yield row

    def where(self, number: int) -> str:
        if not self.strict_ids:
            return f"{self.path}, row {number + 1}"
        with self.path.open("rb") as file:  # blank lines count here: rows are found in an editor
            line = file.read(int(self._span_B2[number, 0])).count(b"\n") + 1
        return f"{self.path}, line {line}"


class ParquetRows:
    """Rows of a Parquet file. A row is read with its row group; the last group stays in memory, which makes reading in
    order fast."""

    strict_ids = False

    def __init__(self, path: Path) -> None:
        self.path = path
        with _parquet(path) as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            self._start_R = np.cumsum([0] + [group.num_rows for group in groups])
            largest = max((group.total_byte_size for group in groups), default=0)
        if largest > _LARGEST_GROUP:
            warnings.warn(
                f"{path} has row groups of up to {largest >> 20} MiB, and a shuffled epoch reads one for every row; "
                "write it again with pyarrow.parquet.write_table(..., row_group_size=1000)",
                stacklevel=2,
            )
        self._newest: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return int(self._start_R[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_newest": None}

    def read(self, numbers: Iterable[int]) -> Iterator[Any]:
        for number in numbers:
            group = int(np.searchsorted(self._start_R, number, side="right")) - 1
            if self._newest is None or self._newest[0] != group:
                with _parquet(self.path) as file:
                    self._newest = group, file.read_row_group(group, use_threads=False)  # threads do not survive a fork
            [row] = self._newest[1].slice(number - int(self._start_R[group]), 1).to_pylist()
            yield _without_nulls(row)

    def where(self, number: int) -> str:
        return f"{self.path}, row {number + 1}"


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ValueError(
            f"{path} is a Parquet file, which needs pyarrow: pip install pyarrow, or convert it to JSON lines"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are kinds of these
        raise ValueError(f"{path} is not readable as Parquet ({error}); fetch or write it again") from error


def _without_nulls(value: Any) -> Any:
    """The row without its null columns: a table has every column in every row, and null where a row leaves it out."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _line_spans(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """(first byte, end) of every line that is not blank."""
    start = 0
    for line in file:
        if line.strip():
            yield start, start + len(line)
        start += len(line)


def _element_spans(file: BinaryIO, path: Path) -> Iterator[tuple[int, int]]:
    """(first byte, end) of every object of a JSON array, with no more than a chunk and a row in memory."""
    decode = json.JSONDecoder().raw_decode
    # As Latin-1 every byte is one character, so places in the text are places in the file; JSON's own signs are ASCII.
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0  # of `text` in the file
    file.seek(start)
    text = file.read(_CHUNK).decode("latin-1")
    at = text.index("[") + 1
    num_rows, comma_due = 0, False
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # always matches
        sign = text[at : at + 1]
        if sign == "]" and (comma_due or not num_rows):
            return
        if sign == "," and comma_due:
            at, comma_due = at + 1, False
            continue
        fault = f"{sign!r} stands where an object, a comma or the end is expected" if sign else "the array has no end"
        if sign == "{" and not comma_due:
            try:
                _, end = decode(text, at)
            except (ValueError, RecursionError) as error:
                fault = str(error)
            else:
                yield start + at, start + end
                num_rows, comma_due, at = num_rows + 1, True, end
                continue
        elif sign:
            raise ValueError(f"{path}, row {num_rows + 1}: {fault}; expected one array of JSON objects")
        more = file.read(max(_CHUNK, len(text) - at)) if len(text) - at <= _LARGEST_ROW else b""
        if not more:
            raise ValueError(f"{path}, row {num_rows + 1}: {fault}; the file is cut off or no JSON: fetch it again")
        start, text, at = start + at, text[at:] + more.decode("latin-1"), 0
