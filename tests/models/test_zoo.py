"""Every registry name on a stock model: a batch of unequal videos, answered and generated from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import stts
from stts.models.checkpoints.load import load_vlm
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.pruners.registry import PRUNERS
from stts.tokens import Grid
from tests.conftest import TINY, make_inputs

ROWS = ["v what colour is the circle ?", "- how many squares ?", "v is there a cross ?", "v what is it ?"]
FRAMES = (4, 7, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_vlm(tmp_path_factory.mktemp("vlm") / "zoo", None, image_size=56, **{**TINY, "llm_layers": 8})


@pytest.fixture(scope="module")
def tiny_zoo(folder: Path) -> tuple[Any, Any]:
    return load_vlm(folder)


def unequal(processor: Any, frames: tuple[int, ...] = FRAMES, rows: list[str] = ROWS) -> dict[str, Any]:
    """Rows with videos of different length, padded on the left; the model takes a list of clips."""
    parts = [
        make_inputs(processor, [row], num_frames=n) for row, n in zip(rows, (frames[0], 1, *frames[1:]), strict=True)
    ]
    longest = max(part["input_ids"].shape[1] for part in parts)

    def pad(name: str, fill: int) -> torch.Tensor:
        return torch.cat([torch.nn.functional.pad(p[name], (longest - p[name].shape[1], 0), value=fill) for p in parts])

    clips = [part["pixel_values_videos"][0] for part in parts if "pixel_values_videos" in part]
    return {
        "input_ids": pad("input_ids", processor.tokenizer.pad_token_id),
        "attention_mask": pad("attention_mask", 0),
        "pixel_values_videos": clips,
    }


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "none"])
@pytest.mark.parametrize("exact", [True, False])
def test_every_pruner_answers_a_batch_of_unequal_videos(tiny_zoo: Any, name: str, exact: bool) -> None:
    model, processor = tiny_zoo
    inputs = unequal(processor)
    torch.manual_seed(0)  # the learned one starts from random weights
    with torch.no_grad(), stts.pruning(model, name, retention_ratio=0.5, exact=exact) as pruned:
        pruned.describe(["a", "b", "c"], [torch.arange(n, dtype=torch.float64) / 2 for n in FRAMES])
        logits = model(**inputs, use_cache=False).logits
        report = pruned.last
        assert report is not None and logits.isfinite().all()
        assert report.num_groups == [16 * n for n in FRAMES]
        if exact:
            assert report.retention_per_video == pytest.approx([0.5] * 3, abs=0.02), "equivalent retention, per video"
        assert (report.llm_cuts != []) == any(stage.site.kind == "llm" for stage in pruned.pruner.stages)
        for index, grid in zip(report.index, report.grids, strict=True):
            assert (index.diff() > 0).all() and index[0] >= 0 and index[-1] < grid.num_groups
        pruned.describe(["a", "b", "c"], [torch.arange(n, dtype=torch.float64) / 2 for n in FRAMES])
        ids = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert ids.shape == (4, inputs["input_ids"].shape[1] + 3)
        for row, video in ((0, 0), (2, 1), (3, 2)):  # alone, without padding: the same answer
            pruned.describe(["abc"[video]], [torch.arange(FRAMES[video], dtype=torch.float64) / 2])
            alone = make_inputs(processor, [ROWS[row]], num_frames=FRAMES[video])
            one = model.generate(**alone, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            assert torch.equal(one[0, -3:], ids[row, -3:])


@pytest.mark.parametrize("name", ["visionzip", "stts", "tango"])
def test_a_limit_of_tokens_is_each_videos_own(tiny_zoo: Any, name: str) -> None:
    """64, 112 and 32 tokens, at most 40 of each: what shares the batch does not matter."""
    model, processor = tiny_zoo
    inputs = unequal(processor)
    torch.manual_seed(0)
    pruned = stts.pruning(model, name, retention_ratio=1.0)
    pruned.limit_tokens(40)
    with torch.no_grad(), pruned:
        logits = model(**inputs, use_cache=False).logits[:, -1]
        assert pruned.last is not None and pruned.last.num_kept == [40, 40, 32]
        for row, frames in ((0, 4), (2, 7), (3, 2)):
            alone = make_inputs(processor, [ROWS[row]], num_frames=frames)
            video = [0, 2, 3].index(row)
            alone["pixel_values_videos"] = inputs["pixel_values_videos"][video][None]
            torch.testing.assert_close(model(**alone, use_cache=False).logits[0, -1], logits[row], atol=1e-5, rtol=1e-4)
            assert pruned.last.num_kept == [min(40, 16 * frames)]
    for length in range(1, 400):
        for most in (1, 7, length - 1):
            if 0 < most < length:
                grid = Grid(length, 1, 1)
                pruned.limit_tokens(most)
                assert pruned.llm_tokens(grid) <= most
