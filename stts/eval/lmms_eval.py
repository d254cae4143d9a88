"""Our models in lmms-eval (EvolvingLMMs-Lab/lmms-eval, 0.7), found there by entry point:

    lmms-eval --model stts --model_args pretrained=FOLDER,pruner=tango,retention_ratio=0.1,num_frames=32 --tasks ...

lmms-eval asks for older packages than we pin, so it lives in an environment of its own: scripts/lmms_eval.sh makes one.
Only lmms-eval imports this file. It is a `chat` model: tasks hand over messages, of which lmms-eval itself makes any
task's `doc_to_visual` and `doc_to_text`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages

from stts.progress import progress_bar

if TYPE_CHECKING:
    from stts.models.checkpoints.chat import Chat, Piece

_LONGEST = 1024  # new tokens where the task names no limit, as lmms-eval's own models have it


def manifest() -> ModelManifest:
    """What the entry point `lmms_eval.models` gives."""
    return ModelManifest("stts", chat_class_path=f"{__name__}.STTS")


class STTS(lmms):
    """Arguments are those of `stts.models.checkpoints.hub.load_chat`; any other one is an option of the pruner, such as
    compat=official.

    Under `accelerate launch` every process takes its share of the questions, on a device of its own."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        pruner: str | None = None,
        retention_ratio: float | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        from accelerate import Accelerator

        # here: lmms-eval loads every entry point, whichever model it then runs
        from stts.models.checkpoints.hub import load_chat

        options.pop("max_batch_size", None)  # always handed over, for sizes found by trial
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"--batch_size {batch_size} must be a number from 1 on; sizes are not found by trial here")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        alone = self._world_size == 1
        self.device = self.accelerator.device if device is None or not alone else device
        self.chat: Chat | None = load_chat(pretrained, pruner, retention_ratio, device=self.device, **options)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of `requests`. Questions of one kind and with the same settings share batches."""
        asked = [self._messages(request.args) for request in requests]
        kinds: dict[str, list[int]] = {}
        for place, (turns, request) in enumerate(zip(asked, requests, strict=True)):
            media = sorted({piece.kind for _, said in turns for piece in said})
            kinds.setdefault(f"{media} {sorted(request.args[2].items(), key=str)}", []).append(place)
        batches = [
            places[start : start + self.batch_size]
            for places in kinds.values()
            for start in range(0, len(places), self.batch_size)
        ]
        results: dict[int, GenerationResult] = {}
        retained: list[float] = []
        elapsed_s, num_tokens = 0.0, 0
        with progress_bar(len(requests), "stts", "answers", shown=self.rank == 0) as bar:
            for places in batches:
                _, _, settings, _, _, _ = requests[places[0]].args
                assert self.chat is not None
                examples = [self.chat.example(_uid(requests[place].args), asked[place]) for place in places]
                begin = time.perf_counter()
                answers = self.chat.answer(examples, **generation(settings))
                elapsed_s += time.perf_counter() - begin
                for place, answer in zip(places, answers, strict=True):
                    num_tokens += answer.num_tokens
                    retained += [] if answer.retention is None else [answer.retention]
                    text = cut(answer.text, settings.get("until"))
                    results[place] = GenerationResult(text, TokenCounts(output_tokens=answer.num_tokens))
                bar.update(len(places))
        measured = {"retention_measured": sum(retained) / len(retained)} if retained else {}
        log_metrics(elapsed_s, num_tokens, num_tokens / elapsed_s if elapsed_s else 0.0, additional_metrics=measured)
        return [results[place] for place in range(len(requests))]

    def _messages(self, args: tuple[Any, ...]) -> list[tuple[Any, list[Piece]]]:
        _, doc_to_messages, _, doc_id, task, split = args
        said = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        return [(message.role, [_piece(part, _uid(args)) for part in message.content]) for message in said.messages]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("model `stts` answers by generating; choose a task with output_type generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("model `stts` answers one question at a time; choose a task of a single round")

    def clean(self) -> None:
        self.chat = None  # where the weights are
        super().clean()


def _uid(args: tuple[Any, ...]) -> str:
    _, _, _, doc_id, task, split = args
    return f"{task}/{split}/{doc_id}"


def _piece(part: Any, uid: str) -> Piece:
    from stts.models.checkpoints.chat import Piece

    if part.type == "text":
        return Piece("text", part.text)
    if part.type not in ("video", "image"):
        raise ValueError(f"question {uid!r} brings {part.type}; model `stts` takes text, one video and images")
    source, clip = part.url, (getattr(part, "start_time", None), getattr(part, "end_time", None))
    if isinstance(source, Mapping):  # how tasks name a part of a video
        clip = source.get("video_start"), source.get("video_end")
        source = source.get("url") or source.get("path") or source.get("video")
    if clip == (None, None):
        return Piece(part.type, source)
    return Piece(part.type, source, clip=(float(clip[0] or 0.0), float("inf") if clip[1] is None else float(clip[1])))


def generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as `Chat.answer` takes them: greedy at temperature 0, which is also the default."""
    options: dict[str, Any] = {"max_new_tokens": int(settings.get("max_new_tokens") or _LONGEST)}
    if settings.get("num_beams"):
        options["num_beams"] = int(settings["num_beams"])
    if (settings.get("temperature") or 0) > 0:
        options |= {"do_sample": True, "temperature": float(settings["temperature"]), "top_p": settings.get("top_p")}
    return options


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the stops, without space around it."""
    for stop in [until] if isinstance(until, str) else until or ():
        text = text.split(stop)[0] if stop else text
    return text.strip()
