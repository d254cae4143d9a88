"""A JSONL file of your own, in the form that training reads: a video and an answer a row; whole answers are graded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stts.data.rows import Sample, read_jsonl
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
    published = False
    primary = "family"

    def rows(self, root: Path) -> Iterable[Row]:
        path = root / self.file
        if not path.is_file():
            raise FileNotFoundError(f"no {self.file} in {root}")
        for number, sample in enumerate(read_jsonl(path)):
            yield Row(root, path, number, {"sample": sample, **sample.meta})

    def read(self, row: Row, doc_id: int) -> Question:
        sample = row.value("sample")
        if sample.video is None or sample.images:
            raise ValueError(f"{sample.uid!r} must show one video and no image; leave it out")
        if isinstance(sample.video, tuple):
            raise ValueError(f"{sample.uid!r} lists frames; put them into a folder of their own and name that one")
        if not sample.video.exists():
            raise MissingVideoError(f"{sample.uid!r}: no video file at {sample.video}")
        options, answer = row.texts("options") if row.values.get("options") else (), sample.messages[-1]
        try:
            grade("", answer.text if answer.role == "assistant" else "", options)  # can it ever be right?
        except ValueError as error:
            raise ValueError(f"{sample.uid!r}: {error}") from error
        asked = next(turn.text for turn in reversed(sample.messages) if turn.role == "user")
        family = row.values.get("family")
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=sample.uid,
            video=sample.video,
            question=asked.replace("<video>", "").strip(),
            options=options,
            answer=answer.text,
            clip=sample.clip,
            fps=row.values.get("fps", 1.0) if sample.video.is_dir() else None,
            group={"family": str(family)} if family else {},
            doc=row.values,
        )

    def sample(self, question: Question, times_s: Sequence[float] = (), wording: str | None = None) -> Sample:
        """The row's own conversation, earlier turns included."""
        return question.doc["sample"] if wording is None else super().sample(question, times_s, wording)

    def _score_one(self, question: Question, text: str, scoring: str) -> Scored:
        assert question.answer is not None
        graded = grade(text, question.answer, question.options)
        values: Mapping[str, tuple[str, ...]] = {name: (str(value),) for name, value in question.group.items()}
        return Scored(question.uid, str(question.video), graded.parsed, graded.correct, values)
