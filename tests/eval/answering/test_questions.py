"""A question that its processor or template cannot take: skipped with its name and file, or raised with both."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from stts.data.collate import Collator
from stts.eval.answering.loop import _Batches
from stts.eval.answering.questions import Source, Task
from stts.eval.benchmarks.tasks import get_task
from tests.data.video.clips import numbered_images, write_video


def test_markers_in_a_question_or_an_option(tiny: Any, tmp_path: Path) -> None:
    texts = ["What moves?\n(A) a\n(B) b", "What is <video>?\n(A) a\n(B) b", "What now?\n(A) a\n(B) an <image> tag"]
    qa = [{"uid": str(uid), "question": text, "answer": "A", "question_type": ["x"]} for uid, text in enumerate(texts)]
    (tmp_path / "video_info.meta.jsonl").write_text(json.dumps({"key": "k0", "type": "x", "qa": qa}) + "\n")
    write_video(tmp_path / "k0.mp4", numbered_images(8))
    task = get_task("lvbench")
    loaded = task.load(tmp_path)
    tasks = (Task(task, tmp_path, loaded, loaded.questions),)
    collate = Collator(tiny[1], training=False)
    source = Source(tasks=tasks, num_frames=4, on_error="skip")
    batch = _Batches(source, [[0, 1, 2]], collate)[0]
    assert not isinstance(batch, ValueError) and batch.batch is not None and batch.batch.uids == ("0",)
    assert [item.uid for item in batch.skipped] == ["1", "2"]
    assert all("k0.mp4" in item.reason for item in batch.skipped)
    error = _Batches(replace(source, on_error="raise"), [[0, 1, 2]], collate)[0]
    assert isinstance(error, ValueError) and "sample '1'" in str(error) and "k0.mp4" in str(error)
