"""`stts fit` in processes of its own, one for each rank."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.forked import Forked

ROOT = Path(__file__).parents[2]
RATES = [f"--model.{part}_lr=1e-3" for part in ("llm", "vit", "connector", "scorer")]
Started = subprocess.Popen[str] | Forked
TWO_RANKS = ["--trainer.accelerator=cpu", "--trainer.devices=2"]
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
CUTS = [
    pytest.param("ddp", id="ddp"),
    *(pytest.param(f"deepspeed_stage_{stage}", marks=needs_deepspeed, id=f"zero{stage}") for stage in (1, 2, 3)),
    pytest.param("fsdp2", id="fsdp2"),
]


def strategy(name: str) -> list[str]:
    """Options for a strategy that also cuts what is as small as our test model."""
    if not name.startswith("deepspeed_stage_3"):
        return [f"--trainer.strategy={name}"]
    settings: dict[str, Any] = {"stage": 3, "persistence_threshold": 100}
    if name.endswith("offload"):
        settings |= {"offload_optimizer": True, "offload_parameters": True}
    return [
        "--trainer.strategy=stts_train.strategies.DeepSpeed",
        f"--trainer.strategy.init_args={json.dumps(settings)}",
    ]


def start(argv: Sequence[str | Path], errors_apart: bool = False) -> Forked:
    """`stts fit` on as many ranks as `--trainer.devices` says, as torchrun starts them."""
    words = list(map(str, argv))
    asked = re.findall(r"--trainer\.devices[ =](\d+)", " ".join(words)) or ["1"]
    return Forked("stts.cli:main", ["fit", *words], int(asked[-1]), errors_apart)


def run_all(runs: Sequence[Sequence[str]], folder: Path, timeout_s: float = 600, ranks: int = 2) -> str:
    """These runs one after the other in the same processes, as torchrun starts them."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    code, output = finish(Forked("tests.train.fits:main", [str(file)], ranks=ranks), timeout_s)
    assert code == 0, output[-4000:]
    noise = ("Warning", "Seed set", "GPU available", "Initializing distributed", "All distributed", "Writing model")
    warnings = [text for text in output.splitlines() if any(map(text.__contains__, noise))]
    warnings = [text for text in warnings if "samples were skipped" not in text]
    assert not warnings, f"nobody can act on these; silence them by name in train/quiet.py: {warnings}"
    return output


def start_module(module: Sequence[str], within: Sequence[str] = (), **env: str) -> subprocess.Popen[str]:
    """`python -m`, started by the command `within`, in a process group of its own, so that all ranks and loader workers
    can be signalled or ended together."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": paths, "PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(
        [*within, sys.executable, "-m", *module],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **more},
        start_new_session=True,
    )


def finish(process: Started, timeout_s: float = 300) -> tuple[int, str]:
    """Exit code and output. A rank that waits for another for ever fails the test, and is ended."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _abort(process)
        pytest.fail(f"still running after {timeout_s} s:\n{process.communicate()[0][-20000:]}")
    return process.wait(), output


def _abort(process: Started) -> None:
    """End every process of a run that hangs; each first writes where its threads are into the run's output."""
    os.killpg(process.pid, signal.SIGABRT)
    time.sleep(5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(argv: Sequence[str | Path]) -> str:
    code, output = finish(start(argv))
    assert code == 0, output[-4000:]
    return output


def wait_for(process: Started, marker: str, timeout_s: float = 300) -> str:
    """Read output up to a line with `marker`. What takes longer is ended, and fails the test."""
    assert process.stdout is not None
    seen = ""
    timer = threading.Timer(timeout_s, _abort, (process,))
    timer.start()
    for text in process.stdout:
        seen += text
        if marker in text:
            timer.cancel()
            return seen
    timer.cancel()
    pytest.fail(f"ended without {marker!r}, exit code {process.wait()}:\n{seen[-20000:]}")


def shown(output: str) -> dict[int, str]:
    """The losses of each optimizer step, as the progress lines show them."""
    lines = re.finditer(r"step (\d+)/\d+  (.*?) kept", output)
    return {int(match[1]): match[2] for match in lines}


def logged(out: Path, name: str) -> list[float]:
    """A value of each optimizer step, from the newest log in a folder."""
    file = max((out / "log").glob("version_*/metrics.csv"), key=lambda file: int(file.parent.name.split("_")[1]))
    return [float(row[name]) for row in csv.DictReader(file.open()) if row.get(name)]
