"""What `stts eval`, `stts compare` and `stts scale` have in common: model, questions, frames, how answers are made and
read; and the road from these settings to a loaded model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
from transformers import PreTrainedModel, ProcessorMixin

from stts.budget import check_ratio
from stts.data.paths import following_links
from stts.data.rows import OnError
from stts.eval.answering.questions import Prompt, Source, Task, open_jsonl, open_tasks
from stts.eval.answering.ranks import Ranks
from stts.eval.answering.run_folder import PARTIAL, file_stamps
from stts.models.checkpoints.load import as_recorded, load_vlm, pruner_settings, recorded_pruner
from stts.models.families.base import host_info
from stts.models.pruning.siglip import SiglipSource, load_siglip
from stts.pruners.own import source_of
from stts.pruners.registry import check_name

Positions = Literal["original", "compact"]
_RECORDED: dict[str, Any] = {"num_frames": 16, "sampler": None, "max_fps": None, "exact": True, "positions": None}
"""Settings that a trained folder may record, with what counts where it does not."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A model and questions for it."""

    model: str | Path
    """Folder of the (fine-tuned) model, or hub id. Learned pruners take their weights from this folder."""
    out: Path
    """Folder of this run. The same command again goes on where a killed one stopped."""
    data: Path | None = None
    """JSONL of questions on videos, each with a short answer; or give tasks."""
    tasks: tuple[str, ...] = ()
    """Benchmarks (videomme, mvbench, ...) and suites (prune4, molmo2_13, ...); --data_root says where they are."""
    data_root: Path | None = None
    """Folder that holds the benchmarks' own folders (videomme/, MVBench/, ...), or the one benchmark asked for."""
    num_frames: int | tuple[int, ...] | None = None
    """Frames per video, at most, and for `stts compare` several of them, increasing; None: as many as the model's
    folder records of its training, else 16."""
    sampler: str | None = None
    """How frames are chosen, see stts/data/video/samplers.py; None: as the model's folder records, else as each task
    does, mostly uniform_inclusive."""
    max_fps: float | None = None
    """Upper bound on frames per second of video; None: as the model's folder records, else none."""
    prompt: Prompt = "letter"
    """letter: the same short prompt everywhere; official: the words given in `wordings`."""
    wordings: dict[str, str] = field(default_factory=dict)
    """The benchmark's own words by task, with {question} and {options}, for --prompt official."""
    scoring: str = "strict"
    """strict: an answer that cannot be read is wrong; compat, or a name such as lmms-eval: as that public scorer."""
    max_new_tokens: int | None = None
    """Longest answer; None: as each task does (16 for letters)."""
    limit: int | None = None
    """Ask the first `limit` questions of each task only."""
    skip_missing: bool = False
    """Leave out questions whose video is not there, and count them; without it they are an error."""
    on_error: OnError = "raise"
    """What a video does that is there but broken: raise, or skip (counted and listed)."""
    follow_links: bool = False
    """Take absolute paths, and links in the data folder that lead out of it; links of a Hugging Face cache are followed
    anyway."""
    timeout_s: float | None = None
    """Longest time in seconds that reading one video may take."""
    num_workers: int | None = None
    """Processes that decode ahead; None: 4 beside a GPU, 0 on a CPU."""
    siglip: str | Path | None = None
    """Folder or hub id of a SigLIP checkpoint whose pooling head and text tower make the signals that the model itself
    lacks; None: fallbacks, named under the table."""
    exact: bool | None = None
    """Every method keeps exactly the planned count; false: each release's own count, which is measured. None: as the
    model's folder records, else true."""
    positions: Positions | None = None
    """Positions of surviving tokens in the LLM; None: as the model's folder records, for every method, else as each
    pruner declares."""
    seed: int = 0
    """Of the random pruners; decoding is greedy."""
    save_kept: int | Literal["all"] = 0
    """Of how many samples, from the first on, to write which tokens were kept, for `stts report`."""
    name: str | None = None
    """Title; None: name of the model folder."""
    overwrite: bool = False
    """Throw an earlier run in `out` away. Without it the same run goes on, another one is refused."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if isinstance(self.num_frames, Sequence):
            several = tuple(self.num_frames)
            object.__setattr__(self, "num_frames", several[0] if len(several) == 1 else several)
        if not self.frames or list(self.frames) != sorted(set(self.frames)) or self.frames[0] < 1:
            raise ValueError(f"--num_frames {list(self.frames)} must be at least 1, and several must increase")
        for flag in ("batch_size", "max_new_tokens", "limit"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise ValueError(f"--{flag} {value} must be at least 1")
        if self.num_workers is not None and self.num_workers < 0:
            raise ValueError(f"--num_workers {self.num_workers} must not be negative")
        if self.save_kept != "all" and self.save_kept < 0:
            raise ValueError(f"--save_kept {self.save_kept} must be 0, a number of samples, or all")
        for flag, allowed in (
            ("on_error", get_args(OnError)),
            ("positions", (None, *get_args(Positions))),
            ("prompt", get_args(Prompt)),
        ):
            if getattr(self, flag) not in allowed:
                raise ValueError(f"--{flag} {getattr(self, flag)!r} must be one of {allowed}")
        self._check_folders()
        self._check_questions()

    def _check_folders(self) -> None:
        def one_name(path: Any) -> Any:
            return path.rstrip("/") or path if isinstance(path, str) else path

        paths = {flag: one_name(getattr(self, flag, None)) for flag in ("model", "baseline_model", "siglip")}
        trained = {name: one_name(folder) for name, folder in getattr(self, "trained", {}).items()}
        for flag, value in (paths | ({"trained": trained} if trained else {})).items():
            if hasattr(self, flag):
                object.__setattr__(self, flag, value)
        for flag, path in (paths | {f"trained: {name}": folder for name, folder in trained.items()}).items():
            hub_id = isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~"))
            if path is not None and not Path(path).is_dir() and not hub_id:
                raise ValueError(f"--{flag} {str(path)!r} is no folder; give a model folder or a hub id owner/name")

    def _check_questions(self) -> None:
        if (self.data is None) == (not self.tasks):
            raise ValueError("give either --data FILE.jsonl, or --tasks with --data_root")
        if self.tasks and self.data_root is None:
            raise ValueError(f"--tasks {list(self.tasks)} needs --data_root, the folder that holds the benchmarks")
        if self.data is not None and self.data_root is not None:
            raise ValueError(
                f"--data_root {self.data_root} goes with --tasks, and --data names a file of its own, beside which its "
                "videos are; leave one of them out"
            )
        if self.data is not None and not Path(self.data).is_file():
            hint = "it is a folder: name the JSONL file in it" if Path(self.data).is_dir() else "check the path"
            raise ValueError(f"--data {str(self.data)!r} is no file; {hint}")

    @property
    def frames(self) -> tuple[int, ...]:
        """Every number of frames; (16,) where it was left out and `as_recorded` has not told."""
        return (self.num_frames or 16,) if not isinstance(self.num_frames, tuple) else self.num_frames

    @property
    def recording(self) -> tuple[str | Path, ...]:
        """Folders whose records fill in what was left out."""
        return (self.model,)

    @property
    def title(self) -> str:
        return self.name or Path(self.model).resolve().name

    def as_recorded(self) -> tuple[Self, tuple[str, ...]]:
        """The same settings, with those that are None taken from what the model's folder records of its training; and a
        note that names what was."""
        empty = [name for name in _RECORDED if getattr(self, name) is None]
        known: dict[str, Any] = {}
        for folder in self.recording:
            for name, value in as_recorded(folder, **dict.fromkeys(empty)).items():
                if value is not None and known.setdefault(name, value) != value:
                    raise ValueError(
                        f"{folder} was trained with {name} {value}, another of these folders with {known[name]}; say "
                        f"which with --{name}"
                    )
        shown = ", ".join(f"{name} {value}" for name, value in known.items())
        who = "the folder of the model records" if len(self.recording) == 1 else "the folders of the models record"
        notes = (f"As {who}: {shown}.",) if known else ()
        return replace(self, **{**{name: _RECORDED[name] for name in empty}, **known}), notes

    def open_tasks(self) -> list[Task]:
        """ValueError, before anything slow, for whatever a task refuses, such as a --scoring that it does not know."""
        with following_links(self.follow_links):
            if self.data is not None:
                tasks = [open_jsonl(self.data, skip_missing=self.skip_missing, limit=self.limit)]
            else:
                assert self.data_root is not None
                tasks = open_tasks(self.tasks, self.data_root, skip_missing=self.skip_missing, limit=self.limit)
        for task in tasks:
            known = ("strict", "compat", *task.benchmark.compat)
            if self.scoring not in known:
                raise ValueError(f"--scoring {self.scoring!r} is unknown for {task.name}; known: {', '.join(known)}")
        return tasks

    def make_source(self, tasks: Sequence[Task], num_frames: int) -> Source:
        return Source(
            tasks=tasks,
            num_frames=num_frames,
            sampler=self.sampler,
            max_fps=self.max_fps,
            on_error=self.on_error,
            follow_links=self.follow_links,
            timeout_s=self.timeout_s,
            prompt=self.prompt,
            wordings=self.wordings,
        )

    def shown(self, source: Source) -> set[str]:
        """Keys of the samples whose kept tokens are written."""
        return set(source.keys[: None if self.save_kept == "all" else self.save_kept])

    def workers(self, device: torch.device) -> int:
        return self.num_workers if self.num_workers is not None else 4 if device.type == "cuda" else 0

    def settings(self) -> dict[str, Any]:
        """As JSON gives them back."""
        return {item.name: json.loads(json.dumps(getattr(self, item.name), default=str)) for item in fields(self)}

    def identity(self, tasks: Sequence[Task], *folders: str | Path | None) -> dict[str, Any]:
        """What decides the result: settings, device (times never mix), and the content of files."""
        beside = ("out", "overwrite", "name", "num_workers", "timeout_s", "data_root", "follow_links", "wide")
        settings = {name: value for name, value in self.settings().items() if name not in beside}
        return {
            **settings,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "files": file_stamps(self.model, self.siglip, *folders, *self._own_pruners()),
            "questions": {task.name: dict(task.loaded.files) for task in tasks},
        }

    def _own_pruners(self) -> list[Path | None]:
        """Files of pruners that are not in the registry: changed code is another run."""
        names = getattr(self, "pruners", None) or [getattr(self, "pruner", None) or "none"]
        return [source_of(name) for name in names]

    def load(self, ranks: Ranks) -> tuple[PreTrainedModel, ProcessorMixin, SiglipSource | None]:
        """The model on this rank's device, its processor, and what makes the signals it lacks."""
        model, processor = load_vlm(self.model)
        model.to(ranks.device())
        siglip = None if self.siglip is None else load_siglip(self.siglip)
        if siglip is not None:
            siglip.check(host_info(model))
        return model, processor, siglip


def check_answers(tasks: Sequence[Task]) -> None:
    """Before anything slow, for verbs that compare: every answer can be right or wrong. ValueError otherwise."""
    for task in tasks:
        hidden = sum(question.answer is None for question in task.questions)
        if task.benchmark.needs_judge or hidden:
            why = "needs a judge" if task.benchmark.needs_judge else f"has {hidden} answers that are not public"
            raise ValueError(f"task {task.name} {why}, so methods cannot be compared on it; `stts eval` writes answers")


def notes_on_tasks(tasks: Sequence[Task]) -> tuple[str, ...]:
    """What a reader of the numbers must know about the questions themselves."""
    cut = [task for task in tasks if len(task.questions) < len(task.loaded.questions)]
    return (
        *(note for task in tasks for note in task.loaded.notes),
        *(f"{task.name}: the first {len(task.questions)} of {len(task.loaded.questions)} questions." for task in cut),
    )


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Around a run: Ctrl-C says what `out` holds, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_left_in(out)) from None


def _left_in(out: Path) -> str:
    if not out.is_dir() or not any(out.glob(PARTIAL.replace("{:05d}", "*"))):
        return "nothing was answered yet; the same command starts again"
    return f"{out} holds every finished batch; the same command again goes on behind them"


@dataclass(frozen=True, kw_only=True)
class EvalConfig(RunConfig):
    """Evaluate a model under one pruner, on a data set or on benchmarks.

    `stts eval --rescore RUN --scoring NAME` grades the answers of a finished run again, without the model. The same
    command with a larger --limit asks what is new."""

    pruner: str | None = None
    """Name (see `stts pruners`), module:Class or file.py:Class; none: every token. None: the one that the model's
    folder was trained with, else none."""
    pruner_options: dict[str, Any] = field(default_factory=dict)
    """Options of the pruner, such as {compat: official}."""
    retention_ratio: float | None = None
    """Fraction of visual tokens kept, in (0, 1]; a mean over the LLM's layers. None: the ratio that the folder's own
    pruner was trained for."""
    dense_reference: Path | None = None
    """Folder of an earlier `stts eval` of the same model, questions and frames with pruner none: differences to it are
    paired by question."""
    batch_size: int = 1
    """Questions answered at once."""

    def __post_init__(self) -> None:
        if self.pruner is not None:
            check_name(self.pruner)
        if self.pruner == "none" and (self.pruner_options or self.retention_ratio is not None):
            raise ValueError("--retention_ratio and --pruner_options say nothing without a --pruner; name one")
        super().__post_init__()
        if len(self.frames) > 1:
            raise ValueError(f"--num_frames {list(self.frames)} must be one number; `stts compare` takes several")
        if self.retention_ratio is not None:
            try:
                check_ratio(self.retention_ratio)
            except ValueError as error:
                raise ValueError(f"--retention_ratio: {error}") from error

    def as_recorded(self) -> tuple[Self, tuple[str, ...]]:
        """Also the ratio of the folder's own pruner. ValueError where a pruner is left without any."""
        config, notes = super().as_recorded()
        saved = pruner_settings(self.model)
        if self.pruner is None:
            if saved is None and (self.pruner_options or self.retention_ratio is not None):
                raise ValueError("--retention_ratio and --pruner_options say nothing without a --pruner; name one")
            config = replace(config, pruner=recorded_pruner(self.model, saved) if saved else "none")
        if config.pruner == "none" or config.retention_ratio is not None:
            return config, notes
        if saved is None or saved["pruner"] != config.pruner:
            raise ValueError(f"--pruner {config.pruner} needs --retention_ratio, the fraction of visual tokens kept")
        return replace(config, retention_ratio=saved["retention_ratio"]), notes
