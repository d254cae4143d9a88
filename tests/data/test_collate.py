"""The collator against the processor it wraps: texts, labels, padding, unequal videos, images, and its errors."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stts.data.collate import IGNORED, Collator, time_instruction
from stts.data.datasets import Example, Skipped
from stts.data.rows import Message, Sample

QUESTION = "<video>\nwhich colour flashed ?"
LLAVA_TEMPLATE = (  # the form of released LLaVA-OneVision folders: a finished answer differs from the prompt by a space
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ ' <|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant\n' }}{% endif %}"
)


def example(
    uid: str = "a", *, turns: Sequence[str] = (QUESTION, "red"), frames: int | None = 4, images: int = 0
) -> Example:
    rng = np.random.default_rng(len(uid))
    messages = tuple(Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns))
    video = None if frames is None else rng.integers(0, 255, (frames, 56, 56, 3), dtype=np.uint8)
    times = None if frames is None else np.arange(frames) / 4
    pictures = tuple(rng.integers(0, 255, (56, 112, 3), dtype=np.uint8) for _ in range(images))
    return Example(Sample(uid, messages), video, times, pictures)


@pytest.fixture(scope="session")
def processor(tiny_folder: Path) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_folder)


def words(processor: Any, ids: torch.Tensor) -> str:
    return processor.tokenizer.decode(ids[ids != IGNORED])


def test_inputs_are_those_of_the_processor(processor: Any) -> None:
    item = example()
    batch = Collator(processor, training=False)([item])
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "which colour flashed ?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    stock = processor(text=[text], videos=[item.frames], do_sample_frames=False, return_tensors="pt")
    assert batch is not None and set(batch.inputs) == set(stock)
    for name, value in stock.items():
        assert torch.equal(batch.inputs[name], value), name
    assert batch.answers == ("red",) and batch.uids == batch.video_uids == ("a",)
    assert batch.timestamps_s[0].tolist() == [0, 0.25, 0.5, 0.75]


def test_labels_cover_the_answer_and_its_end(processor: Any) -> None:
    batch = Collator(processor, training=True)([example()])
    assert words(processor, batch.inputs["labels"][0]) == "red <|im_end|>"
    kept = batch.inputs["labels"] != IGNORED
    assert torch.equal(batch.inputs["labels"][kept], batch.inputs["input_ids"][kept])


def test_every_answer_of_a_conversation_is_a_label(processor: Any) -> None:
    turns = (QUESTION, "red", "is there a blue circle ?", "yes")
    batch = Collator(processor, training=True)([example(turns=turns), example("b")])
    assert words(processor, batch.inputs["labels"][0]) == "red <|im_end|> yes <|im_end|>"
    assert batch.inputs["attention_mask"][1, -1] == 0, "the shorter row is padded on the right"
    asked = Collator(processor, training=False)([example(turns=turns), example("b")])
    text = words(processor, asked.inputs["input_ids"][0])
    assert "red <|im_end|>" in text and text.endswith("<|im_start|> assistant"), "earlier answers are context"
    assert asked.answers == ("yes", "red") and asked.inputs["attention_mask"][1, 0] == 0, "padded on the left"


def test_training_text_continues_the_prompt_that_generate_sees(processor: Any) -> None:
    changed = pickle.loads(pickle.dumps(processor))
    changed.chat_template = LLAVA_TEMPLATE
    trained = Collator(changed, training=True).render(example().sample)
    asked = Collator(changed, training=False).render(example().sample)
    assert trained == asked + "red <|im_end|>"
    batch = Collator(changed, training=True)([example()])
    assert words(changed, batch.inputs["labels"][0]) == "red <|im_end|>"


def test_unequal_frame_counts_stay_apart(processor: Any) -> None:
    items = [example("a", frames=2), example("bb", frames=5)]
    batch = Collator(processor, training=True)(items)
    alone = [Collator(processor, training=True)([item]) for item in items]
    videos = batch.inputs["pixel_values_videos"]
    assert [video.shape[0] for video in videos] == [2, 5]
    for row, one in enumerate(alone):
        length = one.inputs["input_ids"].shape[1]
        assert torch.equal(batch.inputs["input_ids"][row, :length], one.inputs["input_ids"][0])
        assert torch.equal(videos[row], one.inputs["pixel_values_videos"][0])
    moved = batch.to("meta")
    assert all(video.is_meta for video in moved.inputs["pixel_values_videos"]) and moved.uids == batch.uids


def test_images_videos_and_text_share_a_batch(processor: Any) -> None:
    items = [
        example("image", turns=("<image>\nis there a red circle ?", "yes"), frames=None, images=1),
        example("two", turns=("<image> <image>\nis there a red circle ?", "no"), frames=None, images=2),
        example("video"),
        example("text", turns=("is there a red circle ?", "no"), frames=None),
    ]
    batch = Collator(processor, training=True)(items)
    assert batch.inputs["batch_num_images"].tolist() == [1, 2]
    assert batch.inputs["pixel_values"].shape[0] == 3 and batch.inputs["image_sizes"].shape == (3, 2)
    assert batch.video_uids == ("video",) and len(batch.uids) == 4


def test_skipped_items_are_reported(processor: Any) -> None:
    collator = Collator(processor, training=True)
    gone = Skipped("gone", "no such file")
    assert collator([gone]) is None
    assert collator([gone, example()]).skipped == (gone,)
    blank = collator.blank([gone])
    assert blank.blank and blank.skipped == (gone,) and (blank.inputs["labels"] != IGNORED).any()


def test_text_tokens_are_known_without_media(processor: Any) -> None:
    collator = Collator(processor, training=True)
    items = [example(), example("bb", turns=("is there a red circle ?", "no"), frames=None)]
    batch = collator(items)
    text = (batch.inputs["input_ids"] != processor.video_token_id) & batch.inputs["attention_mask"].bool()
    assert collator.num_text_tokens([item.sample for item in items]) == text.sum(1).tolist()


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (example("u7", turns=("which colour flashed ?", "red")), "'u7' has 0 <video> markers for 1"),
        (example("u7", turns=("<video> <video> which ?", "red")), "'u7' has 2 <video> markers for 1"),
        (example("u7", turns=("<image> which ?", "red"), frames=None), "'u7' has 1 <image> markers for 0"),
        (example("u7", turns=(QUESTION, "  ")), "'u7' has no answer or an empty one"),
        (example("u7", turns=(QUESTION,)), "'u7' has no answer or an empty one"),
        (example("u7", turns=(QUESTION + " <|im_start|> assistant x", "red")), "'u7': found 2 complete answers"),
    ],
)
def test_bad_rows_are_named(processor: Any, item: Example, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("|", r"\|")):
        Collator(processor, training=True)([example(), item])


def test_an_answer_behind_the_limit_is_an_error(processor: Any) -> None:
    short = pickle.loads(pickle.dumps(processor))
    short.tokenizer.model_max_length = 40
    with pytest.raises(ValueError, match=r"'a' has \d+ tokens, more than the 40"):
        Collator(short, training=True)([example()])


def test_a_template_without_end_of_turn_is_refused(processor: Any) -> None:
    plain = pickle.loads(pickle.dumps(processor))
    plain.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }} {% endfor %}"
    with pytest.raises(ValueError, match="expected a prompt and a special end-of-turn token"):
        Collator(plain, training=True)


def test_answers_are_not_asked_for_when_generating(processor: Any) -> None:
    batch = Collator(processor, training=False)([replace(example(), sample=example(turns=(QUESTION,)).sample)])
    assert batch.answers == ("",) and "labels" not in batch.inputs


def test_the_time_instruction_has_two_decimals_everywhere() -> None:
    assert time_instruction([0.0, 1.5, 2.996], 3) == (
        "This video is 3.00 seconds long. 3 frames were taken from it, at 0.00s,1.50s,3.00s. "
        "Please answer the questions about this video."
    )


@pytest.mark.parametrize("training", [False, True])
def test_a_processor_that_wants_times_gets_them_behind_the_video_marker(tiny: Any, training: bool) -> None:
    _, processor = tiny
    items = [replace(example(), duration_s=1.25), example("b", turns=("what is it ?", "red"), frames=None)]
    plain = Collator(processor, training=training)(items)
    processor.time_instruction = True
    times = time_instruction([0, 0.25, 0.5, 0.75], 1.25)
    told = replace(
        items[0].sample,
        messages=(Message("user", f"<video>\n{times}\nwhich colour flashed ?"), *items[0].sample.messages[1:]),
    )
    made = Collator(processor, training=training)(items)
    counted = Collator(processor, training=True).num_text_tokens([item.sample for item in items], 4)
    processor.time_instruction = False
    expected = Collator(processor, training=training)([replace(items[0], sample=told), items[1]])
    assert made is not None and plain is not None and expected is not None
    for name, value in expected.inputs.items():
        assert torch.equal(made.inputs[name], value), name
    if training:
        text = made.inputs["attention_mask"].bool() & (made.inputs["input_ids"] != processor.video_token_id)
        assert counted == text.sum(1).tolist(), "a word is a token here, however long the number"
    assert made.samples == plain.samples, "the batch names the samples as they are"
    assert made.inputs["input_ids"].shape[1] > plain.inputs["input_ids"].shape[1]


def test_missing_times_are_refused_where_the_prompt_needs_them(tiny: Any) -> None:
    _, processor = tiny
    processor.time_instruction = True
    collator = Collator(processor, training=False)
    with pytest.raises(ValueError, match="'a' has no frame times or no duration"):
        collator([example()])
    assert collator.blank().blank


def test_an_answer_with_the_word_that_ends_a_turn_is_refused(processor: Any) -> None:
    turns = (Message("user", "what colour ?"), Message("assistant", "red <|im_end|> green"))
    with pytest.raises(ValueError, match=r"'odd': an answer contains '<\|im_end\|>'"):
        Collator(processor, training=True)([Example(Sample("odd", turns))])
