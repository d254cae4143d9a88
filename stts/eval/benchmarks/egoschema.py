"""EgoSchema (arXiv:2308.09126): clips of three minutes, five options; 500 answers are public.

The full set has none: `submission` makes the file for its server.

**Differs:** an unparsed answer is wrong; lmms-eval guesses (scoring "lmms-eval")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stts.eval.benchmarks.base import Benchmark, Question, check_uids
from stts.eval.benchmarks.files import Row, find_video, rows_of
from stts.eval.benchmarks.options import letter_at, place_of, unmarked
from stts.eval.benchmarks.scores import Compat
from stts.metrics import extract


@dataclass(frozen=True, kw_only=True)
class EgoSchema(Benchmark):
    folders: tuple[str, ...] = ("Subset",)

    title = "EgoSchema"
    layouts = (
        "Subset/test-00000-of-00001.parquet + videos/{video_idx}.mp4",
        "full set: MC/ or GENERATION/test-00000-of-00001.parquet + videos/{video_idx}.mp4",
    )
    compat: ClassVar = {
        "lmms-eval": Compat(extract.smallest, "guessed"),
        "molmo2": Compat(extract.prefix),
    }
    their_metric = ("score", 1)

    def rows(self, root: Path) -> Iterable[Row]:
        return rows_of(root, *(f"{folder}/test-00000-of-00001.parquet" for folder in self.folders))

    def read(self, row: Row, doc_id: int) -> Question:
        options = unmarked(row.texts("option"))
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=row.text("question_idx"),
            video=find_video(row.root, ("videos",), row.text("video_idx"), suffixes=(".mp4", ".MP4")),
            question=row.text("question"),
            options=options,
            answer=None if row.value("answer") is None else letter_at(row.integer("answer"), options),
            doc=row.values,
        )

    def submission(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, int]:
        """Video -> place of the answer, -1 where it cannot be read."""
        check_uids(questions, predictions)
        return {q.doc["video_idx"]: place_of(self.parse(predictions[q.uid], q), q.options) for q in questions}
