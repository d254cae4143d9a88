"""Paths that data files name: kept inside their root, because a data set is input from elsewhere.

Links inside the root are followed, and so are those of a Hugging Face cache, whose files are links into its `blobs`
folder. Other links that lead out of the root, and absolute paths elsewhere, need `following_links(True)`, in commands
`--follow_links true`: for data that you wrote or trust."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path

_FOLLOWING = ContextVar("_FOLLOWING", default=False)


@contextmanager
def following_links(follow: bool) -> Iterator[None]:
    """Inside, data files that are opened may name links that lead anywhere."""
    token = _FOLLOWING.set(follow)
    try:
        yield
    finally:
        _FOLLOWING.reset(token)


def follows_links() -> bool:
    """Whether `following_links(True)` is on."""
    return _FOLLOWING.get()


def confined(base: str | Path, name: str | Path, *, follow_links: bool | None = None) -> Path:
    """`name` under the folder `base`, or an absolute `name` inside it. The file need not exist.

    follow_links: None takes what `following_links` says. ValueError for a path that leaves `base`, by `..`, by being
    absolute, or by a link."""
    base, name = _real_folder(os.fspath(base)), os.fspath(name)
    if "\0" in name:
        raise ValueError(f"path {name!r} cannot be followed (it has a null character); correct it")
    try:
        folder, last = os.path.split(os.path.join(base, name))  # an absolute name replaces base
        target = os.path.join(_real_folder(folder), last)
        if os.path.islink(target):
            target = os.path.realpath(target)
    except (OSError, ValueError) as error:
        raise ValueError(f"path {name!r} cannot be followed ({error}); correct it") from error
    if ".." in name.split("/"):
        raise ValueError(f"path {name!r} leaves the root {base}; write it without .., or set root to a common folder")
    if _is_inside(base, target):
        return Path(target)
    written = os.path.normpath(os.path.join(base, name))
    follow = _FOLLOWING.get() if follow_links is None else follow_links
    if not _is_inside(base, written) and not (follow and os.path.isabs(name)):
        raise ValueError(
            f"path {name!r} leaves the root {base}; move the file there, set root to a common folder, or follow "
            "absolute paths and links of data that you trust with follow_links=True (--follow_links true)"
        )
    if follow or _is_inside(_blobs(base), target):
        return Path(written)  # a blob has no name to speak of
    raise ValueError(
        f"path {name!r} leaves the root {base}: it is a link to {target}; move the file there, set root to a common "
        "folder, or follow such links with follow_links=True (--follow_links true)"
    )


def _is_inside(base: str | None, path: str) -> bool:
    return base is not None and os.path.commonpath([base, path]) == base


def _blobs(folder: str) -> str | None:
    """The `blobs` of the Hugging Face cache that `folder` lies in: REPOSITORY/snapshots/REVISION/..."""
    before, found, _ = (folder + "/").partition("/snapshots/")
    blobs = os.path.join(before, "blobs")
    return _real_folder(blobs) if found and os.path.isdir(blobs) else None


@lru_cache(maxsize=4096)
def _real_folder(folder: str) -> str:
    """Links followed, once per folder: each costs a system call per part of its path."""
    return os.path.realpath(folder)
