"""Bounded, exact, least recently used first out, and one for all workers."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

from stts.data.datasets import Example, VideoJsonl
from stts.data.video.cache import Decoded, FrameCache, frames_key
from tests.data.video.clips import frame_numbers, numbered_images, write_video


def video(level: int, num_frames: int = 4, edge: int = 32) -> Decoded:
    """4 frames of 32 x 32: 12,288 bytes of pixels and 32 of times, 12,352 in whole blocks of 64."""
    frames = np.full((num_frames, edge, edge, 3), level, np.uint8)
    return Decoded(frames, np.arange(num_frames, dtype=np.float64) + level / 10, duration_s=level + 0.5)


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def same(found: Decoded | None, expected: Decoded) -> bool:
    return (
        found is not None
        and np.array_equal(found.frames, expected.frames)
        and found.timestamps_s.tolist() == expected.timestamps_s.tolist()
        and found.duration_s == expected.duration_s
    )


def test_the_least_recently_used_goes_first() -> None:
    cache = FrameCache(3 * 12_352)
    for number in range(3):
        cache.put(key(number), video(number))
    assert same(cache.get(key(0)), video(0)), "now 1 is the oldest"
    cache.put(key(3), video(3))
    assert cache.get(key(1)) is None
    assert all(same(cache.get(key(number)), video(number)) for number in (0, 2, 3))
    assert (cache.lookups, cache.hits) == (5, 4) and cache.used_bytes == 3 * 12_352


def test_what_is_handed_out_is_a_copy() -> None:
    cache = FrameCache(1 << 20)
    mine = video(7)
    cache.put(key(0), mine)
    mine.frames[:] = 0
    found = cache.get(key(0))
    assert found is not None and found.frames.flags.writeable
    found.frames[:] = 0
    assert same(cache.get(key(0)), video(7))


def test_any_sizes_in_any_order_stay_exact_and_within_the_bound() -> None:
    """300 videos of 0.4 to 150 KB through 400 KB, against a dictionary that forgets nothing."""
    rng = np.random.default_rng(0)
    cache, hits = FrameCache(400_000), 0
    known: dict[int, Decoded] = {}
    for step in range(1500):
        number = int(rng.zipf(1.3)) % 300
        known.setdefault(number, video(number % 250, int(rng.integers(1, 9)), int(rng.integers(10, 80))))
        found = cache.get(key(number))
        if found is None:
            cache.put(key(number), known[number])
        else:
            hits += 1
            assert same(found, known[number]), step
        assert cache.used_bytes <= 400_000
    assert cache.hits == hits > 300 and cache.used_bytes > 200_000
    cache.put(key(1000), video(0, 64, 64))
    assert cache.get(key(1000)) is None, "larger than the whole cache"


def test_the_mapping_is_all_the_memory_there_is() -> None:
    def shared_bytes() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Shared", "Private")))

    cache = FrameCache(20 << 20)
    before = shared_bytes()
    for number in range(200):  # 200 x 1 MB
        cache.put(key(number), video(number, 16, 148))
    grown = shared_bytes() - before
    assert 18 << 20 < grown < 23 << 20


def test_a_changed_file_or_another_choice_is_another_key(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    first = frames_key(path, ("uniform", 8, None))
    assert first == frames_key(path, ("uniform", 8, None)) != frames_key(path, ("uniform", 9, None))
    os.utime(path, ns=(0, 10**9))
    assert frames_key(path, ("uniform", 8, None)) != first


def write_rows(folder: Path, num_videos: int) -> Path:
    rows = []
    for number in range(num_videos):
        write_video(folder / f"{number}.mp4", numbered_images(10 + number), gop=3)
        ask = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "rain"}]
        rows.append({"id": str(number), "video": f"{number}.mp4", "conversations": ask})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_workers_and_their_successors_share_one_cache(tmp_path: Path) -> None:
    path, cache = write_rows(tmp_path, 6), FrameCache(1 << 22)
    plain, cached = VideoJsonl(path, num_frames=4), VideoJsonl(path, num_frames=4, cache=cache)
    for epoch in range(3):  # every epoch has new workers, and the third a video each that the other one decoded
        order = [0, 1, 2, 3, 4, 5] if epoch < 2 else [1, 0, 3, 2, 5, 4]
        loader = DataLoader(cached, sampler=order, batch_size=None, num_workers=2, multiprocessing_context="fork")
        for place, example in zip(order, loader, strict=True):
            expected = plain[place]
            assert isinstance(expected, Example) and expected.frames is not None
            assert np.array_equal(example.frames, expected.frames)
            np.testing.assert_array_equal(example.timestamps_s, np.asarray(expected.timestamps_s))
            assert example.duration_s == expected.duration_s
        assert (cache.lookups, cache.hits) == (6 * epoch + 6, 6 * epoch)


def test_a_file_written_again_is_decoded_again(tmp_path: Path) -> None:
    data = VideoJsonl(write_rows(tmp_path, 1), num_frames=2, cache=FrameCache(1 << 22))

    def shown() -> list[int]:
        example = data[0]
        assert isinstance(example, Example) and example.frames is not None
        return frame_numbers(example.frames)

    assert shown() == shown() == [0, 9]
    write_video(tmp_path / "0.mp4", numbered_images(30), gop=3)
    assert shown() == [0, 29]


def test_it_cannot_be_copied_by_mistake_or_made_of_nothing() -> None:
    with pytest.raises(TypeError, match="shared by forking"):
        pickle.dumps(FrameCache(1 << 20))
    with pytest.raises(ValueError, match="holds nothing"):
        FrameCache(100)
