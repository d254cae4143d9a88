"""Video-MME (arXiv:2405.21075): 900 videos of three lengths, three questions each.

Scores follow the benchmark's breakdown (length, domain, sub-category, type of task) and Molmo2's medium and long.

**Differs:** an unparsed answer is wrong; the official script and Molmo2 leave it out (scoring "official"). Subtitles
are those of the frames that the model sees, where lmms-eval takes 32 frames whatever the model sees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from stts.eval.benchmarks.base import Benchmark, Question
from stts.eval.benchmarks.files import Row, confined, find_video, rows_of
from stts.eval.benchmarks.options import checked_letter, unmarked
from stts.eval.benchmarks.scores import Compat
from stts.eval.benchmarks.subtitles import Subtitle, read_srt, shown_at
from stts.metrics import extract

_TABLE = "videomme/test-00000-of-00001.parquet"


@dataclass(frozen=True, kw_only=True)
class VideoMME(Benchmark):
    subtitles: bool = False
    only: str | None = None
    """One length: short, medium or long."""

    title = "Video-MME"
    layouts = (f"{_TABLE} + data/{{videoID}}.mp4 (or .MP4, .mkv; or video/), subtitle/{{videoID}}.srt",)
    primary = "duration"
    compat: ClassVar = {"official": Compat(extract.first_capital, "dropped"), "lmms-eval": Compat(extract.ranked)}
    their_metric = ("videomme_perception_score", 100)

    def rows(self, root: Path) -> Iterable[Row]:
        if self.subtitles and not (root / "subtitle").is_dir():
            raise FileNotFoundError(f"no folder {root / 'subtitle'}")
        return rows_of(root, _TABLE)

    def read(self, row: Row, doc_id: int) -> Question | None:
        duration, video = row.text("duration"), row.text("videoID")
        if duration not in ("short", "medium", "long"):
            raise ValueError(f"duration is {duration!r}, expected short, medium or long")
        if self.only not in (None, duration):
            return None
        options = unmarked(row.texts("options"))
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=row.text("question_id"),
            video=find_video(row.root, ("data", "video"), video, suffixes=(".mp4", ".MP4", ".mkv")),
            question=row.text("question"),
            options=options,
            answer=checked_letter(row.text("answer"), options),
            group={
                "duration": duration,
                **({"lengths": "medium_long"} if duration != "short" else {}),
                **{key: row.text(key) for key in ("domain", "sub_category", "task_type")},
            },
            subtitles=_subtitles(confined(row.root / "subtitle", f"{video}.srt")) if self.subtitles else (),
            doc=row.values,
        )

    def prompt(self, question: Question, times_s: Sequence[float] = (), wording: str | None = None) -> str:
        asked = super().prompt(question, times_s, wording)
        if not self.subtitles:
            return asked
        if question.subtitles and not len(times_s):
            raise ValueError(f"{self.name}: subtitles are chosen by frame; give times_s, the seconds of the frames")
        texts = shown_at(question.subtitles, times_s)
        return "\n".join(["Subtitles of these frames:", *(texts or ["There are none."]), asked])


def _subtitles(path: Path) -> tuple[Subtitle, ...]:
    return read_srt(path) if path.is_file() else ()  # 744 of the 900 videos have them
