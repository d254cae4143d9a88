"""Examples to model inputs: the family's own processor, the family's own chat template, and labels on the answers.

Each conversation is written exactly as `generate` would meet it: the template up to its generation prompt, then the
answer, then what the template puts after an answer. (Some templates write a finished assistant turn a little
differently from the prompt that asks for one; a model trained on that form is evaluated on another.)

Shape suffixes beside those of `stts.tokens`: B = rows, L = text length, V = videos, C = 3 colour channels, H, W =
pixels."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import ProcessorMixin

from stts.data.datasets import Example, Skipped
from stts.data.frame_times import LATE_S, time_instruction, timed, video_metadata, with_times
from stts.data.processors import join_rows, traits_of
from stts.data.rows import Message, Sample
from stts.data.video.stream import VALUES, StreamedPixels, stand_in

__all__ = ["IGNORED", "Batch", "Collator", "Step", "time_instruction"]

IGNORED = -100
"""Label of a token that is not part of an answer; the value that stock losses leave out."""
_MARKER = re.compile(r"\s*<(video|image)>\s*")


@dataclass(frozen=True)
class Step:
    """Counts of the optimizer step that a batch is a part of, on this rank, made before the first of its batches runs:
    on a device they would have to be waited for."""

    num_tokens: int
    """Answer tokens of all batches of the step."""
    num_videos: int
    num_batches: int
    place: int
    """Of this batch among them, from 0."""
    own_tokens: int
    """Answer tokens of this batch; 0 for a blank one."""
    own_videos: int
    is_first: bool = True
    """Whether the step before told nothing of this one: the first after a start, or of an epoch."""
    has_next: bool = False
    """Whether the counts of the step after this one are known, those below."""
    next_tokens: int = 0
    next_videos: int = 0

    @classmethod
    def of(cls, batches: Sequence[Batch], *, is_first: bool = True) -> list[Step]:
        """One for each of the batches that make an optimizer step together."""
        tokens = [batch.num_answer_tokens for batch in batches]
        videos = [batch.num_videos for batch in batches]
        return [
            cls(sum(tokens), sum(videos), len(batches), place, *own, is_first)
            for place, own in enumerate(zip(tokens, videos, strict=True))
        ]


@dataclass(frozen=True)
class Batch:
    """One forward pass of a stock model."""

    inputs: dict[str, Any]
    """Keyword arguments of the model: what its processor returns, and `labels`, int64 (B, L), when training.
    `input_ids`, `attention_mask`: int64 (B, L). `pixel_values_videos`: (V, T, C, H, W), or a list of (T, C, H, W) where
    frame counts differ; in families that cut frames into patches beforehand, flat patches of all videos."""
    uids: tuple[str, ...]
    """Per row."""
    video_uids: tuple[str, ...]
    """Per video, in batch order."""
    timestamps_s: tuple[Tensor | None, ...]
    """Per video, float64 (T,) seconds."""
    answers: tuple[str, ...]
    """Per row, the last answer of the conversation; "" where it has none."""
    samples: tuple[Sample, ...]
    skipped: tuple[Skipped, ...] = ()
    blank: bool = False
    """True: the batch is a placeholder, because every sample was skipped, and has weight zero in the loss."""
    step: Step | None = None
    """The optimizer step this batch is a part of; None: it is one by itself."""
    lengths: tuple[int, ...] = ()
    """Per row, tokens of the prompt before pruning, padding left out; counted here, because on a device the host would
    have to wait for them."""
    answer_places: Tensor | None = None
    """int64, places of `labels` moved one to the left where some row has an answer: where the LLM's head must run. None
    without labels."""
    cell_labels: tuple[NDArray[np.uint8] | None, ...] = ()
    """Per video, `Example.label_TYX`."""

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that the answer loss is a mean of; 0 for a blank batch."""
        return 0 if self.blank else int((self.inputs["labels"][:, 1:] != IGNORED).sum())

    @property
    def num_videos(self) -> int:
        return 0 if self.blank else len(self.video_uids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every input tensor on `device`."""

        def move(value: Any) -> Any:
            if isinstance(value, list):
                return [move(item) for item in value]
            can_move = isinstance(value, Tensor | StreamedPixels)
            return value.to(device, non_blocking=non_blocking) if can_move else value

        moved = {name: move(value) for name, value in self.inputs.items()}
        return replace(self, inputs=moved, answer_places=move(self.answer_places))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked host memory, from which a device copies while the host goes on."""

        def pin(value: Any) -> Any:
            if isinstance(value, list):
                return [pin(item) for item in value]
            return value.pin_memory() if isinstance(value, Tensor) else value

        pinned = {name: pin(value) for name, value in self.inputs.items()}
        return replace(self, inputs=pinned, answer_places=pin(self.answer_places))

    def with_pixels(self, convert: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with `convert` applied to its pixel values, and to nothing else: a timestamp in bf16 would be
        seconds off."""

        def each(value: Any) -> Any:
            return [each(item) for item in value] if isinstance(value, list) else convert(value)

        pixels = {name: each(value) for name, value in self.inputs.items() if name.startswith("pixel_values")}
        return replace(self, inputs=self.inputs | pixels)


class Collator:
    """Builds a `Batch` from examples; picklable, so that it can run in loader workers.

    training=True: whole conversations, padded on the right, with labels. training=False: everything before the last
    answer and the generation prompt, padded on the left, as `generate` expects."""

    def __init__(self, processor: ProcessorMixin, *, training: bool) -> None:
        self.processor, self.training = processor, training
        tokenizer = processor.tokenizer
        self._prompt_ids, self._end_text, self._end_id = _chat_form(processor)

        self._longest = tokenizer.model_max_length

    def __call__(self, items: Sequence[Example | Skipped]) -> Batch | None:
        """A batch of all examples, in order; None when every item was skipped.

        Raises ValueError, with the uid, for a marker without its medium (or the other way round), and in training for
        a missing or empty answer and for a conversation longer than the tokenizer's limit (it would lose its answer).
        """
        skipped = tuple(item for item in items if isinstance(item, Skipped))
        examples = [item for item in items if isinstance(item, Example)]
        if not examples:
            return None
        for example in examples:
            _check_media(example)
        if traits_of(self.processor).one_kind_per_call:
            _check_one_kind(examples)
        texts = [self.render(timed(example) if self._tells_times else example.sample) for example in examples]
        videos = [example for example in examples if example.has_video]
        inputs, places = self._process(texts, videos, examples), None
        if self.training:
            inputs["labels"] = self._labels(inputs["input_ids"], inputs["attention_mask"], examples)
            places = (inputs["labels"][:, 1:] != IGNORED).any(0).nonzero().flatten()
        return Batch(
            inputs=inputs,
            uids=tuple(example.sample.uid for example in examples),
            video_uids=tuple(example.sample.uid for example in videos),
            timestamps_s=tuple(
                None if example.timestamps_s is None else torch.as_tensor(example.timestamps_s, dtype=torch.float64)
                for example in videos
            ),
            answers=tuple(_last_answer(example.sample) for example in examples),
            samples=tuple(example.sample for example in examples),
            skipped=skipped,
            lengths=tuple(inputs["attention_mask"].sum(1).tolist()),
            answer_places=places,
            cell_labels=tuple(example.label_TYX for example in videos),
        )

    def blank(self, skipped: Sequence[Skipped] = ()) -> Batch:
        """One row with one black frame, for a rank that skipped its whole batch: every rank must run every module."""
        sample = Sample("blank", (Message("user", "<video>\n?"), Message("assistant", "?")))
        batch = self([Example(sample, np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1), duration_s=0.0)])
        assert batch is not None
        return replace(batch, skipped=tuple(skipped), blank=True)

    @property
    def _tells_times(self) -> bool:
        """Whether the prompt tells the times of frames; an adapter's `prepare_processor` marks such a processor."""
        return getattr(self.processor, "time_instruction", False)

    def render(self, sample: Sample) -> str:
        """The text of one conversation, with one media marker per medium. ValueError for a missing or empty answer."""
        messages = sample.messages
        turns = [place for place, message in enumerate(messages) if message.role == "assistant"]
        if self.training:
            if not turns or any(not messages[place].text.strip() for place in turns):
                raise ValueError(
                    f"sample {sample.uid!r} has no answer or an empty one; training needs text in every assistant turn"
                )
            end_word = self.processor.tokenizer.convert_ids_to_tokens(self._end_id)
            if any(end_word in messages[place].text for place in turns):  # its label would end there, in silence
                raise ValueError(
                    f"sample {sample.uid!r}: an answer contains {end_word!r}, with which this template ends a turn; "
                    "take it out of the text"
                )
        else:
            turns = turns[:-1] if messages[-1].role == "assistant" else turns
        content = [_content(message) for message in messages]
        end = len(messages) - (messages[-1].role == "assistant")
        text, num_written = "", 0  # messages in `text`
        for place in [*turns, *([] if self.training else [end])]:
            before = self._template(content[:num_written], False) if num_written else ""
            prompt = self._template(content[:place], True)
            if not prompt.startswith(before):
                raise ValueError(
                    f"sample {sample.uid!r}: this chat template rewrites earlier turns; use single-turn conversations"
                )
            text += prompt[len(before) :].removeprefix(self._end_text if num_written else "")
            if place in turns:
                text += messages[place].text.strip() + self._end_text
                num_written = place + 1
        return text

    def num_text_tokens(self, samples: Sequence[Sample], num_frames: int = 0) -> list[int]:
        """Tokens of each conversation without what its videos and images become; known before any file is opened.

        Times and marks that a processor writes between frames are part of the video, not counted here.

        num_frames: of every video; where the prompt tells their times, these are taken to be as long as can be."""
        if self._tells_times:
            samples = [with_times(sample, [LATE_S] * num_frames, LATE_S) for sample in samples]
        media = [re.escape(getattr(self.processor, f"{kind}_token")) for kind in ("video", "image")]
        texts = [re.sub(rf"\s*({'|'.join(media)})\s*", " ", self.render(sample)) for sample in samples]
        return [len(ids) for ids in self.processor(text=texts)["input_ids"]]

    def _template(self, content: list[dict[str, Any]], ask: bool) -> str:
        return self.processor.apply_chat_template(content, add_generation_prompt=ask, tokenize=False)

    def _process(self, texts: list[str], videos: list[Example], examples: list[Example]) -> dict[str, Any]:
        traits, side = traits_of(self.processor), "right" if self.training else "left"
        if traits.row_by_row and len(texts) > 1:
            rows = zip(texts, examples, strict=True)
            parts = [self._process([text], [one] if one.has_video else [], [one]) for text, one in rows]
            return join_rows(parts, self.processor.tokenizer, side)
        reads_times = traits.reads_times
        media: dict[str, Any] = {"return_mm_token_type_ids": True} if reads_times else {}
        if videos:
            # The layout is named, not guessed: a clip 3 pixels high would be read as channels first.
            options: dict[str, Any] = {"do_sample_frames": False, "input_data_format": "channels_last"}
            if reads_times:
                options["video_metadata"] = [video_metadata(video) for video in videos]
            media |= {"videos": [self._frames(video) for video in videos], "videos_kwargs": options}
        if any(example.images for example in examples):
            media["images"] = [list(example.images) for example in examples if example.images]
        media |= {"return_tensors": "pt"} if traits.row_by_row else {}
        streams = [video.stream for video in videos if video.stream is not None]
        if streams and (len(streams) < len(videos) or self.training):
            raise ValueError("streamed videos are for evaluation, and not beside others in a batch; set stream=False")
        # No return_tensors otherwise: the processor would stack videos of unequal length, and fail.
        with stand_in(self.processor, streams) if streams else nullcontext():
            values = self.processor(text=texts, padding=True, padding_side=side, **media)
        inputs = {name: _to_tensor(value) for name, value in values.items() if not streams or name != VALUES}
        return inputs | ({VALUES: StreamedPixels(streams, self.processor.video_processor)} if streams else {})

    def _frames(self, example: Example) -> Tensor:
        if example.stream is not None:
            return torch.from_numpy(example.stream.read(0, 1))
        frames_THWC = torch.from_numpy(np.ascontiguousarray(example.frames))
        if len(frames_THWC) > 1 or getattr(self.processor.video_processor, "temporal_patch_size", 1) == 1:
            return frames_THWC
        # Processors of pairs of frames double the last of an odd number; some refuse a single one before they do.
        return frames_THWC.expand(2, -1, -1, -1)

    def _labels(self, ids_BL: Tensor, mask_BL: Tensor, examples: list[Example]) -> Tensor:
        labels_BL = torch.full_like(ids_BL, IGNORED)
        num_prompt = len(self._prompt_ids)
        windows_BLP = ids_BL.unfold(1, num_prompt, 1) if ids_BL.shape[1] >= num_prompt else ids_BL[:, :0, None]
        is_prompt_BL = (windows_BLP == torch.tensor(self._prompt_ids)).all(-1)
        for row, example in enumerate(examples):
            uid, length = example.sample.uid, int(mask_BL[row].sum())
            if length > self._longest:
                raise ValueError(
                    f"sample {uid!r} has {length} tokens, more than the {self._longest} this tokenizer allows, so its "
                    "answer would be cut; use fewer frames or a shorter text"
                )
            ends = (ids_BL[row] == self._end_id).nonzero().flatten().tolist()
            starts = [start + num_prompt for start in is_prompt_BL[row].nonzero().flatten().tolist()]
            num_answers = sum(message.role == "assistant" for message in example.sample.messages)
            stops = [next((end for end in ends if end >= start), -1) for start in starts]
            if len(starts) != num_answers or any(stop <= start for start, stop in zip(starts, stops, strict=True)):
                raise ValueError(
                    f"sample {uid!r}: found {len(starts)} complete answers in the tokens, expected {num_answers}; an "
                    "answer was truncated or the text contains the template's own control words"
                )
            for start, stop in zip(starts, stops, strict=True):
                labels_BL[row, start : stop + 1] = ids_BL[row, start : stop + 1]
        return labels_BL


def _chat_form(processor: ProcessorMixin) -> tuple[list[int], str, int]:
    """Ids of the generation prompt, text behind an answer, and id that ends a turn, from a trial conversation."""
    question, answer = ({"role": role, "content": [{"type": "text", "text": "x"}]} for role in ("user", "assistant"))

    def write(*messages: Any, ask: bool = False) -> str:
        text: str = processor.apply_chat_template(list(messages), add_generation_prompt=ask, tokenize=False)
        return text

    prompt, turn = write(question, ask=True)[len(write(question)) :], write(question, answer)
    tokenizer = processor.tokenizer
    special = [token for token in tokenizer.all_special_tokens if token not in prompt]
    end_text = turn[turn.rindex("x") + 1 :]
    if not any(token in end_text for token in special):
        # Some templates end an answer where the next question starts: take it up to its first control token.
        behind = write(question, answer, question)[len(turn) :]
        ends = [behind.index(token) + len(token) for token in special if token in behind.partition("x")[0]]
        end_text = behind[: min(ends, default=0)]
    end_ids = tokenizer(end_text, add_special_tokens=False)["input_ids"]
    end_ids = [token for token in end_ids if token in set(tokenizer.all_special_ids)]
    if not prompt.strip() or not end_ids:
        raise ValueError(
            f"the chat template gives the generation prompt {prompt!r} and ends an answer with {end_text!r}; expected "
            "a prompt and a special end-of-turn token (ChatML or similar), else answers cannot be told from questions"
        )
    return tokenizer(prompt, add_special_tokens=False)["input_ids"], end_text, end_ids[0]


def _content(message: Message) -> dict[str, Any]:
    """One message in the form that chat templates read: a list of typed parts, in the order of the text."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(_MARKER.split(message.text)):
        if number % 2:
            parts.append({"type": piece})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return {"role": message.role, "content": parts}


def _last_answer(sample: Sample) -> str:
    last = sample.messages[-1]
    return last.text.strip() if last.role == "assistant" else ""


def _check_media(example: Example) -> None:
    text = "".join(message.text for message in example.sample.messages)
    for marker, num_media in (("<video>", int(example.has_video)), ("<image>", len(example.images))):
        num_markers = text.count(marker)
        if num_markers != num_media:
            raise ValueError(
                f"sample {example.sample.uid!r} has {num_markers} {marker} markers for {num_media} {marker[1:-1]}(s); "
                "write one marker where each medium is shown"
            )


def _check_one_kind(examples: Sequence[Example]) -> None:
    """ValueError for images beside videos, where the processor has one placeholder for both."""
    videos = [example.sample.uid for example in examples if example.has_video]
    images = [example.sample.uid for example in examples if example.images]
    if videos and images:
        raise ValueError(
            f"sample {images[0]!r} has images and sample {videos[0]!r} a video, which this model cannot take in one "
            "call; put images and videos into different batches, or leave one of the two samples out"
        )


def _to_tensor(value: Any) -> Any:
    """A tensor where the parts fit together, else the list of parts."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence) or not value:
        return value
    if all(isinstance(part, Tensor) for part in value):
        return torch.stack(list(value)) if len({part.shape for part in value}) == 1 else list(value)
    return torch.tensor([list(part) if isinstance(part, Sequence) else part for part in value])
