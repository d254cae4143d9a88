"""PerceptionTest (arXiv:2305.13786), multiple choice with three options, by skill area and type of reasoning.

The test split has no public answers: `submission` makes its rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stts.eval.benchmarks.base import Benchmark, Question, check_uids
from stts.eval.benchmarks.files import Row, find_video, rows_of
from stts.eval.benchmarks.options import letter_at, place_of
from stts.eval.benchmarks.scores import Compat
from stts.metrics import extract


@dataclass(frozen=True, kw_only=True)
class PerceptionTest(Benchmark):
    table: str = "mc_question_val/validation-00000-of-00001.parquet"

    title = "PerceptionTest"
    layouts = (
        "mc_question_val/validation-00000-of-00001.parquet + videos/{video_name}.mp4",
        "without answers: mc_question/test-00000-of-00001.parquet + videos/{video_name}.mp4",
    )
    primary = "area"
    compat: ClassVar = {"molmo2": Compat(extract.standalone)}
    their_metric = ("accuracy", 1)

    def rows(self, root: Path) -> Iterable[Row]:
        return rows_of(root, self.table)

    def read(self, row: Row, doc_id: int) -> Question:
        options, answer = row.texts("options"), row.values.get("answer_id")
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=f"{row.text('video_name')}_{row.text('question_id')}",
            video=find_video(row.root, ("videos",), row.text("video_name"), suffixes=(".mp4", ".MP4")),
            question=row.text("question"),
            options=options,
            answer=None if answer is None else letter_at(row.integer("answer_id"), options),
            group={key: row.text(key) for key in ("area", "reasoning")},
            doc=row.values,
        )

    def submission(self, questions: Sequence[Question], predictions: Mapping[str, str]) -> list[dict[str, Any]]:
        """One row per question; `pred_id` is -1 where the answer cannot be read."""
        check_uids(questions, predictions)
        rows = []
        for question in questions:
            letter = self.parse(predictions[question.uid], question)
            kept = {key: question.doc[key] for key in ("video_name", "question", "question_id")}
            rows.append({**kept, "pred_id": place_of(letter, question.options)})
        return rows
