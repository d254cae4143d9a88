"""The GPU benchmark on a CPU: its inputs, its rival, its checks, and the whole of it on small models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import stts
from stts.models.checkpoints.load import load_vlm
from stts.models.families.published import config_of
from stts.models.families.tiny import write_tiny
from stts.packing import attention
from stts.packing.segments import Segments
from stts.pruners.base import Newlines, Positions, Stage
from stts.pruners.registry import PRUNERS
from stts.tokens import Budget, Kept, Signal, Site, VideoTokens
from tests.scripts import FOLDER, load_script

CPU = torch.device("cpu")
MOLMO2, QWEN3, ONEVISION = (
    "allenai/Molmo2-4B",
    "Qwen/Qwen3-VL-4B-Instruct",
    "llava-hf/llava-onevision-qwen2-7b-ov-hf",
)
FRAMES = 6
SITE = Site("vit", 3, 4)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Any:
    """The small model of a family, by name."""
    script = load_script("benchmarks/gpu")
    return script.Bench(request.param, replace(script.PLANS["tiny"], dtype="float32"), CPU)


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MOLMO2, QWEN3, ONEVISION])
def test_inputs_are_laid_out_as_the_processor_lays_them_out(name: str, tmp_path: Path) -> None:
    models = load_script("benchmarks/gpu_models")
    model, processor = load_vlm(write_tiny(tmp_path / "model", config_of(name)))
    side = 7 * 14 if name != QWEN3 else 6 * 16
    num_frames = 8
    frames = np.zeros((num_frames, side, side, 3), np.uint8)
    message = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "is there a cross ?"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True)
    metadata = {"fps": 1.0, "frames_indices": list(range(num_frames)), "total_num_frames": num_frames}
    options: dict[str, Any] = {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False}
    wanted = processor(text=[text], return_tensors="pt", return_mm_token_type_ids=True, **options)
    config = model.config
    grid = models.grid_of(config, num_frames, tiny=True)
    made = models.make_inputs(config, grid, CPU, torch.float32, training=False)
    assert made.keys() == wanted.keys() - ({"mm_token_type_ids"} if name == ONEVISION else set())
    assert made["pixel_values_videos"].shape == wanted["pixel_values_videos"].shape
    for key in made.keys() & {"video_token_pooling", "video_grids", "video_grid_thw"}:
        assert torch.equal(made[key], wanted[key]), key

    def visual(inputs: Any) -> list[int]:
        names = ("video_token_id", "image_patch_id", "frame_start_token_id", "frame_end_token_id")
        ids = [value for key in names if (value := getattr(config, key, None)) is not None]
        return [token for token in inputs["input_ids"][0].tolist() if token in ids]

    assert visual(made) == visual(wanted)
    if "mm_token_type_ids" in made:
        kinds = {key: set(inputs["input_ids"][inputs["mm_token_type_ids"] > 0].tolist()) for key, inputs in
                 (("made", made), ("wanted", wanted))}  # fmt: skip
        assert kinds["made"] == kinds["wanted"]
        assert made["mm_token_type_ids"].max() == wanted["mm_token_type_ids"].max()


# --- the rival -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed:
    """The same groups of every frame, and some key bias until the drop."""

    places: tuple[int, ...]
    site: Site = SITE
    signals: frozenset[Signal] = frozenset()
    count_known: bool = True
    positions: Positions = "original"
    newlines: Newlines = "all"

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (self,)

    def __call__(self, videos: Sequence[VideoTokens], budgets: Sequence[Budget]) -> list[Kept]:
        kept = []
        for video in videos:
            place_G = torch.arange(video.grid.num_groups) % video.grid.per_frame
            bias_N = torch.linspace(-2, 0, len(video.x_ND))
            index_K = torch.isin(place_G, torch.tensor(self.places)).nonzero()[:, 0]
            kept.append(Kept(index_K, attention_bias_N=bias_N))
        return kept

    def flops(self, grid: Any, width: int, num_kept: int) -> int:
        return 0


@pytest.mark.parametrize(("bench", "places"), [(MOLMO2, (1, 4)), (QWEN3, (0, 4, 7))], indirect=["bench"])
def test_the_rival_gives_our_logits_where_no_frame_is_alone_in_its_row(bench: Any, places: tuple[int, ...]) -> None:
    frames = FRAMES if bench.config.model_type == "molmo2" else 2 * FRAMES
    inputs = bench.inputs(frames, training=False)
    pruned = stts.Pruning(bench.model, Fixed(places), retention_ratio=len(places) / 9)
    room = load_script("benchmarks/rival_tower")
    rival = room.Rival(bench.model, Fixed(places), retention_ratio=len(places) / 9)
    with torch.no_grad():
        with pruned:
            ours = bench.model(**inputs).logits
        with rival:
            theirs = bench.model(**inputs).logits
        assert rival.last.kept_patches == pruned.last.kept_patches
        dense = bench.model(**inputs).logits
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(dense, ours, atol=1e-3)


@pytest.mark.parametrize("bench", [MOLMO2], indirect=True)
def test_the_rival_leaves_nothing_behind(bench: Any) -> None:
    rival = load_script("benchmarks/rival_tower").Rival(bench.model, Fixed((4,)), retention_ratio=1 / 9)
    config = bench.model.config.to_dict()

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("inside")

    handle = bench.model.model.vision_tower.layers[0].register_forward_hook(broken)
    with torch.no_grad(), pytest.raises(RuntimeError, match="inside"), rival:
        bench.model(**bench.inputs(FRAMES, training=False))
    handle.remove()
    assert bench.model.config.to_dict() == config


# --- checks ----------------------------------------------------------------------------------------------------------


def dense_kernel(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, causal: bool) -> Tensor:
    """Stands where a CUDA kernel does: boundaries stay on the device."""
    number_S = torch.searchsorted(cu[1:].contiguous(), torch.arange(len(q)), right=True)
    mask = number_S[:, None] == number_S
    if causal:
        mask = mask.tril()
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(attention, "_kernel", lambda device, dtype: dense_kernel)
    yield


@pytest.mark.parametrize("bench", [MOLMO2, QWEN3, ONEVISION], indirect=True)
def test_the_tower_never_waits_for_the_device(bench: Any, kernel: None) -> None:
    checks, cell = (
        load_script("benchmarks/gpu_checks"),
        load_script("benchmarks/gpu").Cell("inference", FRAMES, 0.5, "stts"),
    )
    pruned = bench.pruning(cell)
    with checks.no_syncs(pruned):
        bench.generate(cell, pruned)
    adapter = pruned.adapter
    stock = adapter.blocks

    def waiting() -> list[Callable[..., Tensor]]:
        return [lambda x, *rest, block=block: block(x * x.abs().max().clamp(1, 1).item(), *rest) for block in stock()]

    def by_mask() -> list[Callable[..., Tensor]]:
        return [lambda x, *rest, block=block: block(x[x.new_ones(len(x)).bool()], *rest) for block in stock()]

    for found in (waiting, by_mask):
        adapter.blocks = found
        with pytest.raises(RuntimeError, match="makes the host wait"), checks.no_syncs(pruned):
            bench.generate(cell, pruned)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = load_script("benchmarks/gpu_checks")
    assert all(row["ok"] for row in checks.check_kernel(CPU, tiny=True))

    def without_bias(q: Tensor, k: Tensor, v: Tensor, segments: Segments, **options: Any) -> Tensor:
        weak = segments if segments.key_bias is None else segments.with_bias(0.5 * segments.key_bias)
        return attention.packed_attention(q, k, v, weak, **options)

    monkeypatch.setattr(checks, "packed_attention", without_bias)
    assert [row["ok"] for row in checks.check_kernel(CPU, tiny=True)] == [False, False, True, True]


@pytest.mark.parametrize("bench", [MOLMO2], indirect=True)
def test_a_cell_that_fails_says_why_and_ends_nothing(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("benchmarks/gpu")
    [unreachable] = [script.run_cell(bench, script.Cell("pruners", 4, 0.01, "fastv"))]
    assert unreachable["failed"] == "ValueError" and "0.01" in unreachable["message"]

    def full(*_: Any) -> dict[str, float]:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(bench, "generate", full)
    row = script.run_cell(bench, script.Cell("inference", 4, 0.5, "stts"))
    assert row == {"failed": "out of memory", "message": "tried to allocate 80 GiB"}
    key = dict(part="inference", frames=4, retention_ratio=0.5, way="stts")
    text = load_script("benchmarks/gpu_table").report(
        load_script("benchmarks/gpu_table").derive({"x": key | row}),
        {"device": "a GPU", "dtype": "bfloat16", "attention": "sdpa", "packed_kernel": "SDPA", "torch": "2",
         "transformers": "5", "repeats": 1, "tiny": False, "new_tokens": 3, "model": "m"}, "",
    )  # fmt: skip
    assert "out of memory" in text


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_script("benchmarks/gpu").main(["--device", "cpu"])
    assert "add --tiny" in capsys.readouterr().err


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_path_runs_and_a_killed_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "gpu.json"
    argv = ["--device", "cpu", "--tiny", "--json", str(file)]
    script = [sys.executable, str(FOLDER / "benchmarks" / "gpu.py"), *argv, "--check", "--profile"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)}
    looked = subprocess.run(script, capture_output=True, text=True, check=True, env=environment).stdout
    shares = json.loads(file.read_text())["profile"]
    assert "host syncs: not checked" in looked and looked.count("(target < 3 %)") == 2
    assert shares["training"]["backward"] > 0 == shares["inference"]["backward"]
    assert all(part["decide"] > 0 and part["drop"] > 0 and part["shorten"] > 0 for part in shares.values())
    file.unlink()

    main = load_script("benchmarks/gpu").main
    assert main(argv) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text())
    rows = {(row["part"], row["way"]): row for row in found["rows"]}
    assert not [row for row in rows.values() if "failed" in row]
    ways = {"dense", "release", "stts"}
    assert rows.keys() == {
        *((part, way) for part in ("inference", "training") for way in ways),
        *(("pruners", way) for way in ["dense", *PRUNERS] if way != "none"),
    }
    for (part, way), row in rows.items():
        assert row["ratio"] == pytest.approx(rows[part, "dense"]["total_ms"] / row["total_ms"])
        gained = row["ratio"] if part == "training" else row["ttft_ratio"]
        assert row["share"] == pytest.approx(gained / row["ceiling"])
        assert (row["ceiling"] > 1) == (way != "dense")
        if part == "pruners" and way != "dense":
            assert row["calls"] and row["choice_ms"] > 0
    assert rows["training", "release"]["loss"] != rows["training", "dense"]["loss"]
    assert rows["inference", "release"]["flops"] == rows["inference", "stts"]["flops"]
    assert "Tiny models: times mean nothing" in out and out.count("vidcom2") == 1

    gone = "inference 4 stts 0.5"
    del found["cells"][gone]
    file.write_text(json.dumps(found))
    assert main([*argv, "--parts", "inference"]) == 0
    again = capsys.readouterr()
    assert "AdamW, states in bfloat16" in again.out
    assert [line.rpartition(": ")[0] for line in again.err.splitlines() if line.startswith("inference ")] == [gone]
    assert json.loads(file.read_text())["cells"].keys() == {*found["cells"], gone}
