"""Folders of frames, and files that never open or take too long."""

from __future__ import annotations

import fcntl
import os
import signal
import time

import pytest
from PIL import Image
from torch.utils.data import DataLoader

from stts.data.datasets import Example, Skipped, VideoJsonl
from stts.data.video.sample import VideoError
from tests.data.test_datasets import ROW, write
from tests.data.video.clips import frame_numbers, numbered_images, write_video

# --- frame folders ----------------------------------------------------------------------------------------------------


def write_frames(folder, num_frames):
    folder.mkdir()
    for number, image in enumerate(numbered_images(num_frames)):
        Image.fromarray(image).save(folder / f"f_{number}.png")


def test_a_frame_folder_is_a_video(tmp_path):
    write_frames(tmp_path / "v_demo", 12)
    (tmp_path / "v_demo" / "notes.txt").write_text("no frame")
    row = {**ROW, "video": "v_demo"}
    data = VideoJsonl(write(tmp_path, row, {**row, "id": "b", "fps": 2, "clip": [1, 2]}), num_frames=4)
    assert frame_numbers(data[0].frames) == [0, 3, 7, 11], "f_10 comes after f_9"
    assert data[0].timestamps_s.tolist() == [0, 3, 7, 11] and data[0].duration_s == 12
    assert frame_numbers(data[1].frames) == [2, 2, 3, 4] and data[1].timestamps_s.tolist() == [1, 1, 1.5, 2]


def test_broken_frame_folders_are_named(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    root = tmp_path / "root"
    (root / "linked").mkdir(parents=True)
    (root / "linked" / "f.png").symlink_to(secret)
    write_frames(root / "mixed", 2)
    Image.new("RGB", (8, 8)).save(root / "mixed" / "f_1.png")
    rows = [{**ROW, "id": name, "video": name} for name in ("linked", "mixed")] + [{**ROW, "video": "mixed", "fps": 0}]
    data = VideoJsonl(write(root, *rows), num_frames=2)
    for place, fault in enumerate(("without pictures", "several sizes", "'fps' is 0")):
        with pytest.raises(VideoError, match=fault):
            data[place]


# --- what never returns -----------------------------------------------------------------------------------------------


def test_pipes_are_no_media(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    picture = {"id": "b", "image": "pipe.mp4", "conversations": [{"from": "human", "value": "what ?"}]}
    data = VideoJsonl(write(tmp_path, {**ROW, "video": "pipe.mp4"}, picture), on_error="skip")
    assert all("pipe.mp4" in data[place].reason for place in range(2))


def test_a_file_that_never_opens_is_skipped_in_a_loader_worker(tmp_path):
    """A lease on a regular file makes the kernel hold back whoever opens it, as a dead network mount does."""
    for name in ("good.mp4", "stuck.mp4"):
        write_video(tmp_path / name, numbered_images(8))
    rows = [{**ROW, "id": name, "video": f"{name}.mp4"} for name in ("good", "stuck", "good")]
    data = VideoJsonl(write(tmp_path, *({**row, "id": str(n)} for n, row in enumerate(rows))), num_frames=2,
                      timeout_s=1.0, on_error="skip")  # fmt: skip
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel asks for the lease back
    holder = os.open(tmp_path / "stuck.mp4", os.O_RDWR)
    try:
        try:
            fcntl.fcntl(holder, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            pytest.skip(f"no leases here: {error}")
        started = time.monotonic()
        items = list(DataLoader(data, batch_size=None, num_workers=1))
        assert time.monotonic() - started < 20, "the kernel takes a lease away after 45 s"
    finally:
        os.close(holder)
        signal.signal(signal.SIGIO, before)
    assert [type(item) for item in items] == [Example, Skipped, Example]
    assert "stuck.mp4" in items[1].reason and "timeout_s=1.0" in items[1].reason


def test_a_video_too_long_to_decode_in_time_is_an_error_with_its_name(tmp_path):
    write_video(tmp_path / "a.mp4", numbered_images(200, 240, 320), gop=200)
    with pytest.raises(VideoError, match=r"sample 'a': .*a\.mp4: not .* within timeout_s=0\.002"):
        VideoJsonl(write(tmp_path, ROW), timeout_s=0.002)[0]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
    assert len(VideoJsonl(write(tmp_path, ROW), timeout_s=60, num_frames=4)[0].frames) == 4
    with pytest.raises(ValueError, match="timeout_s=0"):
        VideoJsonl(write(tmp_path, ROW), timeout_s=0)
