"""The real entry point: every YAML parses, a run from files to exported folder, and what a user sees on a mistake."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
import yaml

import stts_train.cli as cli
from stts.data.shapes.clips import ShapesConfig
from stts.data.shapes.files import write_shapes
from tests.train.launch import finish, needs_deepspeed, start, start_module

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("shapes_*.yaml"))  # recipes need their own family: test_recipes.py


def stts_fit(*argv: str | Path) -> tuple[str, str]:
    """What `stts fit` prints, and its errors."""
    process = start(argv, errors_apart=True)
    out, err = process.communicate(300)
    assert process.returncode == 0, err[-3000:]
    return out, err


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ShapesQA files, one of them cut short."""
    out = tmp_path_factory.mktemp("files") / "shapes"
    write_shapes(out, sizes={"train": 4, "val": 2}, config=ShapesConfig(num_sampled=8), progress=False)
    video = next((out / "train").glob("*.mp4"))
    video.write_bytes(video.read_bytes()[:200])
    return out


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses(config: Path, tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    """Against the real parser and classes; only the paths of this machine are put in."""
    argv = ["--config", str(config), "--model.model", str(tiny_folder), "--out", str(tmp_path / "out")]
    if yaml.safe_load(config.read_text())["data"]["kind"] == "jsonl":
        argv += ["--data.train", str(files / "train.jsonl"), "--data.val", str(files / "val.jsonl")]
    made = cli.make_cli(argv)
    assert made.model.pruning.name == yaml.safe_load(config.read_text())["model"]["pruner"]
    assert len(made.datamodule.train_data) > 0
    assert not (tmp_path / "out").exists(), "parsing writes nothing"


def test_there_are_configs_for_the_quick_start() -> None:
    assert {"shapes_pretrain", "shapes_stts", "shapes_teacher", "shapes_tiny"} <= {path.stem for path in CONFIGS}


@pytest.mark.slow
def test_a_run_from_files_to_folders(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    argv = ["--config", ROOT / "configs" / "shapes_stts.yaml", "--model.model", tiny_folder, "--out", out]
    argv += ["--data.train", files / "train.jsonl", "--data.val", files / "val.jsonl", "--data.num_frames", "8"]
    argv += ["--data.max_tokens", "400", "--trainer.max_steps", "6", "--trainer.val_check_interval", "3"]
    argv += ["--progress_every", "4", "--checkpoint_every", "3", "--trainer.log_every_n_steps", "1"]
    done, noise = stts_fit(*argv)
    shown = re.findall(r"step (\d)/6  .* s/step(?:  (\d+:\d\d) left)?\n", done)
    assert [step for step, _ in shown] == ["1", "4", "6"] and [bool(left) for _, left in shown] == [True, True, False]
    for text in ("Loading weights", "Writing model", "Seed set", "GPU available", "`Trainer.fit` stopped"):
        assert text not in done + noise, "nobody can act on it"
    for expected in (
        "temporal_loss",
        "kept 0.5",
        "validation at step 3",
        f"wrote {out}/model",
    ):
        assert expected in done
    for name in ("model", "best"):
        recorded = json.loads((out / name / "stts.json").read_text())
        expected = {"pruner": "stts", "positions": "original", "num_frames": 8, "sampler": "uniform_inclusive"}
        assert {key: recorded[key] for key in expected} == expected, "what it trained with"
        assert (out / name / "scorer.safetensors").is_file()
        assert "_attn" not in (out / name / "config.json").read_text()
    [broken] = {line.split("\t")[0].rsplit("-", 1)[0] for line in (out / "skipped.txt").read_text().splitlines()}
    assert broken == next(p.stem for p in (files / "train").glob("*.mp4") if p.stat().st_size == 200)
    [metrics] = (out / "log").glob("*/metrics.csv")
    rows = list(csv.DictReader(metrics.open()))
    names = {"train/answer_loss", "train/temporal_loss", "retention_measured", "kept_per_frame", "tokens_per_s"}
    names |= {"pad_waste", "scorer_grad_norm", "lr/scorer", "lr/llm", "val/accuracy", "val/answer_loss", "skipped"}
    assert names <= {name for row in rows for name, value in row.items() if value}

    again, _ = stts_fit(*argv, "--resume", "last", "--trainer.max_steps", "8")
    assert "step 8/8" in again and "step 4/8" not in again


@pytest.mark.slow
def test_two_ranks_stay_in_step_when_one_has_nothing_to_read(tiny_folder: Path, files: Path, tmp_path: Path) -> None:
    """Batches of one file, some of them broken: a rank that skips its file still takes part in every step."""
    out = tmp_path / "out"
    argv = ["--config", ROOT / "configs" / "shapes_stts.yaml", "--model.model", tiny_folder, "--out", out]
    argv += ["--data.train", files / "train.jsonl", "--data.val", files / "val.jsonl", "--data.num_frames", "8"]
    argv += ["--data.max_tokens", "0", "--data.batch_size", "1", "--data.num_workers", "0", "--trainer.devices", "2"]
    argv += ["--trainer.strategy", "ddp", "--trainer.accelerator", "cpu", "--trainer.max_steps", "6"]
    argv += ["--trainer.val_check_interval", "6", "--progress_every", "6"]
    # a process as users start it, which starts that of the other rank
    code, done = finish(start_module(["stts.cli", "fit", *map(str, argv)]))
    assert code == 0, done[-3000:]
    assert "step 6/6" in done and done.count("wrote ") == 2, "rank 0 alone prints and exports"
    skipped = [line for file in out.glob("skipped-rank*.txt") for line in file.read_text().splitlines()]
    assert len(skipped) == len(set(skipped)) == 3


@pytest.mark.slow
def test_print_config(tmp_path: Path) -> None:
    done, _ = stts_fit("--config", ROOT / "configs" / "shapes_tiny.yaml", "--model.pruner", "easy", "--print_config")
    shown = yaml.safe_load(done)
    assert shown["model"]["pruner"] == "easy" and shown["data"]["batch_size"] == 4
    assert shown["model"]["retention_ratio"] == 0.5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.llm_rl", "1"], "model.llm_rl"),
        (["--model.llm_lr", "fast"], "model.llm_lr"),
        (["--data.kind", "webdataset"], "data.kind"),
        (["--model.retention_ratio", "30"], "retention_ratio=30"),
        (["--model.model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model.pruner", "stss"], "unknown pruner 'stss'"),
        (["--resume", "/nowhere/last.ckpt"], "/nowhere/last.ckpt"),
    ],
)
def test_a_mistake_is_named_without_a_traceback(
    argv: list[str], message: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = ROOT / "configs" / "shapes_tiny.yaml"
    code: object
    try:
        code = cli.fit(["--config", str(config), "--model.model", str(tiny_folder), "--out", str(out), *argv])
    except SystemExit as stopped:  # the parser's own way out
        code = stopped.code
    shown = capsys.readouterr()
    assert code == 2 and message in shown.err and "Traceback" not in shown.err
    assert not out.exists(), "nothing is written before the settings are known to be good"


DEEPSPEED = "--trainer.strategy=stts_train.strategies.DeepSpeed"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.retention_ratio=1.5"], "retention_ratio=1.5 must be in (0, 1]"),
        (["--data.train=/nowhere/rows.jsonl"], "no JSONL, JSON or Parquet file at /nowhere/rows.jsonl"),
        (["--data.val=/nowhere/rows.jsonl"], "no JSONL, JSON or Parquet file at /nowhere/rows.jsonl"),
        (["--data.root=/nowhere"], "no video file at /nowhere/"),
        *(
            pytest.param([DEEPSPEED, f"--trainer.strategy.init_args={json.dumps(given)}"], said, marks=needs_deepspeed)
            for given, said in (
                ({"config": {"zero_optimisation": {}}}, "did you mean zero_optimization?"),
                (
                    {"config": {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}},
                    "nvme_path=None is no folder; create it",
                ),
                ({"stage": 7}, "stage=7 is not a stage of ZeRO; use 0, 1, 2 or 3"),
            )
        ),
    ],
)
def test_what_is_wrong_is_one_line_before_a_model_is_loaded(
    more: list[str], message: str, files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The model is not there either, which would be said next."""
    argv = ["--config", str(ROOT / "configs" / "shapes_stts.yaml"), f"--model.model={tmp_path / 'none'}"]
    argv += [f"--data.train={files / 'train.jsonl'}", "--data.val=null", "--data.on_error=raise"]
    assert cli.fit([*argv, f"--out={tmp_path / 'out'}", *more]) == 2
    [line] = [line for line in capfd.readouterr().err.splitlines() if "Seed set" not in line]
    assert line.startswith("error: ") and message in line


def test_a_file_that_goes_while_a_run_reads_it_is_one_line(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a loader process, whose traceback torch puts into the message."""
    files = write_shapes(tmp_path / "own", sizes={"train": 4, "val": 1}, config=ShapesConfig(num_sampled=8))
    for video in (files / "train").glob("*.mp4"):
        video.write_bytes(b"no video")
    argv = ["--config", str(ROOT / "configs" / "shapes_stts.yaml"), f"--model.model={tiny_folder}"]
    argv += [f"--data.train={files / 'train.jsonl'}", "--data.val=null", "--data.on_error=raise", "--data.max_tokens=0"]
    argv += ["--data.batch_size=2", "--trainer.accelerator=cpu", f"--out={tmp_path / 'out'}"]
    assert cli.fit(argv) == 2
    shown = capfd.readouterr().err
    assert "Traceback" not in shown and len(re.findall(r"error: sample '\S+: \S+\.mp4: .*", shown)) == 1, shown


def test_a_typo_in_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text((ROOT / "configs" / "shapes_tiny.yaml").read_text().replace("  pruner:", "  prunner:"))
    with pytest.raises(SystemExit) as stopped:
        cli.fit(["--config", str(config)])
    assert stopped.value.code == 2 and "prunner" in capsys.readouterr().err
