"""The folder of a comparison: what is there already, what comes next, and the final files.

partial.jsonl    while running: the identity on line 1, then one line per finished batch
kept/            with `--save_kept`: which tokens were kept, a file per batch (`stts.eval.kept`)
comparison.json  everything, per sample; .csv the rows; .md the table; .png the figure
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from stts.eval.kept import FOLDER
from stts.eval.plot import draw
from stts.eval.table import ComparisonResult, render_csv, render_markdown

RESULT, PARTIAL = "comparison.json", "partial.jsonl"
_HASHED_BYTES = 256 * 2**20


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
    """Opens `out` for the comparison with this `identity` (settings and file stamps that decide the result).

    ValueError when `out` holds anything but the same comparison; with `overwrite`, anything but a comparison."""

    def __init__(self, out: Path, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        self.out = Path(out)
        self.identity: dict[str, Any] = json.loads(json.dumps(identity))  # tuples become lists, as in the file
        self.batches: list[dict[str, Any]] = []
        self.finished: ComparisonResult | None = None
        self._appending = False
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            self._take_over(overwrite)

    def _take_over(self, overwrite: bool) -> None:
        result, partial = self.out / RESULT, self.out / PARTIAL
        if not result.is_file() and not partial.is_file():
            raise ValueError(f"--out {self.out} is not empty and holds no comparison; choose another folder")
        if overwrite:
            for file in (partial, *(result.with_suffix(suffix) for suffix in (".png", ".md", ".csv", ".json"))):
                file.unlink(missing_ok=True)
            for file in (self.out / FOLDER).glob("*.safetensors"):
                file.unlink()
            return
        if result.is_file():
            made = json.loads(result.read_text(encoding="utf-8"))
            self._check(made["identity"])
            self.finished = ComparisonResult.from_json(made)
            return
        head, *lines = partial.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        if not head.endswith("\n"):
            return  # killed before anything was written
        self._check(json.loads(head))
        self.batches = [json.loads(line) for line in lines if line.endswith("\n")]  # a kill may cut the last line

    def _check(self, found: Mapping[str, Any]) -> None:
        names = [name for name in {**found, **self.identity} if found.get(name) != self.identity.get(name)]
        if names:
            raise ValueError(
                f"--out {self.out} holds another comparison (different: {', '.join(names)}); "
                "choose another folder, or --overwrite true to throw that one away"
            )

    def add(self, batch: dict[str, Any], kept: Mapping[str, Tensor]) -> None:
        """Note a finished batch, the tokens `kept` first: after a kill in between both are made again."""
        self.out.mkdir(parents=True, exist_ok=True)
        if not self._appending:  # whole once, so that a line cut by a kill is gone
            lines = (json.dumps(line) + "\n" for line in (self.identity, *self.batches))
            _write_whole(self.out / PARTIAL, "".join(lines))
            self._appending = True
        if kept:
            (self.out / FOLDER).mkdir(exist_ok=True)
            _write_whole(self.out / FOLDER / f"{len(self.batches):06d}.safetensors", save(dict(kept)))
        self.batches.append(batch)
        with (self.out / PARTIAL).open("a", encoding="utf-8") as file:
            file.write(json.dumps(batch) + "\n")

    def finish(self, result: ComparisonResult) -> None:
        """Write the final files, comparison.json last: where it is, the others are."""
        base = self.out / RESULT
        _write_whole(base.with_suffix(".png"), draw(result))
        _write_whole(base.with_suffix(".csv"), render_csv(result))
        _write_whole(base.with_suffix(".md"), render_markdown(result))
        _write_whole(base, json.dumps({"identity": self.identity, **result.to_json()}, indent=1) + "\n")
        (self.out / PARTIAL).unlink(missing_ok=True)


def _write_whole(path: Path, content: str | bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
