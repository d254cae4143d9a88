"""How cost grows with the number of frames: dense, training-free (VisionZip) and STTS, half of the tokens kept.

    python scripts/benchmarks/growth.py --out docs/results/cost          5 minutes on 2 CPU cores
    python scripts/benchmarks/growth.py --quick --out /tmp/cost          seconds
    python scripts/benchmarks/growth.py --redraw --out docs/results/cost  the picture again, from growth.json

Measured on a CPU, float32: a LLaVA-OneVision with random weights (ViT of 8 blocks of width 192 on 64 patches a frame,
LLM of 6 layers of width 256, 16 tokens a frame), one video of 8 to 256 frames, all ways in turns. Time: prefill, and a
training step (forward and backward). Memory: the peak that torch holds beyond weights and input, gradients included.

Counted: FLOPs of Molmo2-4B (`stts/metrics/cost.py`, formula `exact`: attention counted in full; visual tokens only;
tower, connector and pruner included), and the tokens that its LLM sees.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from measure import extra_mib, machine, spread, timed, write_json
from torch import Tensor
from transformers.utils import logging

import stts
from stts.data.collate import Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts.files import staged
from stts.metrics.cost import VideoCost
from stts.models.checkpoints.load import load_vlm
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.models.families.base import vlm_shape
from stts.models.families.published import config_of
from stts.models.pruning.report import planned_cost
from stts.pruners.listing import EXAMPLE_HOST
from stts.pruners.registry import make_pruner
from stts.tokens import Grid

CPU = torch.device("cpu")
WAYS = {"dense": None, "visionzip": "visionzip", "stts": "stts"}
RATIO = 0.5
FRAMES = (8, 16, 32, 64, 128, 256)
MOLMO2 = "allenai/Molmo2-4B"
MOLMO2_SIDE = 9  # groups per side of a frame
SIZES = {
    "image_size": 128, "patch_size": 16, "vit_width": 192, "vit_blocks": 8, "vit_heads": 3, "vit_mlp": 768,
    "llm_width": 256, "llm_layers": 6, "llm_heads": 4, "llm_kv_heads": 2, "llm_mlp": 1024,
}  # fmt: skip
QUICK = {"image_size": 64, "patch_size": 16, "vit_width": 32, "vit_blocks": 6, "vit_heads": 2, "llm_layers": 2}


# --- counted ---------------------------------------------------------------------------------------------------------


def molmo2_cost(num_frames: int, way: str) -> VideoCost:
    """One video through Molmo2-4B, as planned."""
    config = config_of(MOLMO2)
    shape, grid = vlm_shape(config), Grid(num_frames, MOLMO2_SIDE, MOLMO2_SIDE)
    host = replace(
        EXAMPLE_HOST, family="molmo2", vit_width=shape.vit.width, vit_depth=25, llm_width=shape.llm.width,
        llm_layers=shape.llm.layers, patches_per_group=shape.merge_side**2,
    )  # fmt: skip
    with torch.device("meta"):  # a scorer without memory for its weights
        pruner = make_pruner("none" if way == "dense" else way, host)
    return planned_cost(pruner, shape, host, grid, 1.0 if way == "dense" else RATIO)


# --- measured --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    way: str
    frames: int
    prefill_ms: float
    prefill_spread: float
    training_ms: float
    training_spread: float
    prefill_mib: float
    training_mib: float
    molmo2_tflop: float
    molmo2_tokens: int


def inputs_of(processor: Any, num_frames: int, training: bool) -> dict[str, Tensor]:
    side = processor.video_processor.size["height"]
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, side, side, 3), np.uint8)
    turns = (Message("user", "<video>\nwhat colour is the circle ?"), Message("assistant", "red"))
    example = Example(Sample("noise", turns), frames, np.arange(num_frames) / 2.0, duration_s=num_frames / 2.0)
    batch = Collator(processor, training=training)([example])
    assert batch is not None
    return dict(batch.inputs) | ({} if training else {"logits_to_keep": 1})


def passes(model: Any, processor: Any, num_frames: int, training: bool) -> dict[str, Callable[[], None]]:
    """A call per way."""
    model.train(training)
    inputs = inputs_of(processor, num_frames, training)

    def call(pruner: str | None) -> Callable[[], None]:
        way = None if pruner is None else stts.pruning(model, pruner, retention_ratio=RATIO, untrained=True)
        if way is not None and way.module is not None:
            way.module.train(training)

        def once() -> None:
            if way is not None:
                way.attach()
            try:
                with torch.set_grad_enabled(training):
                    out = model(**inputs, use_cache=not training)
                    if training:
                        losses = [] if way is None or way.last is None else list(way.last.losses.values())
                        torch.stack([out.loss, *losses]).sum().backward()
            finally:
                if way is not None:
                    way.detach()
            for part in (model, None if way is None else way.module):
                if part is not None:
                    part.zero_grad()

        return once

    return {name: call(pruner) for name, pruner in WAYS.items()}


def measure(frames: Sequence[int], sizes: dict[str, int], repeats: int) -> Iterator[Point]:
    """Every way at one number of frames, then at the next."""
    with tempfile.TemporaryDirectory() as scratch:
        model, processor = load_vlm(write_small_vlm(Path(scratch) / "model", **sizes), dtype=torch.float32)
    for num_frames in frames:
        found: dict[str, dict[str, Any]] = {name: {} for name in WAYS}
        for work in ("prefill", "training"):
            calls = passes(model, processor, num_frames, work == "training")
            for name, call in calls.items():  # the run that warms up is the one whose memory is read
                found[name][f"{work}_mib"] = extra_mib(call, CPU)
            rounds: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(repeats):
                for name, call in calls.items():
                    rounds[name].append(timed(call, CPU))
            for name, ms in rounds.items():
                found[name] |= {f"{work}_ms": statistics.median(ms), f"{work}_spread": spread(ms)}
        print(f"{num_frames} frames: prefill {found['dense']['prefill_ms']:.0f} ms dense", file=sys.stderr)
        for name, numbers in found.items():
            tokens = int(num_frames * MOLMO2_SIDE**2 * (1 if name == "dense" else RATIO))
            tflop = molmo2_cost(num_frames, name).total / 1e12
            yield Point(way=name, frames=num_frames, **numbers, molmo2_tflop=tflop, molmo2_tokens=tokens)


# --- drawn -----------------------------------------------------------------------------------------------------------

_STYLE = {
    "dense": ("dense", "#555555", "o", "--"),
    "visionzip": ("VisionZip, training-free", "#31688e", "s", "-"),
    "stts": ("STTS, learned", "#cb181d", "^", "-"),
}
_PANELS = (
    ("prefill_ms", "prefill (s)", 1e-3), ("training_ms", "training step (s)", 1e-3),
    ("molmo2_tflop", "FLOPs of a prefill (TFLOP)", 1.0),
    ("prefill_mib", "peak memory, prefill (MiB)", 1.0), ("training_mib", "peak memory, training step (MiB)", 1.0),
    (None, "speed-up that FLOPs allow (x dense)", 1.0),
)  # fmt: skip


def draw(content: dict[str, Any], path: Path) -> None:
    """Log-log, so that a slope of 1 is linear growth; the last panel is linear upwards."""
    figure = Figure(figsize=(13, 7.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    points = content["points"]
    frames = sorted({point["frames"] for point in points})
    for axes, (field, label, factor) in zip(figure.subplots(2, 3).flat, _PANELS, strict=True):
        for way, (name, colour, marker, line) in _STYLE.items():
            mine = [point for point in points if point["way"] == way]
            if field is not None:
                values = [factor * point[field] for point in mine]
            else:
                dense = [point["molmo2_tflop"] for point in points if point["way"] == "dense"]
                values = [rival / point["molmo2_tflop"] for rival, point in zip(dense, mine, strict=True)]
            axes.plot(frames, values, label=name, color=colour, marker=marker, linestyle=line, linewidth=1.8)
        axes.set_xscale("log", base=2)
        axes.set_title("Molmo2-4B, counted" if label.endswith(("(TFLOP)", "dense)")) else "small model, measured")
        axes.set_xlabel("frames")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(FixedLocator(frames))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        _y_axis(axes, log=field is not None)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Cost of one video by frames, half of the tokens kept ({content['device']}, float32)", fontsize=13)
    with staged(path) as part:
        figure.savefig(part, format="png")


def _y_axis(axes: Axes, log: bool) -> None:
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0.9)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for growth.json and growth.png")
    parser.add_argument("--quick", action="store_true", help="8 and 16 frames, a tiny model, once")
    parser.add_argument("--redraw", action="store_true", help="only the picture, from growth.json")
    parser.add_argument("--frames", type=int, nargs="+", default=FRAMES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="CPU threads; 1: CPU time is measured, for busy machines")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    file = args.out / "growth.json"
    if not args.redraw:
        if args.threads:
            torch.set_num_threads(args.threads)
        info = machine(CPU)
        frames, sizes, repeats = (FRAMES[:2], QUICK, 1) if args.quick else (args.frames, SIZES, args.repeats)
        setting = {"retention_ratio": RATIO, "repeats": repeats, "sizes": sizes}
        points: list[dict[str, Any]] = []
        for point in measure(frames, sizes, repeats):
            points.append(asdict(point))
            if point.way == list(WAYS)[-1]:  # a run that is stopped leaves what it has
                write_json(file, {**info, **setting, "points": points})
    draw(json.loads(file.read_text(encoding="utf-8")), args.out / "growth.png")
    print(f"wrote {file} and {args.out / 'growth.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
