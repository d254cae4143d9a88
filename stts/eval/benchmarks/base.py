"""What a benchmark is: questions read from its own files, a prompt for each, and scores of the answers."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from stts.data.rows import Message, Sample
from stts.data.video.samplers import Timeline, choose_frames
from stts.eval.benchmarks.files import MissingVideoError, Row, frame_files
from stts.eval.benchmarks.scores import Compat, Scored, Scores, apply_compat, common_metrics, grouped, mean_acc
from stts.eval.benchmarks.subtitles import Subtitle
from stts.metrics import extract

LETTER_CUE = "Reply with the letter of the correct option only."
LETTER_WORDING = "{question}\n{options}\n" + LETTER_CUE
YES_NO_CUE = "Answer with yes or no."


@dataclass(frozen=True, kw_only=True)
class Question:
    task: str
    doc_id: int
    """Place among the task's rows, those with a missing video included."""
    uid: str
    video: Path
    """A file, or a folder of frames where `fps` is set."""
    question: str
    options: tuple[str, ...] = ()
    """Texts only; A, B, ... stand for them in order."""
    answer: str | None = None
    """A letter where there are options; None: the answer is not public."""
    group: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """Fields to break the score down by; several values where labels are many."""
    clip: tuple[float, float] | None = None
    """Seconds (start, end) of the video to look at; None for all of it."""
    fps: float | None = None
    subtitles: tuple[Subtitle, ...] = ()
    doc: Mapping[str, Any] = field(default_factory=dict)
    """The row as it was."""

    def frame_files(self, sampler: str, num_frames: int) -> tuple[list[Path], list[float]]:
        """Images of a folder of frames and their seconds, by one of `SAMPLERS`, inside `clip`."""
        if self.fps is None:
            raise ValueError(f"{self.uid}: {self.video} is a video file; decode it with sample_frames")
        files = frame_files(self.video)
        if not files:
            raise MissingVideoError(f"{self.uid}: no images in {self.video}")
        chosen_T = choose_frames(Timeline.constant(len(files), self.fps), sampler, num_frames, self.clip).tolist()
        return [files[number] for number in chosen_T], [number / self.fps for number in chosen_T]


@dataclass(frozen=True)
class Loaded:
    questions: tuple[Question, ...]
    missing_video: tuple[str, ...]
    """Why each skipped row was skipped."""
    bad_rows: tuple[str, ...]
    """Rows that cannot be asked, left out, and why: an answer that is no option, a range of no length, ..."""
    notes: tuple[str, ...]
    """What a reader of the results should know, such as another number of rows than published."""
    files: Mapping[str, str]
    """Annotation file -> sha1, so that a result names the release it was made on."""


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """One task. `load`, ask `prompt` of each question, `score` the answers by uid."""

    name: str
    expected_rows: int | None = None

    title: ClassVar[str]
    layouts: ClassVar[tuple[str, ...]]
    """Accepted files under the root, for the error that names them."""
    wording: ClassVar[str] = LETTER_WORDING
    sampler: ClassVar[str] = "uniform_inclusive"
    max_new_tokens: ClassVar[int] = 16
    primary: ClassVar[str | None] = None
    """Group field of `macro`."""
    compat: ClassVar[Mapping[str, Compat]] = {}
    """Other people's scorings; the first is what plain "compat" means."""
    their_metric: ClassVar[tuple[str, float] | None] = None
    """lmms-eval's name of the headline and its scale, 1 or 100."""
    shows_video: ClassVar[bool] = True
    """False: frames are images between texts, which video pruners do not touch."""
    needs_judge: ClassVar[bool] = False
    """True: answers are free texts that somebody must rate; without a judge they are written down, not scored."""
    published: ClassVar[bool] = True
    """True: nobody here can correct a bad row, so it is left out and counted. False: it is an error."""

    @abstractmethod
    def rows(self, root: Path) -> Iterable[Row]: ...

    @abstractmethod
    def read(self, row: Row, doc_id: int) -> Question | None:
        """None for a row that is not part of this task."""

    def load(self, root: str | Path, *, skip_missing: bool = False) -> Loaded:
        """Every question of the task. Rows that cannot be asked, and with `skip_missing` those whose video is absent,
        are left out, counted and listed.

        ValueError for absent or broken files, a missing video, and where more rows are bad than good.

        **Differs:** public scorers treat bad rows each in their own way (MVBench's shows one frame where a range has no
        length, and counts an answer that is no option as wrong); here no method is asked, so they change no score."""
        root = Path(root)
        try:
            questions, missing, bad, files = self._read_all(root)
        except FileNotFoundError as error:
            layouts = "".join(f"\n  {layout}" for layout in self.layouts)
            raise ValueError(f"{self.title} ({self.name}): {error}; accepted under the root:{layouts}") from error
        num_rows = len(questions) + len(missing) + len(bad)
        if 2 * len(bad) > num_rows:
            raise ValueError(
                f"{self.title}: {len(bad)} of {num_rows} rows cannot be asked, first {bad[0]}; is this another release?"
            )
        if missing and not skip_missing:
            raise ValueError(
                f"{self.title}: {len(missing)} of {num_rows} rows have no video, first "
                f"{missing[0]}; fetch them, or leave these rows out and count them: --skip_missing true "
                "(skip_missing=True)"
            )
        if not questions:
            raise ValueError(f"{self.title} ({self.name}): no questions in {', '.join(map(str, files)) or root}")
        notes = [f"{self.name}: skipped {len(missing)} rows without video"] if missing else []
        if bad:
            more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
            listed = "; ".join(bad[:5]).replace(f"{root}/", "")
            notes.append(f"{self.name}: left out {len(bad)} of {num_rows} rows, which cannot be asked: {listed}{more}")
        if self.expected_rows not in (None, num_rows):
            notes.append(f"{self.name}: {num_rows} rows, published {self.expected_rows}")
        stamps = {path.relative_to(root).as_posix(): hashlib.sha1(path.read_bytes()).hexdigest() for path in files}
        return Loaded(tuple(questions), tuple(missing), tuple(bad), tuple(notes), stamps)

    def _read_all(self, root: Path) -> tuple[list[Question], list[str], list[str], list[Path]]:
        """Questions, rows without video, bad rows, files."""
        questions: list[Question] = []
        missing: list[str] = []
        bad: list[str] = []
        row_of: dict[str, Row] = {}
        files: dict[Path, None] = {}
        for row in self.rows(root):
            files[row.file] = None
            try:
                if row.fault:
                    raise ValueError(row.fault)
                question = self.read(row, len(questions) + len(missing) + len(bad))
                if question is not None and question.uid in row_of:
                    raise ValueError(f"uid {question.uid!r} is already on {row_of[question.uid]}")
            except MissingVideoError as error:
                missing.append(f"{row}: {error}")
                continue
            except ValueError as error:
                bad.append(f"{row}: {error}")
                if not self.published:
                    raise ValueError(f"{self.title}: {bad[0]}") from error
                continue
            if question is not None:
                row_of[question.uid] = row
                questions.append(question)
        return questions, missing, bad, list(files)

    def prompt(self, question: Question, times_s: Sequence[float] = (), wording: str | None = None) -> str:
        """What the model is asked; `times_s` are the seconds of the frames it sees, for tasks with subtitles.

        `wording` replaces this task's, for example by the benchmark's own: {question} and {options} are filled in."""
        wording = self.wording if wording is None else wording
        if "{question}" not in wording:
            raise ValueError(f"wording {wording!r} must hold {{question}}, and {{options}} where there are options")
        options = question.options
        lines = [f"{name}. {text}" for name, text in zip(extract.letters(len(options)), options, strict=True)]
        filled = {"{question}": question.question, "{options}": "\n".join(lines)}
        parts = wording.replace("{options}", "\0{options}\0").replace("{question}", "\0{question}\0").split("\0")
        return "".join(filled.get(part, part) for part in parts)  # never twice: a question may hold "{options}"

    def sample(self, question: Question, times_s: Sequence[float] = (), wording: str | None = None) -> Sample:
        """The conversation that asks this question; `times_s` and `wording` as for `prompt`."""
        text = self.prompt(question, times_s, wording)
        for kind in ("video", "image"):  # a marker stands for a file, and the text only mentions it
            text = text.replace(f"<{kind}>", f"< {kind}>")
        return Sample(
            uid=question.uid,
            messages=(Message("user", f"<video>\n{text}"),),
            video=question.video,
            clip=question.clip,
            meta={"options": list(question.options)},
        )

    def parse(self, text: str, question: Question) -> str:
        """The strict reading of an answer; "" where there is none."""
        return extract.strict(text, question.options)

    def score(self, questions: Sequence[Question], predictions: Mapping[str, str], scoring: str = "strict") -> Scores:
        """`predictions` by uid, one for every question. `scoring` is "strict", or "compat" or a name in `compat`."""
        check_uids(questions, predictions)
        if scoring != "strict" and scoring not in ("compat", *self.compat):
            raise ValueError(f"scoring {scoring!r} is unknown for {self.name}; known: strict, {', '.join(self.compat)}")
        if scoring == "compat":
            scoring = next(iter(self.compat), "strict")
        scored = [self._score_one(question, predictions[question.uid], scoring) for question in questions]
        counted = [item for item in scored if item.counted]
        groups = grouped(counted)
        macro = mean_acc(groups.get(self.primary, {})) if self.primary else None
        metrics = common_metrics(counted, macro) | {"left_out": len(scored) - len(counted)}
        metrics |= self.further_metrics(groups, counted, metrics)
        headline = self.headline(metrics)
        if self.their_metric:
            name, scale = self.their_metric
            metrics[name] = None if headline is None else scale * headline
        return Scores(self.name, scoring, headline, metrics, groups, tuple(scored))

    def headline(self, metrics: Mapping[str, float | int | None]) -> float | None:
        return metrics["acc"]

    def further_metrics(
        self, groups: Mapping[str, Any], scored: Sequence[Scored], metrics: Mapping[str, float | int | None]
    ) -> dict[str, float | int | None]:
        """What this benchmark reports besides `acc`, `macro` and the rest of `common_metrics`."""
        return {}

    def _score_one(self, question: Question, text: str, scoring: str) -> Scored:
        if question.answer is None:
            raise ValueError(f"{self.name}: the answer of {question.uid!r} is not public; see submission()")
        parsed: str | None
        if scoring == "strict":
            parsed, counted = self.parse(text, question) or None, True
        else:
            parsed, counted = apply_compat(self.compat[scoring], text, question.options, question.uid)
        values = {name: (value,) if isinstance(value, str) else value for name, value in question.group.items()}
        return Scored(question.uid, str(question.video), parsed, parsed == question.answer, values, counted)


def check_uids(questions: Sequence[Question], predictions: Mapping[str, str]) -> None:
    wanted = [question.uid for question in questions]
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"{len(wanted) - len(set(wanted))} questions come twice; remove padding before scoring")
    absent, extra = [uid for uid in wanted if uid not in predictions], set(predictions) - set(wanted)
    if absent or extra:
        raise ValueError(
            f"{len(absent)} of {len(wanted)} questions have no prediction (first {absent[:3]}) and {len(extra)} "
            f"predictions no question (first {sorted(extra)[:3]}); give one prediction per uid"
        )
