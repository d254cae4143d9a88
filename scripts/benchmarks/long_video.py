"""Peak memory and time from one minute to one hour of video, whole and in pieces: what grows, and what does not.

    python scripts/benchmarks/long_video.py --quick                   seconds: up to 2 minutes of video
    python scripts/benchmarks/long_video.py --json long_video.json    up to 1 hour, minutes on 2 CPU cores

Decoding, preprocessing, tower, pruner and connector up to the first layer of the LLM, of the small VLM shipped with
stts, on one MP4 of ShapesQA clips one behind the other. `whole`: every frame decoded, then one pass; `pieces`: frames
are streamed, `--chunk-frames` at a time. Pruners keep at most `--budget` tokens, so that the LLM's own cost, which is
not in the numbers, is the same for every length; dense hands the LLM everything, and its prompt grows with the video.

`peak` is the most memory at any moment beyond what was there before: resident memory on Linux, torch's allocator on
CUDA. `holds` is what a method must keep in pieces, from shapes: outputs of the connector (of every token; STTS: of kept
ones), signals or scores, and the prompt, which stock code makes at its full length before any token is dropped.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measure
import torch

from stts.data.collate import Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts.data.shapes.clips import ShapesConfig, make_clip
from stts.data.shapes.files import encode
from stts.data.video.sample import FrameStream, sample_frames
from stts.models.checkpoints.load import load_vlm
from stts.models.pruning.context import Pruning
from stts.pruners.registry import make_pruner

MIB = 2**20
MODEL = Path(__file__).parents[2] / "stts" / "assets" / "shapes_vlm"
VIDEO_FPS = 4.0


@dataclass(frozen=True)
class Row:
    minutes: float
    frames: int
    pruner: str
    mode: str
    llm_tokens: int
    """Visual tokens handed to the LLM."""
    seconds: float
    peak_mib: float
    holds_mib: float


class _AtTheLLM(Exception):
    """Stops a pass where the LLM would begin."""


def write_video(path: Path, minutes: float, frame_size: int) -> None:
    """At least so long; ShapesQA clips of 30 seconds to 5 minutes one behind the other."""
    config = ShapesConfig(frame_size=frame_size, fps=VIDEO_FPS, num_sampled=8)
    clips, frames = [], 0
    while frames < minutes * 60 * VIDEO_FPS:
        clips.append(make_clip(0, "long", len(clips), config))
        frames += clips[-1].num_frames
    encode(clips, path)


def example(path: Path, minutes: float, fps: float, stream: bool) -> Example:
    """The first minutes of the file at `fps` frames a second."""
    num_frames = round(minutes * 60 * fps)
    choice: dict[str, Any] = {"num_frames": num_frames, "clip": (0.0, minutes * 60 - 1 / VIDEO_FPS)}
    sample = Sample("long", (Message("user", "<video>\nwhich colour flashed ?"),))
    if stream:
        frames = FrameStream(path, **choice)
        return Example(sample, None, frames.timestamps_s, duration_s=frames.source.duration_s, stream=frames)
    clip = sample_frames(path, **choice)
    return Example(sample, clip.frames, clip.timestamps_s, duration_s=clip.source.duration_s)


class Memory:
    """Most memory in use between `start` and `peak_mib`, beyond what was in use at `start`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0.0
        if device.type != "cuda" and not Path("/proc/self/clear_refs").exists():
            raise SystemExit("resident memory is read from /proc, which this system lacks; run on Linux or on CUDA")

    def start(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
            return
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self.before = _status("VmRSS")

    def peak_mib(self) -> float:
        if self.device.type == "cuda":
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / MIB
        return (_status("VmHWM") - self.before) / MIB


def _status(name: str) -> float:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":")]
    return float(line.split()[1]) * 1024


def run(
    model: Any, processor: Any, path: Path, name: str, minutes: float, args: argparse.Namespace, stream: bool
) -> Row:
    """One pass up to the LLM."""
    host = Pruning(model, "none").adapter.host
    options = {"prune_block": 1} if name == "stts" else {}
    torch.manual_seed(0)  # a learned pruner starts from random weights: what it keeps is not the point here
    pruner = make_pruner(name, host, **options)
    frames = round(minutes * 60 * args.fps)
    grid = Pruning(model, "none").adapter.grid(frames)
    ratio = 1.0 if name == "none" else min(1.0, args.budget / grid.num_groups)
    pruning = Pruning(
        model, pruner, retention_ratio=ratio, chunk_frames=args.chunk_frames if stream else None, untrained=True
    )

    def stop(module: Any, given: Any, kwargs: dict[str, Any]) -> None:
        raise _AtTheLLM

    def up_to_the_llm() -> None:
        batch = Collator(processor, training=False)([example(path, minutes, args.fps, stream)])
        assert batch is not None
        with pruning, torch.inference_mode():
            pruning.describe(batch.video_uids, batch.timestamps_s, ["which colour flashed ?"])
            handle = pruning.adapter.language_model.register_forward_pre_hook(stop, with_kwargs=True)
            try:
                model(**batch.to(model.device).inputs)
            except _AtTheLLM:
                pass
            finally:
                handle.remove()

    memory = Memory(model.device)
    memory.start()
    seconds = measure.timed(up_to_the_llm, model.device) / 1000
    peak = memory.peak_mib()
    assert pruning.last is not None
    kept = sum(pruning.last.num_kept)
    return Row(minutes, frames, name, "pieces" if stream else "whole", kept, seconds, peak, holds(pruning, grid, kept))


def holds(pruning: Pruning, grid: Any, kept: int) -> float:
    """MiB, fp32: see the module docstring."""
    host, stages = pruning.adapter.host, pruning.pruner.stages
    in_vit = any(stage.site.kind == "vit" for stage in stages)
    features = (kept if in_vit else grid.num_groups) * host.llm_width
    signals = {signal for stage in stages for signal in stage.signals}
    per_token = {"attn": 1, "probe": 1, "keys": host.vit_width // host.vit_heads}
    made = sum(grid.num_groups * per_token.get(signal, 0) for signal in signals)
    made += grid.t * host.llm_width * ("frame" in signals)
    scores = grid.num_groups if in_vit else 0
    prompt = grid.num_groups * host.llm_width
    return 4 * (features + made + scores + prompt) / MIB


def table(rows: Sequence[Row]) -> str:
    lines = [["pruner", "mode", "minutes", "frames", "tokens to the LLM", "s", "peak MiB", "of whole", "holds MiB"]]
    whole = {(row.pruner, row.minutes): row for row in rows if row.mode == "whole"}
    for row in rows:
        rival = whole.get((row.pruner, row.minutes))
        share = "-" if rival is None or row is rival else f"{row.peak_mib / max(rival.peak_mib, 1e-9):.2f}x"
        numbers = [f"{row.minutes:g}", str(row.frames), str(row.llm_tokens), f"{row.seconds:.2f}"]
        lines.append(
            ["dense" if row.pruner == "none" else row.pruner, row.mode, *numbers,
             f"{row.peak_mib:.0f}", share, f"{row.holds_mib:.1f}"]
        )  # fmt: skip
    return measure.table(lines, left=2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="half a minute and two minutes of video")
    parser.add_argument("--minutes", nargs="+", type=float, default=[1.0, 4.0, 15.0, 60.0])
    parser.add_argument("--pruners", nargs="+", default=["none", "visionzip", "stts"], metavar="NAME")
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second that are looked at")
    parser.add_argument("--chunk-frames", type=int, default=64)
    parser.add_argument("--budget", type=int, default=576, help="visual tokens that pruners keep, at most")
    parser.add_argument("--frame-size", type=int, default=96, help="height and width of the video in pixels")
    parser.add_argument("--video", type=Path, help="use this file instead of drawing one")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    minutes = [0.5, 2.0] if args.quick else sorted(args.minutes)
    model, processor = load_vlm(MODEL)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    model.config.text_config.max_position_embeddings = 1 << 30  # the LLM does not run, so nothing is too long for it
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path = args.video or Path(folder) / "long.mp4"
        if args.video is None:
            print(f"drawing {minutes[-1]:g} minutes of video", file=sys.stderr)
            write_video(path, minutes[-1], args.frame_size)
        run(model, processor, path, "none", minutes[0], args, stream=True)  # warms caches
        for name in args.pruners:
            for length in minutes:
                for stream in (False, True):
                    rows.append(run(model, processor, path, name, length, args, stream))
                    print(f"{name} {length:g} min: {rows[-1].seconds:.1f} s", file=sys.stderr)
    print(
        f"{args.fps:g} frames a second, pieces of {args.chunk_frames} frames, budget {args.budget} tokens, "
        f"{measure.where(model.device)}, {measure.clock_name(model.device)}, torch {torch.__version__}\n\n"
        f"{table(rows)}\n\n"
        "holds: connector outputs (stts: of kept tokens only), signals or scores, and the prompt at its full length"
    )
    setting = {"fps": args.fps, "chunk_frames": args.chunk_frames, "budget": args.budget, "frame_size": args.frame_size}
    content = {**setting, **measure.machine(model.device), "rows": [asdict(row) for row in rows]}
    measure.write_json(args.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
