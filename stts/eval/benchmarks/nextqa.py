"""NExT-QA multiple choice (arXiv:2105.08276): five options; causal, temporal and descriptive questions.

The split is part of the name: lmms-eval and Molmo2 use test (8564 rows), several pruning papers val (4996).

**Differs:** an unparsed answer is wrong; lmms-eval and Molmo2 guess (scorings of their names)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stts.eval.benchmarks.base import Benchmark, Question
from stts.eval.benchmarks.files import Row, find_video, read_json, rows_of
from stts.eval.benchmarks.options import letter_at
from stts.eval.benchmarks.scores import Compat
from stts.metrics import extract

_KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}


@dataclass(frozen=True, kw_only=True)
class NextQA(Benchmark):
    tables: tuple[str, ...] = ("MC/test-00000-of-00001.parquet", "test.csv")

    title = "NExT-QA"
    layouts = (
        "MC/test-00000-of-00001.parquet, or test.csv, val.csv + NExTVideo/{video}.mp4",
        "the same with map_vid_vidorID.json + NExTVideo/{folder}/{vidor}.mp4",
    )
    primary = "kind"
    compat: ClassVar = {
        "lmms-eval": Compat(extract.largest, "guessed"),
        "molmo2": Compat(extract.largest_spaced, "guessed"),
    }
    their_metric = ("exact_match", 1)

    def rows(self, root: Path) -> Iterable[Row]:
        nested = _nested(root / "map_vid_vidorID.json")
        for row in rows_of(root, *self.tables):
            yield row.inside({"vidor": nested.get(str(row.values.get("video")))})

    def read(self, row: Row, doc_id: int) -> Question:
        video, kind = row.text("video"), row.text("type")
        if kind[0] not in _KINDS:
            raise ValueError(f"type is {kind!r}, expected one that starts with C, T or D")
        options = tuple(row.text(f"a{place}") for place in range(5))
        nested = row.value("vidor")
        names = [video, nested, nested.split("/")[-1]] if nested else [video]
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=f"{video}_{row.text('qid')}",
            video=find_video(row.root, ("NExTVideo",), *names),
            question=row.text("question"),
            options=options,
            answer=letter_at(row.integer("answer"), options),
            group={"kind": _KINDS[kind[0]], "type": kind},
            doc=row.values,
        )


def _nested(path: Path) -> Mapping[str, str]:
    """Video -> folder/name, where the videos lie as in VidOR."""
    if not path.is_file():
        return {}
    paths = read_json(path)
    if not isinstance(paths, dict) or not all(isinstance(name, str) for name in paths.values()):
        raise ValueError(f"{path}: expected an object of video -> path")
    return paths
