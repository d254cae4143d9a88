"""Answers graded: what every method got right, per question and per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from stts.eval.answering.answer import Answer
from stts.eval.answering.questions import Source
from stts.eval.benchmarks.scores import Scores

if TYPE_CHECKING:  # the loop imports all that runs a model, which a report of a finished run does without
    from stts.eval.answering.loop import Answers


@dataclass(frozen=True, kw_only=True)
class Graded(Answer):
    """An answer and whether it is right."""

    parsed: str | None
    correct: bool
    counted: bool = True
    """False only in a compat scoring that leaves this answer out."""


@dataclass(frozen=True)
class Record:
    uid: str
    """Behind `task/` where several tasks were asked."""
    video: str
    family: str
    """Group by which its task breaks scores down first."""
    answer: str
    outcomes: Mapping[str, Graded]
    """By `Cell.key`."""
    question: str = ""
    """What the user asked last, without media markers."""
    task: str = "jsonl"

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        return cls(**{**row, "outcomes": {key: Graded.from_json(one) for key, one in row["outcomes"].items()}})


@dataclass(frozen=True)
class TaskScore:
    """One method on one task. Everything is 0 to 1."""

    headline: float | None
    """What the task is known by; None where it cannot be stated."""
    metrics: Mapping[str, float | int | None]
    groups: Mapping[str, Mapping[str, Mapping[str, float | int]]]
    """Field -> value -> acc, n, parse_failures."""
    scoring: str

    @classmethod
    def of(cls, scores: Scores) -> Self:
        groups = {
            name: {value: dict(vars(score)) for value, score in members.items()}
            for name, members in scores.groups.items()
        }
        return cls(scores.headline, dict(scores.metrics), groups, scores.scoring)


def score_tasks(source: Source, answers: Answers, cell: str, scoring: str) -> dict[str, Scores]:
    """One method's scores by task. Left out: questions whose video could not be read, tasks whose answers are not
    public or need a judge.

    ValueError for a `scoring` that a task does not know."""
    said = answers.said[cell]
    by_task = {}
    for task in source.tasks:
        asked = {item.question.uid: item.key for item in source.asked if item.task is task and item.key in said}
        if asked and task.has_answers:
            questions = [question for question in task.questions if question.uid in asked]
            texts = {uid: said[key].prediction for uid, key in asked.items()}
            by_task[task.name] = task.benchmark.score(questions, texts, scoring)
    return by_task


def make_records(source: Source, answers: Answers, scores: Mapping[str, Mapping[str, Scores]]) -> tuple[Record, ...]:
    """`scores` by cell, then by task."""
    graded = {
        (cell, task, item.uid): item
        for cell, tasks in scores.items()
        for task, score in tasks.items()
        for item in score.scored
    }
    records = []
    for asked in source.asked:
        if asked.key not in answers.asked:
            continue
        outcomes = {}
        for cell, said in answers.said.items():
            one, item = said[asked.key], graded[cell, asked.task.name, asked.question.uid]
            outcomes[cell] = Graded(**vars(one), parsed=item.parsed, correct=item.correct, counted=item.counted)
        records.append(
            Record(
                uid=asked.key,
                video=asked.video,
                family=_family(asked.task.benchmark.primary, asked.question.group),
                answer=asked.question.answer or "",
                outcomes=outcomes,
                question=answers.asked[asked.key]["input"],
                task=asked.task.name,
            )
        )
    return tuple(records)


def _family(primary: str | None, group: Mapping[str, str | Sequence[str]]) -> str:
    value = group.get(primary, "") if primary else ""
    return value if isinstance(value, str) else ", ".join(value)
