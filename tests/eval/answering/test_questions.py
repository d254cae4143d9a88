"""Questions that mention markers are asked; one that the processor cannot take is skipped or raised, with its file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from stts.data.collate import Collator
from stts.eval.answering.loop import _Batches
from stts.eval.answering.questions import Source, Task
from stts.eval.benchmarks.tasks import get_task
from stts.models.checkpoints.load import load_vlm
from tests.data.video.clips import numbered_images, write_video
from tests.families import write_family


def test_markers_and_control_words_in_questions(tmp_path: Path) -> None:
    texts = [
        "What moves?\n(A) a\n(B) a <video>",
        "What is an <image>?\n(A) a\n(B) b",
        "What?\n(A) <|video_pad|>\n(B) b",
    ]
    qa = [{"uid": str(uid), "question": text, "answer": "A", "question_type": ["x"]} for uid, text in enumerate(texts)]
    (tmp_path / "video_info.meta.jsonl").write_text(json.dumps({"key": "k0", "type": "x", "qa": qa}) + "\n")
    write_video(tmp_path / "k0.mp4", numbered_images(8))
    task = get_task("lvbench")
    loaded = task.load(tmp_path)
    source = Source(tasks=(Task(task, tmp_path, loaded, loaded.questions),), num_frames=4, on_error="skip")
    collate = Collator(load_vlm(write_family("qwen2_5_vl", tmp_path / "qwen"))[1], training=False)
    batch = _Batches(source, [[0, 1, 2]], collate)[0]
    assert not isinstance(batch, ValueError) and batch.batch is not None and batch.batch.uids == ("0", "1")
    [skipped] = batch.skipped
    assert skipped.uid == "2" and "k0.mp4" in skipped.reason
    error = _Batches(replace(source, on_error="raise"), [[0, 1, 2]], collate)[0]
    assert isinstance(error, ValueError) and "sample '2'" in str(error) and "k0.mp4" in str(error)
