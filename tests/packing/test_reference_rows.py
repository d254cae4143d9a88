"""The release's row layout, against layouts made by the release's own code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.golden.stts_rows import reference_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "data" / "stts" / "case7_packing_only.safetensors"
ABSENT = -99  # how the file marks a patch that went nowhere; -1 there is the revived frame


def golden(group: str) -> dict[str, Tensor]:
    prefix = group + "."
    return {name.removeprefix(prefix): x for name, x in load_file(GOLDEN).items() if name.startswith(prefix)}


def without_revived_frame(case: dict[str, Tensor], frame: int) -> dict[str, Tensor]:
    """The same layout from a packer that gives a frame without survivors no row: its extra last row is gone."""
    case = {name: x.clone() for name, x in case.items()}
    assert (case["packed_row"][frame] == -1).all() and case["refill_mask"][frame].all(), "the defect is in the file"
    case["packed_row"][frame] = case["packed_slot"][frame] = ABSENT
    case["refill_mask"][frame] = False
    case["packed_x"], case["packed_attn_mask"] = case["packed_x"][:-1], case["packed_attn_mask"][:-1]
    return case


@pytest.mark.parametrize(
    "group", ["random_groups", "all_full", "lone_frame", "several_empty", "one_empty", "many_small"]
)
def test_layout_equals_the_release(group: str) -> None:
    case = golden(group)
    if group == "one_empty":
        case = without_revived_frame(case, frame=4)
    rows = reference_rows(case["keep"])

    assert rows.num_rows == len(case["packed_x"])
    present = case["packed_slot"] != ABSENT
    assert torch.equal(rows.row_FN, case["packed_row"].where(present, -1))
    assert torch.equal(rows.slot_FN, case["packed_slot"].where(present, -1))
    assert torch.equal(rows.refill_FN, case["refill_mask"])
    assert torch.equal(rows.mask(), case["packed_attn_mask"])

    packed = torch.zeros_like(case["packed_x"])
    packed[rows.row_FN[present], rows.slot_FN[present]] = case["x"][present]
    assert torch.equal(packed, case["packed_x"])


def test_a_layout_small_enough_to_read() -> None:
    # Frame 1 (3 patches) comes first and has room for frame 0 (1 patch), frame 3 is full, frame 2 is empty and frame 4
    # (2 patches) is alone, so it takes its two dropped patches back.
    keep = torch.tensor([[0, 0, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    rows = reference_rows(keep)
    assert rows.num_rows == 3
    assert rows.row_FN.tolist() == [[-1, -1, 1, -1], [1, -1, 1, 1], [-1] * 4, [0] * 4, [2] * 4]
    assert rows.slot_FN.tolist() == [[-1, -1, 3, -1], [0, -1, 1, 2], [-1] * 4, [0, 1, 2, 3], [0, 1, 2, 3]]
    assert rows.refill_FN.int().tolist() == [[0] * 4, [0] * 4, [0] * 4, [0] * 4, [1, 0, 0, 1]]
    assert rows.mask()[1, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


def test_unused_slots_see_and_are_seen_by_nothing() -> None:
    keep = torch.tensor([[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)  # 3 of 6 slots used
    mask = reference_rows(keep).mask()
    assert mask.shape == (1, 1, 6, 6)
    assert not mask[..., 3:, :].any() and not mask[..., :, 3:].any() and mask.sum() == 4 + 1


@pytest.mark.parametrize("shape", [(0, 4), (3, 4)])
def test_no_survivors_no_rows(shape: tuple[int, int]) -> None:
    rows = reference_rows(torch.zeros(shape, dtype=torch.bool))
    assert rows.num_rows == 0 and rows.mask().shape == (0, 1, 4, 4)
    assert (rows.row_FN == -1).all() and (rows.slot_FN == -1).all() and not rows.refill_FN.any()


def test_the_survivor_mask_is_left_alone() -> None:
    keep = torch.rand(5, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    before = keep.clone()
    reference_rows(keep).mask()
    assert torch.equal(keep, before)


@pytest.mark.parametrize("keep", [torch.ones(2, 3), torch.ones(4, dtype=torch.bool)], ids=["float", "one-axis"])
def test_anything_but_a_bool_mask_of_frames_is_refused(keep: Tensor) -> None:
    with pytest.raises(ValueError, match="expected a bool survivor mask"):
        reference_rows(keep)
