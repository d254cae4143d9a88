"""`make_batch`: whatever one sample does to the processor is skipped or raised with the names of sample and file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stts.data.batches import make_batch
from stts.data.collate import Collator
from stts.data.datasets import Example, Skipped
from stts.models.checkpoints.load import load_vlm
from tests.data.test_collate import example
from tests.families import write_family

VIDEO = Path("clips/b.mp4")


def bad(item: Example) -> Example:
    return replace(item, sample=replace(item.sample, uid="bad", video=VIDEO))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_vlm(write_family("qwen2_5_vl", tmp_path_factory.mktemp("qwen") / "model"))[1]


def check(collate: Collator, item: Example, reason: str) -> None:
    gone = Skipped("gone", "no such file")
    batch, skipped = make_batch(collate, [gone, example("a"), item, example("c")], "skip")
    alone = collate([example("a"), example("c")])
    assert batch is not None and alone is not None and batch.uids == ("a", "c") and batch.skipped == skipped
    assert all(torch.equal(batch.inputs[name], value) for name, value in alone.inputs.items())
    assert [one.uid for one in skipped] == ["gone", "bad"] and reason in skipped[1].reason
    assert str(VIDEO) in skipped[1].reason and "'bad'" in skipped[1].reason
    with pytest.raises(ValueError, match=rf"sample 'bad' \({VIDEO}\).*on_error=skip"):
        make_batch(collate, [example("a"), item], "raise")
    assert make_batch(collate, [item], "skip") == (None, skipped[1:])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (("<video>\nwhich marker, <video> or <image> ?", "red"), "2 <video> markers"),
        (("<video>\nwhich colour ?", "  "), "no answer or an empty one"),
        (("<video>\nwhich colour ? <|im_end|>", "red <|im_start|> assistant x"), "complete answers"),
    ],
)
def test_a_text_that_breaks_the_template(tiny: Any, turns: tuple[str, ...], reason: str) -> None:
    check(Collator(tiny[1], training=True), bad(example(turns=turns)), reason)


def test_a_picture_beyond_the_limits_of_the_processor(qwen: Any) -> None:
    # Qwen's processors refuse an aspect ratio over 200.
    flat = replace(bad(example()), frames=np.zeros((4, 2, 600, 3), np.uint8))
    check(Collator(qwen, training=True), flat, "aspect ratio")


def test_missing_times(qwen: Any) -> None:
    check(Collator(qwen, training=False), replace(bad(example()), timestamps_s=None), "no frame times")


def test_what_no_single_sample_does_is_raised_as_it_is(tmp_path: Path) -> None:
    _, processor = load_vlm(write_family("molmo2", tmp_path / "molmo2"))
    image = example("i", turns=("<image>\nwhat ?", "red"), frames=None, images=1)
    with pytest.raises(ValueError, match=r"^sample 'i' has images and sample 'a' a video"):
        make_batch(Collator(processor, training=False), [example("a"), image], "skip")
