"""The training scripts: what the SLURM job starts, and the benchmark on a handful of clips."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "molmo2_4b_stts.yaml"


@pytest.fixture(scope="module")
def bench() -> Any:
    sys.path.insert(0, str(ROOT / "scripts" / "benchmarks"))  # as for a script that is run: it imports its neighbours
    spec = importlib.util.spec_from_file_location("training", ROOT / "scripts" / "benchmarks" / "training.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["training"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def slurm(tmp_path: Path, *argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """The job script, with a scontrol that knows two nodes and an srun that shows what it was asked for."""
    for name, body in (("scontrol", "echo node1; echo node2"), ("srun", 'echo "$MASTER_ADDR:$MASTER_PORT" "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = str(ROOT / "scripts" / "launch_slurm.sh")
    return subprocess.run(["bash", script, *argv], capture_output=True, text=True, env=paths | env, timeout=60)


def test_slurm_starts_one_process_per_gpu_with_the_config_as_it_is(tmp_path: Path) -> None:
    job = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "54321", "SLURM_JOB_NODELIST": "node[1-2]"}
    done = slurm(tmp_path, str(CONFIG), "--model.llm_lr", "0", SLURM_NTASKS_PER_NODE="4", **job)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "node1:34321", "--kill-on-bad-exit=1", "stts", "fit", "--config", str(CONFIG), "--trainer.num_nodes", "2",
        "--trainer.devices", "4", "--model.llm_lr", "0",
    ]  # fmt: skip


def test_slurm_refuses_what_it_cannot_run(tmp_path: Path) -> None:
    assert "usage" in slurm(tmp_path).stderr
    assert "hand it to sbatch" in slurm(tmp_path, str(CONFIG)).stderr


def test_clips_of_the_benchmark_are_of_all_lengths(bench: Any) -> None:
    examples = bench.mixture(40, 32)
    seconds = [example.duration_s for example in examples]
    counts = [len(example.frames) for example in examples]
    assert min(seconds) < 6 and max(seconds) > 150 and min(counts) < 12 and max(counts) == 32
    longer = bench.stretched(examples[int(np.argmin(counts))], 32)
    assert len(longer.frames) == len(longer.timestamps_s) == 32 and (longer.frames[-1] == longer.frames[-2]).all()


def test_padded_batches_stay_in_the_budget(bench: Any) -> None:
    """10, 30: 2 x 30 fits in 60; a third would make 90. 5, 50: 2 x 50 does not fit. One too long goes alone."""
    assert bench.padded_batches([10, 30, 5, 50, 20, 99], 60) == [[0, 1], [2], [3], [4], [5]]


def test_packing_wastes_nothing_and_changes_no_loss(bench: Any, tiny_folder: Path) -> None:
    examples = bench.mixture(6, 24)
    rows = bench.bench(str(tiny_folder), examples, 900, 0.5, torch.device("cpu"))
    padded, single, packed, pruned = rows
    assert padded.waste > 0.02 and single.waste == packed.waste == pruned.waste == 0
    assert packed.loss == pytest.approx(single.loss, abs=1e-4)
    assert pruned.batches <= packed.batches <= single.batches == 6 and padded.ratio == 1
