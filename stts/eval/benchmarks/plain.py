"""A JSONL file of your own, in the form that training reads: graded by the whole answer, as `stts compare` does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stts.data.datasets import read_jsonl
from stts.eval.benchmarks.base import Benchmark, Question
from stts.eval.benchmarks.files import MissingVideoError, Row
from stts.eval.benchmarks.scores import Scored
from stts.metrics.accuracy import grade


@dataclass(frozen=True, kw_only=True)
class PlainJsonl(Benchmark):
    """The root is the folder that holds `file`; keys `options` and `family` are read."""

    file: str = "questions.jsonl"

    title = "JSONL"
    layouts = ("questions.jsonl: {id, video, clip?, conversations or messages, options?, family?}",)
    wording = "{question}"
    primary = "family"

    def rows(self, root: Path) -> Iterable[Row]:
        path = root / self.file
        if not path.is_file():
            raise FileNotFoundError(f"no {self.file} in {root}")
        for number, sample in enumerate(read_jsonl(path)):
            yield Row(root, path, number, {"sample": sample, **sample.meta})

    def read(self, row: Row, doc_id: int) -> Question:
        sample = row.value("sample")
        asked, *_, answered = sample.messages if len(sample.messages) > 1 else (sample.messages[0],) * 2
        if sample.video is None or sample.images or len(sample.messages) != 2 or answered.role != "assistant":
            raise ValueError(f"{sample.uid!r} must be one question on one video with its answer, and show no image")
        if not sample.video.is_file():
            raise MissingVideoError(f"no video at {sample.video}")
        options = row.texts("options") if row.values.get("options") else ()
        grade("", answered.text, options)  # refuses an answer that can never be right
        family = row.values.get("family")
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=sample.uid,
            video=sample.video,
            question=asked.text.replace("<video>", "").strip(),
            options=options,
            answer=answered.text,
            clip=sample.clip,
            group={"family": str(family)} if family else {},
            doc={key: value for key, value in row.values.items() if key != "sample"},
        )

    def _score_one(self, question: Question, text: str, scoring: str) -> Scored:
        assert question.answer is not None
        graded = grade(text, question.answer, question.options)
        values: Mapping[str, tuple[str, ...]] = {name: (str(value),) for name, value in question.group.items()}
        return Scored(question.uid, str(question.video), graded.parsed, graded.correct, values)
