"""MVBench (arXiv:2311.17005): twenty tasks of 200 questions on short clips.

The headline is the unweighted mean of the tasks. One task (fine_grained_pose) needs videos under their own licence, and
some papers silently score 19: here a score of fewer than twenty tasks has no headline, and `tasks_scored` says so.

**Differs:** lmms-eval leaves empty answers out of the denominator (scoring "lmms-eval"); here they count as wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stts.eval.benchmarks.base import Benchmark, Question
from stts.eval.benchmarks.files import MissingVideoError, Row, find_video, rows_of
from stts.eval.benchmarks.options import letter_of_text
from stts.eval.benchmarks.scores import Compat, Scored
from stts.metrics import extract

# Task -> folder in the original release, folder in the release with pre-cut clips.
FOLDERS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("action_sequence", "action_prediction", "object_interaction"),
        ("star/Charades_v1_480", "star/Charades_segment"),
    ),
    "action_localization": ("sta/sta_video", "sta/sta_video_segment"),
    "episodic_reasoning": ("tvqa/frames_fps3_hq", "tvqa/video_fps3_hq_segment"),
    "action_antonym": ("ssv2_video", "ssv2_video_mp4"),
    "fine_grained_action": ("Moments_in_Time_Raw/videos",) * 2,
    "unexpected_action": ("FunQA_test/test",) * 2,
    **dict.fromkeys(
        ("object_existence", "moving_direction", "moving_count", "moving_attribute", "counterfactual_inference"),
        ("clevrer/video_validation",) * 2,
    ),
    **dict.fromkeys(("object_shuffle", "action_count", "state_change", "character_order"), ("perception/videos",) * 2),
    "scene_transition": ("scene_qa/video",) * 2,
    "fine_grained_pose": ("nturgbd", "nturgbd_convert"),
    "egocentric_navigation": ("vlnqa",) * 2,
}
BOUNDED = frozenset(
    {"action_sequence", "action_prediction", "object_interaction", "action_localization", "episodic_reasoning"}
)
_FRAMES_FPS = 3.0


@dataclass(frozen=True, kw_only=True)
class MVBench(Benchmark):
    tasks: tuple[str, ...] = tuple(FOLDERS)

    title = "MVBench"
    layouts = (
        "json/{task}.json + video/{original folder}/... (start and end are applied)",
        "json/{task}.json + video/{folder of pre-cut clips}/... (start and end are ignored)",
    )
    primary = "task"
    compat: ClassVar = {
        "lmms-eval": Compat(extract.loose, "empty dropped"),
        "molmo2": Compat(extract.prefix),
    }
    their_metric = ("mvbench_accuracy", 100)

    def rows(self, root: Path) -> Iterable[Row]:
        for task in self.tasks:
            for row in rows_of(root, f"json/{task}.json"):
                yield row.inside({"task": task})

    def read(self, row: Row, doc_id: int) -> Question:
        task, name = row.text("task"), row.text("video")
        options = row.texts("candidates")
        video, whole = _video(row.root, task, name)
        return Question(
            task=self.name,
            doc_id=doc_id,
            uid=f"{task}/{row.number}",
            video=video,
            question=row.text("question"),
            options=options,
            answer=letter_of_text(row.text("answer"), options),
            group={"task": task},
            clip=_clip(row) if whole and task in BOUNDED else None,
            fps=_FRAMES_FPS if video.is_dir() else None,
            doc=row.values,
        )

    def further_metrics(
        self, groups: Mapping[str, Any], scored: Sequence[Scored], metrics: Mapping[str, float | int | None]
    ) -> dict[str, float | int | None]:
        return {"tasks_scored": len(groups.get("task", {}))}

    def headline(self, metrics: Mapping[str, float | int | None]) -> float | None:
        return metrics["macro"] if metrics["tasks_scored"] == len(self.tasks) else None


def _video(root: Path, task: str, name: str) -> tuple[Path, bool]:
    """The video and whether it is whole (original release), not a pre-cut clip."""
    original, cut = FOLDERS[task]
    try:
        return find_video(root, _places(original), name, suffixes=("",), folder=task == "episodic_reasoning"), True
    except MissingVideoError:
        if cut == original:
            raise
        return find_video(root, _places(cut), name, suffixes=("",)), False


def _places(folder: str) -> list[str]:
    places = [f"video/{folder}", folder]
    if folder.startswith(("clevrer/", "star/")):  # some of the archives unpack one level deeper
        places += [f"video/data0613/{folder}", f"data0613/{folder}"]
    return places


def _clip(row: Row) -> tuple[float, float] | None:
    start, end = row.seconds("start"), row.seconds("end")
    if start is None or end is None:
        return None
    if not 0 <= start < end:
        raise ValueError(f"start {start} and end {end} are no range of seconds")
    return start, end
