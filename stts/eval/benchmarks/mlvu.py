"""MLVU dev (arXiv:2406.04264), its seven multiple-choice tasks on videos of minutes to hours.

The headline M-avg is the unweighted mean of the seven tasks; Molmo2 reports the mean over questions (`micro`), so both
are given. Fewer than seven tasks have no M-avg.

**Differs:** an answer is read by our rule; the benchmark's own script and lmms-eval's first versions take the character
before the first closing bracket (scoring "official")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stts.eval.benchmarks.base import Benchmark, Question
from stts.eval.benchmarks.files import Row, find_video, rows_of
from stts.eval.benchmarks.options import checked_letter, letter_of_text, split_inline
from stts.eval.benchmarks.scores import Compat, Scored, mean_acc
from stts.metrics import extract

FOLDERS: Mapping[str, str] = {
    "plotQA": "1_plotQA",
    "needle": "2_needle",
    "ego": "3_ego",
    "count": "4_count",
    "order": "5_order",
    "anomaly_reco": "6_anomaly_reco",
    "topic_reasoning": "7_topic_reasoning",
}
KINDS: Mapping[str, tuple[str, ...]] = {
    "holistic": ("topic_reasoning", "anomaly_reco"),
    "single_detail": ("plotQA", "needle", "ego"),
    "multi_detail": ("order", "count"),
}
_TABLES = ("mlvu/test-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "test-00000-of-00001.parquet")


@dataclass(frozen=True, kw_only=True)
class MLVU(Benchmark):
    title = "MLVU"
    layouts = (
        "MLVU/json/{i}_{task}.json + MLVU/video/{i}_{task}/{video}",
        f"{' or '.join(_TABLES)} + {{video_name}}, or video/{{video_name}}",
    )
    primary = "task"
    compat: ClassVar = {
        "official": Compat(extract.bracketed),
        "lmms-eval": Compat(extract.ranked),
        "molmo2": Compat(extract.prefix),
    }
    their_metric = ("mlvu_percetion_score", 100)  # their spelling

    def rows(self, root: Path) -> Iterable[Row]:
        if not (root / "MLVU/json").is_dir() and any((root / name).is_file() for name in _TABLES):
            yield from rows_of(root, *_TABLES)
            return
        for task, folder in FOLDERS.items():
            for row in rows_of(root, f"MLVU/json/{folder}.json"):
                yield row.inside({"question_type": task})

    def read(self, row: Row, doc_id: int) -> Question | None:
        if "video_name" not in row.values:
            task, options, text = row.text("question_type"), row.texts("candidates"), row.text("question")
            video = find_video(row.root, (f"MLVU/video/{FOLDERS[task]}",), row.text("video"), suffixes=("",))
            answer = letter_of_text(row.text("answer"), options)
        else:
            task = row.text("task_type")
            if task not in FOLDERS:
                return None  # the two generation tasks
            text, options = split_inline(row.text("question"))
            video = find_video(row.root, (".", "video"), row.text("video_name"), suffixes=("",))
            answer = checked_letter(row.text("answer"), options)
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=f"{task}/{row.number}",
            video=video,
            question=text,
            options=options,
            answer=answer,
            group={"task": task},
            doc=row.values,
        )

    def further_metrics(
        self, groups: Mapping[str, Any], scored: Sequence[Scored], metrics: Mapping[str, float | int | None]
    ) -> dict[str, float | int | None]:
        tasks = groups.get("task", {})
        by_kind: dict[str, float | int | None] = {
            kind: mean_acc({name: tasks[name] for name in names}) if set(names) <= set(tasks) else None
            for kind, names in KINDS.items()
        }
        complete = len(tasks) == len(FOLDERS)
        return by_kind | {
            "m_avg": metrics["macro"] if complete else None,
            "micro": metrics["acc"],
            "tasks_scored": len(tasks),
        }

    def headline(self, metrics: Mapping[str, float | int | None]) -> float | None:
        return metrics["m_avg"]
