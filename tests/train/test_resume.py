"""Nothing is lost: a run that is killed, or told to stop, goes on to the losses it would have had."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

import stts_train.cli as cli
from stts.cli import main
from stts.models.checkpoints.load import load_vlm
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts_train.checkpoints import Checkpoints, Saved, choose, newest
from stts_train.export import read_weights
from stts_train.plan import GIB, make_plan
from stts_train.plan_cli import read_run
from tests.conftest import TINY
from tests.train.cases import FROZEN, KILLED, MOVES
from tests.train.launch import (
    CUTS,
    RATES,
    ROOT,
    TWO_RANKS,
    finish,
    logged,
    run,
    run_all,
    shown,
    start,
    strategy,
    wait_for,
)

STEPS, EVERY = 9, 4
RESUMED = [p for p in CUTS if p.values[0] in KILLED]


def settings(model: Path, out: Path, *more: str) -> list[str]:
    """Epochs of 5 steps: the checkpoint of step 4 lies inside one, step 6, where runs are told to stop, in the next."""
    argv = [f"--config={ROOT / 'configs' / 'shapes_tiny.yaml'}", f"--model.model={model}", f"--out={out}", *RATES]
    argv += ["--data.phases=[{num_clips: 20}]", "--data.batch_size=2", "--data.num_val_clips=0"]
    argv += ["--data.shapes={num_sampled: 8}", "--data.num_workers=1", "--model.warmup_steps=3"]
    argv += [f"--trainer.max_steps={STEPS}", "--progress_every=1", f"--checkpoint_every={EVERY}"]
    return [*argv, "--model.clip_per_part=false", "--trainer.accelerator=cpu", *more]


@pytest.fixture(scope="module")
def straight(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    """Answer and temporal loss of each step of one process that nothing interrupts; two ranks share its batches."""
    return one_process(tiny_folder, tmp_path_factory.mktemp("straight") / "out")


def one_process(model: Path, out: Path, *frozen: str) -> dict[int, list[float]]:
    more = ["--data.batch_size=4", "--data.num_workers=0", "--checkpoint_every=0", "--trainer.log_every_n_steps=1"]
    assert cli.fit(settings(model, out, *more, *frozen)) == 0
    losses = zip(logged(out, "train/answer_loss"), logged(out, "train/temporal_loss"), strict=True)
    return {step: list(pair) for step, pair in enumerate(losses, 1)}


def numbers(output: str) -> dict[int, list[float]]:
    """Answer and temporal loss of each step, to the four digits that are shown."""
    return {step: [float(word) for word in text.split()[1::2]] for step, text in shown(output).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_that_is_killed_and_told_to_stop_has_the_losses_of_one_that_is_not(
    name: str,
    tiny_folder: Path,
    tmp_path: Path,
    straight: dict[int, list[float]],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same command three times. First: kill -9 of one rank, whom the other names, or of all, a step behind its
    checkpoint or in the middle of writing the next one. Then SIGTERM, to the first process, as a shell sends it, or to
    all, loader workers included, as schedulers do; or SIGINT to all, as Ctrl-C does."""
    argv = settings(tiny_folder, tmp_path, *TWO_RANKS, *strategy(name))
    in_save = name in ("deepspeed_stage_2", "deepspeed_stage_3")
    with monkeypatch.context() as during:
        during.setenv("WAIT_IN_STEP_6", "1")
        process = start([*argv, f"--trainer.callbacks=tests.train.fits.{'DieInSave' if in_save else 'WaitInStep6'}"])
    killed = wait_for(process, "half written" if in_save else "in the middle of step 6")
    if name == "ddp":
        os.kill(int(killed.split()[-1]), signal.SIGKILL)
        code, rest = finish(process)
        assert code != 0 and "error: rank 0 of 2 lost rank 1 in step 6: " in rest, rest
        killed += rest
    else:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert list(numbers(killed)) == list(range(1, 9 if in_save else 6))
    assert bool(list((tmp_path / "checkpoints").glob(".unfinished-step-00000008/run.json"))) == in_save

    process = start([*argv, "--trainer.callbacks=tests.train.fits.WaitForSignal"])
    told = wait_for(process, "step 5/")
    assert f"going on from {tmp_path}/checkpoints/step-00000004" in told
    told_by = signal.SIGINT if name == "fsdp2" else signal.SIGTERM
    (os.killpg if name in ("ddp", "deepspeed_stage_3", "fsdp2") else os.kill)(process.pid, told_by)
    code, rest = finish(process)
    assert code == 0 and "stopped at step 6; the same command goes on" in rest, rest
    told += rest

    last = run(argv)
    assert f"going on from {tmp_path}/checkpoints/step-00000006" in last
    parts = [numbers(output) for output in (killed, told, last)]
    assert [list(part) for part in parts[1:]] == [[5, 6], [7, 8, 9]]
    for part in parts:
        for step, values in part.items():  # up to the last digit shown, which strategies may round to either side
            assert values == pytest.approx(straight[step], abs=1.5e-4), f"step {step}"
    assert shown(told)[5] == shown(killed)[5]
    saved = newest(tmp_path)
    assert saved is not None and saved.step == STEPS and saved.ranks == 2
    if name == "ddp":
        check_refusals(tiny_folder, tmp_path, capfd)


def check_refusals(tiny_folder: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What other steps or another strategy would make of this checkpoint is never guessed."""
    before = sorted(out.rglob("*"))
    assert cli.fit(settings(tiny_folder, out)) == 2
    assert "2 batches in an optimizer step (2 rank(s) x 1), this run has 1 (1 x 1)" in capfd.readouterr().err
    assert cli.fit(settings(tiny_folder, out, *TWO_RANKS, *strategy("fsdp2"))) == 2
    assert "was written under strategy DDPStrategy, this run uses FSDP2" in capfd.readouterr().err
    assert sorted(out.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["everything", "a part"])
def test_a_run_goes_on_with_fewer_and_with_more_ranks_and_under_other_stages(
    kind: str, tiny_folder: Path, tmp_path: Path, straight: dict[int, list[float]], subtests: pytest.Subtests
) -> None:
    """A step is two batches, on one rank or on two: the same steps and losses, wherever the run stops and goes on.

    Checkpoints hold what learns alone."""
    moves = [move for move in MOVES if bool(move.frozen) == (kind == "a part")]
    moves = [move for move in moves if find_spec("deepspeed") is not None or move.strategy in ("ddp", "fsdp2")]
    outs = {move: tmp_path / f"{move.strategy}-{move.frozen}" for move in moves}
    expected = {frozen: straight if not frozen else {} for frozen in {move.frozen for move in moves}}
    for frozen in filter(None, expected):
        expected[frozen] = one_process(tiny_folder, tmp_path / frozen, *FROZEN[frozen])
    first = 1
    for number, (ranks, last) in enumerate(moves[0].stays):
        stops = {"class_path": "tests.train.fits.StopInSteps", "init_args": {"steps": [last] if last < STEPS else []}}
        more = ["--trainer.accelerator=cpu", f"--trainer.devices={ranks}", "--trainer.log_every_n_steps=1"]
        more += [f"--trainer.accumulate_grad_batches={2 // ranks}", f"--trainer.callbacks={json.dumps(stops)}"]
        more += ["--data.num_workers=0", "--checkpoint_every=0"]
        argvs = {m: [*more, *strategy(m.strategies[number]), *FROZEN[m.frozen]] for m in moves}
        output = run_all([settings(tiny_folder, outs[m], *argv) for m, argv in argvs.items()], tmp_path, ranks=ranks)
        assert output.count("going on from") == (len(moves) if first > 1 else 0)
        for move, out in outs.items():
            with subtests.test(f"{move.strategy} {move.frozen} to step {last} on {ranks}"):
                saved = newest(out)
                assert saved is not None and (saved.step, saved.ranks, saved.per_step) == (last, ranks, 2 // ranks)
                losses = zip(*(logged(out, f"train/{name}_loss") for name in ("answer", "temporal")), strict=True)
                steps = range(1, last + 1)  # in one file, each once
                whole = [pytest.approx(expected[move.frozen][step], rel=1e-5, abs=1e-5) for step in steps]
                assert [list(pair) for pair in losses] == whole
                if move.frozen:
                    names = read_weights(saved).keys()
                    assert names and all(n.startswith("scorer.") or ".lora_" in n for n in names), sorted(names)[:3]
        first = last + 1


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run in one process, with validation."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert cli.fit(small(tiny_folder, out)) == 0
    return out


def small(model: Path, out: Path, *more: str) -> list[str]:
    validation = ["--data.num_val_clips=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    return settings(model, out, "--data.num_workers=0", "--checkpoint_every=1", *validation, *more)


def folders(out: Path) -> set[str]:
    return {folder.name for folder in (out / "checkpoints").iterdir()}


def test_the_newest_and_the_best_are_kept(finished: Path) -> None:
    assert {name for name in folders(finished) if name.startswith("step")} == {"step-00000008", "step-00000009"}
    assert sum(name.startswith("best") for name in folders(finished)) == 1
    assert len(folders(finished)) == 3, "nothing unfinished is left"


def test_the_folder_of_a_run_names_its_model(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"is the folder of a run of `stts fit`; its model is {finished}/model"
    assert main(["export", str(finished), str(tmp_path / "new")]) == 2
    assert where in capsys.readouterr().err
    with pytest.raises(ValueError, match=where):
        load_vlm(finished)


def test_the_same_command_again_has_nothing_to_do(
    finished: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (finished / "model" / "model.safetensors").read_bytes()
    assert cli.fit(small(tiny_folder, finished)) == 0
    shown_text = capsys.readouterr().out
    assert "going on from" in shown_text and "step 9/9" not in shown_text
    assert (finished / "model" / "model.safetensors").read_bytes() == weights


def test_other_settings_start_anew_and_set_old_checkpoints_aside(
    finished: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    argv = small(tiny_folder, out, "--model.llm_lr=2e-3", "--trainer.max_steps=2")
    assert cli.fit(argv) == 0
    text = capsys.readouterr().out
    assert f"; memory planned per rank: {make_plan(read_run(argv)).total / GIB:.3g} GiB\n" in text, (
        "as stts plan has it"
    )
    assert "written with other settings (model.llm_lr, trainer.max_steps): starting anew" in text
    assert "step 1/2" in text and "step-00000002" in folders(out)
    assert {folder.name for folder in (out / "checkpoints-1").iterdir()} == folders(finished)
    for name in ("model", "best"):  # both of the new run, or not there
        old, new = out / f"{name}-1" / "model.safetensors", out / name / "model.safetensors"
        assert old.read_bytes() == (finished / name / "model.safetensors").read_bytes() != new.read_bytes()
    assert cli.fit(small(tiny_folder, out, "--model.llm_lr=3e-3", "--trainer.max_steps=3", "--resume=last")) == 0
    assert "step 2/3" not in capsys.readouterr().out, "asked for by name, it goes on under other settings"


def test_a_checkpoint_cut_short_is_not_there(finished: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    cut_short = out / "checkpoints" / ".unfinished-step-00000011"
    (cut_short / "state").mkdir(parents=True)
    found = newest(out)
    assert found is not None and found.step == 9
    assert cli.fit(small(tiny_folder, out, "--resume=last")) == 0
    assert not cut_short.exists(), "a run clears what the one before it left"


def test_a_checkpoint_of_one_rank_says_so_to_a_run_of_two(
    finished: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.fit(small(tiny_folder, finished, *TWO_RANKS, "--trainer.strategy=ddp")) == 2
    assert "1 batches in an optimizer step (1 rank(s) x 1), this run has 2 (2 x 1)" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_or_pruner_is_named(
    finished: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = folders(finished)
    wider = write_small_vlm(tmp_path / "wider", None, image_size=56, **TINY | {"llm_mlp": 64})
    for argv in (small(wider, finished), small(tiny_folder, finished, "--model.pruner=none")):
        assert cli.fit([*argv, "--resume=last"]) == 2
        text = capsys.readouterr().err
        assert f"was written for the model {tiny_folder} with the pruner stts, and what learns in this run" in text
        assert "Traceback" not in text and folders(finished) == before


def test_what_cannot_be_found_is_named(tmp_path: Path) -> None:
    assert choose("auto", tmp_path, {}) == (None, "") and choose(None, tmp_path, {}) == (None, "")
    with pytest.raises(ValueError, match="--resume last finds no checkpoint in"):
        choose("last", tmp_path, {})
    with pytest.raises(ValueError, match=r"no checkpoint at .*expected a folder such as"):
        Saved.read(tmp_path)


def test_a_signal_in_the_middle_of_a_print_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Python refuses to print while it prints."""

    class Interrupted(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, text: Any, /) -> int:
            signal.raise_signal(signal.SIGINT)
            return len(text)

    module = SimpleNamespace(losses=SimpleNamespace(stop_requested=False))
    callback = Checkpoints(tmp_path, {}, 0, 1, None)
    callback.on_train_start(cast(Any, SimpleNamespace(global_step=0)), module)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Interrupted())))
    try:
        print("step 1", flush=True)
    finally:
        callback.teardown(cast(Any, None), cast(Any, None), "fit")
    assert module.losses.stop_requested and "saving after this step" in capfd.readouterr().out
