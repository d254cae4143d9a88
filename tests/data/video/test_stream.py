"""A streamed video is the video: the same frames, inputs and answers, and never more of it in memory than a piece."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stts
from stts.data.collate import Collator
from stts.data.datasets import Example, VideoJsonl
from stts.data.video.sample import FrameStream, VideoError, sample_frames
from stts.data.video.stream import StreamedPixels
from stts.models.checkpoints.load import load_vlm
from tests.data.video.clips import numbered_images, write_video
from tests.families import write_family


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, numbered_images(40))
    return path


def rows(folder: Path, clip: Path, count: int) -> Path:
    turns = [{"from": "human", "value": "<video>\nis there a cross ?"}, {"from": "gpt", "value": "yes"}]
    made = [{"id": f"r{number}", "video": clip.name, "conversations": turns} for number in range(count)]
    path = folder / f"rows{count}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_pieces_are_the_frames_of_the_whole(clip: Path) -> None:
    settings: dict[str, Any] = {"sampler": "uniform_inclusive", "num_frames": 11, "clip": (0.2, 3.0)}
    whole, stream = sample_frames(clip, **settings), FrameStream(clip, **settings)
    assert stream.shape == whole.frames.shape and len(stream) == 11 and stream.source == whole.source
    assert np.array_equal(stream.timestamps_s, whole.timestamps_s)
    for size in (1, 4, 11):
        parts = [stream.read(first, min(first + size, 11)) for first in range(0, 11, size)]
        assert np.array_equal(np.concatenate(parts), whole.frames)
    with pytest.raises(VideoError, match="check the path"):
        FrameStream(clip.with_name("absent.mp4"), num_frames=2)


@pytest.mark.parametrize("name", ["none", "stts", "visionzip"])
def test_a_streamed_batch_is_answered_as_the_whole_one(
    tiny_folder: Path, clip: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = load_vlm(tiny_folder)
    file, collate = rows(clip.parent, clip, 2), Collator(processor, training=False)
    whole, streamed = (
        collate([data[0], data[1]]) for data in (VideoJsonl(file, num_frames=10, stream=flag) for flag in (False, True))
    )
    assert whole is not None and streamed is not None
    pixels = streamed.to("cpu").inputs["pixel_values_videos"]
    assert isinstance(pixels, StreamedPixels) and len(pixels) == 20
    assert torch.equal(pixels[7:13].load(), whole.inputs["pixel_values_videos"].flatten(0, 1)[7:13])
    assert torch.equal(streamed.inputs["input_ids"], whole.inputs["input_ids"])
    assert all(torch.equal(a, b) for a, b in zip(streamed.timestamps_s, whole.timestamps_s, strict=True))  # type: ignore[arg-type]
    ratio = 1.0 if name == "none" else 0.5
    read: list[int] = []
    decode = FrameStream.read
    monkeypatch.setattr(
        FrameStream, "read", lambda self, first, last: (read.append(last - first), decode(self, first, last))[1]
    )
    torch.manual_seed(0)
    pruned = stts.Pruning(model, name, retention_ratio=ratio)
    with torch.no_grad():
        with pruned:
            expected = model(**whole.inputs).logits
        with stts.pruning(model, pruned.pruner, retention_ratio=ratio, chunk_frames=4):
            found = model(**streamed.inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert max(read) == 4
    with torch.no_grad(), pruned, pytest.raises(ValueError, match="pass chunk_frames"):
        model(**streamed.inputs)


def test_what_cannot_be_streamed_says_so(tiny_folder: Path, clip: Path, tmp_path: Path) -> None:
    file = rows(clip.parent, clip, 1)
    data = VideoJsonl(file, num_frames=4, stream=True)
    _, processor = load_vlm(tiny_folder)
    with pytest.raises(ValueError, match="stream=False"):
        Collator(processor, training=True)([data[0]])
    whole = VideoJsonl(file, num_frames=4)[0]
    assert isinstance(whole, Example) and whole.has_video
    with pytest.raises(ValueError, match="stream=False"):
        Collator(processor, training=False)([data[0], whole])
    _, other = load_vlm(write_family("qwen2_5_vl", tmp_path / "qwen"))
    with pytest.raises(ValueError, match="cannot be streamed"):
        Collator(other, training=False)([data[0]])
