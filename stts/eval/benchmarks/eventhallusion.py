"""EventHallusion (arXiv:2409.16597): does a model see events that are usual but did not happen?

The current release answers "no" in two of its three files and "yes" in the third throughout, so a constant answer
scores about half: read `macro` (the mean of the splits) and `yes_rate` next to `acc`. `Loaded.files` names the release.

**Differs:** the older `mix_questions.json` is read as interleave and its ids renamed; its description task needs a
judge and is not here. "Not sure" and "nothing" are no answer; the release's rule, text that begins with "no", pays on
two of the three files (scoring "official")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stts.eval.benchmarks.base import YES_NO_CUE, Benchmark, Question
from stts.eval.benchmarks.files import Row, find_video, rows_of
from stts.eval.benchmarks.scores import Compat, Scored
from stts.metrics import extract

SPLITS = ("entire", "interleave", "misleading")


@dataclass(frozen=True, kw_only=True)
class EventHallusion(Benchmark):
    title = "EventHallusion"
    layouts = (
        "questions/{entire, interleave, misleading}_questions.json + videos/{split}/{id}.mp4",
        "the same with questions/mix_questions.json for interleave, ids mix_###",
    )
    wording = f"{{question}}\n{YES_NO_CUE}"
    primary = "split"
    compat: ClassVar = {"official": Compat(extract.starts_yes_no)}

    def rows(self, root: Path) -> Iterable[Row]:
        for split in SPLITS:
            older = ("questions/mix_questions.json",) if split == "interleave" else ()
            for row in rows_of(root, f"questions/{split}_questions.json", *older):
                asked = row.values.get("questions")
                if not isinstance(asked, list) or not all(isinstance(item, dict) for item in asked):
                    yield row.bad("'questions' must be a list of objects")
                    continue
                yield from (row.inside({"split": split, "place": n, **item}) for n, item in enumerate(asked))

    def read(self, row: Row, doc_id: int) -> Question:
        split, name = row.text("split"), row.text("id")
        renamed = name.replace("mix_", "interleave_", 1) if name.startswith("mix_") else name
        answer = extract.yes_no(row.text("answer"))
        if not answer:
            raise ValueError(f"answer {row.text('answer')!r} is neither yes nor no")
        folders = [f"videos/{split}"] + (["videos/mix"] if split == "interleave" else [])
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=f"{renamed}/{row.integer('place')}",
            video=find_video(row.root, folders, renamed, name),
            question=row.text("question"),
            answer=answer,
            group={"split": split},
            doc=row.values,
        )

    def parse(self, text: str, question: Question) -> str:
        return extract.yes_no(text)

    def further_metrics(
        self, groups: Mapping[str, Any], scored: Sequence[Scored], metrics: Mapping[str, float | int | None]
    ) -> dict[str, float | int | None]:
        return {"yes_rate": sum(item.parsed == "yes" for item in scored) / len(scored) if scored else None}
