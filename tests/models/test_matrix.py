"""Which pruner runs on which family, in training, forward and generate: found by running them, kept as a table.

The table is `stts/assets/support/matrix.md`: `stts pruners --matrix` prints it and docs/families.md shows it. Every
cell that runs is compared with its own, so that tests may run in any order and process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import stts
from stts.models.checkpoints.load import load_vlm, save_pruned
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.pruners.listing import MATRIX
from stts.pruners.registry import PRUNERS
from tests.conftest import TINY, answer_labels
from tests.conftest import make_inputs as llava_inputs
from tests.models.checkpoints import test_llava_video
from tests.models.families import molmo2_tiny, qwen_tiny, test_internvl, test_qwen3_5

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
Inputs = Callable[[Any, str], dict[str, Any]]
"""(processor, padding side) -> a batch with videos of two sizes or lengths, and text."""


def _llava(folder: Path) -> tuple[Any, Any]:
    return load_vlm(write_small_vlm(folder / "vlm", None, image_size=56, **{**TINY, "llm_layers": 8}))


def _llava_video(folder: Path) -> tuple[Any, Any]:
    model, processor = _llava(folder)
    test_llava_video.VIDEO.write(model.config)
    return load_vlm(save_pruned(folder / "video", model, processor, None))


def _video_rows(processor: Any, side: str) -> dict[str, Any]:
    made = test_llava_video.rows(processor, training=side == "right")
    return {name: value for name, value in made.items() if name != "labels"}


FAMILIES: dict[str, tuple[Callable[[Path], tuple[Any, Any]], Inputs]] = {
    "LLaVA-OneVision": (
        _llava,
        lambda processor, side: llava_inputs(
            processor, ["v what ?", "- how many ?", "iv is there ?"], padding_side=side
        ),
    ),
    "LLaVA-Video": (_llava_video, _video_rows),
    "Qwen2.5-VL": (
        lambda folder: qwen_tiny.make("qwen2_5_vl", folder, fullatt_block_indexes=[3, 7], window_size=16),
        lambda processor, side: qwen_tiny.make_inputs(processor, ["v what ?", "- how ?", "iw is ?"], padding_side=side),
    ),
    "Qwen3-VL": (
        lambda folder: qwen_tiny.make("qwen3_vl", folder, deepstack_visual_indexes=[5, 6], num_position_embeddings=36),
        lambda processor, side: qwen_tiny.make_inputs(processor, ["v what ?", "- how ?", "iw is ?"], padding_side=side),
    ),
    "Qwen3.5": (
        test_qwen3_5.make_qwen3_5,
        lambda processor, side: qwen_tiny.make_inputs(processor, ["v what ?", "- how ?", "iw is ?"], padding_side=side),
    ),
    "Molmo2": (
        lambda folder: load_vlm(molmo2_tiny.write_molmo2(folder)),
        lambda processor, side: molmo2_tiny.make_inputs(
            processor, ["3 what ?", "- how ?", "5 is ?"], padding_side=side
        ),
    ),
    "InternVL": (
        lambda folder: test_internvl.make(),
        lambda processor, side: test_internvl.make_inputs(
            processor, ["v what ?", "- how ?", "iw is ?"], padding_side=side
        ),
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    return {name: make(tmp_path_factory.mktemp("family")) for name, (make, _) in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PRUNERS)
def test_every_pruner_on_every_family(made: Any, family: str, name: str) -> None:
    (model, processor), build = made[family], FAMILIES[family][1]
    torch.manual_seed(0)  # a learned pruner starts from random weights
    works = []
    with stts.pruning(model, name, retention_ratio=1.0 if name == "none" else 0.6) as pruned:
        inputs = build(processor, "right")
        inside = any(stage.site.kind == "llm" for stage in pruned.pruner.stages)
        model.train()
        try:
            loss = model(**inputs, labels=answer_labels(inputs), use_cache=False).loss
        except ValueError as error:
            assert inside and "training does not support" in str(error)
        else:
            assert not inside
            loss.backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            assert loss.isfinite() and grads and all(grad.isfinite().all() for grad in grads)
            works.append("fit")
        finally:
            model.eval().zero_grad()
        with torch.no_grad():
            assert model(**inputs).logits.isfinite().all()
            assert pruned.last is not None
            ratio = 1.0 if name == "none" else 0.6
            assert pruned.last.retention_measured == pytest.approx(ratio, abs=0.06)
            works.append("forward")
            inputs = build(processor, "left")
            ids = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
            assert ids.shape[1] == inputs["input_ids"].shape[1] + 2
            works.append("generate")
    found = "all" if works == ["fit", "forward", "generate"] else ", ".join(works)
    assert table_cells()[name, family] == found, f"if meant, correct {MATRIX.name}, run scripts/make_docs.py"


def table_cells() -> dict[tuple[str, str], str]:
    """(pruner, family) -> what the table says works."""
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in MATRIX.read_text().splitlines())
    return {(name, family): cell for name, *cells in rows for family, cell in zip(head[1:], cells, strict=True)}


def test_the_table_has_every_cell_and_stands_in_the_docs() -> None:
    assert set(table_cells()) == {(name, family) for name in PRUNERS for family in FAMILIES}
    assert MATRIX.read_text() in PAGE.read_text(), "run `python scripts/make_docs.py`"
