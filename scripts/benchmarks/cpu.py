"""How much of the arithmetic that a pruner saves turns into time, on a CPU: prefill and a training step, part by part.

    python scripts/benchmarks/cpu.py --json docs/results/cost/cpu.json   4 minutes on 2 CPU cores
    python scripts/benchmarks/cpu.py --quick                             seconds

Two LLaVA-OneVision with random weights: `tiny`, the small VLM of ShapesQA, and `base`, ViT-B/16 (12 blocks of width
768, 196 patches, 49 tokens a frame) with the widths of Qwen2-0.5B at a third of its depth and a small vocabulary. All
ways run on the same model, videos and prompts, in turns; the rival is `dense`, the stock class without us. Float32.

`speed-up` is the rival's time / the way's time, `ceiling` the same of their FLOPs (formula `exact`, causal attention
halved because the kernel skips that half, text counted), `share` speed-up / ceiling. A training step is forward and
backward; its FLOPs are three times those of the forward pass, but a training-free choice has no backward pass. Parts:
`tower` patch embedding and blocks, `LLM` decoder layers, `pruner` the choice itself, `other` connector, merging, head,
loss. In training the backward pass of connector and scorer counts as tower.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import PARTS, Timed, clock_name, compared, flops_of, machine, table, where, write_json
from torch import Tensor, nn
from transformers.utils import logging

import stts
from stts.data.collate import Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts.models.checkpoints.load import load_vlm
from stts.models.checkpoints.shapes_vlm import write_small_vlm

DENSE = "dense"
CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {"holitom": {"tau": 0.8}}  # its table of thresholds knows published ratios only


@dataclass(frozen=True)
class Shape:
    sizes: dict[str, int]
    """For `write_small_vlm`."""
    videos: int
    """A batch."""
    frames: int
    repeats: int
    prefill: tuple[str, ...]
    training: tuple[str, ...]


SHAPES = {
    "tiny": Shape(
        {}, 8, 32, 7,
        ("stts", "random-vit", "visionzip", "fastvid", "holitom", "tango", "vidcom2", "fastv", "dart", "adatp"),
        ("stts", "random-vit", "visionzip"),
    ),
    "base": Shape(
        {"image_size": 224, "patch_size": 16, "vit_width": 768, "vit_blocks": 12, "vit_heads": 12, "vit_mlp": 3072,
         "llm_width": 896, "llm_layers": 8, "llm_heads": 14, "llm_kv_heads": 2, "llm_mlp": 4864},
        1, 8, 2, ("stts", "random-vit", "visionzip", "fastv"), ("stts", "visionzip"),
    ),
}  # fmt: skip


class Clock:
    """Where the time of one pass goes, by hooks on the stock modules; `mark` works with our hooks on or off."""

    def __init__(self, model: nn.Module) -> None:
        self.now = time.process_time if clock_name(CPU) == "CPU time" else time.perf_counter
        self._model: Any = model.model
        self.reset()

    def reset(self) -> None:
        """Before every pass."""
        self.spent = dict.fromkeys(PARTS, 0.0)
        self._begin: dict[str, float] = {}
        self._inside = ""
        self._graded: float | None = None

    def _start(self, part: str) -> None:
        self._inside, self._begin[part] = part, self.now()

    def _stop(self, part: str) -> None:
        self.spent[part] += self.now() - self._begin[part]
        self._inside = ""

    @contextmanager
    def on(self) -> Iterator[None]:
        """Hooks go on last, so that ours run before the LLM's clock starts."""
        tower, llm = self._model.vision_tower, self._model.language_model

        def enter_llm(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            embeds: Tensor = kwargs["inputs_embeds"]
            if embeds.requires_grad:
                embeds.register_hook(lambda _: setattr(self, "_graded", self.now()))
            self._start("LLM")

        handles = [
            tower.embeddings.register_forward_pre_hook(lambda *_: self._start("tower")),
            tower.encoder.layers[-1].register_forward_hook(lambda *_: self._stop("tower")),
            llm.register_forward_pre_hook(enter_llm, with_kwargs=True),
            llm.register_forward_hook(lambda *_: self._stop("LLM")),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def around_stage(self) -> Iterator[None]:
        """For `Pruning`: the time of its stages."""
        begin = self.now()
        try:
            yield
        finally:
            spent = self.now() - begin
            self.spent["pruner"] += spent
            if self._inside:  # inside the ViT or the LLM: not theirs
                self.spent[self._inside] -= spent

    def backward(self, loss: Tensor) -> None:
        """The LLM's part ends where the gradient reaches its inputs."""
        begin = self.now()
        loss.backward()
        end = self.now()
        middle = end if self._graded is None else self._graded
        self.spent["LLM"] += middle - begin
        self.spent["tower"] += end - middle


@dataclass(frozen=True)
class Row:
    shape: str
    work: str
    way: str
    time: Timed
    ceiling: float
    share: float
    flops: dict[str, int]
    parts_ms: dict[str, float]
    """Medians."""
    parts_ratio: dict[str, float | None]
    """The rival's median / this one, where the rival spends time too."""
    parts_ceiling: dict[str, float | None]
    """The same of FLOPs."""


def batch_of(processor: Any, shape: Shape, training: bool) -> dict[str, Tensor]:
    """Noise: a scene would be no faster and no slower."""
    generator = np.random.default_rng(0)
    side = processor.video_processor.size["height"]
    examples = []
    for number in range(shape.videos):
        frames = generator.integers(0, 256, (shape.frames, side, side, 3), np.uint8)
        turns = (Message("user", "<video>\nwhat colour is the circle ?"), Message("assistant", "red"))
        sample = Sample(str(number), turns)
        examples.append(Example(sample, frames, np.arange(shape.frames) / 2.0, duration_s=shape.frames / 2.0))
    batch = Collator(processor, training=training)(examples)
    assert batch is not None
    return dict(batch.inputs)


def ways_of(
    model: Any, pruners: Sequence[str], clock: Clock, ratio: float, training: bool
) -> dict[str, stts.Pruning | None]:
    """Dense (None) and every pruner at this ratio, untrained where it learns."""
    ways: dict[str, stts.Pruning | None] = {DENSE: None}
    for pruner in pruners:
        settings = {"retention_ratio": ratio, "untrained": True, "around_stage": clock.around_stage}
        way = ways[pruner] = stts.pruning(model, pruner, **settings, **OPTIONS.get(pruner, {}))
        if way.module is not None:
            way.module.train(training)
    return ways


def bench(name: str, shape: Shape, work: str, pruners: Sequence[str], ratio: float, repeats: int) -> list[Row]:
    """Dense, then every pruner."""
    training = work == "training"
    with tempfile.TemporaryDirectory() as scratch:
        model, processor = load_vlm(write_small_vlm(Path(scratch) / "model", **shape.sizes), dtype=torch.float32)
    model.train(training)
    inputs = batch_of(processor, shape, training)
    if not training:
        inputs["logits_to_keep"] = 1
    torch.manual_seed(0)
    clock = Clock(model)
    ways = ways_of(model, pruners, clock, ratio, training)

    def once(way: stts.Pruning | None) -> dict[str, float]:
        clock.reset()
        attached: Any = nullcontext() if way is None else way
        with attached, clock.on(), torch.set_grad_enabled(training):
            begin = clock.now()
            out = model(**inputs, use_cache=not training)
            if training:
                losses = [] if way is None or way.last is None else list(way.last.losses.values())
                clock.backward(torch.stack([out.loss, *losses]).sum())
            total = clock.now() - begin
        model.zero_grad()
        spent = {part: 1e3 * seconds for part, seconds in clock.spent.items()}
        return {**spent, "other": 1e3 * total - sum(spent.values()), "total": 1e3 * total}

    for way in ways.values():
        once(way)
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(repeats):
        for label, way in ways.items():
            rounds[label].append(once(way))

    whole = stts.pruning(model, "none")
    with whole, torch.no_grad():
        model(**{**inputs, "labels": None} if training else inputs)
    assert whole.last is not None
    num_text = inputs["input_ids"].shape[1] - whole.last.num_groups[0]
    flops = {label: flops_of(way or whole, (way or whole).last, num_text, training) for label, way in ways.items()}
    medians = {
        label: {part: statistics.median(one[part] for one in every) for part in PARTS}
        for label, every in rounds.items()
    }
    rival = [one["total"] for one in rounds[DENSE]]
    rows = []
    for label, every in rounds.items():
        time_ = compared(rival, [one["total"] for one in every])
        ceiling = sum(flops[DENSE].values()) / sum(flops[label].values())
        ratios = {part: over(medians[DENSE][part], medians[label][part]) for part in PARTS}
        ceilings = {part: over(flops[DENSE][part], flops[label][part]) for part in PARTS}
        share = time_.ratio / ceiling
        rows.append(Row(name, work, label, time_, ceiling, share, flops[label], medians[label], ratios, ceilings))
    return rows


def over(rival: float, own: float) -> float | None:
    return rival / own if rival > 0 and own > 0 else None


def report(rows: Sequence[Row]) -> str:
    head = ["way", "ms", "spread", "speed-up", "ceiling", "share"]
    lines = [[*head, "tower ms", "x / ceiling", "LLM ms", "x / ceiling", "pruner ms", "other ms"]]
    for row in rows:
        parts = []
        for part in ("tower", "LLM"):
            ratio, ceiling = row.parts_ratio[part], row.parts_ceiling[part]
            parts += [f"{row.parts_ms[part]:.1f}", f"{ratio:.2f} / {ceiling:.2f}"]
        lines.append(
            [
                row.way, f"{row.time.ms:.1f}", f"{row.time.ratio_spread:.0%}", f"{row.time.ratio:.2f}x",
                f"{row.ceiling:.2f}x", f"{row.share:.2f}", *parts,
                f"{row.parts_ms['pruner']:.1f}", f"{row.parts_ms['other']:.1f}",
            ]
        )  # fmt: skip
    return table(lines, 1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the tiny shape, two pruners, once")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--retention_ratio", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, help="rounds; default: 7 tiny, 2 base")
    parser.add_argument("--threads", type=int, help="CPU threads; 1: CPU time is measured, for busy machines")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    info = machine(CPU)
    logging.disable_progress_bar()
    print(f"{where(CPU)}, {info['clock']}, {args.retention_ratio:g} of the visual tokens kept; medians")
    rows: list[Row] = []
    for name in ["tiny"] if args.quick else args.shapes:
        shape = SHAPES[name]
        for work, pruners in (("prefill", shape.prefill), ("training", shape.training)):
            repeats = 1 if args.quick else args.repeats or shape.repeats
            shape = replace(shape, videos=1, frames=4) if args.quick else shape
            found = bench(name, shape, work, pruners[:2] if args.quick else pruners, args.retention_ratio, repeats)
            print(f"\n{name}, {work}: {shape.videos} x {shape.frames} frames, {repeats} rounds\n")
            print(report(found), flush=True)
            rows += found
    setting = {"retention_ratio": args.retention_ratio, "shapes": {name: asdict(SHAPES[name]) for name in SHAPES}}
    write_json(args.json, {**info, **setting, "rows": [asdict(row) for row in rows]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
