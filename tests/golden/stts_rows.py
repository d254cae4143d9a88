"""Rows of frames as the STTS release packs them (arXiv 2603.18004), to compare its golden outputs with ours; our towers
run on exact lengths and need no rows.

Shape suffixes: F = frames of the batch, N = patches per frame = slots per row, R = rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stts.packing.pack import first_fit


def first_fit_decreasing(counts: Sequence[int], capacity: int) -> list[list[int]]:
    """Item numbers per row, largest item first; equal items keep their order, items of size 0 get no row.

    Raises ValueError when an item is negative or larger than `capacity`."""
    for number, count in enumerate(counts):
        if not 0 <= count <= capacity:
            raise ValueError(
                f"item {number} has size {count}, expected 0 to capacity={capacity}; items are never split, "
                "so the capacity must be at least the largest item"
            )
    order = sorted((i for i, count in enumerate(counts) if count), key=lambda i: counts[i], reverse=True)
    return first_fit(order, counts, capacity)  # `sorted` is stable, also in reverse


@dataclass(frozen=True, slots=True)
class ReferenceRows:
    """Where the release puts every patch. Built by `reference_rows`."""

    row_FN: Tensor
    """int64 row of each patch, -1 where the patch is dropped."""
    slot_FN: Tensor
    """int64 slot inside the row, 0 to N - 1, -1 where the patch is dropped."""
    refill_FN: Tensor
    """bool, dropped patches that come back as context only because their frame is alone in its row."""
    num_rows: int
    """R."""

    def mask(self) -> Tensor:
        """bool (R, 1, N, N), true where two slots hold patches of one frame; unused slots see and are seen by none."""
        num_frames, num_slots = self.row_FN.shape
        # Dropped patches are written to one slot behind the last row: a fixed shape needs no host synchronisation.
        end = self.num_rows * num_slots
        place_FN = torch.where(self.row_FN >= 0, self.row_FN * num_slots + self.slot_FN, end)
        frame_FN = torch.arange(num_frames, device=self.row_FN.device)[:, None].expand_as(self.row_FN)
        owner = torch.full((end + 1,), -1, dtype=torch.int64, device=self.row_FN.device)
        owner_RN = owner.scatter(0, place_FN.flatten(), frame_FN.flatten())[:end].view(self.num_rows, num_slots)
        same_RNN = owner_RN[:, :, None] == owner_RN[:, None, :]
        return (same_RNN & (owner_RN >= 0)[:, :, None])[:, None]


def reference_rows(keep_FN: Tensor) -> ReferenceRows:
    """The release's row layout for a bool (F, N) survivor mask, with one transfer of F counts to the host.

    Frames are packed first-fit by decreasing survivors, into rows of N slots; a frame alone in its row also takes back
    its dropped patches ("refill"). **Differs:** a frame without survivors never gets a row; the release revives it as
    a full extra row when it is the only one in the batch, which changes nothing for survivors."""
    if keep_FN.dim() != 2 or keep_FN.dtype != torch.bool:
        raise ValueError(
            f"expected a bool survivor mask (frames, patches), got {keep_FN.dtype} {tuple(keep_FN.shape)}; "
            "flatten the batch and use `keep = scores >= threshold`"
        )
    num_frames, num_slots = keep_FN.shape
    counts = keep_FN.sum(1).tolist()
    rows = first_fit_decreasing(counts, num_slots)

    row_F, start_F, alone_F = [-1] * num_frames, [0] * num_frames, [0] * num_frames
    for row, frames in enumerate(rows):
        used = 0
        for frame in frames:
            row_F[frame], start_F[frame], alone_F[frame] = row, used, int(len(frames) == 1)
            used += counts[frame]

    plan_3F1 = torch.tensor([row_F, start_F, alone_F], device=keep_FN.device).view(3, num_frames, 1)
    row_F1, start_F1, alone_F1 = plan_3F1.unbind()
    refill_FN = alone_F1.bool() & ~keep_FN
    present_FN = keep_FN | refill_FN
    rank_FN = present_FN.cumsum(1) - 1  # place among the frame's own patches, which keep their order
    return ReferenceRows(
        row_FN=torch.where(present_FN, row_F1, -1),
        slot_FN=torch.where(present_FN, start_F1 + rank_FN, -1),
        refill_FN=refill_FN,
        num_rows=len(rows),
    )
