"""`stts compare --save_kept`: what was kept is on disk as it was, for the samples asked for, also after a kill."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stts.data.shapes.files import write_shapes
from stts.data.shapes.scene import FAMILIES
from stts.eval.answering.kept_tokens import kept_tensors, read_kept
from stts.eval.compare import CompareConfig, run_compare
from stts.models.pruning.report import Report
from stts.tokens import Grid

FRAMES, CELLS = 4, 16


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), sizes={"test": 3}, progress=False)


@pytest.fixture
def config(tiny_folder: Path, clips: Path, tmp_path: Path) -> CompareConfig:
    """Three clips, three questions each, a clip per batch."""
    shutil.copytree(clips, tmp_path / "data")
    return CompareConfig(
        model=tiny_folder,
        data=tmp_path / "data" / "test.jsonl",
        out=tmp_path / "out",
        pruners=("novelty", "random", "fastv"),
        retention_ratios=(0.5,),
        num_frames=FRAMES,
        batch_size=3,
        max_new_tokens=1,
        save_kept=4,
    )


def test_the_first_samples_are_kept_with_index_grid_times_and_scores(config: CompareConfig) -> None:
    result = run_compare(config, progress=False)
    uids = [record.uid for record in result.records]
    kept = read_kept(config.out, uids)
    assert set(kept) == set(uids[:4])
    for record in result.records[:4]:
        one = kept[record.uid]
        assert (one.grid.t, one.grid.per_frame) == (FRAMES, CELLS) and len(one.times_s) == FRAMES
        assert set(one.index) == {"novelty@0.5", "random@0.5", "fastv@0.5"}, "dense keeps everything and is not written"
        for key in ("novelty@0.5", "random@0.5"):
            assert len(one.index[key]) == record.outcomes[key].num_kept == FRAMES * CELLS // 2
            assert one.index[key].diff().min() > 0
        assert len(one.index["fastv@0.5"]) < FRAMES * CELLS, "a cut inside the LLM shows what is left behind it"
        novelty = one.scores["novelty@0.5"]
        ranked = torch.sort(novelty, descending=True, stable=True).indices[: FRAMES * CELLS // 2]
        assert torch.equal(ranked.sort().values.int(), one.index["novelty@0.5"]), "higher = kept"
    assert all(record.question.endswith("?") and "<video>" not in record.question for record in result.records)


def test_nothing_is_written_unless_asked_and_all_means_all(config: CompareConfig) -> None:
    plain = run_compare(replace(config, save_kept=0), progress=False)
    assert not (config.out / "kept").exists()
    whole = run_compare(replace(config, save_kept="all", overwrite=True), progress=False)
    uids = {record.uid for record in whole.records}
    assert set(read_kept(config.out, uids)) == uids and whole.records == plain.records
    run_compare(replace(config, save_kept=0, overwrite=True), progress=False)
    assert read_kept(config.out, uids) == {}, "--overwrite throws away what the old comparison kept"


def test_a_killed_run_ends_with_the_same_files(config: CompareConfig) -> None:
    config = replace(config, save_kept="all")
    straight = replace(config, out=config.out.with_name("straight"))
    run_compare(straight, progress=False)
    last = sorted((config.data.parent / "test").iterdir())[-1]
    whole = last.read_bytes()
    last.write_bytes(b"stops the run")
    with pytest.raises(ValueError, match="not readable as a video"):
        run_compare(config, progress=False)
    (config.out / "kept" / "000006.safetensors").write_bytes(b"of a batch that was killed before it was noted")
    last.write_bytes(whole)
    run_compare(config, progress=False)
    files = sorted(path.name for path in (straight.out / "kept").iterdir())
    assert files == [f"{place:06d}.safetensors" for place in (0, 3, 6)], "first question of each batch"
    for name in files:
        assert (config.out / "kept" / name).read_bytes() == (straight.out / "kept" / name).read_bytes()


def test_scores_of_a_later_stage_name_the_cells_it_saw(config: CompareConfig) -> None:
    run_compare(replace(config, pruners=("holitom+inner",)), progress=False)
    found = read_kept(config.out, [f"test-{clip:06d}-{name}" for clip in range(3) for name in FAMILIES])
    assert len(found) == config.save_kept
    for one in found.values():
        kept, scores = one.index["holitom+inner@0.5"], one.scores["holitom+inner@0.5"]
        seen = ~scores.isnan()
        assert scores.shape == (FRAMES * CELLS,) and len(kept) < seen.sum() < FRAMES * CELLS
        assert seen[kept.long()].all(), "what the last stage kept, it saw"
        ranked = torch.where(seen, scores, -torch.inf).sort(descending=True, stable=True).indices[: len(kept)]
        assert torch.equal(ranked.sort().values.int(), kept), "and kept for its scores"


def test_a_stage_that_gave_no_scores_has_none_and_a_uid_may_hold_slashes(tmp_path: Path) -> None:
    report = Report([Grid(2, 1, 2)] * 2, [torch.tensor([0, 3])] * 2, [None, torch.arange(4.0)])
    tensors = kept_tensors("a:B@0.5", report, ("x/1", "x/2"), (None, None), {"x/1", "x/2"})
    assert [name for name in tensors if name.startswith("scores")] == ["scores/a:B@0.5/x/2"]
    (tmp_path / "kept").mkdir()
    save_file(tensors, tmp_path / "kept" / "000000.safetensors")
    with safe_open(tmp_path / "kept" / "000000.safetensors", framework="pt") as file:
        assert "times/x/1" not in file.keys()  # noqa: SIM118
    found = read_kept(tmp_path, ["x/1"])
    assert list(found) == ["x/1"] and found["x/1"].index["a:B@0.5"].tolist() == [0, 3] and not found["x/1"].scores


def test_a_negative_number_of_samples_is_refused(config: CompareConfig) -> None:
    with pytest.raises(ValueError, match="--save_kept -1 must be 0"):
        replace(config, save_kept=-1)
