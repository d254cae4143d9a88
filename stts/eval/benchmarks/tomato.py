"""TOMATO (arXiv:2410.23266): six kinds of motion that no single frame shows. Its authors use 16 frames."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stts.eval.benchmarks.base import Benchmark, Question
from stts.eval.benchmarks.files import Row, find_video, first_file, read_json
from stts.eval.benchmarks.options import letter_at
from stts.eval.benchmarks.scores import Compat
from stts.metrics import extract

KINDS = ("count", "direction", "rotation", "shape&trend", "velocity&frequency", "visual_cues")


@dataclass(frozen=True, kw_only=True)
class Tomato(Benchmark):
    title = "TOMATO"
    layouts = ("data/{kind}.json (an object of id -> question) + videos/{demonstration_type}/{key}.mp4",)
    primary = "kind"
    compat: ClassVar = {"molmo2": Compat(extract.prefix)}
    their_metric = ("tomato_score", 1)

    def rows(self, root: Path) -> Iterable[Row]:
        for kind in KINDS:
            path = first_file(root, f"data/{kind}.json")
            questions = read_json(path)
            if not isinstance(questions, dict):
                raise ValueError(f"{self.title}: {path}: expected an object of id -> question")
            for number, (uid, values) in enumerate(questions.items()):
                row = Row(root, path, number, values if isinstance(values, dict) else {})
                named = row.inside({"id": uid, "kind": kind})
                yield named if isinstance(values, dict) else row.bad(f"expected an object, got {values!r:.80}")

    def read(self, row: Row, doc_id: int) -> Question:
        options, demonstration = row.texts("options"), row.text("demonstration_type")
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=f"{row.text('kind')}/{row.text('id')}",
            video=find_video(row.root, ("videos",), f"{demonstration}/{row.text('key')}"),
            question=row.text("question"),
            options=options,
            answer=letter_at(row.integer("answer"), options),
            group={"kind": row.text("kind"), "demonstration_type": demonstration},
            doc=row.values,
        )
