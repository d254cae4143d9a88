"""What deciding costs: every pruner of the registry on one video, beside the authors' way and plain loops.

    python scripts/benchmarks/pruners.py --quick               8 frames of 7x7 tokens, seconds on a CPU
    python scripts/benchmarks/pruners.py --json pruners.json   32 frames of 14x14 tokens of width 3584, minutes on a CPU

Runs in float32 on the CPU, in bfloat16 on CUDA where there is one. The video has scenes, static places and moving ones.
Times are the least of all rounds after a warm-up, as other work on a machine only lengthens them; ours and the authors'
way (`rival_*.py`: their loops over frames and windows, their matrices of all pairs) take turns, the plain loops
(`stts/pruners/naive/`) run once, with `--loops`. `peak` is the most memory that torch holds at any moment beyond the
input, over the bytes of the tokens. `launches` are operators that would start a kernel, `waits` the moments at which
the host would wait for a GPU, both of one call (`counting.py`); copies of small tables to the device are not waits
here. `same` is the share of kept tokens that the authors' way keeps too: it counts by the release's own rule, ours
exactly as planned. Collecting the signals (attention maps, keys) is not in the times: `stts compare` measures whole
forward passes.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import rival_learned
import rival_mergers
import rival_pruners
import torch
from counting import counted
from measure import extra_mib, in_turns, machine, timed, where, write_json
from measure import table as columns

import stts  # noqa: F401  (before torch's profiler pulls in torchvision)
from stts.budget import plan
from stts.pruners import ops
from stts.pruners.base import Stage
from stts.pruners.check import example_video, map_tensors
from stts.pruners.listing import EXAMPLE_HOST
from stts.pruners.registry import PRUNERS, make_pruner
from stts.pruners.stts import STTS
from stts.tokens import Budget, Grid, Kept, Site, VideoTokens

RIVALS = {**rival_pruners.RIVALS, **rival_mergers.RIVALS, **rival_learned.RIVALS}
"""The authors' way by the class of a stage."""
WHOLE_CLIP = ("divprune", "cdpruner")
"""Their loops compare every pair of tokens of a clip, one by one: hours at 6272 tokens, so they are left out there."""
OPTIONS: dict[str, dict[str, Any]] = {
    "holitom": {"tau": 0.8}, "holitom+inner": {"tau": 0.8},  # its reference takes no threshold from a table
    "vcast": {"compat": "official"}, "cacovid": {"compat": "official"},  # else frames share the budget otherwise
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    pruner: str
    stage: str
    site: str
    tokens: int
    kept: int
    ms: float
    extra_mib: float
    peak: float
    """extra_mib over the tokens' own."""
    launches: int
    waits: int
    authors_ms: float | None = None
    ratio: float | None = None
    """authors_ms / ms, of rounds in which the two took turns."""
    same: float | None = None
    naive_ms: float | None = None


def bench(
    name: str, stage: Stage, grid: Grid, width: int, ratio: float, device: torch.device, repeats: int, loops: bool
) -> Row:
    """One stage; inside the LLM it keeps half of what is left there, elsewhere `ratio`."""
    site = stage.site
    video = example_video(
        stage,
        grid,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        width=width if site.kind != "vit" else EXAMPLE_HOST.vit_width * width // EXAMPLE_HOST.llm_width,
        key_width=512 if site.kind == "llm" else 72,  # 4 key heads of 128 in the LLM; one of 72 in the tower
        frame_width=EXAMPLE_HOST.vit_width,
    )
    video = map_tensors(video, lambda tensor: tensor.to(device))
    here, share = (Site("pre_llm"), 0.5) if site.kind == "llm" else (site, ratio)
    [[budget]] = plan([here], share, [grid if site.kind == "vit" else Grid(1, 1, video.num_groups)], 2, exact=False)

    def decide() -> Kept:
        [kept] = stage([video], [budget])
        return kept

    label = getattr(stage, "label", None)  # what must stand beside every number of the method
    kind = type(stage).__name__ + (f" ({label})" if label else "") + " in training" * getattr(stage, "training", False)
    kept = decide()
    rival = RIVALS.get(type(stage).__name__)
    theirs: list[torch.Tensor] = []
    ways = {"authors": lambda: theirs.append(rival(video, budget, stage))} if rival else {}
    # Calls of less than a millisecond need more rounds for a least that is one.
    took = in_turns({**ways, "ours": decide}, device, repeats if timed(decide, device) > 5 else 20 * repeats)
    extra, tokens_mib = extra_mib(decide, device), video.x_ND.numel() * video.x_ND.element_size() / 2**20
    cached, ops.CACHED = ops.CACHED, sys.maxsize  # count as on a GPU: only a CPU goes through a video in blocks
    launches, waits = counted(decide)
    ops.CACHED = cached
    row = Row(
        name, kind, site.kind, video.num_groups, len(kept.index_K), took["ours"].least, extra, extra / tokens_mib,
        launches, waits,
    )  # fmt: skip
    if rival:
        same = torch.isin(theirs[0].cpu(), kept.index_K.cpu()).float().mean().item()
        authors_ms = took["authors"].least
        row = replace(row, authors_ms=authors_ms, ratio=authors_ms / row.ms, same=same)
    reference = reference_of(stage) if loops and not (name in WHOLE_CLIP and video.num_groups > 2000) else None
    if reference is not None:
        row = replace(row, naive_ms=timed(lambda: reference(video, budget), device))
    return row


def reference_of(stage: Stage) -> Callable[[VideoTokens, Budget], Kept] | None:
    """`naive/<file>.py` holds a function named like the file, and `<file>_inner` for a stage inside the LLM."""
    method = getattr(stage, "method", stage)  # AdaTP: the settings are on what its stages share
    file = type(stage).__module__.rpartition(".")[2]
    try:
        module = importlib.import_module(f"stts.pruners.naive.{file}")
    except ModuleNotFoundError:
        return None
    function = getattr(module, file + "_inner" * type(stage).__name__.endswith("Inner"), None)
    if function is None:
        return None
    names = list(inspect.signature(function).parameters)[2:]
    options = {name: value for name in names if (value := getattr(method, name, None)) is not None}
    return lambda video, budget: function(video, budget, **options)


def table(rows: Sequence[Row]) -> str:
    head = ["pruner", "stage", "site", "tokens", "kept", "ms", "peak", "launches", "waits"]
    lines = [[*head, "authors' ms", "ratio", "same", "loops' ms"]]
    for row in rows:
        compared = ["-"] * 3
        if row.authors_ms is not None and row.ratio is not None and row.same is not None:
            compared = [f"{row.authors_ms:.0f}", f"{row.ratio:.1f}x", f"{100 * row.same:.1f} %"]
        numbers = [
            str(row.tokens),
            str(row.kept),
            f"{row.ms:.2f}",
            f"{row.peak:.1f}",
            str(row.launches),
            str(row.waits),
        ]
        loops = "-" if row.naive_ms is None else f"{row.naive_ms:.0f}"
        lines.append([row.pruner, row.stage, row.site, *numbers, *compared, loops])
    return columns(lines, 3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 frames of 7x7 tokens of width 448")
    parser.add_argument("--pruners", nargs="+", choices=list(PRUNERS), default=list(PRUNERS), metavar="NAME")
    parser.add_argument("--retention-ratio", type=float, default=0.2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loops", action="store_true", help="also time the plain loops once: many minutes")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)

    grid, width = (Grid(8, 7, 7), 448) if args.quick else (Grid(32, 14, 14), EXAMPLE_HOST.llm_width)
    host = replace(EXAMPLE_HOST, llm_width=width, vit_width=EXAMPLE_HOST.vit_width * width // EXAMPLE_HOST.llm_width)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = {"grid": [grid.t, grid.h, grid.w], "width": width, "retention_ratio": args.retention_ratio}
    about = {**machine(device), **setting, "repeats": args.repeats}
    rows: list[Row] = []
    seen: list[Stage] = []
    with torch.no_grad():
        for name in args.pruners:
            torch.manual_seed(0)  # a learned pruner starts from random weights
            kinds: set[type[Stage]] = set()
            for stage in make_pruner(name, host, **OPTIONS.get(name, {})).stages:
                if isinstance(stage, torch.nn.Module):
                    stage.to(device)
                # Stages that another pruner shares, or that differ in the layer only (AdaTP), are timed once.
                if stage in seen or type(stage) in kinds:
                    continue
                kinds.add(type(stage))
                seen.append(stage)
                for training in (False, True)[: 1 + (type(stage) is STTS)]:  # with its temporal loss too
                    if isinstance(stage, torch.nn.Module):
                        stage.train(training)
                    rows.append(bench(name, stage, grid, width, args.retention_ratio, device, args.repeats, args.loops))
                    print(f"{name}: {rows[-1].ms:.1f} ms", file=sys.stderr)
                    write_json(args.json, {**about, "rows": [asdict(row) for row in rows]})  # some rows take minutes
    print(f"{grid.t} frames of {grid.h}x{grid.w} tokens, width {width}, {where(device)}, torch {torch.__version__}\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
