"""Does video input keep up with training: decoded frames per second of a core, and what a training step waits for data.

    python scripts/benchmarks/video.py --json docs/results/cost/video.json   minutes on 2 CPU cores
    python scripts/benchmarks/video.py --quick                               seconds
    python scripts/benchmarks/video.py --videos DIR/*.mp4                    your own files
    python scripts/benchmarks/video.py --gpu gpu.json                        beside step times of benchmarks/gpu.py

Decoding: H.264 clips of a minute at 25 frames per second (x264, preset veryfast), drawn here: a textured scene under a
moving camera, with noise, at 360p, 480p and 720p, a keyframe every 12 frames (short) or only where x264 sets one (long,
250). 64 frames of each. Ways:

    everything           PyAV decodes all frames in order, the chosen ones are converted; one thread
    everything, threads  the same with FFmpeg's own threads
    seek, one by one     for each chosen frame to the keyframe before it, then forward; timed once
    ours                 `stts.data.video.sample_frames`: one pass, jumps where they save work, H.264 frames that no
                         other needs left out; one thread

All return the same pixels, which is checked. `frames/s` are chosen frames per second of CPU time, all threads counted:
16 loader workers on 16 cores deliver 16 times as many samples.

Waiting: the small VLM is trained for some steps on 64-frame samples of 360p clips, without loader workers, and with one
worker beside one compute thread. `waits` is the share of the step in which the model stood still for want of data.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from growth import molmo2_cost
from measure import machine, spread, table, write_json
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging

import stts
from stts.data.collate import Batch, Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts.data.video.decode import Reader
from stts.data.video.sample import sample_frames
from stts.data.video.samplers import choose_frames
from stts.models.checkpoints.load import load_vlm
from stts.models.checkpoints.shapes_vlm import write_small_vlm

NUM_FRAMES, CORES = 64, 16
SIZES = {"360p": (640, 360), "480p": (854, 480), "720p": (1280, 720)}
GOPS = {"short": 12, "long": 250}
TINY = {"image_size": 64, "patch_size": 16, "vit_width": 32, "vit_heads": 2, "llm_layers": 2}
WAITING = {"image_size": 128, "patch_size": 16, "vit_width": 384, "vit_blocks": 8, "vit_heads": 6, "vit_mlp": 1536}
H200_FLOPS = 989.5e12  # dense bf16 a second, NVIDIA's data sheet
Frames = NDArray[np.uint8]


# --- clips -----------------------------------------------------------------------------------------------------------


def write_clip(path: Path, size: tuple[int, int], gop: int, num_frames: int, fps: int = 25) -> Path:
    """A textured scene under a moving camera, with the noise of a sensor."""
    width, height = size
    generator = np.random.default_rng(0)
    scene = generator.random(((height + 160) // 8, (width + 160) // 8)).repeat(8, 0).repeat(8, 1)
    for axis in (0, 1):
        scene = sum(np.roll(scene, shift, axis) for shift in range(-4, 5)) / 9
    luma = (40 + 160 * scene).astype(np.uint8)
    noise = generator.integers(0, 20, (8, height, width), np.uint8)
    grey = np.full((height // 2, width), 128, np.uint8)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", gop
        stream.options = {"preset": "veryfast", "crf": "25"}
        for number in range(num_frames):
            x, y = int(64 + 56 * np.sin(number / 50)), int(64 + 56 * np.sin(number / 37))
            picture = np.concatenate([luma[y : y + height, x : x + width] + noise[number % 8], grey])
            frame = VideoFrame.from_ndarray(picture, format="yuv420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# --- ways of decoding ------------------------------------------------------------------------------------------------


def _wanted(path: Path) -> list[int]:
    """Presentation times of the frames that the sampler chooses."""
    index = Reader(str(path), float("inf")).index_packets()
    assert index.pts_F is not None
    return index.pts_F[choose_frames(index.timeline, "uniform_inclusive", NUM_FRAMES)].tolist()


def everything(path: Path, threads: str = "NONE") -> Frames:
    wanted, found = set(_wanted(path)), []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = threads
        stream.codec_context.thread_count = 1 if threads == "NONE" else 0
        for frame in container.decode(stream):
            if frame.pts in wanted:
                found.append(frame.to_ndarray(format="rgb24", threads=1))
    return np.stack(found)


def seek_each(path: Path) -> Frames:
    found = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
        for pts in _wanted(path):
            container.seek(pts, stream=stream)
            frame = next(frame for frame in container.decode(stream) if frame.pts == pts)
            found.append(frame.to_ndarray(format="rgb24", threads=1))
    return np.stack(found)


WAYS: dict[str, Callable[[Path], Frames]] = {
    "everything": everything,
    "everything, threads": lambda path: everything(path, "AUTO"),
    "seek, one by one": seek_each,
    "ours": lambda path: sample_frames(path, num_frames=NUM_FRAMES).frames,
}


@dataclass(frozen=True)
class Row:
    clip: str
    way: str
    cpu_s: float
    """CPU seconds for the sample, median."""
    spread: float
    frames_per_s: float
    """Chosen frames per second of CPU time."""
    ratio: float
    """Against `everything`."""


def bench(clip: str, path: Path, repeats: int) -> list[Row]:
    """All ways in turns."""
    oracle = everything(path)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(repeats):
        for way, decode in WAYS.items():
            if turn and decode is seek_each:  # a quarter of a minute and more, so once
                continue
            begin = time.process_time()
            frames = decode(path)
            seconds[way].append(time.process_time() - begin)
            if not np.array_equal(frames, oracle):
                raise AssertionError(f"{way} returned other pixels than decoding everything: {path}")
    rival = float(np.median(seconds["everything"]))
    return [
        Row(clip, way, median, spread(values), len(oracle) / median, rival / median)
        for way, values in seconds.items()
        for median in [float(np.median(values))]
    ]


# --- waiting ---------------------------------------------------------------------------------------------------------


class Clips(Dataset[Example]):
    """The same file under many names: no cache is in the way."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, number: int) -> Example:
        clip = sample_frames(self.path, num_frames=NUM_FRAMES)
        turns = (Message("user", "<video>\nwhat colour is the circle ?"), Message("assistant", "red"))
        return Example(Sample(str(number), turns), clip.frames, clip.timestamps_s, duration_s=clip.source.duration_s)


@dataclass(frozen=True)
class Waiting:
    workers: int
    steps: int
    step_s: float
    """Mean, waiting included."""
    waits: float
    """Share of it spent waiting for data."""


def waiting(path: Path, workers: int, steps: int, sizes: dict[str, int]) -> Waiting:
    """Train on one-sample batches; the first step, in which workers start, is not counted."""
    with tempfile.TemporaryDirectory() as scratch:
        model, processor = load_vlm(write_small_vlm(Path(scratch) / "model", **sizes), dtype=torch.float32)
    model.train()
    collate = Collator(processor, training=True)
    loader: DataLoader[Example] = DataLoader(
        Clips(path, steps + 1), batch_size=1, collate_fn=collate, num_workers=workers,
        prefetch_factor=2 if workers else None, multiprocessing_context="fork" if workers else None,
    )  # fmt: skip
    pruned = stts.pruning(model, "stts", retention_ratio=0.5, untrained=True)
    waited = begin = 0.0
    with pruned:
        batches = iter(loader)
        for step in range(steps + 1):
            before = time.perf_counter()
            batch: Batch = next(batches)
            if step:
                waited += time.perf_counter() - before
            out = model(**batch.inputs, use_cache=False)
            losses = [] if pruned.last is None else list(pruned.last.losses.values())
            torch.stack([out.loss, *losses]).sum().backward()
            model.zero_grad()
            if not step:
                begin = time.perf_counter()
    total = time.perf_counter() - begin
    return Waiting(workers, steps, total / steps, waited / total)


# --- report ----------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short clip of 3 s, a tiny model, one step")
    parser.add_argument("--videos", type=Path, nargs="+", help="files to decode instead of drawn clips")
    parser.add_argument("--seconds", type=int, default=60, help="length of drawn clips")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gpu", type=Path, help="JSON of benchmarks/gpu.py that has training at 64 frames, half kept")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    logging.disable_progress_bar()
    if args.quick:
        args.seconds, args.repeats = 3, 1
    torch.set_num_threads(1)  # the model's one core; the other one is the loader's
    with tempfile.TemporaryDirectory() as scratch:
        clips = {path.name: path for path in args.videos or ()}
        for size, (name, gop) in product({"360p"} if args.quick else SIZES, GOPS.items()):
            if not args.videos:
                path = Path(scratch) / f"{size}-{name}.mp4"
                clips[f"{size}, {name} GOP"] = write_clip(path, SIZES[size], gop, 25 * args.seconds)
                print(f"{path.name}: {path.stat().st_size / 125e3 / args.seconds:.1f} Mbit/s", file=sys.stderr)
        rows: list[Row] = []
        for clip, path in clips.items():
            rows += bench(clip, path, args.repeats)
            print(f"{clip}: {rows[-1].ratio:.2f}x", file=sys.stderr)
        sizes = dict(TINY) if args.quick else dict(WAITING)
        path = next(iter(clips.values()))
        steps = 1 if args.quick else 8
        waits = [waiting(path, workers, steps, sizes) for workers in (0, 1)]
    step_s = None if args.gpu is None else step_of(json.loads(args.gpu.read_text(encoding="utf-8")))
    print(report(rows, waits, step_s))
    content = {"molmo2_4b_training_tflop": TRAINING_FLOPS / 1e12, "step_s": step_s}
    content |= {"rows": [asdict(row) for row in rows], "waiting": [asdict(one) for one in waits]}
    write_json(args.json, {**machine(torch.device("cpu")), "clock": "CPU time; waiting: wall time", **content})
    return 0


TRAINING_FLOPS = 3 * molmo2_cost(NUM_FRAMES, "stts").total  # forward and backward, nothing computed again


def step_of(content: dict[str, Any]) -> float:
    """Seconds of a training step of STTS on one sample, from the JSON of gpu.py. ValueError where it has none."""
    suffix = f"training {NUM_FRAMES} stts 0.5"
    found = [cell["total_ms"] for key, cell in content["cells"].items() if key.endswith(suffix) and "total_ms" in cell]
    if not found:
        raise ValueError(f"no cell '...{suffix}' with a time; run gpu.py without --quick, or leave --gpu out")
    return float(found[0]) / 1e3


def report(rows: Sequence[Row], waits: Sequence[Waiting], step_s: float | None) -> str:
    lines = [["clip", "way", "CPU s", "spread", "frames/s", "ratio", f"samples/s of {CORES} cores"]]
    for row in rows:
        numbers = [f"{row.cpu_s:.2f}", f"{row.spread:.0%}", f"{row.frames_per_s:.1f}", f"{row.ratio:.2f}x"]
        lines.append([row.clip, row.way, *numbers, f"{CORES / row.cpu_s:.1f}"])
    slowest = max((row for row in rows if row.way == "ours"), key=lambda row: row.cpu_s)
    needed_s, least_s = slowest.cpu_s / CORES, TRAINING_FLOPS / H200_FLOPS
    text = [
        table(lines, 2),
        "",
        f"Estimate, not measured on one machine: {CORES} cores decode a {NUM_FRAMES}-frame sample of the slowest clip "
        f"({slowest.clip}) in {needed_s:.2f} s.",
        f"To train Molmo2-4B with STTS on it, half kept, takes {TRAINING_FLOPS / 1e12:.0f} TFLOP, {least_s:.2f} s of "
        f"an H200 at its peak: decoding would hold it up only above {least_s / needed_s:.0%} of that peak.",
    ]
    if step_s is not None:
        text.append(
            f"The step measured on a GPU takes {step_s:.2f} s: the cores decode for {needed_s / step_s:.0%} of it."
        )
    text.append("")
    for one in waits:
        how = f"{one.workers} loader worker, overlapped" if one.workers else "no loader worker"
        text.append(f"{how}: {one.steps} steps of {1e3 * one.step_s:.0f} ms, {one.waits:.1%} of it waiting for data")
    return "\n".join(text)


if __name__ == "__main__":
    sys.exit(main())
