"""Where the time of one `generate` goes: tower, pruning, connector, prefill, decode; and the memory it took.

    vit      the tower from its embedding on, with what a stage does inside it
    prune    signals and stages before the LLM, and shortening the prompt: what exists only because of pruning
    connect  projector and pooling, token embeddings, features put into the prompt
    prefill  the LLM on the prompt up to the logits of the first token, with stages inside the LLM
    decode   first token to last token

    TTFT on the device = vit + prune + connect + prefill

On CUDA a phase ends with an event in the stream and nothing waits until the end; elsewhere a monotonic clock is read.
Times of the two are never comparable, `PhaseTimes.device` says which it was.

**Differs** from a timer around whole modules: deepstack mergers run amid the tower's blocks in the stock
code, so they count as `vit` everywhere.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from stts.models.families.base import make_adapter
from stts.models.pruning.context import Pruning
from stts.models.pruning.visual_pass import Phase

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class PhaseTimes:
    """Milliseconds by phase, of all rows of the batch together."""

    vit_ms: float
    prune_ms: float
    connect_ms: float
    prefill_ms: float
    decode_ms: float
    num_new_tokens: int
    """Tokens of the longest answer, the first one included."""
    device: str
    """"cuda" or "cpu"."""
    weights_gib: float | None = None
    """Allocated before the call; this and the next two are None where the device does not count its memory."""
    peak_alloc_gib: float | None = None
    """Most allocated during the call, weights included."""
    peak_reserved_gib: float | None = None

    @property
    def ttft_ms(self) -> float:
        """Time to first token on the device: without decoding and preprocessing the video."""
        return self.vit_ms + self.prune_ms + self.connect_ms + self.prefill_ms

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Tokens after the first one over the time they took; None for an answer of one token."""
        return 1000 * (self.num_new_tokens - 1) / self.decode_ms if self.num_new_tokens > 1 else None


class Phases:
    """`with Phases(pruning) as phases: model.generate(...)`, then `phases.times`.

    given: a `Pruning`, attached or about to be, or a stock model of a supported family. One `generate` or forward
        pass per context. Hooks go on at entry and are gone afterwards; answers are what they are without.

    `times` raises ValueError when no prompt with video went through."""

    def __init__(self, given: Pruning | PreTrainedModel) -> None:
        self._pruning = given if isinstance(given, Pruning) else None
        self._adapter = given.adapter if isinstance(given, Pruning) else make_adapter(given)
        self._model = given.model if isinstance(given, Pruning) else given
        self._cuda = self._model.device.type == "cuda"
        self._handles: list[Any] = []
        self._marks: list[tuple[Phase, Any]] = []
        self._end: Any = None
        self._forwards = 0
        self._memory: tuple[float, float, float] | None = None

    def __enter__(self) -> Phases:
        if self._handles or self._marks:
            raise ValueError("this Phases was used already; make a new one per call of generate")
        tower, connector = self._adapter.timed_modules()
        first = {"prepend": True}  # before a Pruning's own hook on the same module, whichever was put on earlier
        self._handles = [
            self._adapter.inner.register_forward_pre_hook(lambda *_: self._switch("connect"), **first),
            tower.register_forward_pre_hook(lambda *_: self._switch("vit")),
            connector.register_forward_pre_hook(lambda *_: self._switch("connect")),
            self._adapter.language_model.register_forward_pre_hook(lambda *_: self._switch("prefill")),
            self._model.register_forward_hook(lambda *_: self._forward_ended()),
        ]
        if self._pruning is not None:
            self._pruning.listen(self._switch)
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._model.device)
            self._weights = torch.cuda.memory_allocated(self._model.device)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._pruning is not None:
            self._pruning.listen(None)
        if self._marks:
            self._end = self._now()
        if self._cuda:
            device = self._model.device
            torch.cuda.synchronize(device)
            peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
            self._memory = (self._weights / _GIB, peaks[0] / _GIB, peaks[1] / _GIB)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._model.device))
        return event

    def _switch(self, phase: Phase) -> None:
        if not self._forwards:  # afterwards everything is decode
            self._marks.append((phase, self._now()))

    def _forward_ended(self) -> None:
        self._switch("decode")
        self._forwards += 1

    @property
    def times(self) -> PhaseTimes:
        if self._end is None or not self._forwards or not any(phase == "prefill" for phase, _ in self._marks):
            raise ValueError("no prompt went through the model inside this context; call generate in it")
        spent: dict[str, float] = dict.fromkeys(get_args(Phase), 0.0)
        for (phase, begin), (_, end) in pairwise([*self._marks, ("decode", self._end)]):
            spent[phase] += begin.elapsed_time(end) if self._cuda else 1000 * (end - begin)
        weights, alloc, reserved = self._memory or (None, None, None)
        return PhaseTimes(
            **{f"{phase}_ms": ms for phase, ms in spent.items()},
            num_new_tokens=self._forwards,
            device="cuda" if self._cuda else "cpu",
            weights_gib=weights,
            peak_alloc_gib=alloc,
            peak_reserved_gib=reserved,
        )
