"""The folder of a run: what is there already, what comes next, and the final files.

partial-RRRRR.jsonl  while running, by each rank: the identity on line 1, then one line per finished batch
answers.jsonl        when done: the same lines of all ranks, so that a run can be graded again or asked more questions
kept/                with `--save_kept`: which tokens were kept, a file per batch (`stts.eval.answering.kept_tokens`)
                     and the final files, the result last: where it is, the others are

A run with a larger `--limit` goes on in the folder of a smaller one, finished or not.

A file is there whole or not at all, a line that was cut by a kill or a full disk is not read, and a run goes on behind
the last whole line of every rank, also with another number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from filelock import BaseFileLock, FileLock, Timeout
from safetensors.torch import save
from torch import Tensor

from stts.eval.answering.kept_tokens import FOLDER
from stts.eval.answering.ranks import Ranks
from stts.files import write_whole

RESULT = "comparison.json"
"""Of `stts compare`."""
PARTIAL = "partial-{:05d}.jsonl"
ANSWERS = "answers.jsonl"
WAIT_S = 1800.0
"""How long rank 0 waits for others that write nothing."""
_POLL_S = 1.0
_HASHED_BYTES = 256 * 2**20

Note = dict[str, Any]
"""A finished batch as its line holds it, see `stts.eval.answering.loop`."""


def file_stamps(*paths: str | Path | None) -> dict[str, str]:
    """Fingerprints of files, and of the weights and settings in model folders; hub ids have none.

    The content counts, so that a file written again unchanged is the same; of large files size and time of change."""
    stamps = {}
    for path in (Path(given) for given in paths if given is not None):
        inside = (
            sorted(file for file in path.iterdir() if file.suffix in (".json", ".safetensors")) if path.is_dir() else []
        )
        for file in inside or ([path] if path.is_file() else []):
            stat = file.stat()
            stamps[str(file)] = f"{stat.st_size} bytes, {stat.st_mtime_ns}"
            if stat.st_size <= _HASHED_BYTES:
                with file.open("rb") as content:
                    stamps[str(file)] = hashlib.file_digest(content, "sha256").hexdigest()
    return stamps


class Store:
    """Opens `out` for the run with this `identity` (settings and file stamps that decide the result).

    result: globs of the final files; the first must store the run's identity. ValueError when `out` holds anything but
    the same run, or one with a smaller limit; with `overwrite`, anything but a run of this kind."""

    def __init__(
        self,
        out: Path,
        identity: Mapping[str, Any],
        *,
        kind: str,
        result: Sequence[str],
        overwrite: bool,
        ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    ) -> None:
        self.out = Path(out)
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # tuples become lists, as in the file
        self.kind, self.ranks = kind, ranks
        self.began = datetime.now().strftime("%Y%m%d_%H%M%S")
        self.finished: dict[str, Any] | None = None
        """The result, where the same run is done already."""
        self._patterns = tuple(result)
        self._part: BinaryIO | None = None
        self._lock: BaseFileLock | None = None
        if overwrite and ranks.world_size > 1:
            raise ValueError(f"--overwrite works with one process only; remove {self.out} before starting several")
        self._opened = time.time()
        if self.out.is_dir():
            self._stopped(ranks.rank).unlink(missing_ok=True)
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            self._take_over(overwrite)

    @property
    def config_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]

    def _take_over(self, overwrite: bool) -> None:
        results, parts = sorted(self.out.glob(self._patterns[0])), self._noted()
        if not (results or parts) and not (self.out.is_dir() and all(map(_is_left_over, self.out.iterdir()))):
            raise ValueError(f"--out {self.out} is not empty and holds no {self.kind}; choose another folder")
        if self.ranks.world_size == 1:
            for file in self.out.rglob(".*.part"):  # of a process killed while it wrote
                file.unlink()
        if overwrite:
            # Results go last: killed here, the folder is still known for what it is.
            for pattern in (
                f"{FOLDER}/*.safetensors",
                ANSWERS,
                *reversed(self._patterns),
                PARTIAL.replace("{:05d}", "*"),
            ):
                for file in self.out.glob(pattern):
                    file.unlink()
            for folder in filter(Path.is_dir, self.out.iterdir()):
                if not any(folder.iterdir()):
                    folder.rmdir()
            return
        if results:
            content = json.loads(results[-1].read_text(encoding="utf-8"))
            identity = content.get("identity") or content.get("stts", {}).get("identity") or {}
            self._check(identity)
            if identity == self.identity:
                self.finished = content
                return
        for part in parts:
            line = next(_whole_lines(part), None)
            if line is not None:
                head = json.loads(line)
                self._check(head["identity"])
                self.began = min(self.began, head["began"])

    def _check(self, theirs: Mapping[str, Any]) -> None:
        names = [name for name in {**theirs, **self.identity} if theirs.get(name) != self.identity.get(name)]
        if names == ["limit"] and _grows(theirs["limit"], self.identity["limit"]):
            return
        if names:
            raise ValueError(
                f"--out {self.out} holds another {self.kind} (different: {', '.join(names)}); "
                "choose another folder, or --overwrite true to throw that one away"
            )

    def _parts(self) -> list[Path]:
        return sorted(self.out.glob(PARTIAL.replace("{:05d}", "*")))

    def _noted(self) -> list[Path]:
        """Every file of notes: of a finished run first."""
        return [*self.out.glob(ANSWERS), *self._parts()]

    def _stopped(self, rank: int) -> Path:
        return self.out / f".stopped-{rank:05d}.part"

    def notes(self) -> list[Note]:
        """Finished batches of all ranks, each once: a kill while `finish` runs leaves them in two files."""
        lines = (line for part in self._noted() for place, line in enumerate(_whole_lines(part)) if place)
        return [json.loads(line) for line in dict.fromkeys(lines)]

    def add(self, note: Note, kept: Mapping[str, Tensor], name: str) -> None:
        """Note a finished batch, the tokens `kept` first, as file `name`: after a kill in between both are made again.

        ValueError, and nothing written, when the disk is full or the folder cannot be written."""
        with _writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            if self._part is None:
                self._part = self._open_part()
            if kept:
                (self.out / FOLDER).mkdir(exist_ok=True)
                write_whole(self.out / FOLDER / f"{name}.safetensors", save(dict(kept)))
            _append(self._part, note)

    def _open_part(self) -> BinaryIO:
        """This rank's file, locked, cut behind its last whole line."""
        path = self.out / PARTIAL.format(self.ranks.rank)
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"another process writes {path}: is this job running already? Wait for it, or choose another --out"
            ) from error
        except NotImplementedError:  # a file system without locks
            pass
        file = path.open("a+b", buffering=0)
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        if not file.seek(0, os.SEEK_END):
            _append(file, {"identity": self.identity, "began": self.began})
        return file

    def stop(self, reason: str) -> None:
        """Tell rank 0, which would wait, that this rank gave up."""
        if not self.ranks.is_first and self.out.is_dir():
            write_whole(self._stopped(self.ranks.rank), reason)

    def wait(self, keys: Collection[str], *, progress: bool = True) -> list[Note]:
        """All notes, once those of every rank together cover `keys`; says what it waits for.

        ValueError when a rank stopped, or nobody wrote anything for `WAIT_S` seconds."""
        since, size, said = time.monotonic(), -1, -1e9
        while True:
            now = sum(part.stat().st_size for part in self._noted())
            if now != size:
                since, size = time.monotonic(), now
                notes = self.notes()
                done = {key for note in notes for key in note["keys"]}
                if done.issuperset(keys):
                    return notes
            waiting = f"{len(set(keys) - done)} of {len(keys)} questions are still out, at other ranks"
            for file in self.out.glob(self._stopped(0).name.replace("00000", "*")):
                if file.stat().st_mtime < self._opened - 60:  # of an earlier start
                    continue
                raise ValueError(f"rank {int(file.name[9:14])} stopped: {file.read_text()}; {_AGAIN}")
            if time.monotonic() - since > WAIT_S:
                raise ValueError(
                    f"{waiting}, and none was answered for {WAIT_S / 60:.0f} minutes; is a rank dead? {_AGAIN}"
                )
            if progress and time.monotonic() - said > 30:
                said = time.monotonic()
                print(f"rank 0 is done; {waiting} ...", file=sys.stderr, flush=True)
            time.sleep(_POLL_S)

    def finish(self, files: Mapping[str, str | bytes]) -> None:
        """Write all notes, then the final files in this order, the result last; then the parts can go."""
        lines = [{"identity": self.identity, "began": self.began}, *self.notes()]
        with _writing(self.out):
            write_whole(self.out / ANSWERS, "".join(json.dumps(line) + "\n" for line in lines))
            for name, content in files.items():
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.out / name, content)
            for part in (*self._parts(), *self.out.glob(f".{PARTIAL.replace('{:05d}', '*')}.lock")):
                part.unlink(missing_ok=True)
        if self._part is not None:
            self._part.close()
        if self._lock is not None:
            self._lock.release()


_AGAIN = "the same command again goes on behind what is done"


def read_notes(out: str | Path) -> list[Note]:
    """Every batch of the finished run in `out`. ValueError where it holds none."""
    path = Path(out) / ANSWERS
    if not path.is_file():
        raise ValueError(f"{out} holds no {ANSWERS}, which a finished run keeps; run it again, or finish it")
    return [json.loads(line) for place, line in enumerate(_whole_lines(path)) if place]


def _grows(before: int | None, now: int | None) -> bool:
    return before is not None and (now is None or now > before)


def _whole_lines(part: Path) -> Iterator[bytes]:
    with part.open("rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def _append(file: BinaryIO, line: Mapping[str, Any]) -> None:
    """A whole line or none."""
    before = file.seek(0, os.SEEK_END)
    content = json.dumps(line).encode() + b"\n"
    try:
        while content:
            content = content[file.write(content) :]
    except OSError:
        file.truncate(before)
        raise


def _is_left_over(file: Path) -> bool:
    return file.name.startswith(".") and file.name.endswith((".part", ".lock"))


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"--out {out}: cannot write {error.filename or 'a file there'} ({error.strerror}); nothing half-written is "
            f"left. Make room (or check the rights), then {_AGAIN}"
        ) from error
