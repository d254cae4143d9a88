"""Rows and videos of a benchmark's own folder. Nothing is fetched, and no row can name a file outside its folder."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stts.data.paths import confined


class MissingVideoError(ValueError):
    """A row whose video is not there."""


@dataclass(frozen=True)
class Row:
    """A row with the file it came from. Reading a column that is absent or of another kind is a ValueError."""

    root: Path
    file: Path
    number: int
    """Counted from 0."""
    values: Mapping[str, Any]
    fault: str = ""
    """Why this row cannot be read at all; its `values` are empty then."""

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}"

    def value(self, key: str) -> Any:
        if key not in self.values:
            raise ValueError(f"column {key!r} is missing, found {', '.join(map(str, self.values))}; check the release")
        return self.values[key]

    def text(self, key: str) -> str:
        """A non-empty text; numbers used as ids become texts."""
        value = self.value(key)
        text = str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
        if not text:
            raise ValueError(f"column {key!r} is {value!r}, expected a text")
        return text

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.value(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"column {key!r} is {value!r}, expected a list of texts")
        return tuple(item.strip() for item in value)

    def integer(self, key: str) -> int:
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, (int, str)) or not re.fullmatch(r"-?\d+", str(value)):
            raise ValueError(f"column {key!r} is {value!r}, expected an integer")
        return int(value)

    def seconds(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"column {key!r} is {value!r}, expected seconds")
        return None if value is None else float(value)

    def inside(self, values: Mapping[str, Any]) -> Row:
        """A row nested in this one; its columns go before those of this row."""
        return replace(self, values={**self.values, **values})

    def bad(self, fault: str) -> Row:
        """The same row as one that cannot be read, so that the rows behind it are."""
        return replace(self, values={}, fault=fault)


def first_file(root: Path, *names: str) -> Path:
    """The first of these that exists under `root`."""
    path = next((root / name for name in names if (root / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {' and no '.join(names)} in {root}")
    return path


def rows_of(root: Path, *names: str) -> Iterator[Row]:
    """Rows of the first of these files that exists: .parquet, .jsonl, .csv, or .json (a list).

    ValueError, naming the file, where it cannot be read as a whole."""
    path = first_file(root, *names)
    for number, values in enumerate(_read(path)):
        row = Row(root, path, number, values if isinstance(values, dict) else {})
        yield row if isinstance(values, dict) else row.bad(f"expected an object with columns, got {values!r:.80}")


def _read(path: Path) -> Iterable[Any]:
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix == ".csv":
        try:
            return list(csv.DictReader(io.StringIO(read_text(path, legacy=True), newline="")))
        except csv.Error as error:
            raise ValueError(f"{path} is no readable CSV file ({error}); fetch it again") from error
    if path.suffix == ".jsonl":
        lines = read_text(path).split("\n")  # not splitlines: a text may hold U+2028 and other ends of line
        return [parse_json(line, f"{path}, line {n}") for n, line in enumerate(lines, start=1) if line.strip()]
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(rows).__name__}")
    return rows


def read_text(path: Path, *, legacy: bool = False) -> str:
    """The text of a file in UTF-8, or in UTF-16 where it begins with its mark or is full of zero bytes.

    `legacy`: what is neither is read as Windows-1252, as old spreadsheets and subtitles are; else a ValueError."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encodings = ["utf-16"]
    elif b"\0" in content[:200]:
        encodings = ["utf-16-be" if content[:1] == b"\0" else "utf-16-le"]
    else:
        encodings = ["utf-8-sig", *(["cp1252"] if legacy else [])]
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            reason = error
    raise ValueError(f"{path} is not {' or '.join(encodings)} text ({reason}); save it as UTF-8")


def read_json(path: Path) -> Any:
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}); fetch it again") from error


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(f"reading {path} needs pyarrow: pip install pyarrow") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError, ArrowException) as error:
        raise ValueError(f"{path} is no readable Parquet file ({error}); fetch it again") from error
    return rows


def find_video(
    root: Path, folders: Sequence[str], *names: str, suffixes: Sequence[str] = (".mp4",), folder: bool = False
) -> Path:
    """The first `root / folder / name + suffix` that exists; with `folder`, a folder of frames.

    `folders` are the benchmark's and may be links; a name comes from a row and must stay inside its folder, links as
    `stts.data.paths` says."""
    for place in folders:
        for name in names:
            for suffix in suffixes:
                path = confined(root / place, f"{name}{suffix}")
                if path.is_dir() if folder else path.is_file():
                    return path
    raise MissingVideoError(f"no video at {root / folders[0] / f'{names[0]}{suffixes[0]}'}")


def frame_files(folder: Path) -> list[Path]:
    """The images of a folder of frames, 2.jpg before 10.jpg."""
    images = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in (".jpg", ".jpeg", ".png") and not path.name.startswith(".")
    ]
    return sorted(images, key=lambda path: [(not part.isdigit(), int(part) if part.isdigit() else 0, part)
                                            for part in re.split(r"(\d+)", path.name) if part])  # fmt: skip
