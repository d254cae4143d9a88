"""The collator with the processors of the families beside LLaVA: times, labels, mixed rows, and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from stts.data.collate import IGNORED, Batch, Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from tests.families import FAMILIES, write_family

TIMED = tuple(family for family in FAMILIES if family != "internvl")
"""Their processors read times."""
QUESTION = "<video>\nwhich colour flashed ?"
UNEVEN_S = (0.0, 0.75, 1.5, 2.0, 9.25)
"""A variable frame rate, and an odd number of frames."""


@pytest.fixture(scope="module")
def processors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("families")
    return {family: AutoProcessor.from_pretrained(write_family(family, folder / family)) for family in FAMILIES}


def example(
    uid: str = "a",
    *,
    turns: Sequence[str] = (QUESTION, "red"),
    times: Sequence[float] | None = (0.0, 0.5, 1.0, 1.5),
    size: tuple[int, int] = (40, 48),
    images: int = 0,
) -> Example:
    rng = np.random.default_rng(len(uid))
    messages = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns))
    video = None if times is None else rng.integers(0, 255, (len(times), *size, 3), dtype=np.uint8)
    pictures = tuple(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8) for _ in range(images))
    return Example(Sample(uid, messages), video, None if times is None else np.array(times), pictures, 10.0)


def collate(processor: Any, items: Sequence[Example], *, training: bool) -> Batch:
    batch = Collator(processor, training=training)(items)
    assert batch is not None
    return batch


def text_of(processor: Any, ids: torch.Tensor) -> str:
    """Words without spaces, visual tokens left out."""
    text = processor.tokenizer.decode(ids[ids != IGNORED]).replace(" ", "")
    return text.replace("<|video_pad|>", "").replace("<im_patch>", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_those_of_the_processor(processors: dict[str, Any], family: str) -> None:
    processor, item = processors[family], example()
    batch = collate(processor, [item], training=False)
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "which colour flashed ?"}]}]
    stock = processor(
        text=[processor.apply_chat_template(chat, add_generation_prompt=True)], videos=[item.frames],
        do_sample_frames=False, return_tensors="pt",
        video_metadata=[{"total_num_frames": 4, "fps": 2.0, "frames_indices": [0, 1, 2, 3]}],
    )  # fmt: skip
    assert batch is not None and set(batch.inputs) == set(stock) and ("mm_token_type_ids" in stock) == (family in TIMED)
    for name, value in stock.items():
        assert torch.equal(batch.inputs[name], value), name


def test_qwen3_reads_the_mean_time_of_each_pair_of_frames(processors: dict[str, Any]) -> None:
    batch = collate(processors["qwen3_vl"], [example(times=UNEVEN_S)], training=False)
    text = text_of(processors["qwen3_vl"], batch.inputs["input_ids"][0])
    shown = "".join(f"<{time}seconds><|vision_start|><|vision_end|>" for time in (0.4, 1.8, 9.2))
    assert f"<|vision_start|>{shown}<|vision_end|>which" in text, "0.375, 1.75 and 9.25 with one decimal"


def test_molmo2_reads_the_time_of_each_frame(processors: dict[str, Any]) -> None:
    batch = collate(processors["molmo2"], [example(times=UNEVEN_S)], training=False)
    text = text_of(processors["molmo2"], batch.inputs["input_ids"][0])
    assert "".join(f"{time}<frame_start><frame_end>" for time in ("0.0", 0.8, 1.5, "2.0", 9.2)) in text


@pytest.mark.parametrize(("times", "seconds"), [((0, 0.5, 1, 1.5), 1.0), ((3, 4, 7), 4.0), (UNEVEN_S, 4.625)])
def test_qwen25_gets_the_mean_seconds_between_temporal_patches(
    processors: dict[str, Any], times: Sequence[float], seconds: float
) -> None:
    batch = collate(processors["qwen2_5_vl"], [example(times=times)], training=True)
    assert batch.inputs["second_per_grid_ts"].tolist() == [seconds]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_of_a_conversation_is_a_label_and_every_turn_ends_once(
    processors: dict[str, Any], family: str
) -> None:
    processor = processors[family]
    turns = (QUESTION, "red", "is there a blue circle ?", "yes")
    batch = collate(processor, [example(turns=turns), example("bb")], training=True)
    assert text_of(processor, batch.inputs["labels"][0]) == "red<|im_end|>yes<|im_end|>"
    assert text_of(processor, batch.inputs["labels"][1]) == "red<|im_end|>"
    kept = batch.inputs["labels"] != IGNORED
    assert torch.equal(batch.inputs["labels"][kept], batch.inputs["input_ids"][kept])
    ids = batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0].bool()]
    assert "<|im_end|><|im_start|>user isthere".replace(" ", "") in text_of(processor, ids)
    assert "<|im_end|><|im_end|>" not in text_of(processor, ids)
    asked = collate(processor, [example(turns=turns), example("bb")], training=False)
    text = text_of(processor, asked.inputs["input_ids"][0])
    assert "red<|im_end|><|im_start|>user" in text and text.endswith("<|im_start|>assistant")
    assert asked.answers == ("yes", "red") and asked.inputs["attention_mask"][1, 0] == 0, "padded on the left"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_rows_do_not_depend_on_their_batch(processors: dict[str, Any], family: str, training: bool) -> None:
    items = [
        example("a", times=UNEVEN_S),
        example("text", turns=("is there a red circle ?", "no"), times=None),
        example("long", times=(0, 1), size=(64, 32)),
    ]
    if family != "molmo2":
        turns = ("<image> <image>\nis there a red circle ?", "no")
        items.insert(1, example("two", turns=turns, times=None, images=2))
    batch, *alone = (collate(processors[family], some, training=training) for some in (items, *([i] for i in items)))
    assert batch.video_uids == ("a", "long") and [0 if t is None else len(t) for t in batch.timestamps_s] == [5, 2]
    for row, one in enumerate(alone):
        real = batch.inputs["attention_mask"][row].bool()
        for name in set(one.inputs) & {"input_ids", "mm_token_type_ids", "labels"}:
            assert torch.equal(batch.inputs[name][row][real], one.inputs[name][0]), name
    for name in {name for one in alone for name in one.inputs} & set(processors[family].model_input_names):
        if name not in ("input_ids", "attention_mask", "mm_token_type_ids", "video_token_pooling"):
            parts = torch.cat([one.inputs[name] for one in alone if name in one.inputs])
            torch.testing.assert_close(batch.inputs[name], parts, msg=name)


@pytest.mark.parametrize("family", TIMED)
def test_rows_without_any_media(processors: dict[str, Any], family: str) -> None:
    text = example("t", turns=("is there a red circle ?", "no"), times=None)
    batch = collate(processors[family], [text], training=True)
    assert set(batch.inputs) == {"input_ids", "attention_mask", "mm_token_type_ids", "labels"}
    assert batch.inputs["mm_token_type_ids"].sum() == 0 and batch.video_uids == ()


@pytest.mark.parametrize("family", TIMED)
def test_a_single_frame_and_the_blank_batch(processors: dict[str, Any], family: str) -> None:
    batch = collate(processors[family], [example(times=(7.25,))], training=True)
    grid = batch.inputs["video_grids" if family == "molmo2" else "video_grid_thw"]
    assert grid[0, 0] == 1 and [time.tolist() for time in batch.timestamps_s if time is not None] == [[7.25]]
    if family == "qwen3_vl":
        assert "<7.2seconds>" in text_of(processors[family], batch.inputs["input_ids"][0])
    blank = Collator(processors[family], training=True).blank()
    assert blank.blank and (blank.inputs["labels"] != IGNORED).any() and len(blank.video_uids) == 1


@pytest.mark.parametrize("family", TIMED)
def test_missing_times_are_refused(processors: dict[str, Any], family: str) -> None:
    given = example("u7")
    item = Example(given.sample, given.frames)
    with pytest.raises(ValueError, match="'u7' has no frame times"):
        Collator(processors[family], training=False)([example(), item])


def test_molmo2_refuses_images_beside_videos(processors: dict[str, Any]) -> None:
    image = example("u8", turns=("<image>\nis there a red circle ?", "no"), times=None, images=1)
    collator = Collator(processors["molmo2"], training=True)
    with pytest.raises(ValueError, match="'u8' has images and sample 'u7' a video"):
        collator([example("u7"), image])
    both = example("u9", turns=("<image> <video>\nis there a red circle ?", "no"), images=1)
    with pytest.raises(ValueError, match="'u9' has images and sample 'u9' a video"):
        collator([both])
    assert collate(processors["molmo2"], [image, image], training=True).inputs["image_grids"].shape == (2, 4)
