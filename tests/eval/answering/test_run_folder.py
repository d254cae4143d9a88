"""One process writes a rank's part of a run folder at a time; notes are kept, each once, and the limit may grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stts.eval.answering import run_folder
from stts.eval.answering.ranks import Ranks
from stts.eval.answering.run_folder import Store, read_notes


def store(out: Path, rank: int = 0) -> Store:
    return Store(
        out, {"what": "test"}, kind="comparison", result=("result.json",), overwrite=False, ranks=Ranks(rank, 2)
    )


def test_a_part_is_locked_until_its_run_is_over(tmp_path: Path) -> None:
    out, note = tmp_path / "run", {"keys": ["a"]}
    first = store(out)
    first.add(note, {}, "000000")
    with pytest.raises(ValueError, match=r"another process writes .*partial-00000\.jsonl"):
        store(out).add(note, {}, "000001")
    store(out, rank=1).add({"keys": ["b"]}, {}, "000002")  # a rank has a file of its own
    first.finish({"result.json": "{}"})
    assert not [path.name for path in out.iterdir() if path.name.endswith(".lock") or "partial" in path.name]
    abandoned = store(tmp_path / "other")
    abandoned.add(note, {}, "000000")
    del abandoned  # as a process that ends
    store(tmp_path / "other").add({"keys": ["b"]}, {}, "000001")


def limited(out: Path, limit: int | None, **settings: Any) -> Store:
    return Store(out, {"limit": limit, **settings}, kind="run", result=("result.json",), overwrite=False)


def note(key: str) -> dict[str, Any]:
    return {"keys": [key], "ms": {"a": 0.1 + 0.2}, "said": "é\u2028"}


def test_a_run_cut_off_while_it_finished_holds_every_note_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = limited(tmp_path, 2)
    for key in ("x", "y"):
        first.add(note(key), {}, "")
    write, written = run_folder.write_whole, []

    def full(path: Path, content: Any) -> None:
        written.append(path.name)
        if path.name == "result.json":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_whole", full)
        with pytest.raises(ValueError, match=r"cannot write .*result\.json .No space left"):
            first.finish({"result.json": '{"identity": {"limit": 2}}'})
    assert written == ["answers.jsonl", "result.json"] and (tmp_path / "partial-00000.jsonl").exists()
    again = limited(tmp_path, 2)
    assert again.notes() == [note("x"), note("y")] and again.finished is None
    again.finish({"result.json": '{"identity": {"limit": 2}}'})
    assert read_notes(tmp_path) == [note("x"), note("y")] and not list(tmp_path.glob("partial*"))
    assert limited(tmp_path, 2).finished == {"identity": {"limit": 2}}


@pytest.mark.parametrize(("before", "now", "goes_on"), [(2, 3, True), (2, None, True), (3, 2, False), (None, 2, False)])
@pytest.mark.parametrize("finished", [True, False])
def test_only_the_limit_may_grow(
    tmp_path: Path, before: int | None, now: int | None, goes_on: bool, finished: bool
) -> None:
    first = limited(tmp_path, before, model="m")
    first.add(note("x"), {}, "")
    if finished:
        first.finish(
            {"result.json": f'{{"identity": {{"limit": {"null" if before is None else before}, "model": "m"}}}}'}
        )
    if goes_on:
        second = limited(tmp_path, now, model="m")
        assert second.finished is None and second.notes() == [note("x")]
    else:
        with pytest.raises(ValueError, match=r"another run \(different: limit\)"):
            limited(tmp_path, now, model="m")
    with pytest.raises(ValueError, match=r"different: .*model"):
        limited(tmp_path, now, model="n")
