"""Every benchmark runs at its smallest, and what it reports adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.scripts import load_script

CASE7 = Path(__file__).parent / "golden" / "data" / "stts" / "case7_packing_only.safetensors"
ABSENT = -99  # how the file marks a patch that went nowhere


# --- what they share -------------------------------------------------------------------------------------------------


def test_extra_memory_is_the_peak_beyond_what_was_there() -> None:
    held = torch.ones(1 << 18)  # 1 MiB, there before

    def call() -> torch.Tensor:
        doubled = held * 2  # + 1 MiB
        once_more = doubled + 1  # + 1 MiB
        del doubled
        return once_more * 3  # the place of `doubled` again

    assert load_script("benchmarks/measure").extra_mib(call, held.device) == pytest.approx(2, abs=0.01)


def test_a_round_in_which_everything_is_slow_changes_no_ratio() -> None:
    measure = load_script("benchmarks/measure")
    found = measure.compared([10.0, 30.0, 10.0], [5.0, 15.0, 5.0])
    assert (found.ms, found.ratio, found.ratio_spread) == (5.0, 2.0, 0.0)
    assert found.spread == pytest.approx(1.0)  # quartiles 5 and 10


def test_ways_take_turns() -> None:
    order: list[str] = []
    ways = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = load_script("benchmarks/measure").in_turns(ways, torch.device("cpu"), 2)
    assert "".join(order) == "ab" + "abab" and list(found) == ["a", "b"]


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["random_groups", "all_full", "lone_frame", "several_empty", "many_small"])
def test_the_rival_packs_like_the_release(group: str) -> None:
    case = {name.removeprefix(f"{group}."): x for name, x in load_file(CASE7).items() if name.startswith(f"{group}.")}
    rows = load_script("benchmarks/packing").rival_layout(case["keep"])
    present = case["packed_slot"] != ABSENT
    assert torch.equal(rows.row_FN, case["packed_row"].where(present, -1))
    assert torch.equal(rows.slot_FN, case["packed_slot"].where(present, -1))
    assert torch.equal(rows.mask_R1NN, case["packed_attn_mask"])


def test_packing_is_compared_with_the_rival(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new folder" / "packing.json"
    assert load_script("benchmarks/packing").main(["--quick", "--json", str(file)]) == 0
    rival, ours = json.loads(file.read_text())["rows"]
    assert rival["way"] == "rows and mask" and rival["rows"] >= 4 and ours["waste"] == 0
    assert ours["memory_ratio"] == rival["extra_mib"] / ours["extra_mib"] > 1
    assert ours["layout"]["ratio"] == rival["layout"]["ms"] / ours["layout"]["ms"]
    assert "729 patches a frame, half kept" in capsys.readouterr().out


# --- long video ------------------------------------------------------------------------------------------------------


def test_long_video_is_measured_whole_and_in_pieces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = load_script("benchmarks/long_video")
    path = tmp_path / "rows.json"
    args = ["--minutes", "0.5", "1", "--fps", "1", "--chunk-frames", "8", "--budget", "100", "--frame-size", "48"]
    assert bench.main([*args, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 3 * 2 * 2
    found = {(row["pruner"], row["mode"], row["frames"]): row for row in rows}
    for frames in (30, 60):
        tokens = {name: found[name, "whole", frames]["llm_tokens"] for name in ("none", "visionzip", "stts")}
        assert tokens == {"none": 9 * frames, "visionzip": 100, "stts": 100}
        for name in tokens:
            assert found[name, "pieces", frames]["llm_tokens"] == tokens[name]
            assert found[name, "pieces", frames]["peak_mib"] >= 0
    # held: 96 values per token of the connector and of the prompt; stts keeps 100 of them and a score per token
    assert found["none", "pieces", 60]["holds_mib"] == 4 * 540 * (96 + 96) / 2**20
    assert found["stts", "pieces", 60]["holds_mib"] == 4 * (100 * 96 + 540 + 540 * 96) / 2**20
    assert "tokens to the LLM" in capsys.readouterr().out


# --- dense against pruned --------------------------------------------------------------------------------------------


def test_speed_up_stands_beside_what_flops_allow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cpu.json"
    assert load_script("benchmarks/cpu").main(["--quick", "--threads", "1", "--json", str(file)]) == 0
    rows = {(row["work"], row["way"]): row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == [(work, way) for work in ("prefill", "training") for way in ("dense", "stts", "random-vit")]
    dense, pruned = rows["prefill", "dense"], rows["prefill", "random-vit"]
    assert dense["ceiling"] == dense["share"] == 1 and dense["flops"]["pruner"] == 0
    assert pruned["ceiling"] == sum(dense["flops"].values()) / sum(pruned["flops"].values()) > 1
    assert pruned["share"] == pruned["time"]["ratio"] / pruned["ceiling"]
    assert rows["training", "stts"]["flops"]["tower"] == 3 * rows["prefill", "stts"]["flops"]["tower"]
    for row in rows.values():
        assert sum(row["parts_ms"].values()) == pytest.approx(row["time"]["ms"], rel=0.01), "one round: parts add up"
    assert "tiny, training: 1 x 4 frames, 1 rounds" in capsys.readouterr().out


# --- video -----------------------------------------------------------------------------------------------------------


def test_every_way_of_decoding_gives_the_same_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench, clip = load_script("benchmarks/video"), tmp_path / "clip.mp4"
    bench.write_clip(clip, (64, 48), 12, 80)
    gpu = tmp_path / "gpu.json"
    gpu.write_text(json.dumps({"cells": {"training 64 stts 0.5": {"total_ms": 2000.0}}}))
    file = tmp_path / "video.json"
    assert bench.main(["--quick", "--videos", str(clip), "--gpu", str(gpu), "--json", str(file)]) == 0
    content = json.loads(file.read_text())
    assert [row["way"] for row in content["rows"]] == list(bench.WAYS)  # main() has compared their pixels
    assert content["step_s"] == 2.0 and [one["workers"] for one in content["waiting"]] == [0, 1]
    assert all(0 <= one["waits"] < 1 for one in content["waiting"])
    assert "Estimate, not measured on one machine" in capsys.readouterr().out
    with pytest.raises(ValueError, match="run gpu"):
        bench.step_of({"cells": {}})


# --- growth ----------------------------------------------------------------------------------------------------------


def test_counted_flops_are_those_of_the_specification() -> None:
    plot = load_script("benchmarks/growth")
    dense, stts = plot.molmo2_cost(128, "dense"), plot.molmo2_cost(128, "stts")
    assert (dense.vit, dense.llm, dense.connector) == (78_869_392_588_800, 138_743_818_223_616, 2_054_829_441_024)
    assert (stts.vit, stts.llm, stts.pruner) == (45_766_833_684_480, 53_521_063_870_464, 1_140_644_892_672)
    assert plot.molmo2_cost(128, "visionzip").vit == dense.vit


def test_growth_is_drawn_from_its_file(tmp_path: Path) -> None:
    plot = load_script("benchmarks/growth")
    assert plot.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    points = json.loads((tmp_path / "growth.json").read_text())["points"]
    assert [(point["frames"], point["way"]) for point in points] == [
        (frames, way) for frames in (8, 16) for way in ("dense", "visionzip", "stts")
    ]
    assert points[3]["training_mib"] > points[0]["training_mib"] > points[0]["prefill_mib"] > 0
    picture = (tmp_path / "growth.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert plot.main(["--redraw", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "growth.png").read_bytes() == picture


def test_a_cell_that_breaks_the_gpu_ends_the_run_which_goes_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel's illegal access, as torch tells it: the call fails, and so does every later one of the process."""
    gpu, file = load_script("benchmarks/gpu"), tmp_path / "gpu.json"
    command = ["--device", "cpu", "--tiny", "--parts", "inference", "--json", str(file)]

    def fail(*_: Any, **__: Any) -> Any:
        monkeypatch.setattr(torch, "ones", fail)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(gpu.Rival, "__enter__", fail)  # dense, the first cell, is measured before
        with pytest.raises(SystemExit, match="the same command goes on behind this cell"):
            gpu.main(command)
    monkeypatch.undo()
    assert "release 0.5: broke the device: CUDA error: an illegal memory access" in capsys.readouterr().err
    cells = json.loads(file.read_text())["cells"]
    assert ["failed" in row for row in cells.values()] == [False, True], "nothing was begun behind it"

    assert gpu.main(command) == 1
    again = json.loads(file.read_text())["cells"]
    assert list(again) == [*cells, "inference 4 stts 0.5"] and again.items() > cells.items()
    assert again["inference 4 stts 0.5"]["total_ms"] > 0
