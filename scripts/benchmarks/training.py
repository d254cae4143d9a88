"""What packing is worth in training: the same clips of 2 s to 5 min in packed rows, and as a stock trainer feeds them.

    python scripts/benchmarks/training.py --quick                   the small VLM on a CPU, under two minutes
    python scripts/benchmarks/training.py --json training.json      more and longer clips; bf16 on CUDA
    python scripts/benchmarks/training.py --model FOLDER_OR_HUB_ID  another LLaVA-OneVision

Clips are ShapesQA, lengths log-uniform, sampled at 2 frames per second up to a limit. Every way gets the same clips in
the same order and the same budget of LLM tokens for a batch, padding counted, and does forward and backward passes
through all batches, three times; the fastest counts:

    stock, padded      as many samples as fit when each is as long as the longest: the stock class takes the videos of
                       a batch as one tensor, so shorter ones repeat their last frame (the rival)
    stock, one by one  the stock class without padding: batches of one sample
    packed, dense      first-fit by length, rows without padding, every token
    packed, STTS       the same with the learned pruner at the given retention

`waste` is the share of computed LLM tokens that belong to no sample, `unfilled` the share of the budget that batches
left empty. The loss of the dense ways without padding must agree; the padded one sees repeated frames.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import write_json

import stts
from stts.budget import plan
from stts.data.collate import IGNORED, Batch, Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts.data.shapes.clips import ShapesConfig, make_clip, sampled_indices
from stts.models.checkpoints.load import load_vlm
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.packing.pack import pack_samples

SHORTEST_S, LONGEST_S, FPS = 2.0, 300.0, 2.0


@dataclass(frozen=True)
class Row:
    way: str
    batches: int
    seconds: float
    samples_per_s: float
    waste: float
    unfilled: float
    loss: float
    ratio: float
    """samples_per_s / that of the padded stock class."""


def mixture(number: int, max_frames: int, seed: int = 0) -> list[Example]:
    """Clips whose lengths are log-uniform between 2 s and 5 min, at 2 frames per second, with one question each."""
    rng = np.random.default_rng(seed)
    config = ShapesConfig(num_sampled=8)
    examples = []
    for index in range(number):
        seconds = float(np.exp(rng.uniform(np.log(SHORTEST_S), np.log(LONGEST_S))))
        clip = make_clip(seed, "train" if seconds < 30 else "long", index, config)
        times_T = np.linspace(0, seconds, min(max_frames, max(4, round(seconds * FPS))))
        frames = clip.render(sampled_indices(clip.num_frames, len(times_T)))
        turns = (Message("user", f"<video>\n{clip.questions[0].text}"), Message("assistant", clip.questions[0].answer))
        examples.append(Example(Sample(clip.uid, turns), frames, times_T, duration_s=seconds))
    return examples


def stretched(example: Example, num_frames: int) -> Example:
    """The last frame repeated until there are `num_frames`."""
    assert example.frames is not None and example.timestamps_s is not None
    more = num_frames - len(example.frames)
    frames = np.concatenate([example.frames, np.repeat(example.frames[-1:], more, 0)])
    return replace(example, frames=frames, timestamps_s=np.pad(example.timestamps_s, (0, more), mode="edge"))


def padded_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Consecutive samples, as many as fit when each is as long as the longest of them."""
    batches: list[list[int]] = [[]]
    for number, length in enumerate(lengths):
        longest = max([length, *(lengths[i] for i in batches[-1])])
        if batches[-1] and longest * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(number)
    return batches


def run(
    model: Any, batches: Sequence[Batch], device: torch.device, pruning: stts.Pruning | None
) -> tuple[float, float]:
    """Seconds for forward and backward passes, and the mean loss of an answer token."""
    sync: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    total, tokens, seconds = 0.0, 0, 0.0
    for batch in batches:
        inputs = batch.to(device).inputs
        sync()
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = model(**inputs, use_cache=False)
        losses = [] if pruning is None or pruning.last is None else list(pruning.last.losses.values())
        torch.stack([out.loss, *losses]).sum().backward()
        sync()
        seconds += time.perf_counter() - start
        model.zero_grad()
        number = int((inputs["labels"][:, 1:] != IGNORED).sum())
        total, tokens = total + out.loss.item() * number, tokens + number
    return seconds, total / tokens


def bench(
    folder: str, examples: list[Example], budget: int, ratio: float, device: torch.device, repeats: int = 3
) -> list[Row]:
    """All four ways on the same clips."""
    model, processor = load_vlm(folder, dtype=torch.float32)
    model.to(device).train()
    collate = Collator(processor, training=True)
    made: list[Row] = []

    def batch(numbers: Sequence[int], longest: int | None = None) -> Batch:
        chosen = [examples[i] for i in numbers]
        result = collate([stretched(one, longest) for one in chosen] if longest else chosen)
        assert result is not None
        return result

    def add(way: str, batches: Sequence[Batch], real: int, pruner: str | None = None, slots: int | None = None) -> None:
        pruning = (
            None
            if pruner is None
            else stts.pruning(model, pruner, retention_ratio=ratio if pruner == "stts" else 1.0, untrained=True)
        )
        if pruning is None:
            run(model, batches[:1], device, None)
            seconds, loss = min(run(model, batches, device, None) for _ in range(repeats))
            slots = sum(one.inputs["input_ids"].numel() for one in batches)
        else:
            if pruning.module is not None:
                pruning.module.train()
            with pruning:
                run(model, batches[:1], device, pruning)
                seconds, loss = min(run(model, batches, device, pruning) for _ in range(repeats))
        assert slots is not None
        rate = len(examples) / seconds
        first = made[0].samples_per_s if made else rate
        empty = max(0.0, 1 - slots / (budget * len(batches)))
        made.append(Row(way, len(batches), seconds, rate, 1 - real / slots, empty, loss, rate / first))

    singles = [batch([i]) for i in range(len(examples))]
    lengths = [one.inputs["input_ids"].shape[1] for one in singles]
    counts = [len(one.frames) for one in examples if one.frames is not None]
    groups = padded_batches(lengths, budget)
    add("stock, padded", [batch(g, max(counts[i] for i in g)) for g in groups], sum(lengths))
    add("stock, one by one", singles, sum(lengths))
    rows = pack_samples(lengths, budget)
    add("packed, dense", [batch(row) for row in rows], sum(lengths), "none", sum(lengths))
    pruned = stts.pruning(model, "stts", retention_ratio=ratio, untrained=True)
    grids = [pruned.adapter.grid(count) for count in counts]
    planned = plan([pruned.pruner.stages[0].site], ratio, grids, pruned.adapter.host.llm_layers)[0]
    shorter = [
        length - grid.num_groups + one.num_kept for length, grid, one in zip(lengths, grids, planned, strict=True)
    ]
    rows = pack_samples(shorter, budget)
    add(f"packed, STTS {ratio:g}", [batch(row) for row in rows], sum(shorter), "stts", sum(shorter))
    return made


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few clips of at most 32 frames")
    parser.add_argument("--model", help="a LLaVA-OneVision; default: a small untrained one")
    parser.add_argument("--max_tokens", type=int, help="LLM tokens of a batch, padding counted")
    parser.add_argument("--retention_ratio", type=float, default=0.5)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    number, max_frames = (32, 32) if args.quick else (256, 64)
    examples = mixture(number, max_frames)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.model or str(write_small_vlm(Path(scratch) / "small"))
        budget = args.max_tokens or 4 * 9 * max_frames
        made = bench(folder, examples, budget, args.retention_ratio, device)
    print(f"{number} clips of 2 s to 5 min, at most {max_frames} frames, {budget} LLM tokens a batch, on {device}")
    print(f"{'':20}{'batches':>8}{'seconds':>9}{'samples/s':>11}{'ratio':>7}{'waste':>8}{'unfilled':>10}{'loss':>9}")
    for row in made:
        print(
            f"{row.way:20}{row.batches:>8}{row.seconds:>9.2f}{row.samples_per_s:>11.2f}{row.ratio:>7.2f}"
            f"{row.waste:>8.1%}{row.unfilled:>10.1%}{row.loss:>9.4f}"
        )
    write_json(args.json, {"device": str(device), "rows": [asdict(row) for row in made]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
