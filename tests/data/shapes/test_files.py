from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest

from stts.data.datasets import VideoJsonl
from stts.data.rows import read_jsonl
from stts.data.shapes.clips import ShapesConfig, ShapesFrames, make_clip, sampled_indices
from stts.data.shapes.files import write_shapes
from stts.data.video.sample import sample_frames

CONFIG = ShapesConfig()
SIZES = {"train": 6, "val": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", sizes=SIZES, config=CONFIG, progress=False)


def test_layout_and_rows(folder):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    clips = {f"{split}/{split}-{index:06d}.mp4" for split, size in SIZES.items() for index in range(size)}
    lists = {f"{split}{kind}.jsonl" for split in SIZES for kind in ("", "_conversations", "_cells")}
    assert names == clips | lists | {"shapes.json"}, "and no partial file stays behind"
    [talk, *_] = read_jsonl(folder / "val_conversations.jsonl")
    assert talk.messages == ShapesFrames("val", 1, 0, CONFIG, questions_per_item=3)[0].sample.messages
    rows = [json.loads(line) for line in (folder / "val.jsonl").read_text().splitlines()]
    clip = make_clip(0, "val", 0, CONFIG)
    assert len(rows) == 12
    assert rows[0] == {
        "id": f"val-000000-{clip.questions[0].family}",
        "video": "val/val-000000.mp4",
        "conversations": [
            {"from": "human", "value": f"<video>\n{clip.questions[0].text}"},
            {"from": "gpt", "value": clip.questions[0].answer},
        ],
        "family": clip.questions[0].family,
        "options": list(clip.questions[0].options),
        "duration": clip.num_frames / CONFIG.fps,
    }


def test_decoded_frames_are_the_rendered_ones(folder):
    decoded, rendered = VideoJsonl(folder / "val.jsonl"), ShapesFrames("val", 4, 0, CONFIG)
    for index in range(4):
        file, drawn = decoded[3 * index], rendered[index]  # a clip's first question is the first of its three rows
        assert file.sample.messages == drawn.sample.messages and file.sample.uid == drawn.sample.uid
        assert file.sample.meta["duration"] == drawn.sample.meta["duration"]
        np.testing.assert_allclose(file.timestamps_s, drawn.timestamps_s, atol=1e-6)
        error = np.abs(file.frames.astype(int) - drawn.frames).mean(axis=(1, 2, 3))
        # Measured on 60 clips: 2.8 of 255 in the mean, 3.6 in the worst frame; crf 14 smoothing noise of up to
        # 9 levels; 4:2:0 instead of 4:4:4 gives 5.5.
        assert error.max() < 4.0
        # Frames a quarter of a second off cost 0.47 more in the stillest of those clips, 1.4 in the median one.
        clip = make_clip(0, "val", index, CONFIG)
        frame_T = sampled_indices(clip.num_frames, 16)
        for shift in (-2, 2):
            other = clip.render((frame_T + shift).clip(0, clip.num_frames - 1)).astype(int)
            assert np.abs(other - file.frames).mean() > error.mean() + 0.3


def test_a_second_folder_is_the_same_with_two_processes(folder, tmp_path):
    again = write_shapes(tmp_path / "again", sizes=SIZES, config=CONFIG, progress=False, processes=2)
    for name in ("train.jsonl", "val.jsonl", "shapes.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    for index in range(4):
        one, two = (sample_frames(root / f"val/val-{index:06d}.mp4", num_frames=40) for root in (folder, again))
        assert np.array_equal(one.frames, two.frames)


def test_a_stopped_run_goes_on_and_a_larger_one_adds(tmp_path):
    out = write_shapes(tmp_path / "data", sizes={"val": 3}, config=CONFIG, progress=False)
    kept, lost = out / "val/val-000000.mp4", out / "val/val-000001.mp4"
    before = kept.stat().st_mtime_ns
    content = lost.read_bytes()
    lost.unlink()
    write_shapes(out, sizes={"val": 4}, config=CONFIG, progress=False)
    assert kept.stat().st_mtime_ns == before and lost.read_bytes() == content
    assert len(read_jsonl(out / "val.jsonl")) == 12


def test_long_clips_are_long_and_written_in_bounded_memory(tmp_path):
    tracemalloc.start()
    out = write_shapes(tmp_path / "data", sizes={"long": 2}, seed=1, config=CONFIG, progress=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    for index in range(2):
        clip = make_clip(1, "long", index, CONFIG)
        video = sample_frames(out / f"long/{clip.uid}.mp4", num_frames=16)
        assert video.source.num_frames_in_file == clip.num_frames >= 120
        assert np.abs(video.frames.astype(int) - clip.render(sampled_indices(clip.num_frames, 16))).mean() < 4.0
    # 64 frames as int16 and uint8, noise and one chunk of float work are under 10 MB; 1200 frames would be over 50.
    assert peak < 16e6


def test_other_settings_and_strange_folders_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="choose another folder"):
        write_shapes(folder, sizes=SIZES, seed=1, config=CONFIG, progress=False)
    with pytest.raises(ValueError, match="choose another folder"):
        write_shapes(folder, sizes=SIZES, config=ShapesConfig(families=("count",)), progress=False)
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="choose an empty folder"):
        write_shapes(tmp_path, sizes=SIZES, progress=False)
    for sizes in ({}, {"dev": 3}, {"val": 0}):
        with pytest.raises(ValueError, match="sizes="):
            write_shapes(tmp_path / "new", sizes=sizes, progress=False)
    with pytest.raises(ValueError, match="seed=-1"):
        write_shapes(tmp_path / "new", sizes=SIZES, seed=-1, progress=False)
    assert not (tmp_path / "new").exists()
