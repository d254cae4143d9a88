"""`stts compare` end to end: a tiny stock model, real MP4 files, every output file."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stts.cli import main
from stts.data.collate import Collator
from stts.data.datasets import VideoJsonl
from stts.data.shapes.files import write_shapes
from stts.eval.compare import CompareConfig, run_compare
from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import BEFORE, DENSE, Row
from stts.metrics.cost import video_cost
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.models.families.base import vlm_shape
from tests.conftest import TINY

CLIPS, FRAMES = 4, 6
CELLS = 16  # 7 x 7 patches are pooled to 4 x 4 tokens a frame


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), sizes={"test": CLIPS}, progress=False)


@pytest.fixture
def data(clips: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; returns the JSONL. Three questions a clip."""
    shutil.copytree(clips, tmp_path / "data")
    return tmp_path / "data" / "test.jsonl"


@pytest.fixture
def config(tiny_folder: Path, data: Path, tmp_path: Path) -> CompareConfig:
    """One clip a batch, one token an answer."""
    return CompareConfig(
        model=tiny_folder,
        data=data,
        out=tmp_path / "out",
        pruners=("none", "random", "uniform", "novelty"),
        retention_ratios=(0.5,),
        num_frames=FRAMES,
        batch_size=3,
        max_new_tokens=1,
    )


def run(config: CompareConfig, **changes: Any) -> ComparisonResult:
    return run_compare(replace(config, **changes), progress=False)


def rewrite(data: Path, change: Callable[[int, dict[str, Any]], None]) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for number, row in enumerate(rows):
        change(number, row)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))


def answer_like_dense(config: CompareConfig) -> None:
    """Make every second row's answer what dense says, the others' something it never says."""
    found = run(config, pruners=("none",), out=config.out.with_name("scout"))
    said = {record.uid: record.outcomes[DENSE].prediction for record in found.records}

    def change(number: int, row: dict[str, Any]) -> None:
        del row["options"]
        row["conversations"][1]["value"] = "nothing" if number % 2 else said[row["id"]]

    rewrite(config.data, change)


def row_of(result: ComparisonResult, method: str, ratio: float = 1.0) -> Row:
    [row] = [row for row in result.rows if (row.method, row.retention_configured) == (method, ratio)]
    return row


def flops(row: Row) -> Mapping[str, float]:
    return row.flops["exact"]


def test_every_file_tells_the_same(config: CompareConfig) -> None:
    answer_like_dense(config)
    result = run(config)
    assert sorted(file.name for file in config.out.iterdir()) == [
        "answers.jsonl",
        *(f"comparison.{end}" for end in ("csv", "json", "md", "png")),
    ]
    assert [row.method for row in result.rows] == [DENSE, "random", "uniform", "novelty"], "`none` is the dense row"
    assert row_of(result, DENSE).accuracy == 0.5
    for row in result.rows:
        key = DENSE if row.method == DENSE else f"{row.method}@0.5"
        right = [record.outcomes[key].prediction == record.answer for record in result.records]
        assert row.accuracy == sum(right) / len(right) and row.num_samples == 3 * CLIPS and row.num_videos == CLIPS
        assert sum(round(f["accuracy"] * f["num_samples"]) for f in row.families.values()) == sum(right)
        if row.method != DENSE:
            assert row.difference_low is not None and row.difference is not None and row.difference_high is not None
            assert row.difference == pytest.approx(row.accuracy - 0.5)
            assert row.difference_low < row.difference < row.difference_high

    written = json.loads((config.out / "comparison.json").read_text())
    assert ComparisonResult.from_json(written) == result
    assert {record["family"] for record in written["records"]} == {f for row in result.rows for f in row.families}
    with (config.out / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    table = (config.out / "comparison.md").read_text()
    for line, row, of_json in zip(lines, result.rows, written["rows"], strict=True):
        assert row.accuracy is not None
        assert (line["method"], float(line["accuracy"])) == (row.method, row.accuracy)
        assert float(line["flops/exact/total"]) == flops(row)["total"] == of_json["flops"]["exact"]["total"]
        shown = next(text for text in table.splitlines() if text.startswith(f"| {row.method} |"))
        assert f"| {100 * row.accuracy:.1f} [" in shown


def test_budgets_are_met_and_costs_are_those_of_the_formulas(config: CompareConfig, tiny: tuple[Any, Any]) -> None:
    result = run(config, retention_ratios=(0.5, 0.25))
    shape = vlm_shape(tiny[0].config)
    for ratio in (0.5, 0.25):
        planned = round(ratio * FRAMES * CELLS)
        cost = video_cost(shape, num_frames=FRAMES, llm_tokens=planned)
        for method in ("random", "uniform", "novelty"):
            row = row_of(result, method, ratio)
            assert row.retention_measured == ratio and row.kept_per_frame == planned / FRAMES
            assert row.decode["flops_share"] == row.decode["cache_share"] == ratio
            assert {part: flops(row)[part] for part in ("vit", "llm")} == {"vit": cost.vit, "llm": cost.llm}
            assert flops(row)["connector"] == cost.connector
        assert flops(row_of(result, "random", ratio))["pruner"] == 0
        assert flops(row_of(result, "novelty", ratio))["pruner"] == 4 * FRAMES * CELLS * TINY["llm_width"]
    dense = video_cost(shape, num_frames=FRAMES, llm_tokens=FRAMES * CELLS)
    assert flops(row_of(result, DENSE))["total"] == dense.total
    assert flops(row_of(result, "random", 0.25))["share"] == cost.total / dense.total


def test_dense_is_the_stock_model_and_so_is_everything_kept(config: CompareConfig, tiny: tuple[Any, Any]) -> None:
    result = run(config, retention_ratios=(1.0,), max_new_tokens=4)
    model, processor = tiny
    data = VideoJsonl(config.data, num_frames=FRAMES)
    for start in range(0, 3 * CLIPS, 3):
        batch = Collator(processor, training=False)([data[start + place] for place in range(3)])
        assert batch is not None
        with torch.inference_mode():
            ids = model.generate(**batch.inputs, max_new_tokens=4, do_sample=False)
        stock = processor.tokenizer.batch_decode(ids[:, batch.inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for text, record in zip(stock, result.records[start : start + 3], strict=True):
            assert {outcome.prediction for outcome in record.outcomes.values()} == {text}
    assert {flops(row)["share"] for row in result.rows} == {1.0}


def test_pruning_changes_answers_and_the_seed_changes_random(config: CompareConfig, tmp_path: Path) -> None:
    says = []
    model = write_small_vlm(tmp_path / "model", None, image_size=56, seed=2, **TINY)  # not all untrained ones look
    for seed in range(4):  # an untrained model may say the same about two different subsets
        result = run(
            config, model=model, retention_ratios=(0.1,), seed=seed, out=config.out / str(seed), max_new_tokens=8
        )
        methods = result.records[0].outcomes
        says.append({name: tuple(record.outcomes[name].prediction for record in result.records) for name in methods})
    assert {one["uniform@0.1"] for one in says} == {says[0]["uniform@0.1"]} != {says[0][DENSE]}
    assert {one[DENSE] for one in says} == {says[0][DENSE]}
    assert len({one["random@0.1"] for one in says}) > 1


def test_a_killed_run_goes_on_behind_its_last_batch(config: CompareConfig) -> None:
    straight = run(config, out=config.out.with_name("straight"))
    videos = sorted((config.data.parent / "test").iterdir())
    whole = [video.read_bytes() for video in videos]
    for video in videos[2:]:
        video.write_bytes(b"stops the run")
    with pytest.raises(ValueError, match="not readable as a video"):
        run(config)
    with (config.out / "partial-00000.jsonl").open("a") as file:
        file.write('{"records": [{"uid": "cut by a ki')
    for video in videos[:2]:
        video.write_bytes(b"proof that the finished batches are not run again")
    videos[2].write_bytes(whole[2])
    with pytest.raises(ValueError, match="not readable as a video"):
        run(config)  # a second stop: batch 3 is noted behind the mended line
    videos[3].write_bytes(whole[3])
    resumed = run(config)
    assert resumed.records == straight.records
    assert not (config.out / "partial-00000.jsonl").exists()
    for video in videos[2:]:
        video.write_bytes(b"")
    assert run(config) == resumed, "a finished comparison is read, not run"


def test_what_is_in_out_is_respected(config: CompareConfig) -> None:
    run(config, pruners=("uniform",))
    with pytest.raises(
        ValueError, match=r"another comparison \(different: pruners, retention_ratios\).*--overwrite true"
    ):
        run(config, retention_ratios=(0.25,))
    again = run(config, retention_ratios=(0.25,), overwrite=True)
    assert row_of(again, "random", 0.25).accuracy is not None
    rewrite(config.data, lambda number, row: row.update(family="other"))
    with pytest.raises(ValueError, match="different: questions"):
        run(config, retention_ratios=(0.25,))
    foreign = config.out.with_name("foreign")
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds no comparison"):
        run(config, out=foreign, overwrite=True)
    assert (foreign / "thesis.tex").exists()


def test_broken_videos_are_counted_and_named(config: CompareConfig) -> None:
    [first, second, *_] = sorted((config.data.parent / "test").iterdir())
    first.write_bytes(b"not a video")
    second.write_bytes(second.read_bytes()[:400])
    with pytest.raises(ValueError, match=first.name):
        run(config)
    result = run(config, on_error="skip", batch_size=4, overwrite=True)
    assert len(result.skipped) == 6 and len(result.records) == 3 * CLIPS - 6
    assert row_of(result, DENSE).num_samples == 3 * CLIPS - 6
    assert "Skipped, video not readable: 6 (test-000000-" in (config.out / "comparison.md").read_text()
    for video in (config.data.parent / "test").iterdir():
        video.write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 12 videos"):
        run(config, on_error="skip", overwrite=True)


def test_the_baseline_is_its_own_model(config: CompareConfig, tiny_folder: Path, tmp_path: Path) -> None:
    other = write_small_vlm(tmp_path / "other", None, image_size=56, seed=2, **TINY)
    result = run(config, pruners=("uniform",), baseline_model=other, max_new_tokens=8)
    alone = run(config, model=other, pruners=("uniform",), out=tmp_path / "alone", max_new_tokens=8)
    assert [r.outcomes[BEFORE].prediction for r in result.records] == [
        r.outcomes[DENSE].prediction for r in alone.records
    ]
    assert any(r.outcomes[BEFORE].prediction != r.outcomes[DENSE].prediction for r in result.records)
    wider = write_small_vlm(tmp_path / "wider", None, image_size=56, **{**TINY, "llm_width": 64})
    with pytest.raises(ValueError, match="another architecture"):
        run(config, baseline_model=wider, out=tmp_path / "never")


def test_times_leave_out_the_first_and_short_batches(config: CompareConfig) -> None:
    result = run(config, batch_size=5)  # 5 + 5 + 2
    assert {len(values) for values in result.batch_ms.values()} == {1}
    assert all(row.ms_per_sample is not None and row.ms_per_sample > 0 for row in result.rows)
    single = run(config, batch_size=12, out=config.out.with_name("single"))
    assert {row.ms_per_sample for row in single.rows} == {None}
    assert "nothing was timed" in (config.out.with_name("single") / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pruners": ("unifrom",)}, "unknown pruner 'unifrom'; did you mean 'uniform'\\? known: none, random"),
        ({"pruners": ()}, r"--pruners \[\] must name"),
        ({"retention_ratios": ()}, r"--retention_ratios \[\] must name"),
        ({"retention_ratios": (0.5, 0.5)}, "each once"),
        ({"retention_ratios": (90,)}, "--retention_ratios: retention_ratio=90 .*to remove 90% write 0.1"),
        ({"model": Path("nowhere")}, "--model 'nowhere' is no folder"),
        ({"baseline_model": "./a/b"}, "--baseline_model './a/b' is no folder"),
        ({"data": Path("nowhere.jsonl")}, "--data 'nowhere.jsonl' is no file; check the path"),
        ({"data": Path(".")}, "name the JSONL file in it"),
        ({"batch_size": 0}, "--batch_size 0 must be at least 1"),
        (
            {"pruner_options": {"tango": {}}},
            r"--pruner_options: \['tango'\] are not among --pruners \['none', 'random'",
        ),
        ({"siglip": Path("nowhere")}, "--siglip 'nowhere' is no folder"),
        ({"limit": 0}, "--limit 0"),
        ({"on_error": "ignore"}, "--on_error 'ignore'"),
        ({"positions": "none"}, "--positions 'none'"),
    ],
)
def test_wrong_settings_name_their_flag(config: CompareConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ["red"]}, "none of the options"),
        ({"options": "red"}, "'options' is 'red', expected a list"),
        ({"conversations": [{"from": "human", "value": "?"}]}, "is empty or none"),
        ({"video": None}, "must show one video"),
    ],
)
def test_rows_that_cannot_be_scored_stop_the_run_at_once(
    config: CompareConfig, change: dict[str, Any], message: str
) -> None:
    def last(number: int, row: dict[str, Any]) -> None:
        if number == 3 * CLIPS - 1:
            row.update(change)
            if "video" in change:
                row["conversations"][0]["value"] = "?"

    rewrite(config.data, last)
    with pytest.raises(ValueError, match=message):
        run(config)
    assert not config.out.exists()


def test_command_line(config: CompareConfig, capsys: pytest.CaptureFixture[str]) -> None:
    args = [
        "compare",
        "--model",
        str(config.model),
        "--data",
        str(config.data),
        "--out",
        str(config.out),
        "--limit",
        "3",
    ]
    args += ["--num_frames=6", "--max_new_tokens", "1", "--name", "tiny", "--exact=false"]
    args += ["--pruner_options", "{random: {seed: 3}}"]
    assert main([*args, "--pruners", "uniform", "random", "--retention_ratios=0.5,0.25"]) == 0
    shown = capsys.readouterr().out
    assert "tiny: 3 questions on 1 videos, 6 frames (uniform_inclusive)" in shown
    assert [line.split()[:2] for line in shown.splitlines() if line.startswith(("uniform", "random"))] == [
        ["uniform", "0.5"], ["random", "0.5"], ["uniform", "0.25"], ["random", "0.25"]
    ]  # fmt: skip
    assert "Options: random seed=3." in shown and "--exact false" in shown
    assert main([*args, "--pruners", "[nothing]"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown pruner 'nothing'")
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--model"])
    assert stopped.value.code == 2
