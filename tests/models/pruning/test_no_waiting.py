"""The tower loop asks the device nothing but how many patches survive, once: run on meta tensors, which have no values.

There everything that makes a CUDA host wait (`item`, `tolist`, `bool`, `nonzero`, `bincount`) raises."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stts
from stts.models.families.attention import switch_on
from stts.models.families.base import TowerOutput, make_adapter
from stts.models.pruning.masks import Slots, make_mask
from stts.models.pruning.tower import Drop, run_tower
from stts.packing import attention
from tests.models.test_matrix import FAMILIES


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What `nonzero` was asked, answered with a half; attention runs as with a kernel for packed rows."""
    asked: list[int] = []

    stock = Tensor.nonzero

    def half(tensor: Tensor, **options: bool) -> Any:
        if not tensor.is_meta:
            return stock(tensor, **options)
        asked.append(len(tensor))
        return torch.empty(len(tensor) // 2, tensor.dim(), dtype=torch.long, device="meta")

    def kernel(q: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(q)

    monkeypatch.setattr(Tensor, "nonzero", half)
    monkeypatch.setattr(attention, "_kernel", lambda device, dtype: kernel)
    return asked


def tower(family: str, folder: Path, spoil: bool = False) -> tuple[TowerOutput, int]:
    """Of a real batch, with a drop inside; and how many patches there were."""
    make, build = FAMILIES[family]
    model, processor = make(folder)
    adapter = make_adapter(model)
    visual = adapter.take_visual(dict(build(processor, "right")))
    assert visual is not None
    given = adapter.embed(visual)
    given = replace(given, x_SD=given.x_SD.to("meta"), aux=tuple(table.to("meta") for table in given.aux))
    ghost = make_adapter(copy.deepcopy(model).to("meta"))
    for config in ghost.configs:
        switch_on(config)
    blocks = list(ghost.blocks())
    if spoil:
        last = blocks[-1]
        blocks[-1] = lambda x, *rest: last(x * x.max().item(), *rest)

    def decide(x_SD: Tensor) -> Drop:
        row_S = x_SD[:, 0]
        return Drop(row_S > 0, row_S.float(), row_S.float())

    site = stts.pruning(model, "stts", retention_ratio=0.5).pruner.stages[0].site
    with torch.no_grad():
        return run_tower(given, blocks, ghost.taps(), site, decide), len(given.x_SD)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loop_waits_once(family: str, tmp_path: Path, questions: list[int]) -> None:
    out, num_patches = tower(family, tmp_path)
    assert questions == [num_patches], "the number of survivors, and nothing else"
    assert all(tap.device.type == "meta" and len(tap) == num_patches // 2 for tap in out.taps)


def test_a_block_that_waits_is_found(tmp_path: Path, questions: list[int]) -> None:
    with pytest.raises(RuntimeError, match="meta"):
        tower("LLaVA-OneVision", tmp_path, spoil=True)


def test_boundaries_of_packed_rows_need_no_answer_either() -> None:
    row_RM = torch.zeros(1, 7, dtype=torch.long, device="meta")
    slots = Slots(row_RM, row_RM, row_RM > -1, row_RM, row_RM, None, 3, 7, packed=True, left=False)
    assert make_mask(slots, None).cu_seqlens.shape == (4,)
    row_RM = torch.tensor([[0, 0, 0, 2, 2, 2, 2]])
    slots = Slots(row_RM, row_RM, row_RM > -1, row_RM, row_RM, None, 3, 7, packed=True, left=False)
    assert make_mask(slots, None).cu_seqlens.tolist() == [0, 3, 3, 7]
