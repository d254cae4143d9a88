"""MotionBench (arXiv:2501.02955) and LVBench (arXiv:2406.08035): one line per video with its questions in `qa`.

Options stand inside the question, one per line. MotionBench hides the answers of its test half ("NA"): those rows are
no part of the task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stts.eval.benchmarks.base import Benchmark, Question
from stts.eval.benchmarks.files import Row, find_video, rows_of
from stts.eval.benchmarks.options import checked_letter, split_inline
from stts.eval.benchmarks.scores import Compat
from stts.metrics import extract


class MetaJsonl(Benchmark):
    def rows_in(self, root: Path, *names: str) -> Iterable[Row]:
        for row in rows_of(root, *names):
            asked = row.values.get("qa")
            if not isinstance(asked, list) or not all(isinstance(item, dict) for item in asked):
                yield row.bad("'qa' must be a list of objects")
                continue
            yield from (row.inside(item) for item in asked)

    def question(self, row: Row, doc_id: int, video: Path, group: Mapping[str, str | tuple[str, ...]]) -> Question:
        text, options = split_inline(row.text("question"))
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=row.text("uid"),
            video=video,
            question=text,
            options=options,
            answer=checked_letter(row.text("answer"), options),
            group=group,
            doc=row.values,
        )


@dataclass(frozen=True, kw_only=True)
class MotionBench(MetaJsonl):
    title = "MotionBench"
    layouts = ("MotionBench/video_info.meta.jsonl + MotionBench/{self-collected, public-dataset}/{video_path}",)
    primary = "question_type"
    compat: ClassVar = {"molmo2": Compat(extract.prefix)}

    def rows(self, root: Path) -> Iterable[Row]:
        return self.rows_in(root, "MotionBench/video_info.meta.jsonl", "video_info.meta.jsonl")

    def read(self, row: Row, doc_id: int) -> Question | None:
        if row.text("answer").upper() == "NA":
            return None
        above = row.file.parent.relative_to(row.root)
        folders = [str(above / name) for name in ("self-collected", "public-dataset")]
        video = find_video(row.root, folders, row.text("video_path"), suffixes=("",))
        return self.question(row, doc_id, video, {key: row.text(key) for key in ("question_type", "video_type")})


@dataclass(frozen=True, kw_only=True)
class LVBench(MetaJsonl):
    title = "LVBench"
    layouts = ("video_info.meta.jsonl + {key}.mp4, or videos/{key}.mp4, or all_videos/{key}.mp4",)
    primary = "question_type"
    compat: ClassVar = {
        "lmms-eval": Compat(extract.ranked),
        "molmo2": Compat(extract.prefix),
    }
    their_metric = ("lvbench_score", 1)

    def rows(self, root: Path) -> Iterable[Row]:
        return self.rows_in(root, "video_info.meta.jsonl")

    def read(self, row: Row, doc_id: int) -> Question:
        video = find_video(row.root, (".", "videos", "all_videos"), row.text("key"))
        return self.question(
            row, doc_id, video, {"question_type": row.texts("question_type"), "type": row.text("type")}
        )
