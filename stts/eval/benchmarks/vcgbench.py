"""VCGBench / Video-ChatGPT (arXiv:2306.05424): open answers that a judge rates 0 to 5 on five aspects.

Correctness, detail and context on the generic questions, temporal understanding, and consistency on two wordings of one
question. Scores depend on the judge, so its name is asked for and kept.

**Differs:** a rating that the judge does not give is left out and counted; lmms-eval makes it 0. Judge prompts are our
own words, so numbers compare only with numbers of the same judge here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stts.eval.benchmarks.base import Benchmark, Question, check_uids
from stts.eval.benchmarks.files import Row, find_video, rows_of
from stts.eval.benchmarks.scores import Scores
from stts.files import write_whole

Judge = Callable[[str], int | None]
"""Rating 0 to 5 for a prompt; None where it could give none."""
_ASKED = {
    "correctness": "Are the facts of the answer right?",
    "detail": "Is the answer complete and specific?",
    "context": "Does the answer grasp what the video as a whole is about?",
    "temporal": "Does the answer get the order of events right?",
    "consistency": "Do both answers agree with the right one and with each other?",
}
ASPECTS = {
    "Generic": ("correctness", "detail", "context"),
    "Temporal": ("temporal",),
    "Consistency": ("consistency",),
}


@dataclass(frozen=True, kw_only=True)
class VCGBench(Benchmark):
    folder: str

    title = "VCGBench"
    layouts = (
        "{Generic, Temporal, Consistency}/test-00000-of-00001.parquet + Test_Videos/{video_name}.mp4 (.mkv, ...)",
    )
    wording = "{question}"
    max_new_tokens = 1024
    needs_judge = True

    def rows(self, root: Path) -> Iterable[Row]:
        return rows_of(root, f"{self.folder}/test-00000-of-00001.parquet")

    def read(self, row: Row, doc_id: int) -> Question:
        keys = ("question_1", "question_2") if self.folder == "Consistency" else ("question",)
        asked = [row.text(key) for key in keys if row.value(key) not in (None, "None", "")]
        if len(asked) != 1:
            raise ValueError(f"expected one question in {keys}, got {asked}")
        name = row.text("video_name")
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=f"{name}/{row.number}",
            video=find_video(row.root, ("Test_Videos",), name, suffixes=(".mp4", ".mkv", ".avi", ".mov")),
            question=asked[0],
            answer=row.text("answer"),
            group={"video_name": name},
            doc=row.values,
        )

    def dump(self, path: Path, questions: Sequence[Question], predictions: Mapping[str, str]) -> None:
        """One JSON object per answer, for a judge elsewhere."""
        check_uids(questions, predictions)
        rows = [
            {"uid": q.uid, "question": q.question, "answer": q.answer, "prediction": predictions[q.uid]}
            for q in questions
        ]
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def score(
        self,
        questions: Sequence[Question],
        predictions: Mapping[str, str],
        scoring: str = "strict",
        judge: Judge | None = None,
        judge_name: str = "",
    ) -> Scores:
        """Mean rating of each aspect; None without a judge."""
        check_uids(questions, predictions)
        metrics: dict[str, float | int | None] = {"n": len(questions), "judge_failures": 0}
        if judge is not None and not judge_name:
            raise ValueError(f"{self.name}: ratings depend on the judge; give judge_name")
        units = _pairs(questions) if self.folder == "Consistency" else [(question,) for question in questions]
        for aspect in ASPECTS[self.folder]:
            ratings = [_rating(judge(_judge_prompt(aspect, unit, predictions))) for unit in units] if judge else []
            rated = [rating for rating in ratings if rating is not None]
            metrics[aspect] = sum(rated) / len(rated) if rated else None
            metrics["judge_failures"] = (metrics["judge_failures"] or 0) + len(ratings) - len(rated)
        means = [metrics[aspect] for aspect in ASPECTS[self.folder]]
        known = [mean for mean in means if mean is not None]
        headline = sum(known) / len(known) if len(known) == len(means) else None
        return Scores(self.name, f"judge {judge_name}" if judge else "no judge", headline, metrics, {}, ())


def _rating(given: int | None) -> int | None:
    if given is not None and (isinstance(given, bool) or given not in range(6)):
        raise ValueError(f"the judge gave {given!r}, expected 0 to 5, or None where it could give no rating")
    return given


def _pairs(questions: Sequence[Question]) -> list[tuple[Question, ...]]:
    """The two wordings of each question: rows of one video, two by two in order."""
    waiting: dict[object, Question] = {}
    pairs: list[tuple[Question, ...]] = []
    for question in questions:
        key = question.group["video_name"]
        if key in waiting:
            pairs.append((waiting.pop(key), question))
        else:
            waiting[key] = question
    if waiting:
        raise ValueError(f"{len(waiting)} consistency questions have no second wording, first {next(iter(waiting))}")
    return pairs


def _judge_prompt(aspect: str, unit: Sequence[Question], predictions: Mapping[str, str]) -> str:
    lines = [f"Question: {q.question}\nAnswer given: {predictions[q.uid]}" for q in unit]
    request = f"{_ASKED[aspect]} Rate from 0 (not at all) to 5 (fully). Reply with the number only."
    return "\n".join([f"Right answer: {unit[0].answer}", *lines, request])


def mean_of_five(scores: Sequence[Scores]) -> float | None:
    """Mean of the five aspects over the three tasks; None where one is missing."""
    aspects = {name: value for task in scores for name, value in task.metrics.items() if name in _ASKED}
    values = [value for value in aspects.values() if value is not None]
    return sum(values) / len(values) if len(values) == len(_ASKED) else None
