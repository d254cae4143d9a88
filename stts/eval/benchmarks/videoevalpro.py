"""VideoEval-Pro (arXiv:2505.14640), its multiple-choice form: 1289 questions on long videos, by kind of question."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stts.eval.benchmarks.base import Benchmark, Question
from stts.eval.benchmarks.files import Row, find_video, rows_of
from stts.eval.benchmarks.options import checked_letter, unmarked
from stts.eval.benchmarks.scores import Compat
from stts.metrics import extract


@dataclass(frozen=True, kw_only=True)
class VideoEvalPro(Benchmark):
    title = "VideoEval-Pro"
    layouts = ("data/test-00000-of-00001.parquet + videos_filtered/{video}, or videos/videos_filtered/{video}",)
    primary = "qa_type"
    compat: ClassVar = {"molmo2": Compat(extract.prefix)}

    def rows(self, root: Path) -> Iterable[Row]:
        return rows_of(root, "data/test-00000-of-00001.parquet")

    def read(self, row: Row, doc_id: int) -> Question:
        options = unmarked(row.texts("options"))
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=str(row.number),  # the release has no ids
            video=find_video(
                row.root, ("videos_filtered", "videos/videos_filtered"), row.text("video"), suffixes=("", ".mp4")
            ),
            question=row.text("question"),
            options=options,
            answer=checked_letter(row.text("answer"), options),
            group={key: row.text(key) for key in ("qa_type", "qa_subtype", "source")},
            doc=row.values,
        )
