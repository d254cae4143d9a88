"""One process writes a rank's part of a run folder at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from stts.eval.answering.ranks import Ranks
from stts.eval.answering.run_folder import Store


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
