"""ZeRO-3 on two ranks whose batches differ in kind (v video, t text, i image), in every order, for every family."""

from __future__ import annotations

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import stts_train.cli as cli
from stts.data.shapes.clips import ShapesConfig
from stts.data.shapes.files import write_shapes
from stts_train.batches import Order
from tests.families import FAMILIES, write_family
from tests.train.launch import RATES, ROOT, TWO_RANKS, logged, needs_deepspeed, run_all

STEPS = ["tv", "vv", "vt", "it", "ii", "ti", "tt", "iv", "vi", "tv"]
"""What rank 0 and rank 1 hold in each step: all nine pairs of kinds, and on each rank every kind after every kind. The
first three and the last three steps are two orders in which ranks once waited for each other for ever.

Other orders of these pairs would test the same. What a rank gathers in a step depends on the kind of its batch and on
the order of modules that DeepSpeed recorded in the second step; test_module_order.py has this order equal for all kinds
of batches of all families."""


def test_the_steps_are_every_order() -> None:
    pairs = {"".join(pair) for pair in product("vti", repeat=2)}
    assert set(STEPS) == pairs and STEPS[:3] == ["tv", "vv", "vt"] and STEPS[-3:] == ["iv", "vi", "tv"]
    for rank in range(2):
        assert {a[rank] + b[rank] for a, b in pairwise(STEPS)} == pairs


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of `STEPS`, where the order of training finds them."""
    folder = tmp_path_factory.mktemp("kinds")
    write_shapes(folder, sizes={"train": 2, "val": 1}, config=ShapesConfig(num_sampled=8), progress=False)
    video = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["video"]
    Image.new("RGB", (56, 56), "red").save(folder / "train" / "red.png")
    media = {"v": {"video": video}, "i": {"image": "train/red.png"}, "t": {}}
    placed: list[dict[str, Any]] = [{}] * (2 * len(STEPS))
    for step, (numbers, kinds) in enumerate(zip(Order(len(placed), 2).batches(0), STEPS, strict=True)):
        for rank, (number, kind) in enumerate(zip(numbers, kinds, strict=True)):
            asked = "".join(f"<{name}>\n" for name in media[kind]) + "what colour is the circle ?"
            talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": "red"}]
            placed[number] = {"id": f"step {step} rank {rank}", **media[kind], "conversations": talk}
    file = folder / "kinds.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in placed))
    return file


def settings(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    argv = [f"--config={ROOT / 'configs' / 'shapes_stts.yaml'}", f"--model.model={model}", f"--out={out}", *RATES]
    argv += [f"--data.train={rows}", "--data.val=null", "--data.num_frames=4", "--data.max_tokens=0"]
    argv += ["--data.batch_size=1", "--data.num_workers=0", "--model.warmup_steps=0", "--checkpoint_every=0"]
    argv += [f"--trainer.max_steps={len(STEPS)}", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu"]
    return [*argv, *more]


@pytest.mark.slow
@needs_deepspeed
def test_ranks_with_batches_of_other_kinds_are_one_process(
    rows: Path, tiny_folder: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """Every parameter is cut, also the smallest, such as the newline of images."""
    models = {"llava_onevision": tiny_folder} | {name: write_family(name, tmp_path / name) for name in FAMILIES}
    zero = {"class_path": "stts_train.strategies.DeepSpeed", "init_args": {"stage": 3, "persistence_threshold": 0}}
    more = [*TWO_RANKS, f"--trainer.strategy={json.dumps(zero)}"]
    run_all([settings(model, rows, tmp_path / f"{name}-two", *more) for name, model in models.items()], tmp_path)
    for name, model in models.items():
        with subtests.test(name):
            assert cli.fit(settings(model, rows, tmp_path / f"{name}-one", "--trainer.accumulate_grad_batches=2")) == 0
            for loss in ("train/answer_loss", "train/temporal_loss"):
                expected = logged(tmp_path / f"{name}-one", loss)
                assert len(expected) == len(STEPS)
                assert logged(tmp_path / f"{name}-two", loss) == pytest.approx(expected, abs=1e-4)
