"""`stts eval` from the command line: real files, a tiny stock model, kills, ranks, full disks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stts
from stts.cli import main
from stts.data.shapes.files import write_shapes
from stts.eval.answering.ranks import Ranks
from stts.eval.evaluate import run_eval
from stts.eval.run_config import EvalConfig
from stts.metrics.accuracy import mcnemar, paired_bootstrap
from stts.models.checkpoints.load import load_vlm, save_pruned
from tests.data.video.clips import numbered_images, write_video
from tests.eval.benchmarks import test_five_options, test_mvbench, test_videomme
from tests.eval.benchmarks.folders import touch, write_parquet
from tests.forked import Forked

ROOT = Path(__file__).parents[2]
CLIPS = 3


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), sizes={"test": CLIPS}, progress=False)


@pytest.fixture
def config(tiny_folder: Path, clips: Path, tmp_path: Path) -> EvalConfig:
    shutil.copytree(clips, tmp_path / "data")
    return EvalConfig(
        model=tiny_folder, data=tmp_path / "data" / "test.jsonl", out=tmp_path / "out", pruner="visionzip",
        retention_ratio=0.5, num_frames=4, max_new_tokens=2,
    )  # fmt: skip


def flags(config: EvalConfig, **more: Any) -> list[str]:
    given = {"model": config.model, "data": config.data, "out": config.out, "pruner": config.pruner} | more
    given = {"retention_ratio": 0.5, "num_frames": 4, "max_new_tokens": 2} | given
    return [f"--{name}={value}" for name, value in given.items() if value is not None]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def start(args: Sequence[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stts.cli", "eval", *args], text=True, env=environment(**more),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def fork(args: Sequence[str], **more: str) -> Forked:
    return Forked("stts.cli:main", ["eval", *args], errors_apart=True, **more)


def finish(process: subprocess.Popen[str] | Forked, code: int = 0) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, err
    return out + err


def written(out: Path) -> dict[str, Any]:
    """Results and samples without what a clock decides."""
    [results] = out.glob("*/*_results.json")
    made = json.loads(results.read_text())
    for name in ("date", "start_time", "end_time", "total_evaluation_time_seconds"):
        del made[name]
    del made["stts"]["efficiency"]["time_ms"]
    for row in made["stts"]["tasks"].values():
        del row["ms"]
    samples: dict[str, list[Any]] = {}
    for file in sorted(out.glob("*/*_samples_*.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        for line in lines:
            del line["stts"]["ms"]
        samples[file.name.split("_samples_")[1]] = lines
    return {"results": made, "samples": samples}


def test_files_hold_what_lmms_eval_readers_look_for(config: EvalConfig) -> None:
    shown = finish(fork(flags(config)))
    assert "visionzip at 0.5" in shown and "jsonl" in shown
    made = written(config.out)
    results = made["results"]
    assert {"results", "configs", "versions", "n-shot", "n-samples", "config", "task_hashes", "model_name"} <= set(
        results
    )
    lines = made["samples"]["jsonl.jsonl"]
    assert [line["doc_id"] for line in lines] == list(range(3 * CLIPS))
    accuracy = sum(line["acc"] for line in lines) / len(lines)
    assert results["results"]["jsonl"]["acc,none"] == accuracy == results["stts"]["tasks"]["jsonl"]["acc"]
    assert results["n-samples"]["jsonl"] == {"original": 9, "effective": 9, "missing_video": 0, "bad_rows": 0}
    for line in lines:
        own = line["stts"]
        assert (
            own["n_dense"] == 64 and own["n_kept"] == 32 == sum(own["kept_per_frame"]) and len(own["frame_times"]) == 4
        )
        assert line["target"] and line["input_media"][0].endswith(".mp4") and own["flops"] < own["flops_dense"]
    efficiency = results["stts"]["efficiency"]
    assert efficiency["tokens"] == {"dense": 64, "kept_mean": 32, "kept_p5": 32, "kept_p95": 32, "err": 0.5}
    assert efficiency["flops"]["ratio_llm"] < efficiency["flops"]["ratio_total"] < 1


def test_differences_are_paired_with_an_earlier_dense_run(config: EvalConfig, tmp_path: Path) -> None:
    shutil.copytree(config.model, tmp_path / "model")

    def run(**changes: Any) -> dict[str, Any] | None:
        settings = {name: getattr(config, name) for name in ("data", "num_frames", "max_new_tokens")}
        settings["model"] = tmp_path / "model"
        return run_eval(EvalConfig(**{**settings, **changes}), progress=False)

    run(out=tmp_path / "dense")
    made = run(out=config.out, pruner="random", retention_ratio=0.2, dense_reference=tmp_path / "dense")
    again = run(out=tmp_path / "itself", dense_reference=tmp_path / "dense")
    assert made is not None and again is not None
    paired = made["stts"]["tasks"]["jsonl"]["dense"]
    assert paired["num_samples"] == 3 * CLIPS and 0 < paired["p_bootstrap"] <= 1
    assert paired["bootstrap_low"] is None and "3 videos carry no 95 % interval" in paired["bootstrap_note"]
    assert paired["difference"] == pytest.approx(made["stts"]["tasks"]["jsonl"]["acc"] - paired["acc"])
    same = again["stts"]["tasks"]["jsonl"]["dense"]
    assert (same["difference"], same["p_mcnemar"], same["p_bootstrap"]) == (0.0, 1.0, 1.0)
    [file] = (tmp_path / "dense").glob("*/*_samples_jsonl.jsonl")
    file.write_text(file.read_text().replace('"counted": true', '"counted": false', 1))
    fewer = run(out=tmp_path / "fewer", dense_reference=tmp_path / "dense")
    assert fewer is not None
    assert fewer["stts"]["tasks"]["jsonl"]["dense"]["num_samples"] == 3 * CLIPS - 1, (
        "what a scoring left out is no pair"
    )
    with pytest.raises(ValueError, match=r"of another run \(different: num_frames\)"):
        run(out=tmp_path / "other", num_frames=2, dense_reference=tmp_path / "dense")
    with pytest.raises(ValueError, match="run with pruner 'random'; it must be none"):
        run(out=tmp_path / "other", dense_reference=config.out)
    with pytest.raises(ValueError, match="holds no finished"):
        run(out=tmp_path / "other", dense_reference=tmp_path)
    settings_file = tmp_path / "model" / "config.json"
    settings_file.write_text(settings_file.read_text() + "\n")
    with pytest.raises(ValueError, match=r"of another run \(different: files of the model\)"):
        run(out=tmp_path / "other", dense_reference=tmp_path / "dense")


def test_tests_of_pairs_by_hand() -> None:
    # 5 answers changed, 4 gained and 1 lost: p = 2 (C(5,0) + C(5,1)) / 2^5 = 12/32
    right, dense = [True] * 5 + [False], [False] * 4 + [True, True]
    assert mcnemar(right, dense) == 12 / 32
    assert mcnemar([True, False], [True, False]) == 1.0
    videos = [str(place) for place in range(6)]
    # differences +1 x4, 0, -1: the sum of six draws is <= 0 in 9.9 % of all 6^6 draws
    assert 0.17 < paired_bootstrap(right, dense, videos).p_value < 0.22
    # +1 and 0, each from its own video: one video that changed is no evidence
    assert paired_bootstrap([True, False], [False, False], ["a", "b"]).p_value == 1.0
    # +1 twice from one video, -1 from another: 1, 1/3 or -1 with chances 1/4, 1/2, 1/4
    drawn = paired_bootstrap([True, True, False], [False, False, True], ["a", "a", "b"])
    assert drawn.p_value == pytest.approx(0.5, abs=0.02) and drawn.low is None, "two videos carry no interval"
    assert paired_bootstrap(right, dense, ["one"] * 6).p_value == 1.0
    with pytest.raises(ValueError, match="pair them by sample"):
        mcnemar([True], [])


STOPS = """
import os, signal, time
from stts.pruners.simple import Uniform

class Stops(Uniform):  # at the last clip: waits to be killed, or sends Ctrl-C to itself
    def prune(self, video, budget):
        if "STOP" in os.environ and video.uid.startswith(LAST):
            if os.environ["STOP"] == "SIGINT":
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(600)
        return super().prune(video, budget)
"""


@pytest.fixture
def stops(config: EvalConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pruner that stops at the last clip, with everything before it noted."""
    last = sorted((config.data.parent / "test").glob("*.mp4"))[-1]  # type: ignore[union-attr]
    (tmp_path / "stops.py").write_text(STOPS.replace("LAST", repr(last.stem)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stops", raising=False)
    return "stops:Stops"


@pytest.mark.parametrize("verb", ["eval", "compare"])
def test_ctrl_c_is_one_line_that_says_how_to_go_on(
    config: EvalConfig, stops: str, verb: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    several = "s" if verb == "compare" else ""
    args = [verb, "--model", config.model, "--data", config.data, "--out", config.out, f"--pruner{several}", stops]
    args = [str(arg) for arg in [*args, f"--retention_ratio{several}", 0.5, "--num_frames", 4, "--batch_size", 1]]
    monkeypatch.setenv("STOP", "SIGINT")
    assert main(args) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped: {config.out} holds every finished batch; the same command again goes on behind them"
    )
    assert (config.out / "partial-00000.jsonl").read_bytes().count(b"\n") == 1 + 3 * (CLIPS - 1)
    monkeypatch.delenv("STOP")
    assert main(args) == 0
    assert f"{verb}  {'12/18' if several else '6/9'}" in capsys.readouterr().err, "it starts behind what is done"


def test_a_killed_run_goes_on_to_the_same_files(config: EvalConfig, stops: str, tmp_path: Path) -> None:
    config = replace(config, pruner=stops)
    run_eval(replace(config, out=tmp_path / "straight"), progress=False)
    process = start(flags(config), PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}", STOP="wait")
    part = config.out / "partial-00000.jsonl"
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") == 1 + 3 * (CLIPS - 1)):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not list(config.out.glob("*/*_results.json"))
    with part.open("ab") as file:
        file.write(b'{"keys": ["cut by a ki')
    with pytest.raises(ValueError, match=r"another evaluation \(different: num_frames\).*--overwrite true"):
        run_eval(replace(config, num_frames=2), progress=False)
    run_eval(config, progress=False)
    assert written(config.out) == written(tmp_path / "straight")
    assert not list(config.out.glob("partial*"))


def test_two_ranks_write_what_one_writes(config: EvalConfig, tmp_path: Path) -> None:
    run_eval(replace(config, out=tmp_path / "one"), progress=False)
    ranks = [fork(flags(config), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)) for rank in range(2)]
    for process in ranks:
        finish(process)
    assert written(config.out) == written(tmp_path / "one")


def test_a_full_disk_leaves_nothing_that_looks_finished(config: EvalConfig, tmp_path: Path) -> None:
    run_eval(replace(config, out=tmp_path / "straight"), progress=False)
    limited = (
        "import resource, signal, sys; from stts.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "sys.exit(main(['eval', *sys.argv[1:]]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", limited, *flags(config)], text=True, env=environment(), capture_output=True, timeout=300
    )
    assert (
        process.returncode == 2 and "cannot write" in process.stderr and "goes on behind what is done" in process.stderr
    )
    assert not list(config.out.glob("*/*_results.json")) and not list(config.out.rglob(".*.part"))
    for line in (config.out / "partial-00000.jsonl").read_text().splitlines():
        json.loads(line)
    run_eval(config, progress=False)
    assert written(config.out) == written(tmp_path / "straight")


def benchmarks(root: Path) -> Path:
    """Video-MME, MVBench (cut clips) and EgoSchema without public answers, with videos that can be read."""
    write_parquet(root / "videomme", test_videomme.TABLE, test_videomme.ROWS)
    touch(root / "videomme", "data/aaa.mp4", "data/bbb.mp4", "data/ccc.mp4", "subtitle/aaa.srt")
    (root / "videomme/subtitle/aaa.srt").write_text(test_videomme.SRT)
    test_mvbench.write_all(root / "mvbench", 1)
    write_parquet(root / "egoschema", f"MC/{test_five_options.EGO}", [test_five_options.ego("1", None)])
    touch(root / "egoschema", "videos/v1.mp4")
    for path in root.rglob("*.mp4"):
        write_video(path, numbered_images(12, 56, 56), fps=3)
    return root


def test_benchmarks_from_their_own_folders(config: EvalConfig, tmp_path: Path) -> None:
    root = benchmarks(tmp_path / "benchmarks")
    args = flags(config, data=None, data_root=root, batch_size=8, limit=4)
    shown = finish(fork([*args, "--tasks", "videomme", "videomme_w_subtitle", "mvbench", "egoschema"]))
    assert "no public answers" in shown
    made = written(config.out)
    found = made["results"]["results"]
    assert found["egoschema"]["acc,none"] is None
    assert found["videomme"]["videomme_perception_score,none"] == 100 * found["videomme"]["acc,none"]
    assert set(made["samples"]) == {f"{task}.jsonl" for task in found}
    assert "two plums" in made["samples"]["videomme_w_subtitle.jsonl"][0]["input"]
    [submission] = config.out.glob("*/*_submission_egoschema.json")
    assert json.loads(submission.read_text()).keys() == {"v1"}
    assert not any(line["stts"]["correct"] for line in made["samples"]["egoschema.jsonl"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pruner": "nothing"}, "unknown pruner 'nothing'; known: none"),
        ({"pruner": "tango", "retention_ratio": 1.5}, "--retention_ratio: "),
        ({"pruner": "tango"}, "--pruner tango needs --retention_ratio"),
        ({"retention_ratio": 0.5}, "say nothing without a --pruner"),
        ({"pruner": "fastv", "retention_ratio": 0.1}, "cannot be reached"),
        ({"data": "absent.jsonl"}, "is no file"),
        ({"data": None, "tasks": ("videomme",), "data_root": Path()}, "accepted under the root"),
        ({"scoring": "mine"}, "--scoring 'mine' is unknown for jsonl; known: strict, compat"),
    ],
)
def test_bad_input_is_one_line(config: EvalConfig, change: Mapping[str, Any], message: str, tmp_path: Path) -> None:
    settings = {name: getattr(config, name) for name in ("model", "data", "out", "num_frames", "max_new_tokens")}
    if "data_root" in change:
        change = {**change, "data_root": tmp_path}
    with pytest.raises(ValueError, match=message):
        run_eval(EvalConfig(**{**settings, **change}), progress=False)
    assert not config.out.exists(), "before anything is asked"


def test_bad_rows_stop_the_run_or_are_counted(config: EvalConfig) -> None:
    assert config.data is not None
    text = config.data.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    for bad, message in (
        ([*rows, rows[0]], f"id '{rows[0]['id']}' is already on"),
        ([{**rows[0], "options": ["nothing like it"]}], "none of the options"),
    ):
        config.data.write_text("".join(json.dumps(row) + "\n" for row in bad))
        with pytest.raises(ValueError, match=message):
            run_eval(config, progress=False)
    config.data.write_text(text)
    (config.data.parent / rows[0]["video"]).unlink()
    with pytest.raises(ValueError, match="3 of 9 rows have no video"):
        run_eval(config, progress=False)
    made = run_eval(replace(config, skip_missing=True, save_kept=2), progress=False)
    assert made is not None
    assert made["n-samples"]["jsonl"] == {"original": 9, "effective": 6, "missing_video": 3, "bad_rows": 0}
    assert len(list((config.out / "kept").glob("*.safetensors"))) == 2, "one question a batch"


def test_a_trained_folder_brings_its_own_ratio(config: EvalConfig, tmp_path: Path) -> None:
    model, processor = load_vlm(config.model)
    folder = save_pruned(tmp_path / "model", model, processor, stts.pruning(model, "stts", retention_ratio=0.75))
    own = replace(config, model=folder, pruner="stts", retention_ratio=None)
    assert own.as_recorded()[0].retention_ratio == 0.75
    made = run_eval(replace(own, limit=1), progress=False)
    assert made is not None and made["stts"]["retention_ratio"] == 0.75
    assert made["stts"]["efficiency"]["tokens"]["err"] == 0.75


def test_what_was_skipped_is_said(config: EvalConfig, capsys: pytest.CaptureFixture[str]) -> None:
    first = sorted((config.data.parent / "test").glob("*.mp4"))[0]  # type: ignore[union-attr]
    first.write_bytes(b"not a video")
    assert main(["eval", *flags(config, on_error="skip")]) == 0
    assert "Skipped, video not readable: 3 (first " in capsys.readouterr().out
    assert run_eval(replace(config, on_error="skip"), ranks=Ranks(1, 2)) is None, "a finished run: rank 0 alone tells"
