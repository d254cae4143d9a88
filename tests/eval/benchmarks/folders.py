"""Small copies of the benchmarks' own folders, and predictions for them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from stts.eval.benchmarks.base import Question
from stts.eval.benchmarks.scores import Scores
from stts.eval.benchmarks.tasks import get_task


def touch(root: Path, *names: str) -> None:
    """Empty files: loaders look for videos, they do not open them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write_json(root: Path, name: str, made: Any) -> None:
    touch(root, name)
    (root / name).write_text(json.dumps(made), encoding="utf-8")


def write_jsonl(root: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    touch(root, name)
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(root: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    pytest.importorskip("pyarrow", reason="this benchmark's rows come as Parquet: pip install pyarrow")
    from pyarrow import Table, parquet

    touch(root, name)
    parquet.write_table(Table.from_pylist([dict(row) for row in rows]), root / name)


def load(task: str, root: Path) -> tuple[Question, ...]:
    return get_task(task).load(root).questions


def score(task: str, questions: Sequence[Question], answers: Sequence[str], scoring: str = "strict") -> Scores:
    """Answers in the order of the questions."""
    by_uid = {question.uid: answer for question, answer in zip(questions, answers, strict=True)}
    return get_task(task).score(questions, by_uid, scoring)


def accs(scores: Scores, field: str) -> dict[str, float]:
    return {name: group.acc for name, group in scores.groups[field].items()}
