"""Files and folders that appear whole or not at all: written beside their place, then renamed into it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path to write a file or folder to; when the block ends without an error it becomes `path`.

    What was at `path` before is replaced. After an error, or a kill at any moment, `path` is what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as scratch:
        part = Path(scratch) / path.name
        yield part
        if part.is_dir():
            # safetensors 0.8 writes files that only their owner can read; the folder has the mode of the umask
            readable = part.stat().st_mode & 0o666
            for file in (file for file in part.rglob("*") if file.is_file()):
                file.chmod(readable)
        if path.is_dir():  # a folder can only be renamed to a name that is free
            path.rename(Path(scratch) / "replaced")
        os.replace(part, path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """`staged` for a folder that must not hold anything yet. ValueError when it does, before anything is written."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; choose another folder or remove it")
    with staged(path) as part:
        yield part


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write text (UTF-8, "\\n" line ends) or bytes to `path`, whole or not at all. Returns `path`."""
    with staged(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
    return path
