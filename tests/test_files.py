"""Files appear whole or not at all, with the user's own rights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stts.files import new_folder, staged, write_whole


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    assert write_whole(out, "é\n") == out and out.read_bytes() == "é\n".encode()
    write_whole(out, b"second")
    assert out.read_bytes() == b"second" and [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    out = write_whole(tmp_path / "table.txt", "first")
    with pytest.raises(RuntimeError), staged(out) as part:
        part.write_text("half")
        raise RuntimeError
    assert out.read_text() == "first" and list(tmp_path.iterdir()) == [out]


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with staged(tmp_path / "model") as part:
            part.mkdir()
            (part / f"{name}.txt").write_text(name)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new.txt"] and len(list(tmp_path.iterdir())) == 1


def test_files_of_a_folder_can_be_read_by_those_whom_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with staged(tmp_path / "model") as part:
            part.mkdir()
            (part / "weights").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "model" / "weights").stat().st_mode & 0o777 == 0o640


def test_a_new_folder_must_be_free(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for taken in (tmp_path / "used", tmp_path / "used" / "file"):
        with pytest.raises(ValueError, match="choose another folder or remove it"), new_folder(taken):
            raise AssertionError("nothing may be made for a folder that is refused")
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as part:
        part.mkdir()
    assert (tmp_path / "empty").is_dir()
