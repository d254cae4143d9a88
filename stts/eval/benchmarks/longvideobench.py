"""LongVideoBench (arXiv:2407.15754), validation: 1337 questions on videos of 8 seconds to an hour, 2 to 5 options.

`_v` shows the video alone; `_i` puts each subtitle between the frames where it was spoken, so its prompt depends on the
times of the frames and holds one `<image>` per frame.

**Differs:** an unparsed answer is wrong; the release and lmms-eval guess (scoring "lmms-eval")."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stts.eval.benchmarks.base import Benchmark, Question
from stts.eval.benchmarks.files import Row, confined, find_video, rows_of
from stts.eval.benchmarks.options import letter_at
from stts.eval.benchmarks.scores import Compat
from stts.eval.benchmarks.subtitles import Subtitle, interleave, read_json_subtitles
from stts.metrics import extract

_TABLES = ("lvb_val.json", "validation-00000-of-00001.parquet")


@dataclass(frozen=True, kw_only=True)
class LongVideoBench(Benchmark):
    drop_subtitle_questions: bool = False
    """Leave out questions that speak of subtitles, as Molmo2 does where it shows none; `n` tells."""

    title = "LongVideoBench"
    layouts = (f"{' or '.join(_TABLES)} + videos/{{video_path}}, subtitles/{{subtitle_path}}",)
    max_new_tokens = 32
    primary = "duration_group"
    compat: ClassVar = {"lmms-eval": Compat(extract.first_of_five, "guessed")}
    their_metric = ("lvb_acc", 1)

    def rows(self, root: Path) -> Iterable[Row]:
        return rows_of(root, *_TABLES)

    def read(self, row: Row, doc_id: int) -> Question | None:
        text = row.text("question")
        if self.drop_subtitle_questions and "subtitle" in text.lower():
            return None
        options = _options(row)
        perception = "2" in row.text("question_category")
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=row.text("id"),
            video=find_video(row.root, ("videos",), row.text("video_path"), suffixes=("",)),
            question=text,
            options=options,
            answer=letter_at(row.integer("correct_choice"), options),
            group={
                "duration_group": row.text("duration_group"),
                "question_category": row.text("question_category"),
                "kind": "perception" if perception else "relation",
            },
            subtitles=self.read_subtitles(row),
            doc=row.values,
        )

    def read_subtitles(self, row: Row) -> tuple[Subtitle, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class LongVideoBenchInterleaved(LongVideoBench):
    sampler = "bins_left"
    shows_video = False

    def read_subtitles(self, row: Row) -> tuple[Subtitle, ...]:
        path = confined(row.root / "subtitles", row.text("subtitle_path"))
        if not path.is_file():
            raise FileNotFoundError(f"no subtitles at {path}; fetch them, or use longvideobench_val_v")
        shift = row.seconds("starting_timestamp_for_subtitles") or 0.0
        return read_json_subtitles(path, shift, row.seconds("duration") or 0.0)

    def prompt(self, question: Question, times_s: Sequence[float] = (), wording: str | None = None) -> str:
        if not len(times_s):
            raise ValueError(f"{self.name}: subtitles go between the frames; give times_s, the seconds of the frames")
        shown = interleave(question.subtitles, times_s, "<image>")
        return "\n".join([*shown, super().prompt(question, times_s, wording)])


def _options(row: Row) -> tuple[str, ...]:
    if "candidates" in row.values:
        return row.texts("candidates")
    return tuple(text for text in (row.text(f"option{place}") for place in range(5)) if text != "N/A")
