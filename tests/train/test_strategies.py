"""Many ranks, or many batches in one step, are one process on the global batch; whatever a rank's batch holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

import stts_train.cli as cli
from stts.data.shapes import ShapesConfig
from stts.data.shapes_files import write_shapes
from stts.models.load import load_pruner, load_vlm
from stts.models.pruning import Pruning
from stts_train.data_module import Order
from stts_train.module import VideoFinetune
from tests.conftest import make_inputs
from tests.train.launch import CUTS, RATES, ROOT, TWO_RANKS, finish, logged, run, start, strategy

STEPS = 6
LOSSES = ("train/answer_loss", "train/temporal_loss")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows in the order of training, two to a step: with 2 ranks the left is rank 0's, the right rank 1's."""
    folder = tmp_path_factory.mktemp("rows")
    write_shapes(folder, sizes={"train": 8, "val": 1}, config=ShapesConfig(num_sampled=8), progress=False)
    made = [json.loads(text) for text in (folder / "train.jsonl").read_text().splitlines()]
    (folder / "train" / "broken.mp4").write_bytes(b"no video")
    Image.new("RGB", (56, 56), "red").save(folder / "train" / "red.png")
    video = iter(made)

    def row(uid: str, **media: str) -> dict[str, Any]:
        asked = "".join(f"<{kind}>\n" for kind in media) + "what colour is the circle ?"
        talk = [{"from": "human", "value": asked}, {"from": "gpt", "value": "red"}]
        return {"id": uid, **media, "conversations": talk}

    def long(given: dict[str, Any]) -> dict[str, Any]:
        """Answers of nine tokens more."""
        more = [{"from": "human", "value": "and the order ?"}, {"from": "gpt", "value": "red red blue red red"}]
        return given | {"conversations": given["conversations"] + 2 * more}

    wanted = [
        (next(video), long(next(video))),
        (row("text"), next(video)),
        (next(video), row("broken", video="train/broken.mp4")),
        (row("image", image="train/red.png"), long(next(video))),
        (row("text2"), row("broken2", video="train/broken.mp4")),
        (long(row("image2", image="train/red.png")), next(video)),
    ]
    order = Order(2 * STEPS, 2).batches(0)  # shuffled by number alone, so rows can be laid where we want them
    placed: list[dict[str, Any]] = [{}] * (2 * STEPS)
    for numbers, step in zip(order, wanted, strict=True):
        for number, one in zip(numbers, step, strict=True):
            placed[number] = one
    file = folder / "mixed.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in placed))
    return file


def settings(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    argv = [f"--config={ROOT / 'configs' / 'shapes_stts.yaml'}", f"--model.model={model}", f"--out={out}", *RATES]
    argv += [f"--data.train={rows}", "--data.val=null", "--data.num_frames=8", "--data.on_error=skip"]
    argv += ["--data.max_tokens=0", "--data.num_workers=0", "--model.warmup_steps=0", "--model.clip_per_part=false"]
    argv += [f"--trainer.max_steps={STEPS}", "--trainer.log_every_n_steps=1", "--progress_every=1"]
    return [*argv, "--checkpoint_every=0", "--trainer.accelerator=cpu", *more]


@pytest.fixture(scope="module")
def one_process(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    """The losses of one process that sees the global batch."""
    out = tmp_path_factory.mktemp("one")
    assert cli.fit(settings(tiny_folder, rows, out, "--data.batch_size=2")) == 0
    return {name: logged(out, name) for name in LOSSES}


def assert_same(out: Path, expected: dict[str, list[float]], tolerance: float) -> None:
    for name, values in expected.items():
        assert len(values) == STEPS
        np.testing.assert_allclose(logged(out, name), values, atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.slow
def test_accumulated_batches_are_one_batch(
    tiny_folder: Path, rows: Path, tmp_path: Path, one_process: dict[str, list[float]]
) -> None:
    """Answers of unequal length in the batches of a step: every token weighs the same."""
    argv = settings(tiny_folder, rows, tmp_path, "--data.batch_size=1", "--trainer.accumulate_grad_batches=2")
    assert cli.fit(argv) == 0
    assert_same(tmp_path, one_process, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CUTS)
def test_two_ranks_are_one_process(
    name: str, tiny_folder: Path, rows: Path, tmp_path: Path, one_process: dict[str, list[float]]
) -> None:
    """Among the batches: text alone, an image alone, a file that cannot be read; none of them holds up the others."""
    run(settings(tiny_folder, rows, tmp_path, "--data.batch_size=1", *TWO_RANKS, *strategy(name)))
    assert_same(tmp_path, one_process, 1e-3)
    if name == "deepspeed_stage_3":
        check_export(tmp_path)


def check_export(out: Path) -> None:
    """Gathered weights, bit by bit those that DeepSpeed itself puts together from its shards; and they load."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(str(out / "checkpoints" / f"step-{STEPS:08d}" / "state"))
    state = {name.removeprefix("_forward_module."): value for name, value in state.items()}
    model, processor = load_vlm(out / "model")
    pruner = load_pruner(out / "model", model)
    assert isinstance(pruner, torch.nn.Module)
    exported = {f"model.{name}": value for name, value in model.state_dict().items()}
    exported |= {f"scorer.{name}": value for name, value in pruner.state_dict().items()}
    assert set(state) == set(exported)
    for name, value in state.items():
        assert torch.equal(value, exported[name]), name

    live = VideoFinetune(str(out / "model"), "stts", pruner_options={"prune_block": 1}, positions="original")
    live.load_state_dict(state)
    inputs = make_inputs(processor, ["v what colour ?"], num_frames=8)
    logits = []
    for host, given in ((model, pruner), (live.model.eval(), live.scorer.eval())):
        with torch.no_grad(), Pruning(host, given, retention_ratio=0.5, positions="original"):
            logits.append(host(**inputs).logits)
    assert torch.equal(*logits)


@pytest.mark.slow
@pytest.mark.parametrize("name", [p for p in CUTS if p.values[0] in ("fsdp2", "deepspeed_stage_2")])
def test_bf16_lowers_the_loss(name: str, tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    more = ["--data.batch_size=2", "--trainer.precision=bf16-mixed", "--trainer.max_steps=9", "--trainer.max_epochs=3"]
    run(settings(tiny_folder, rows, tmp_path, *more, *TWO_RANKS, *strategy(name)))
    losses = logged(tmp_path, "train/answer_loss")
    assert len(losses) == 9 and np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3


class BreakGradients(pl.Callback):
    """On rank 1, at step 2: one gradient that is not a number."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            first = next(p for p in pl_module.parameters() if p.requires_grad)
            first.register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [p for p in CUTS if p.values[0] in ("ddp", "deepspeed_stage_2")])
def test_a_gradient_that_is_not_finite_stops_all_ranks_with_the_samples(
    name: str, tiny_folder: Path, rows: Path, tmp_path: Path
) -> None:
    more = [f"--trainer.callbacks={__name__}.BreakGradients", "--data.batch_size=1", *TWO_RANKS, *strategy(name)]
    code, output = finish(start(settings(tiny_folder, rows, tmp_path, *more)))
    assert code != 0 and "the gradient is not finite at step" in output
    assert "'blank'" in output, "the samples of rank 1 are named by both"
    assert "step 3/" not in output and not (tmp_path / "checkpoints").exists()
