"""What the benchmarks share: rivals timed in turns, peak memory, FLOPs by part, the machine, tables and JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler announces every start and stop

import torch

import stts
from stts.files import write_whole
from stts.metrics.cost import VideoCost, VlmShape, llm_prefill_flops, tokens_per_layer
from stts.models.families.base import vlm_shape
from stts.models.pruning.report import Report, cost_of

Call = Callable[[], object]
PARTS = ("tower", "LLM", "pruner", "other")


@dataclass(frozen=True)
class Timed:
    """One way of several that took turns."""

    ms: float
    """Median."""
    spread: float
    """Interquartile range / median."""
    ratio: float
    """How many times faster than the rival: median over the rounds, so that what slows a whole round cancels."""
    ratio_spread: float
    """Interquartile range of that ratio / its median."""
    least: float
    """Of all rounds, in ms: what neighbours on the machine lengthen least."""


def clock_name(device: torch.device) -> str:
    """With one CPU thread the CPU's time is the wall's on an idle machine, and neighbours do not lengthen it."""
    return "CPU time" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall time"


def timed(call: Call, device: torch.device) -> float:
    """Milliseconds, the device's work included."""
    clock = time.process_time if clock_name(device) == "CPU time" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (clock() - start)


def in_turns(ways: Mapping[str, Call], device: torch.device, repeats: int) -> dict[str, Timed]:
    """Every way once to warm up, then all of them in turns; the first one is the rival of the others."""
    for call in ways.values():
        call()
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, call in ways.items():
            rounds[name].append(timed(call, device))
    rival = next(iter(rounds.values()))
    return {name: compared(rival, ms) for name, ms in rounds.items()}


def compared(rival: Sequence[float], ms: Sequence[float]) -> Timed:
    """Times of one way beside those of its rival in the same rounds."""
    ratios = [other / own for other, own in zip(rival, ms, strict=True)]
    return Timed(statistics.median(ms), spread(ms), statistics.median(ratios), spread(ratios), min(ms))


def spread(values: Sequence[float]) -> float:
    """Interquartile range / median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / middle


def extra_mib(call: Call, device: torch.device) -> float:
    """Peak of what torch's allocator holds beyond what it held before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()  # negative where memory is given back
        peak = max(peak, now)
    return peak / 2**20


def flops_of(
    pruned: stts.Pruning, report: Report | None, num_text: int, training: bool, *, causal: bool = True
) -> dict[str, int]:
    """Of the pass that `report` describes, by part; text tokens are those of one row.

    causal: the LLM's kernel skips what a causal mask hides; not so where visual tokens see each other both ways."""
    assert report is not None, "no pass was run"
    host = pruned.adapter.host
    shape = vlm_shape(pruned.model.config)
    total = dict.fromkeys(PARTS, 0)
    for video in range(len(report.grids)):
        cost = cost_of(shape, host, pruned.pruner, report, video)
        entry, *after = report.llm_counts[video]
        visual_L = tokens_per_layer(entry, report.llm_cuts, after, shape.llm.layers)
        parts = parts_of(
            cost, shape, [n + num_text for n in visual_L], training, causal=causal, learned=pruned.module is not None
        )
        total = {part: total[part] + flops for part, flops in parts.items()}
    return total


def parts_of(
    cost: VideoCost, shape: VlmShape, tokens_L: Sequence[int], training: bool, *, causal: bool, learned: bool
) -> dict[str, int]:
    """The same of one video, with `tokens_L` tokens, text included, in every layer of the LLM."""
    passes = 3 if training else 1
    return {
        "tower": passes * (cost.vit + cost.vit_embed),
        "other": passes * cost.connector,
        "pruner": (passes if learned else 1) * cost.pruner,
        "LLM": passes * llm_prefill_flops(shape.llm, tokens_L, causal=causal),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What times depend on, for the JSON."""
    return {
        "device": where(device),
        "clock": clock_name(device),
        "load_at_start": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
    }


def where(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    number = torch.get_num_threads()
    return f"CPU, {number} thread{'s' * (number > 1)}"


def table(lines: Sequence[Sequence[str]], left: int) -> str:
    """Aligned columns, the first `left` of them to the left."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    justify = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return "\n".join(
        "  ".join(place(text, width) for place, text, width in zip(justify, line, widths, strict=True)).rstrip()
        for line in lines
    )


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Whole or not at all; nothing for None."""
    if path is None:
        return
    write_whole(path, json.dumps(content, indent=2) + "\n")
