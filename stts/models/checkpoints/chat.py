"""A question in pieces (texts, a video, images) to an answer, and one video asked with every token and with few.

`PrunedVLM.ask`, `stts ask` and `stts visualize`, our lmms-eval model (`stts.eval.lmms_eval`) and the VLMEvalKit wrapper
(docs/other_frameworks.md) are thin layers over this; frames, prompts and pruning are those of `stts compare`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import ProcessorMixin

from stts.data.collate import Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Role, Sample
from stts.data.video.files import read_picture, read_video
from stts.data.video.sample import VideoClip
from stts.metrics.accuracy import normalise
from stts.models.pruning.context import Pruning
from stts.models.pruning.phases import Phases, PhaseTimes
from stts.models.pruning.report import Report

_OPTION = re.compile(r"\(?[A-Z][).:]\s")
GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Piece:
    """A part of what is said: text, a video file or folder of frames, or an image (file or picture)."""

    kind: Literal["text", "video", "image"]
    value: Any
    clip: tuple[float, float] | None = None
    """Seconds (start, end) of the video; None for all of it."""
    folder_fps: float = 1.0
    """Pictures a second, where the video is a folder of them."""


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    """Generated, without padding."""
    retention: float | None
    """Equivalent retention measured in this answer; None without video."""


@dataclass(frozen=True)
class Asked:
    """One question on one video, answered with every token and with those that a pruner keeps."""

    question: str
    example: Example
    """The frames that the model saw, and their times."""
    pruner: str
    retention_ratio: float
    dense: Answer
    pruned: Answer
    dense_times: PhaseTimes
    pruned_times: PhaseTimes
    report: Report
    """What the pruner kept."""

    @property
    def num_tokens(self) -> tuple[int, int]:
        """Visual tokens in the LLM, dense and pruned; pruned ones meaned over its layers where they fall between."""
        [dense] = self.report.num_groups
        return dense, round(dense * self.report.retention_measured)

    @property
    def ms(self) -> tuple[float, float]:
        """Milliseconds of the whole answer on the device, dense and pruned; decoding the video is not counted."""
        return _all_ms(self.dense_times), _all_ms(self.pruned_times)

    @property
    def method(self) -> str:
        return f"{self.pruner} {self.retention_ratio:g}"

    def __str__(self) -> str:
        """Both answers, then tokens and milliseconds, and what was saved."""
        width = max(len("dense"), len(self.method))
        answers = [("dense", self.dense), (self.method, self.pruned)]
        lines = [f"{name:{width}}  {answer.text.strip()}" for name, answer in answers]
        first = self.dense_times.ttft_ms, self.pruned_times.ttft_ms
        head = ("visual tokens", "ms to first token", "ms in all")
        lines += ["", f"{'':{width}}  {'  '.join(head)}"]
        columns = (self.num_tokens, first, self.ms)
        for row, name in enumerate(("dense", self.method)):
            cells = (f"{columns[0][row]}", f"{first[row]:.1f}", f"{self.ms[row]:.1f}")
            lines.append(f"{name:{width}}  {'  '.join(map(str.rjust, cells, map(len, head)))}")
        saved = (f"{1 - after / before:.0%}" for before, after in columns)
        lines.append(f"{'saved':{width}}  {'  '.join(map(str.rjust, saved, map(len, head)))}")
        if self.report.llm_cuts:
            lines.append(f"Tokens of {self.pruner} are a mean over the layers of the LLM, where it drops them.")
        return "\n".join(lines)


def _all_ms(times: PhaseTimes) -> float:
    return times.ttft_ms + times.decode_ms


class Chat:
    """A model under a pruner that is on it, asked in pieces. Greedy unless told otherwise.

    `PrunedVLM.chat` makes one that shows frames as the model was trained."""

    def __init__(
        self,
        pruning: Pruning,
        processor: ProcessorMixin,
        *,
        num_frames: int = 32,
        sampler: str = "uniform_inclusive",
        max_fps: float | None = None,
    ) -> None:
        self.pruning, self.processor = pruning, processor
        self.num_frames, self.sampler, self.max_fps = num_frames, sampler, max_fps
        self._collate = Collator(processor, training=False)

    def side_by_side(self, video: Piece, question: str, *, max_new_tokens: int, like: Asked | None = None) -> Asked:
        """`question` on `video`, answered densely and pruned; the model must be in eval mode.

        like: what another pruner gave for the same question on the same model: its frames and dense answer are used
        again. ValueError: the video is broken, the pruner drops nothing or was taken off."""
        pruning = self.pruning
        name = pruning.name or type(pruning.pruner).__name__
        if not pruning.pruner.stages:
            raise ValueError(f"pruner {name!r} keeps everything; name one that drops tokens (see `stts pruners`)")
        if not pruning.is_attached:
            raise ValueError(f"pruner {name!r} was taken off the model; put it on again with `vlm.pruning.attach()`")
        if like is None:
            example = self.example("video", [("user", [video, Piece("text", question)])])
            with pruning.aside(1.0):
                dense, dense_times = self._timed(example, max_new_tokens)
        else:
            example, dense, dense_times = like.example, like.dense, like.dense_times
        pruned, pruned_times = self._timed(example, max_new_tokens)
        report = pruning.last
        assert report is not None
        return Asked(question, example, name, pruning.retention_ratio, dense, pruned, dense_times, pruned_times, report)

    def _timed(self, example: Example, max_new_tokens: int) -> tuple[Answer, PhaseTimes]:
        self.answer([example], max_new_tokens=1)  # the first pass of a shape pays for kernels and memory
        with Phases(self.pruning) as phases:
            [answer] = self.answer([example], max_new_tokens=max_new_tokens)
        return answer, phases.times

    def example(self, uid: str, turns: Sequence[tuple[Role, Sequence[Piece]]]) -> Example:
        """The conversation with its frames decoded. ValueError for more than one video, or a broken one.

        Media stand where their pieces do, or where the text has a marker `<video>` or `<image>` for each."""
        pieces = [piece for _, said in turns for piece in said]
        videos = [piece for piece in pieces if piece.kind == "video"]
        if len(videos) > 1:
            raise ValueError(f"question {uid!r} shows {len(videos)} videos, expected at most one; split it")
        clip = self._decode(videos[0]) if videos else None
        sample = Sample(
            uid=uid,
            messages=tuple(Message(role, _written(said)) for role, said in turns),
            video=Path(videos[0].value) if videos else None,
            clip=videos[0].clip if videos else None,
        )
        return Example(
            sample,
            frames=clip.frames if clip else None,
            timestamps_s=clip.timestamps_s if clip else None,
            images=tuple(_picture(piece.value) for piece in pieces if piece.kind == "image"),
            duration_s=clip.source.duration_s if clip else None,
        )

    def _decode(self, video: Piece) -> VideoClip:
        return read_video(
            Path(video.value), sampler=self.sampler, num_frames=self.num_frames, clip=video.clip, max_fps=self.max_fps,
            timeout_s=None, folder_fps=video.folder_fps,
        )  # fmt: skip

    @torch.inference_mode()
    def answer(self, examples: Sequence[Example], *, max_new_tokens: int, **generate: Any) -> list[Answer]:
        """One answer each, in one batch; `generate` as the model's own method takes it."""
        batch = self._collate(examples)
        assert batch is not None
        batch = batch.to(self.pruning.model.device)
        shown = [sample for sample, example in zip(batch.samples, examples, strict=True) if example.frames is not None]
        self.pruning.describe(batch.video_uids, batch.timestamps_s, [question_of(sample) for sample in shown])
        ids_BL = self.pruning.model.generate(**batch.inputs, max_new_tokens=max_new_tokens, **{**GREEDY, **generate})
        new_BL = ids_BL[:, batch.inputs["input_ids"].shape[1] :]
        texts = self.processor.tokenizer.batch_decode(new_BL, skip_special_tokens=True)
        lengths = (new_BL != self.processor.tokenizer.pad_token_id).sum(1).tolist()
        report = self.pruning.last if shown else None
        measured = iter(report.retention_per_video if report is not None else ())
        return [
            Answer(text, length, None if example.frames is None else next(measured, None))
            for text, length, example in zip(texts, lengths, examples, strict=True)
        ]


def _written(pieces: Sequence[Piece]) -> str:
    spoken = "\n".join(str(piece.value) for piece in pieces if piece.kind == "text")
    lines = [
        str(piece.value) if piece.kind == "text" else f"<{piece.kind}>"
        for piece in pieces
        if piece.kind == "text" or f"<{piece.kind}>" not in spoken
    ]
    return "\n".join(lines)


def _picture(value: Any) -> NDArray[np.uint8]:
    return np.asarray(value.convert("RGB")) if isinstance(value, Image.Image) else read_picture(Path(value))


def asked_of(sample: Sample) -> str:
    """What the user said last, without media markers."""
    text = next((message.text for message in reversed(sample.messages) if message.role == "user"), "")
    return text.replace("<video>", "").replace("<image>", "").strip()


def question_of(sample: Sample) -> str:
    """The last question of the user, without media markers, and without the answer options and what follows them.

    A line is an option when it is one of the row's `options`, or begins with a letter as in "A. red" or "(B) blue"."""
    lines = asked_of(sample).splitlines()
    options = [normalise(option) for option in sample.meta.get("options") or ()]
    first = next((n for n, line in enumerate(lines) if n and (_OPTION.match(line) or normalise(line) in options)), None)
    return "\n".join(lines[:first]).strip()
