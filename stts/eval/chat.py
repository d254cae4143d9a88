"""A question in pieces (texts, a video, images) to an answer: how other evaluation frameworks ask.

Our lmms-eval model (`stts.eval.lmms_eval`) and the VLMEvalKit wrapper (docs/other_frameworks.md) are thin layers over
this; frames, prompts and pruning are those of `stts compare`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from stts.data.collate import Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Role, Sample
from stts.data.video.files import read_picture, read_video
from stts.data.video.sample import VideoClip
from stts.eval.answering.method import question_of
from stts.models.checkpoints.hub import PrunedVLM
from stts.models.checkpoints.load import as_recorded
from stts.models.pruning.siglip import load_siglip

GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Piece:
    """A part of what is said: text, a video file or folder of frames, or an image (file or picture)."""

    kind: Literal["text", "video", "image"]
    value: Any
    clip: tuple[float, float] | None = None
    """Seconds (start, end) of the video; None for all of it."""


@dataclass(frozen=True)
class Answer:
    text: str
    num_tokens: int
    """Generated, without padding."""
    retention: float | None
    """Equivalent retention measured in this answer; None without video."""


class Chat:
    """A model with its pruner, asked in pieces. Greedy unless told otherwise."""

    def __init__(
        self,
        pretrained: str | Path,
        pruner: str | None = None,
        retention_ratio: float | None = None,
        *,
        num_frames: int | None = None,
        sampler: str | None = None,
        max_fps: float | None = None,
        siglip: str | Path | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> None:
        """`pretrained`, `pruner`, `retention_ratio` and `options` as in `PrunedVLM.from_pretrained`: what is None comes
        from a folder of ours. `none` as pruner is the stock model. Frames that are None are sampled as the folder
        records of its training, else 32 of them by uniform_inclusive. ValueError when anything does not fit."""
        self.vlm = PrunedVLM.from_pretrained(
            pretrained, pruner, retention_ratio, device=device,
            siglip=None if siglip is None else load_siglip(siglip), **options,
        )  # fmt: skip
        frames = as_recorded(pretrained, num_frames=num_frames, sampler=sampler, max_fps=max_fps)
        self.num_frames: int = frames["num_frames"] or 32
        self.sampler: str = frames["sampler"] or "uniform_inclusive"
        self.max_fps: float | None = frames["max_fps"]
        self._collate = Collator(self.vlm.processor, training=False)

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
            timeout_s=None, folder_fps=1.0,
        )  # fmt: skip

    @torch.inference_mode()
    def answer(self, examples: Sequence[Example], *, max_new_tokens: int, **generate: Any) -> list[Answer]:
        """One answer each, in one batch; `generate` as the model's own method takes it."""
        batch = self._collate(examples)
        assert batch is not None
        batch = batch.to(self.vlm.model.device)
        shown = [sample for sample, example in zip(batch.samples, examples, strict=True) if example.frames is not None]
        self.vlm.pruning.describe(batch.video_uids, batch.timestamps_s, [question_of(sample) for sample in shown])
        ids_BL = self.vlm.generate(**batch.inputs, max_new_tokens=max_new_tokens, **{**GREEDY, **generate})
        new_BL = ids_BL[:, batch.inputs["input_ids"].shape[1] :]
        texts = self.vlm.processor.tokenizer.batch_decode(new_BL, skip_special_tokens=True)
        lengths = (new_BL != self.vlm.processor.tokenizer.pad_token_id).sum(1).tolist()
        report = self.vlm.last if shown else None
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
