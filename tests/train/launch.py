"""`stts fit` as a user starts it: a process of its own, which starts those of the other ranks."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RATES = [f"--model.{part}_lr=1e-3" for part in ("llm", "vit", "connector", "scorer")]
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


def start(argv: Sequence[str | Path]) -> subprocess.Popen[str]:
    """`stts fit`, which starts the other ranks itself."""
    return start_module(["stts.cli", "fit", *map(str, argv)])


def run_all(runs: Sequence[Sequence[str]], folder: Path, timeout_s: float = 600, ranks: int = 2) -> str:
    """These runs one after the other in the same processes, under torchrun on a free port."""
    file = folder / "runs.json"
    file.write_text(json.dumps(runs))
    script = str(Path(__file__).with_name("fits.py"))
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    code, output = finish(start_module([*torchrun, script, str(file)]), timeout_s)
    assert code == 0, output[-4000:]
    noise = ("Warning", "Seed set", "GPU available", "Initializing distributed", "All distributed", "Writing model")
    warnings = [text for text in output.splitlines() if any(map(text.__contains__, noise))]
    warnings = [text for text in warnings if "samples were skipped" not in text]
    assert not warnings, f"nobody can act on these; silence them by name in train/quiet.py: {warnings}"
    return output


def start_module(module: Sequence[str], within: Sequence[str] = (), **env: str) -> subprocess.Popen[str]:
    """`python -m`, started by the command `within`, in a process group of its own, so that all ranks and loader workers
    can be signalled or ended together.

    Operators that DeepSpeed compiles on first use are kept between runs of these tests; scripts/test.sh has them
    already."""
    built = Path(tempfile.gettempdir()) / "stts_test_operators"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*within, sys.executable, "-m", *module],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            "TORCH_EXTENSIONS_DIR": str(built),
            **os.environ,
            "PYTHONPATH": paths,
            "PYTHONFAULTHANDLER": "1",
            "OMP_NUM_THREADS": "1",
            **env,
        },
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 300) -> tuple[int, str]:
    """Exit code and output. A rank that waits for another for ever fails the test, and is ended."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _abort(process)
        pytest.fail(f"still running after {timeout_s} s:\n{process.communicate()[0][-20000:]}")
    return process.returncode, output


def _abort(process: subprocess.Popen[str]) -> None:
    """End every process of a run that hangs; each first writes where its threads are into the run's output."""
    os.killpg(process.pid, signal.SIGABRT)
    time.sleep(5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(argv: Sequence[str | Path]) -> str:
    code, output = finish(start(argv))
    assert code == 0, output[-4000:]
    return output


def wait_for(process: subprocess.Popen[str], marker: str, timeout_s: float = 300) -> str:
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
