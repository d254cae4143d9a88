"""With images=True an image is pruned as a video of one frame, alone, beside others and beside a video."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stts
from stts.models.families.base import linear_layers
from stts.pruners.registry import PRUNERS
from stts.tokens import Grid
from tests.conftest import make_inputs as llava_inputs
from tests.models.families import family_laws as laws
from tests.models.families import molmo2_tiny, qwen_tiny, test_internvl
from tests.models.pruning.test_llm_layers import masked_dense
from tests.models.test_matrix import FAMILIES

INPUTS: dict[str, Any] = {"LLaVA-OneVision": partial(llava_inputs, by_row=True)}
INPUTS |= {"Qwen2.5-VL": qwen_tiny.make_inputs, "Qwen3-VL": qwen_tiny.make_inputs}
INPUTS |= {"Qwen3.5": qwen_tiny.make_inputs, "InternVL": test_internvl.make_inputs}
ROWS = ["ii what ?", "iiv colour is it ?", "- how ?", "v is ?"]
"""LLaVA-OneVision has one tile for an image where a row has several."""
CHOOSE_IN_A_FRAME = {"random", "uniform", "visionzip", "fastv", "dart", "divprune", "cdpruner", "visionselector"}


@pytest.fixture(scope="module", params=INPUTS)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model, and what makes its inputs of rows."""
    model, processor = FAMILIES[request.param][0](tmp_path_factory.mktemp("family"))
    model.generation_config.eos_token_id = None
    return model.eval(), lambda rows, side="right": INPUTS[request.param](processor, rows, padding_side=side)


def image_places(model: Any, inputs: Any, grids: Sequence[Grid]) -> list[list[int]]:
    """Places of the groups of every image in the flattened prompt."""
    image_BL = (inputs["input_ids"] == model.config.image_token_id) & ~laws.placeholders(model, inputs)
    found, newline = image_BL.flatten().nonzero().squeeze(1), int(model.config.model_type == "llava_onevision")
    parts = found.split([grid.num_groups + newline for grid in grids])
    return [part[: grid.num_groups].tolist() for part, grid in zip(parts, grids, strict=True)]


def num_images(model: Any, inputs: Any) -> int:
    """Images, or tiles of them where these are images of their own."""
    if model.config.model_type == "internvl":
        return int((inputs["image_sizes"][:, 0] * (1 - inputs["image_sizes"][:, 1])).sum())
    return len(inputs["image_sizes" if "image_sizes" in inputs else "image_grid_thw"])


def lost(model: Any, inputs: Any, report: Any) -> Tensor:
    """bool (B, L): what was dropped; a quick look at the counts of every image and video on the way."""
    number, gone = num_images(model, inputs), torch.zeros_like(inputs["input_ids"]).bool()
    grids = report.grids
    assert number and all(grid.t == 1 for grid in grids[:number]) and all(grid.t > 1 for grid in grids[number:])
    newline = int(model.config.model_type == "llava_onevision")
    videos = laws.video_places(model, inputs, [grid.num_groups + newline for grid in grids[number:]])
    places = [*image_places(model, inputs, grids[:number]), *videos]
    for place, index, grid in zip(places, report.index, grids, strict=True):
        assert len(index) == round(0.4 * grid.num_groups)
        gone.view(-1)[sorted(set(place[: grid.num_groups]) - {place[cell] for cell in index.tolist()})] = True
    return gone


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]], ids=["mixed", "images"])
def test_survivors_equal_the_masked_dense_model(case: Any, rows: list[str], use_cache: bool) -> None:
    """Counts are those planned for every image and video; what is left is the stock model with the others masked."""
    model, make = case
    inputs = make(rows, "left" if use_cache else "right")
    pruning = stts.pruning(model, "divprune", retention_ratio=0.4, images=True, positions="original")
    with torch.no_grad(), pruning as pruned:
        ours = model(**inputs, use_cache=use_cache).logits
    gone = lost(model, inputs, pruned.last)
    reference = laws.shortened if linear_layers(model.config.text_config) else masked_dense
    with torch.no_grad(), reference(model, {0: gone}, inputs["attention_mask"]):
        stock = model(**inputs, use_cache=False).logits
    compare = inputs["attention_mask"].bool() & ~gone
    assert gone.any()
    torch.testing.assert_close(ours[compare], stock[compare], **laws.CLOSE)


def test_everything_kept_is_the_stock_model(case: Any) -> None:
    model, make = case
    inputs = make(ROWS)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        stock = model(**inputs, use_cache=False).logits
        for pruner in ("none", "uniform"):
            with stts.pruning(model, pruner, retention_ratio=1.0, images=True) as pruned:
                assert torch.equal(model(**inputs, use_cache=False).logits, stock)
                pruned.run_all_modules()  # our own way through the tower
                ours = model(**inputs, use_cache=False).logits
            torch.testing.assert_close(ours[real], stock[real], **laws.CLOSE)
            assert pruned.last is not None and pruned.last.retention_measured == 1
        assert torch.equal(model(**inputs, use_cache=False).logits, stock)


def test_decoding_equals_recomputation(case: Any) -> None:
    model, make = case
    laws.generate_equals_recomputation(model, make(ROWS[:2], "left"), "divprune", 0.4, images=True)


def test_methods_that_need_time_are_refused(case: Any) -> None:
    """The others keep what is planned for each image; videos may be described, images need no name."""
    model, make = case
    inputs = make(ROWS[:2])
    for name in PRUNERS.keys() - CHOOSE_IN_A_FRAME - {"none"}:
        with pytest.raises(ValueError, match="cannot prune an image, which is one frame: "):
            stts.pruning(model, name, retention_ratio=0.6, images=True)
    for name in CHOOSE_IN_A_FRAME:
        pruning = stts.pruning(model, name, retention_ratio=0.8, images=True, untrained=True)
        with torch.no_grad(), pruning as pruned:
            pruned.describe(["clip"], questions=["what ?"])
            assert model(**inputs).logits.isfinite().all()
        report = pruned.last
        assert report is not None and len(report.grids) == num_images(model, inputs) + 1
        assert report.retention_measured == pytest.approx(0.8, abs=0.03)
        if not report.llm_cuts:
            assert report.num_kept == [round(0.8 * grid.num_groups) for grid in report.grids]


def test_gradients_reach_the_tower_through_kept_tokens(case: Any) -> None:
    model, make = case
    inputs = make(ROWS[:1])
    model.train()
    try:
        with stts.pruning(model, "visionzip", retention_ratio=0.4, images=True):
            model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert any(grad.any() for name, grad in grads.items() if "vis" in name)
        assert all(grad.isfinite().all() for grad in grads.values())
    finally:
        model.eval().zero_grad()


def test_images_that_are_no_plain_grid_are_refused(tmp_path: Path) -> None:
    for family, row, why in (("LLaVA-OneVision", "i what ?", "an image in 3 tiles"), ("Molmo2", "i is ?", "Molmo2")):
        (tmp_path / family).mkdir()
        model, processor = FAMILIES[family][0](tmp_path / family)
        make = llava_inputs if family != "Molmo2" else molmo2_tiny.make_inputs
        inputs = make(processor, [row])
        refused = pytest.raises(ValueError, match=f"images=True is not supported for {why}")
        with torch.no_grad(), stts.pruning(model, "uniform", images=True), refused:
            model(**inputs)
        with torch.no_grad(), stts.pruning(model, "uniform") as pruned:
            model(**inputs)
        assert pruned.last is None or not pruned.last.grids, "without it images stay whole"
