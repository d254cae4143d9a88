"""Shared fixtures: a tiny stock LLaVA-OneVision and prompts for it."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stts  # noqa: F401  (before transformers)
from stts.models.checkpoints.load import load_vlm
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.models.pruning.context import Pruning
from tests.forked import SHARED, start_server

# Tests run scorers with random weights on purpose; those of the refusal say untrained=False.
Pruning.__init__.__kwdefaults__["untrained"] = True  # type: ignore[index]

# Operators that DeepSpeed compiles on first use are kept between runs of these tests; scripts/test.sh has them already.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(tempfile.gettempdir()) / "stts_test_operators"))

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started with `&`: tests of Ctrl-C would wait for ever
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Under xdist, one process forks for all test processes."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        os.environ[SHARED] = str(Path(tempfile.mkdtemp(prefix="stts-fork-")) / "door")
        start_server(os.environ[SHARED])


TINY = {"vit_width": 32, "vit_heads": 2, "vit_mlp": 48, "llm_width": 32, "llm_mlp": 48, "llm_layers": 3}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained folder; 7 x 7 patches, so that pooled cells overlap."""
    return write_small_vlm(tmp_path_factory.mktemp("vlm") / "tiny", None, image_size=56, **TINY)


@pytest.fixture
def tiny(tiny_folder: Path) -> tuple[Any, Any]:
    """A fresh model in eval mode and its processor."""
    return load_vlm(tiny_folder)


def make_inputs(
    processor: Any, rows: Sequence[str], *, num_frames: int = 4, padding_side: str = "right", by_row: bool = False
) -> Any:
    """Processor outputs for rows such as "v what colour is the circle ?", the first letters saying which media.

    v = a video, i = an image, nothing = text only; contents are random but the same for the same place in the list.
    by_row: images in a list per row that has some, as chat templates hand them over; else in one list."""
    rng = np.random.default_rng(0)
    side = processor.video_processor.size["height"]
    texts, videos, images = [], [], []
    num_images = [row.partition(" ")[0].count("i") for row in rows]
    for row in rows:
        media, _, question = row.partition(" ")
        content: list[dict[str, Any]] = []
        for letter in media.replace("-", ""):
            content.append({"type": {"v": "video", "i": "image"}[letter]})
            if letter == "v":
                videos.append(rng.integers(0, 255, (num_frames, side, side, 3), dtype=np.uint8))
            else:
                images.append(rng.integers(0, 255, (side, side * 2, 3), dtype=np.uint8))
        content.append({"type": "text", "text": question})
        message = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(message, add_generation_prompt=True))
    options: dict[str, Any] = {"videos": videos, "do_sample_frames": False} if videos else {}
    if by_row:
        rest = iter(images)
        images = [[next(rest) for _ in range(count)] for count in num_images if count]
    options |= {"images": images} if images else {}
    return processor(text=texts, padding=True, padding_side=padding_side, return_tensors="pt", **options)


def answer_labels(inputs: Any, num_answers: int = 2) -> torch.Tensor:
    """Labels on the last `num_answers` real tokens of every row of right-padded inputs."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    place = torch.arange(ids.shape[1])
    end = mask.sum(1, keepdim=True)
    return torch.where((place < end) & (place >= end - num_answers), ids, -100)
