"""What is asked: the questions of one or more tasks in order, decoded when asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stts.data.datasets import Example, Skipped, labels_as_read
from stts.data.rows import OnError
from stts.data.shapes.files import read_cells
from stts.data.video.cache import Decoded
from stts.data.video.files import read_video
from stts.data.video.sample import VideoError
from stts.eval.benchmarks.base import Benchmark, Loaded, Question
from stts.eval.benchmarks.plain import PlainJsonl
from stts.eval.benchmarks.tasks import SUITES, get_task

Prompt = Literal["letter", "official"]


@dataclass(frozen=True)
class Task:
    """A benchmark with the questions found in its folder."""

    benchmark: Benchmark
    root: Path
    loaded: Loaded
    questions: tuple[Question, ...]
    """Those that are asked: all, or the first few."""

    @property
    def name(self) -> str:
        return self.benchmark.name

    @property
    def has_answers(self) -> bool:
        """Whether predictions can be scored here: every answer is public and none needs a judge."""
        return not self.benchmark.needs_judge and all(question.answer is not None for question in self.questions)


def open_jsonl(path: str | Path, *, skip_missing: bool = False, limit: int | None = None) -> Task:
    """A data file of your own as the task `jsonl`."""
    path = Path(path)
    return _open(PlainJsonl(name="jsonl", file=path.name), path.parent, skip_missing, limit)


def open_tasks(
    names: Sequence[str], data_root: str | Path, *, skip_missing: bool = False, limit: int | None = None
) -> list[Task]:
    """Tasks and suites by name, each once, from `data_root`: a folder of benchmarks, or the one benchmark itself.

    ValueError for an unknown name, a folder that is not there, and whatever `Benchmark.load` refuses."""
    wanted = list(dict.fromkeys(task for name in names for task in SUITES.get(name, (name,))))
    return [
        _open(task, _folder_of(task, Path(data_root), alone=len(wanted) == 1), skip_missing, limit)
        for task in map(get_task, wanted)
    ]


def _open(benchmark: Benchmark, root: Path, skip_missing: bool, limit: int | None) -> Task:
    if not benchmark.shows_video:
        raise ValueError(
            f"task {benchmark.name} shows every frame as an image between texts, which no video pruner touches; "
            f"use {benchmark.name.removesuffix('_i')}_v"
        )
    loaded = benchmark.load(root, skip_missing=skip_missing)
    return Task(benchmark, root, loaded, loaded.questions[:limit])


def _folder_of(task: Benchmark, data_root: Path, *, alone: bool) -> Path:
    """`data_root` / the benchmark's name in any spelling (Video-MME, videomme), else `data_root` itself."""

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    if not data_root.is_dir():
        raise ValueError(f"--data_root {data_root} is no folder; give the folder that holds the benchmarks")
    spellings = [plain(task.name), plain(task.title), plain(task.name.partition("_")[0])]
    folders = {plain(entry.name): entry for entry in sorted(data_root.iterdir()) if entry.is_dir()}
    folder = next((folders[name] for name in spellings if name in folders), None)
    if folder is None and not alone:
        raise ValueError(
            f"task {task.name}: --data_root {data_root} has no folder {task.title!r} or "
            f"{task.name.partition('_')[0]!r} (case and hyphens do not matter), only {sorted(folders) or 'files'}; "
            "put the benchmark there, or a link to it"
        )
    # Of a single task both readings are possible, and its own files decide.
    return data_root if folder is None or (alone and not _loads(task, folder) and _loads(task, data_root)) else folder


def _loads(task: Benchmark, root: Path) -> bool:
    try:
        return next(iter(task.rows(root)), None) is not None
    except (FileNotFoundError, ValueError):
        return False


@dataclass(frozen=True)
class Asked:
    """One question as files and records name it."""

    key: str
    """The uid, behind `task/` where several tasks are asked."""
    task: Task
    question: Question

    @property
    def video(self) -> str:
        """Relative to the task's folder where it lies inside."""
        path, root = self.question.video, self.task.root.resolve()
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


@dataclass(frozen=True, kw_only=True)
class Source:
    """The questions of `tasks` with their frames; `source[place]` decodes.

    A subtitle task's prompt depends on the frames it shows, so prompts are made here too."""

    tasks: Sequence[Task]
    num_frames: int
    sampler: str | None = None
    """None: each task's own."""
    max_fps: float | None = None
    """Upper bound on frames per second of video."""
    on_error: OnError = "raise"
    follow_links: bool = False
    """Whether the pictures of a folder of frames may be links that lead out of the folder beside it."""
    timeout_s: float | None = None
    """Longest time that reading one video may take."""
    prompt: Prompt = "letter"
    wordings: Mapping[str, str] = field(default_factory=dict)
    """By task, for the prompt "official"."""
    asked: tuple[Asked, ...] = field(init=False)
    _labels: dict[Path, dict[str, NDArray[np.uint8]]] = field(init=False, default_factory=dict, repr=False)
    _newest: dict[Any, Decoded] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"--on_error {self.on_error!r} must be raise or skip")
        if self.prompt not in ("letter", "official"):
            raise ValueError(f"--prompt {self.prompt!r} must be letter or official")
        absent = [task.name for task in self.tasks if self.prompt == "official" and task.name not in self.wordings]
        if absent:
            raise ValueError(
                f"--prompt official needs the benchmark's own words, and none are given for {absent}; write them under "
                "wordings: {task: '{question} ... {options}'} in the YAML, or use --prompt letter"
            )
        several = len(self.tasks) > 1
        asked = tuple(
            Asked(f"{task.name}/{question.uid}" if several else question.uid, task, question)
            for task in self.tasks
            for question in task.questions
        )
        object.__setattr__(self, "asked", asked)

    def __len__(self) -> int:
        return len(self.asked)

    @property
    def keys(self) -> list[str]:
        return [asked.key for asked in self.asked]

    def __getitem__(self, place: int) -> Example | Skipped:
        """ValueError, naming the question, for one that cannot be shown or worded, unless on_error is "skip"."""
        key, task, question = self.asked[place].key, self.asked[place].task, self.asked[place].question
        wording = self.wordings[task.name] if self.prompt == "official" else None
        try:
            video = self.shown(place)
            sample = task.benchmark.sample(question, video.timestamps_s.tolist(), wording)
        except (ValueError, TimeoutError) as error:
            reason = str(error) or f"{question.video}: not read within {self.timeout_s} s"
            if self.on_error == "raise":
                raise VideoError(f"sample {key!r}: {reason}") from error
            return Skipped(key, reason)
        return Example(replace(sample, uid=key), video.frames, video.timestamps_s, duration_s=video.duration_s)

    def cell_labels(self, place: int) -> NDArray[np.uint8] | None:
        """(T, Y, X): what every cell of a ShapesQA clip shows on the frames that are asked about; None for other data,
        and where other frames are chosen than those that were labelled."""
        one = self.asked[place]
        if not isinstance(one.task.benchmark, PlainJsonl):
            return None
        path = one.task.root / one.task.benchmark.file
        if path not in self._labels:
            self._labels[path] = read_cells(path)
        reading = self.sampler or one.task.benchmark.sampler, self.num_frames, self.max_fps
        return labels_as_read(self._labels[path].get(one.video), one.question.video, reading, one.question.clip)

    def number(self, place: int) -> int:
        """Place among all questions of the tasks, which stays the same when a limit grows."""
        task, before = self.asked[place].task, 0
        for earlier in self.tasks:
            if earlier is task:
                break
            before += len(earlier.loaded.questions)
        return before + sum(one.task is task for one in self.asked[:place])

    def shown(self, place: int) -> Decoded:
        """The frames of a question."""
        return self._decoded(self.asked[place].task, self.asked[place].question)

    def _decoded(self, task: Task, question: Question) -> Decoded:
        """Questions on one video follow each other: the newest one stays decoded."""
        sampler = self.sampler or task.benchmark.sampler
        choice = (question.video, question.clip, sampler)
        if choice not in self._newest:
            self._newest.clear()
            video = read_video(
                question.video,
                sampler=sampler,
                num_frames=self.num_frames,
                clip=question.clip,
                max_fps=self.max_fps,
                timeout_s=self.timeout_s,
                folder_fps=question.fps or 1.0,
                inside=None if self.follow_links else question.video.parent,
            )
            self._newest[choice] = Decoded(video.frames, video.timestamps_s, video.source.duration_s)
        return self._newest[choice]

    def batches(self, size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
        """Places of this rank's questions (`doc_id` modulo `world_size`), in batches of one task each."""
        batches = []
        for task in self.tasks:
            mine = [
                place
                for place, asked in enumerate(self.asked)
                if asked.task is task and asked.question.doc_id % world_size == rank
            ]
            batches += [mine[start : start + size] for start in range(0, len(mine), size)]
        return batches
