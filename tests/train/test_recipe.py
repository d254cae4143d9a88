"""`stts fit` without a config: the family's recipe, what is fitted to rows and machine, and what is refused."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoConfig

import stts.cli
from stts.data.shapes.clips import ShapesConfig
from stts.data.shapes.files import write_shapes
from stts.models.families.published import PUBLISHED, config_of
from stts_train import recipe as recipes
from stts_train.recipe import Machine, for_machine, for_rows, high_rates, recipe_of, recipes_folder, value_of
from stts_train.row_check import check_rows

ROOT = Path(__file__).parents[2]
ONE_GPU, NODE, TWO_NODES, LAPTOP = (
    Machine(1, 1, True), Machine(8, 1, True), Machine(8, 2, True), Machine(1, 1, False)
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("files") / "shapes"
    return write_shapes(out, sizes={"train": 4}, config=ShapesConfig(num_sampled=8), progress=False)


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "llava_onevision_7b_stts.yaml").read_text())
    return settings


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_the_recipe_of_its_family(name: str) -> None:
    config = config_of(name)
    settings = yaml.safe_load(recipe_of(config).read_text())
    assert config_of(settings["model"]["model"]).model_type == config.model_type


def test_a_small_model_has_the_recipe_of_the_quick_start_and_an_unknown_family_none() -> None:
    assert recipe_of(config_of(str(ROOT / "stts/assets/shapes_vlm"))).name == "shapes_stts.yaml"
    with pytest.raises(ValueError, match=r"no recipe for family 'bert'; known: .*llava_onevision"):
        recipe_of(AutoConfig.for_model("bert"))


def test_a_wheel_has_the_recipes_where_they_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert tools["package-dir"]["stts_train.configs"] == "configs" and "stts_train.configs" in tools["packages"]
    assert tools["package-data"]["stts_train.configs"] == ["*.yaml"]
    assert recipes_folder() == ROOT / "configs"
    (tmp_path / "site/stts_train").mkdir(parents=True)
    shutil.copytree(ROOT / "configs", tmp_path / "site/stts_train/configs")
    monkeypatch.setattr(recipes, "__file__", str(tmp_path / "site/stts_train/recipe.py"))
    assert recipes_folder() == tmp_path / "site/stts_train/configs"


def test_options_are_found_however_they_are_written() -> None:
    words = ["--data.train", "a.jsonl", "--out=x", "--out=y"]
    assert [value_of(words, name) for name in ("--data.train", "--out", "--data")] == ["a.jsonl", "y", None]


def test_a_machine_gets_its_devices_and_a_strategy_that_fits_them(recipe: dict[str, Any]) -> None:
    words = ["--model.model", "models/mine"]
    alone = for_machine(words, recipe, ONE_GPU)
    assert alone["--out"] == "runs/mine_stts" and alone["--data.val"] == "null"
    assert (alone["--trainer.accelerator"], alone["--trainer.strategy"]) == ("gpu", "auto")
    assert "--trainer.strategy" not in for_machine(words, recipe, NODE), "the recipe's own"
    assert for_machine(words, recipe, TWO_NODES)["--trainer.num_nodes"] == "2"
    assert for_machine(words, recipe, LAPTOP)["--trainer.accelerator"] == "cpu"
    given = for_machine([*words, "--trainer.devices=2", "--out", "o"], recipe, NODE)
    assert not {"--trainer.devices", "--out"} & set(given), "what is given stays"


def test_torchrun_says_how_many_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "8")
    here = Machine.here()
    assert (here.devices, here.nodes, here.ranks) == (4, 2, 8)


@pytest.mark.parametrize(
    ("rows", "ranks", "accumulate", "steps"),
    [
        (1_000_000, 8, 8, 6250),  # the recipe as it is: 64 batches a step
        (1_000_000, 1, 64, 6250),  # the same batches on one GPU
        (19_200, 8, 8, 300),  # 6,400 batches, 100 steps an epoch, three epochs
        (600, 1, 20, 30),  # 200 batches: ten steps an epoch
        (2, 8, 1, 3),
    ],
)
def test_steps_follow_the_rows(recipe: dict[str, Any], rows: int, ranks: int, accumulate: int, steps: int) -> None:
    options = for_rows([], recipe, ranks, rows, samples_per_batch=3)
    assert options["--trainer.accumulate_grad_batches"] == str(accumulate)
    assert options["--trainer.max_steps"] == str(steps)
    assert int(options["--model.warmup_steps"]) == min(200, max(1, steps // 10))
    assert "--trainer.max_steps" not in for_rows(["--trainer.max_steps=5"], recipe, ranks, rows, 3)


def test_rates_far_above_the_recipe_are_named(recipe: dict[str, Any]) -> None:
    model = {**recipe["model"], "lora": None}
    assert high_rates(model) == []
    [line] = high_rates({**model, "llm_lr": 1e-3})
    assert line.startswith("warning: model.llm_lr=0.001 is 100 times that of configs/llava_onevision_7b_stts.yaml")
    assert high_rates({**model, "llm_lr": 2e-4, "lora": {"rank": 16}}) == [], "adapters take larger rates"
    assert high_rates({**model, "llm_lr": 1e-3, "model": str(ROOT / "stts/assets/shapes_vlm")}) == []
    assert high_rates({**model, "model": "nobody/nothing"}) == []


def settings(train: Any, **more: Any) -> dict[str, Any]:
    reading = {"sampler": "uniform_inclusive", "num_frames": 4, "max_fps": None, "on_error": "skip", "timeout_s": None}
    return {"kind": "jsonl", "train": train, "root": None, "follow_links": False, **reading, **more}


def test_rows_are_parsed_and_two_decoded(files: Path, tmp_path: Path) -> None:
    rows = check_rows(settings(str(files / "train.jsonl")))
    assert rows.number == 12
    assert rows.lines == (f"12 of {files}/train.jsonl parsed; 2 of 2 decoded: 4 frames of 48 x 48",)
    shutil.copytree(files, tmp_path / "broken")
    for video in (tmp_path / "broken" / "train").glob("*.mp4"):
        video.write_bytes(b"not a video")
    with pytest.raises(ValueError, match=r"broken/train\.jsonl: .*train-000000\.mp4"):
        check_rows(settings(str(tmp_path / "broken/train.jsonl")))
    assert check_rows(settings(None, kind="shapes")).number == 0


def test_the_data_of_a_rehearsal_is_opened(
    tiny_folder: Path, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--model.model", str(tiny_folder), "--data.train", str(files / "train.jsonl"), "--dry-run"]
    assert stts.cli.main([*words, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "recipe   shapes_stts.yaml; fitted to machine and rows: " in shown
    assert "memory   about " in shown and "GiB a rank of the " in shown
    assert "time     " in shown and " of one large product here" in " ".join(shown.split())
    assert max(map(len, (line for line in shown.splitlines() if str(tiny_folder) not in line))) <= 100
    assert f"rows: 12 of {files}/train.jsonl parsed" in " ".join(shown.split()) and "step 2/2  answer_loss" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give --config FILE.yaml; or --model.model FOLDER_OR_HUB_ID and --data.train FILE"),
        (["--model.model", "MODEL"], "give --data.train FILE, the rows to train on"),
        (["--model.model", "/nowhere/at/all", "--data.train", "x.jsonl"], "/nowhere/at/all"),
        (["--model.model", "MODEL", "--data.train", "/nowhere.jsonl"], "/nowhere.jsonl"),
    ],
)
def test_what_is_lacking_is_said_in_a_line(
    words: list[str], said: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert stts.cli.main(["fit", *(word.replace("MODEL", str(tiny_folder)) for word in words)]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err and list(tmp_path.iterdir()) == []
