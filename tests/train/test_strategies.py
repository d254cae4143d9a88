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
from safetensors.torch import load_file

import stts
import stts.cli
import stts_train.cli as cli
from stts.data.shapes.clips import ShapesConfig
from stts.data.shapes.files import write_shapes
from stts.models.checkpoints.load import load_vlm
from stts_train.batches import Order
from stts_train.parts import PARTS
from tests.train.cases import CASES, FROZEN, STEPS, Case, table
from tests.train.fits import live_inputs
from tests.train.launch import CUTS, RATES, ROOT, TWO_RANKS, finish, logged, needs_deepspeed, run_all, start, strategy

LOSSES = ("train/answer_loss", "train/temporal_loss", "train/teacher_loss")
NORMS = tuple(f"{part}_grad_norm" for part in PARTS)


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
    argv += ["--data.max_tokens=0", "--data.num_workers=0", "--model.warmup_steps=0"]
    # every part is clipped, by another factor, and steps of AdamW depend on the size of gradients
    argv += ["--model.max_grad_norm=0.02", "--model.eps=1e-3"]
    argv += [f"--trainer.max_steps={STEPS}", "--trainer.log_every_n_steps=1", "--progress_every=1"]
    return [*argv, "--checkpoint_every=0", "--trainer.accelerator=cpu", *more]


@pytest.fixture(scope="module")
def one_process(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], Path]:
    """Runs of one process that sees the global batch, by its samples and by what is frozen."""
    runs = [(2, ""), (4, ""), *((2, frozen) for frozen in FROZEN if frozen)]
    outs = {run: tmp_path_factory.mktemp(f"one{run[0]}{run[1]}") for run in runs}
    for (size, frozen), out in outs.items():
        more = [f"--data.batch_size={size}", f"--trainer.max_steps={2 * STEPS // size}", *FROZEN[frozen]]
        assert cli.fit(settings(tiny_folder, rows, out, *more)) == 0
    return outs


def assert_same(out: Path, expected: Path, tolerance: float, name: str = "") -> None:
    for loss in LOSSES:
        values = logged(expected, loss)
        assert len(values) >= (3 if "teacher" not in loss or "dense steps" in name else 0)
        np.testing.assert_allclose(logged(out, loss), values, atol=tolerance, rtol=0, err_msg=f"{name} {loss}")
    for part in NORMS:
        norms = logged(expected, part)
        if not norms:  # frozen
            assert not logged(out, part)
            continue
        assert max(norms) > 0.02, "what is clipped"
        np.testing.assert_allclose(
            logged(out, part), norms, rtol=10 * tolerance, atol=tolerance, err_msg=f"{name} {part}"
        )


@pytest.mark.slow
def test_accumulated_batches_are_one_batch(
    tiny_folder: Path, rows: Path, tmp_path: Path, one_process: dict[tuple[int, str], Path]
) -> None:
    """Answers of unequal length in the batches of a step: every token weighs the same."""
    argv = settings(tiny_folder, rows, tmp_path, "--data.batch_size=1", "--trainer.accumulate_grad_batches=2")
    assert cli.fit(argv) == 0
    assert_same(tmp_path, one_process[2, ""], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[needs_deepspeed] * ("zero" in kind)) for kind in CASES])
def test_two_ranks_are_one_process(
    kind: str,
    tiny_folder: Path,
    rows: Path,
    tmp_path: Path,
    one_process: dict[tuple[int, str], Path],
    subtests: pytest.Subtests,
) -> None:
    """Among the batches: text alone, an image alone, a file that cannot be read; none of them holds up the others.

    And what is exported is what was live: by the run itself, and by `stts export` from the checkpoint."""
    more = ["--data.batch_size=1", "--trainer.callbacks=tests.train.fits.KeepLogits", "--trainer.accelerator=cpu"]
    more.append("--trainer.devices=8")  # as in a config for another machine: torchrun says two
    outs = {case: tmp_path / case.name for case in CASES[kind]}
    run_all([settings(tiny_folder, rows, out, *more, *case.options) for case, out in outs.items()], tmp_path)
    for case, out in outs.items():
        with subtests.test(case.name):
            low, expected = case.precision != "32-true", one_process[2 * case.per_step, case.frozen]
            assert_same(out, expected, 5e-2 if low else 1e-3, case.name)
            check_export(case, out, None if low else expected)


def test_the_table_of_the_docs_is_what_the_tests_run() -> None:
    shown = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert f"\n\n{table()}\n" in shown, f"docs/training.md is not made from tests/train/cases.py; put there:\n{table()}"


def check_export(case: Case, out: Path, expected: Path | None) -> None:
    """Bit by bit the weights that the run wrote; near those of one process; and the logits of the live model."""
    exported = out / "exported"
    [checkpoint] = (out / "checkpoints").iterdir()
    assert stts.cli.main(["export", str(checkpoint), str(exported)]) == 0
    for file in ("model.safetensors", "scorer.safetensors"):
        whole, live = load_file(exported / file), load_file(out / "model" / file)
        assert whole.keys() == live.keys()
        for name, value in whole.items():
            assert value.dtype == live[name].dtype and torch.equal(value, live[name]), f"{case.name} {name}"
        for name, value in load_file(expected / "model" / file).items() if expected is not None else ():
            assert (whole[name] - value).abs().max() < 1e-5, f"{case.name} {name}"
    kept = torch.load(out / "live.pt")
    is_cut = case.strategy.startswith(("fsdp2", "deepspeed_stage_3"))
    assert (kept["held"] < 0.6) == is_cut, f"{case.name}: a rank holds {kept['held']:.2f} of the parameters"
    vlm = stts.PrunedVLM.from_pretrained(exported)
    inputs = live_inputs(vlm.processor, vlm.model.dtype)
    stock, _ = load_vlm(exported)
    with torch.no_grad():
        pruned, dense = vlm(**inputs).logits, stock(**inputs).logits
    low = case.precision != "32-true"  # ZeRO-3 and FSDP2 round elsewhere, and a near tie of scores may fall otherwise
    assert (dense - kept["dense"]).abs().max() < (5e-2 if low else 1e-5), case.name
    assert low or (pruned - kept["pruned"]).abs().max() < 1e-5, case.name
    assert not torch.allclose(kept["pruned"][:, -1], kept["dense"][:, -1], atol=1e-3), "two different questions"


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
