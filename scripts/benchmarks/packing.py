"""Survivors packed our way and the way of the STTS release: layout, attention and peak memory, in one run.

    python scripts/benchmarks/packing.py --json docs/results/cost/packing.json   2 minutes on 2 CPU cores
    python scripts/benchmarks/packing.py --quick                                 seconds

64, 128 and 256 frames of 27x27 patches, half of their 3x3 groups kept, 16 heads of 72 (SigLIP so400m, the tower of
Molmo2). The rival is the scheme of the release (arXiv 2603.18004), in our words: first-fit by decreasing survivors in a
Python loop that asks the device about every frame; rows of 729 slots, where a frame alone takes its dropped patches
back; a dense mask (rows, 1, 729, 729); after each block the row scattered into a zero tensor of all patches. Ours:
survivors one behind the other, boundaries, `packed_attention`; no rows, no mask, nothing to scatter.

Both get q, k and v already in their own layout. `attention` is one block, with the rival's scatter; `all` is the layout
and the 20 blocks that Molmo2 runs on survivors. Forward only, in float32 on a CPU, in bfloat16 on CUDA. Memory is the
peak that layout and one block hold beyond q, k, v. Outputs are compared first, where no dropped patch takes part.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import Timed, extra_mib, in_turns, machine, table, where, write_json
from torch import Tensor

from stts.packing.attention import kernel_name, packed_attention
from stts.packing.segments import Segments

SIDE, WINDOW = 27, 3
NUM_PATCHES = SIDE**2
BLOCKS = 20  # of 25: the scorer decides after block 3, patches leave after block 4


@dataclass(frozen=True)
class RivalRows:
    """The layout of the release, as its attention needs it."""

    row_FN: Tensor
    """int64, -1 where the patch is in no row."""
    slot_FN: Tensor
    mask_R1NN: Tensor


def survivors(num_frames: int, seed: int = 0) -> Tensor:
    """bool (F, N): half of all groups, the first frame whole, more of them where more happens."""
    generator = torch.Generator().manual_seed(seed)
    groups = (SIDE // WINDOW) ** 2
    score_FG = torch.rand(num_frames, groups, generator=generator) + 0.3 * torch.rand(
        num_frames, 1, generator=generator
    )
    score_FG[0] = 2.0
    rank = score_FG.flatten().argsort(descending=True, stable=True)
    keep = torch.zeros(num_frames * groups, dtype=torch.bool)
    keep[rank[: num_frames * groups // 2]] = True
    side = SIDE // WINDOW
    keep = keep.view(num_frames, side, 1, side, 1).expand(-1, -1, WINDOW, -1, WINDOW)
    return keep.reshape(num_frames, NUM_PATCHES)


def rival_layout(keep_FN: Tensor) -> RivalRows:
    """First-fit over tensors, frame by frame; equal frames in order (their order on a GPU is not specified)."""
    num_frames, num_slots = keep_FN.shape
    count_F = keep_FN.sum(1)
    rows: list[list[int]] = []
    fill: list[int] = []
    for frame in count_F.argsort(descending=True, stable=True):
        count = int(count_F[frame])
        if count == 0:
            continue
        row = next((r for r, used in enumerate(fill) if used + count <= num_slots), len(rows))
        if row == len(rows):
            rows.append([])
            fill.append(0)
        rows[row].append(int(frame))
        fill[row] += count
    row_FN = torch.full((num_frames, num_slots), -1, dtype=torch.int64, device=keep_FN.device)
    slot_FN = row_FN.clone()
    owner_RN = torch.full((len(rows), num_slots), -1, dtype=torch.int64, device=keep_FN.device)
    for row, frames in enumerate(rows):
        start = 0
        for frame in frames:
            # A frame alone in its row takes all of its patches along.
            patches = keep_FN[frame].nonzero()[:, 0] if len(frames) > 1 else torch.arange(num_slots).to(keep_FN.device)
            slots = start + torch.arange(len(patches), device=keep_FN.device)
            row_FN[frame, patches], slot_FN[frame, patches], owner_RN[row, slots] = row, slots, frame
            start += len(patches)
    same = owner_RN[:, :, None] == owner_RN[:, None, :]
    return RivalRows(row_FN, slot_FN, (same & (owner_RN >= 0)[:, :, None])[:, None])


def rival_attention(q_RHNE: Tensor, k_RHNE: Tensor, v_RHNE: Tensor, rows: RivalRows, keep_FN: Tensor) -> Tensor:
    """Masked attention in rows; survivors scattered back, (F, N, H, E) with zeros elsewhere."""
    out_RNHE = F.scaled_dot_product_attention(q_RHNE, k_RHNE, v_RHNE, attn_mask=rows.mask_R1NN).transpose(1, 2)
    out_FNHE = out_RNHE.new_zeros(*keep_FN.shape, *out_RNHE.shape[2:])
    out_FNHE[keep_FN] = out_RNHE[rows.row_FN[keep_FN], rows.slot_FN[keep_FN]]
    return out_FNHE


def our_layout(keep_FN: Tensor) -> tuple[Tensor, Segments]:
    """Rows of the flat patch list that survive, and where each frame ends."""
    return keep_FN.flatten().nonzero()[:, 0], Segments.from_lengths(keep_FN.sum(1), keep_FN.shape[1])


@dataclass(frozen=True)
class Row:
    frames: int
    way: str
    rows: int
    """The rival's rows of 729 slots; ours: 0."""
    waste: float
    """Slots that hold no survivor / slots."""
    layout: Timed
    attention: Timed
    all_ms: float
    all_ratio: float
    extra_mib: float
    memory_ratio: float


def bench(num_frames: int, heads: int, width: int, device: torch.device, repeats: int) -> list[Row]:
    """The rival, then ours."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    keep_FN = survivors(num_frames).to(device)
    qkv_3FNHE = torch.randn(3, *keep_FN.shape, heads, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows = rival_layout(keep_FN)
    num_rows = len(rows.mask_R1NN)
    at = (rows.row_FN >= 0).cpu()
    in_rows = qkv_3FNHE.new_zeros(3, num_rows, NUM_PATCHES, heads, width)
    in_rows[:, rows.row_FN.cpu()[at], rows.slot_FN.cpu()[at]] = qkv_3FNHE[:, at]
    q_R, k_R, v_R = in_rows.to(device).transpose(2, 3)
    row_S, segments = our_layout(keep_FN)
    q_S, k_S, v_S = qkv_3FNHE.flatten(1, 2)[:, row_S.cpu()].to(device)
    del qkv_3FNHE, in_rows
    scale = width**-0.5

    def rival_block() -> Tensor:
        return rival_attention(q_R, k_R, v_R, rows, keep_FN)

    def our_block() -> Tensor:
        return packed_attention(q_S, k_S, v_S, segments, scale=scale)

    def rival_first() -> Tensor:
        return rival_attention(q_R, k_R, v_R, rival_layout(keep_FN), keep_FN)

    def our_first() -> Tensor:
        return packed_attention(q_S, k_S, v_S, our_layout(keep_FN)[1], scale=scale)

    expected = rival_block()
    lone = (rows.mask_R1NN[:, 0].sum(-1) == NUM_PATCHES).all(1)  # refill lets dropped patches of these frames act
    own = keep_FN & ~lone[rows.row_FN]
    whole = keep_FN.all(1, keepdim=True) & keep_FN
    ours = torch.zeros_like(expected).index_put((keep_FN,), our_block())
    torch.testing.assert_close(ours[own | whole], expected[own | whole], atol=2e-2 if dtype != torch.float32 else 1e-5,
                               rtol=1e-2 if dtype != torch.float32 else 1e-4)  # fmt: skip
    del expected, ours

    layout = in_turns({"rival": lambda: rival_layout(keep_FN), "ours": lambda: our_layout(keep_FN)}, device, repeats)
    block = in_turns({"rival": rival_block, "ours": our_block}, device, repeats)
    memory = {"rival": extra_mib(rival_first, device), "ours": extra_mib(our_first, device)}
    everything = {way: layout[way].ms + BLOCKS * block[way].ms for way in layout}
    slots = {"rival": num_rows * NUM_PATCHES, "ours": len(row_S)}
    return [
        Row(
            frames=num_frames,
            way=name,
            rows=num_rows if way == "rival" else 0,
            waste=1 - len(row_S) / slots[way],
            layout=layout[way],
            attention=block[way],
            all_ms=everything[way],
            all_ratio=everything["rival"] / everything[way],
            extra_mib=memory[way],
            memory_ratio=memory["rival"] / memory[way],
        )
        for way, name in (("rival", "rows and mask"), ("ours", "ours"))
    ]


def report(rows: Sequence[Row]) -> str:
    head = [
        "frames",
        "way",
        "rows",
        "waste",
        "layout ms",
        "ratio",
        "attention ms",
        "ratio",
        "spread",
        "all ms",
        "ratio",
    ]
    lines = [[*head, "peak MiB", "ratio"]]
    for row in rows:
        lines.append(
            [
                str(row.frames), row.way, str(row.rows) if row.rows else "-", f"{row.waste:.1%}",
                f"{row.layout.ms:.2f}", f"{row.layout.ratio:.1f}x",
                f"{row.attention.ms:.1f}", f"{row.attention.ratio:.2f}x", f"{row.attention.ratio_spread:.0%}",
                f"{row.all_ms:.0f}", f"{row.all_ratio:.2f}x", f"{row.extra_mib:.0f}", f"{row.memory_ratio:.2f}x",
            ]
        )  # fmt: skip
    return table(lines, 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 frames, 2 heads of 16, once")
    parser.add_argument("--frames", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="CPU threads; 1: CPU time is measured, for busy machines")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frames, heads, width, repeats = (args.frames, 16, 72, args.repeats) if not args.quick else ([8], 2, 16, 1)
    info = machine(device)
    rows: list[Row] = []
    with torch.no_grad():
        for num_frames in frames:
            rows += bench(num_frames, heads, width, device, repeats)
            print(f"{num_frames} frames: {rows[-1].all_ratio:.2f}x", file=sys.stderr)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    print(f"{NUM_PATCHES} patches a frame, half kept, {heads} heads of {width}, {where(device)}, {info['clock']}")
    print(f"ours: {kernel_name(device, dtype)}; medians of {repeats} rounds; all = layout + {BLOCKS} blocks\n")
    print(report(rows))
    write_json(args.json, {**info, "heads": heads, "width": width, "repeats": repeats, "rows": list(map(asdict, rows))})
    return 0


if __name__ == "__main__":
    sys.exit(main())
