"""A video in pieces gives what the whole gives, on every family, for every kind of pruner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaOnevisionForConditionalGeneration

import stts
from stts.data.collate import Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts.models.checkpoints.load import load_vlm
from stts.models.pruning.tower import run_tower
from stts.pruners.registry import PRUNERS
from tests.conftest import make_inputs
from tests.families import FAMILIES, write_family

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
AT_ONCE = ("random-vit", "easy", "heuristic", "tome", "earlytom")
"""They decide inside the tower, and say that they need everything."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Callable[[str], Path]:
    made = {"llava_onevision": tiny_folder}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = write_family(family, tmp_path_factory.mktemp(family) / "vlm")
        return made[family]

    return folder


def batch_of(processor: Any, *num_frames: int, side: int = 56) -> dict[str, Any]:
    """One row per video; each shows a drifting pattern, so that frames are alike but not equal."""
    examples = []
    for number, frames in enumerate(num_frames):
        rng = np.random.default_rng(number)
        still = rng.integers(0, 255, (side, side, 3), dtype=np.uint8)
        shown = [np.roll(still, (t // 2, t), (0, 1)) // (1 + t % 2) for t in range(frames)]
        turns = (Message("user", "<video>\nwhat colour is the circle ?"), Message("assistant", "red"))
        examples.append(
            Example(Sample(f"v{number}", turns), np.stack(shown), np.arange(frames) / 2.0, duration_s=frames / 2.0)
        )
    batch = Collator(processor, training=False)(examples)
    assert batch is not None
    return batch.inputs


@torch.no_grad()
def both_ways(model: Any, inputs: dict[str, Any], name: str, ratio: float, chunk_frames: int) -> None:
    torch.manual_seed(0)  # a learned pruner starts from random weights
    whole = stts.Pruning(model, name, retention_ratio=ratio)
    with whole:
        expected, before = model(**inputs).logits, whole.last
    pieces = stts.Pruning(model, whole.pruner, retention_ratio=ratio, chunk_frames=chunk_frames)
    with pieces:
        found, after = model(**inputs).logits, pieces.last
    assert before is not None and after is not None
    for one, other in zip(before.index, after.index, strict=True):
        assert torch.equal(one, other)
    assert (before.stage_kept, before.kept_patches, before.llm_counts, before.signals) == (
        after.stage_kept, after.kept_patches, after.llm_counts, after.signals
    )  # fmt: skip
    real = inputs["attention_mask"].bool()  # what stands at padding is nobody's business
    torch.testing.assert_close(found[real], expected[real], **CLOSE)


@pytest.mark.parametrize("name", ["none", "stts", "visionzip", "fastvid", "holitom", "tango", "fastv"])
@pytest.mark.parametrize("family", ["llava_onevision", *FAMILIES])
def test_pieces_equal_the_whole(folders: Callable[[str], Path], family: str, name: str) -> None:
    model, processor = load_vlm(folders(family))
    inputs = batch_of(processor, 7, 12)
    for chunk_frames in (1, 4):
        both_ways(model, inputs, name, 1.0 if name == "none" else 0.5, chunk_frames)


@pytest.mark.parametrize("name", sorted(set(PRUNERS) - set(AT_ONCE)))
def test_every_pruner_takes_pieces(folders: Callable[[str], Path], name: str) -> None:
    model, processor = load_vlm(folders("llava_onevision"))
    both_ways(model, batch_of(processor, 9), name, 0.6, 4)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_frames_that_vanish_are_not_run_twice(folders: Callable[[str], Path], family: str) -> None:
    """At the lowest budget only the first frame survives: every later piece runs blocks 0 to k, once."""
    model, processor = load_vlm(folders(family))
    inputs = batch_of(processor, 12)
    ratio = 1 / (12 if family == "llava_onevision" else 6)
    both_ways(model, inputs, "stts", ratio, 2)


def test_images_beside_videos_stay_whole(folders: Callable[[str], Path]) -> None:
    model, processor = load_vlm(folders("llava_onevision"))
    inputs = dict(make_inputs(processor, ["v what colour is the circle ?", "i is there a cross ?"], num_frames=6))
    for name in ("stts", "visionzip"):
        both_ways(model, inputs, name, 0.5, 4)


def test_generate_gives_the_same_tokens(folders: Callable[[str], Path]) -> None:
    model, processor = load_vlm(folders("llava_onevision"))
    inputs = batch_of(processor, 9, 9)
    steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 2}
    torch.manual_seed(0)
    whole = stts.Pruning(model, "stts", retention_ratio=0.5)
    with whole:
        expected = model.generate(**inputs, **steps)
    with stts.pruning(model, whole.pruner, retention_ratio=0.5, chunk_frames=2):
        assert torch.equal(model.generate(**inputs, **steps), expected)


def test_the_tower_never_sees_more_than_a_piece(folders: Callable[[str], Path]) -> None:
    seen: list[int] = []

    def counted(given: Any, *rest: Any) -> Any:
        seen.append(len(given.frames))
        return run_tower(given, *rest)

    model, processor = load_vlm(folders("llava_onevision"))
    inputs = batch_of(processor, 10)
    with torch.no_grad(), stts.pruning(model, "stts", retention_ratio=0.5, chunk_frames=4, tower=counted):
        model(**inputs)
    assert seen[:3] == [4, 4, 2] and max(seen) == 4 and len(seen) <= 6


@pytest.mark.parametrize("name", AT_ONCE)
def test_what_needs_everything_at_once_says_so(folders: Callable[[str], Path], name: str) -> None:
    model, _ = load_vlm(folders("llava_onevision"))
    with pytest.raises(ValueError, match="needs all frames of a video at once"):
        stts.Pruning(model, name, chunk_frames=8)


def test_pieces_are_for_evaluation(folders: Callable[[str], Path]) -> None:
    model, processor = load_vlm(folders("llava_onevision"))
    assert isinstance(model, LlavaOnevisionForConditionalGeneration)
    with pytest.raises(ValueError, match="must be at least 1"):
        stts.Pruning(model, "stts", chunk_frames=0)
    with stts.pruning(model, "stts", chunk_frames=2), pytest.raises(ValueError, match="without gradients"):
        model(**batch_of(processor, 4))
