"""The set-up scripts, run in a checkout whose path has spaces; nothing is downloaded, installed or compiled.

What stands between the scripts and the network is small executables on PATH: a Python that answers one question
differently, or one that writes down what pip was asked to do. Everything else they run is real."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TOOLS = ("bash", "cat", "cksum", "cp", "cut", "dirname", "du", "git", "grep", "rm", "sed", "tail", "uname")


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that the scripts read, in a folder with spaces, and beside it `bin`: all the tools they may use."""
    root = tmp_path / "a check out"
    shutil.copytree(ROOT / "scripts", root / "scripts")
    shutil.copytree(ROOT / ".ci", root / ".ci")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    (tmp_path / "bin").mkdir()
    for name in TOOLS:
        path = shutil.which(name)
        assert path is not None, f"the tests of the scripts need {name}"
        (tmp_path / "bin" / name).symlink_to(path)
    executable(tmp_path / "bin" / "python3", f'exec "{sys.executable}" "$@"')
    return root


def run(checkout: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run bash from another folder, with nothing on PATH but `bin`."""
    path = str(checkout.parent / "bin")
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "STTS_TORCH_INDEX")}
    return subprocess.run(
        ["bash", *command],
        cwd="/",
        env={**kept, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def call(checkout: Path, functions: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run these lines the way a script would that has sourced _setup.sh."""
    lines = f'set -euo pipefail; source "{checkout}/scripts/_setup.sh"; {functions}'
    return run(checkout, "-c", lines, **environment)


SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize(("status", "said"), [(0, ""), (100, "Chromium could not be installed")])
def test_ci_brings_a_browser_where_none_is_and_goes_on_without(checkout: Path, status: int, said: str) -> None:
    tools, log = checkout.parent / "bin", checkout.parent / "apt"
    executable(tools / "id", "echo 0")
    executable(tools / "timeout", 'shift; exec "$@"')
    executable(tools / "ip", "exit 0")
    executable(tools / "apt-get", f'echo "$@" >>"{log}"; exit {status}')
    done = run(checkout, str(checkout / ".ci" / "run"))
    assert log.read_text().startswith("update -qq\n") and ("chromium" in log.read_text()) == (not status)
    assert "installing Chromium" in done.stdout and said in done.stdout
    assert "g++ was not found" in done.stderr, "then the tests begin"
    log.unlink()
    executable(tools / "chromium", "exit 0")
    run(checkout, str(checkout / ".ci" / "run"))
    assert not log.exists(), "one is there"


@pytest.mark.parametrize("script", ["scripts/test.sh", ".ci/run"])
def test_missing_compiler_is_named_before_anything_is_made(checkout: Path, script: str) -> None:
    done = run(checkout, str(checkout / script))
    assert done.returncode == 1
    for words in ("g++ was not found", "sudo apt install g++", "sudo dnf install gcc-c++", "xcode-select --install"):
        assert words in done.stderr
    assert not (checkout / ".venv").exists()


def test_missing_python_headers_are_named(checkout: Path) -> None:
    executable(checkout.parent / "bin" / "g++", "exit 0")
    real = f'exec "{sys.executable}" "$@"'
    executable(checkout.parent / "bin" / "python3", f'case "$*" in *get_path*) echo /nowhere ;; *) {real} ;; esac')
    done = run(checkout, str(checkout / "scripts" / "test.sh"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert done.returncode == 1
    assert "/nowhere/Python.h is missing" in done.stderr
    assert f"sudo apt install python{version}-dev" in done.stderr


def test_missing_git_is_named(checkout: Path) -> None:
    (checkout.parent / "bin" / "git").unlink()
    done = run(checkout, str(checkout / "scripts" / "quickstart.sh"))
    assert done.returncode == 1
    assert "sudo apt install git" in done.stderr


@pytest.mark.parametrize("version", ["2.7", "3.9", "3.10"])
def test_old_python_is_refused_with_its_version(checkout: Path, version: str) -> None:
    executable(checkout.parent / "bin" / "python3", f"echo {version}")
    executable(checkout.parent / "bin" / "python3.13", "exit 127")  # a version manager's stub for what is not installed
    done = run(checkout, str(checkout / "scripts" / "quickstart.sh"))
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr
    assert f"python3 ({version})" in done.stderr
    assert "python3.13 (does not run)" in done.stderr
    assert "python3.11-venv" in done.stderr


def test_the_named_python_decides_and_is_not_replaced(checkout: Path) -> None:
    old = executable(checkout.parent / "my python" / "python", "echo 3.8")
    done = call(checkout, 'find_python; echo "$BASE_PYTHON"', PYTHON=str(old))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{old} (3.8)" in done.stderr
    assert call(checkout, 'find_python; echo "$BASE_PYTHON"', PYTHON=sys.executable).stdout.strip() == sys.executable


def test_a_newer_python_further_down_the_list_is_found(checkout: Path) -> None:
    executable(checkout.parent / "bin" / "python3", "echo 3.9")
    executable(checkout.parent / "bin" / "python3.12", "echo 3.12")
    assert call(checkout, 'find_python; echo "$BASE_PYTHON"').stdout.strip() == "python3.12"


def test_a_broken_environment_is_refused(checkout: Path) -> None:
    executable(checkout / ".venv" / "bin" / "python", "exit 127")
    done = run(checkout, str(checkout / "scripts" / "quickstart.sh"))
    assert done.returncode == 1
    assert "Delete that folder" in done.stderr


def fake_venv(checkout: Path) -> Path:
    """A .venv with the torch of these tests. Its pip only writes its arguments to the returned file, one per line."""
    log = checkout.parent / "pip arguments"
    record = f'printf "%s\\n" "$@" >>"{log}"; cp "{checkout}/.venv/constraints.txt" "{log}.constraints"'
    executable(
        checkout / ".venv" / "bin" / "python",
        f'case "$*" in *"-m pip"*) {record} ;; *) exec "{sys.executable}" "$@" ;; esac',
    )
    return log


def test_install_quotes_keeps_torch_and_runs_once(checkout: Path) -> None:
    log = fake_venv(checkout)
    first = call(checkout, "set_up train,test")
    assert first.returncode == 0, first.stderr
    assert f"torch {torch.__version__} (" in first.stdout
    lines = log.read_text(encoding="utf-8").splitlines()
    assert lines.count("install") == 1, "torch is there already, so pip is called for the project only"
    assert lines[-2:] == ["--editable", f"{checkout}[train,test]"]
    assert str(checkout / ".venv" / "constraints.txt") in lines

    log.unlink()
    call(checkout, "set_up train,test")
    assert not log.exists(), "nothing changed, so nothing is installed"

    with (checkout / "constraints.txt").open("a", encoding="utf-8") as file:
        file.write("tqdm==4.70.1\n")
    call(checkout, "set_up train,test")
    assert "tqdm==4.70.1" in Path(f"{log}.constraints").read_text(encoding="utf-8")


def test_a_torch_in_range_stays_though_another_is_pinned(checkout: Path) -> None:
    log = fake_venv(checkout)
    pinned = "torch==2.0.0\ntorchvision==0.15.0\ntorchdata==0.11.0\n"
    (checkout / "constraints.txt").write_text(pinned, encoding="utf-8")
    assert call(checkout, "set_up fit").returncode == 0
    used = Path(f"{log}.constraints").read_text(encoding="utf-8")
    assert used.splitlines() == ["torchdata==0.11.0", f"torch=={torch.__version__}"]


@pytest.mark.parametrize("broken", ["evs", "stts"])
def test_quick_start_stops_when_one_of_its_two_runs_fails(checkout: Path, broken: str) -> None:
    fake_venv(checkout)
    (checkout / ".venv" / "constraints.txt").touch()
    done, stops = checkout.parent / "done", f'echo "{broken} is out of memory" >&2; exit 3'
    executable(
        checkout / ".venv" / "bin" / "stts",
        f"""case "$*" in
  *"--out runs/quickstart/{broken} "* | *"--out runs/quickstart/{broken}") {stops} ;;
  fit*) sleep 0.4; touch "{done}" ;;
  *) echo "called $1" ;;
esac""",
    )
    (checkout / "runs" / "quickstart").mkdir(parents=True)  # by `stts data shapes`
    for tool in ("sleep", "touch"):
        (checkout.parent / "bin" / tool).symlink_to(shutil.which(tool) or "")
    ended = run(checkout, str(checkout / "scripts" / "quickstart.sh"))
    assert ended.returncode in (1, 3) and f"{broken} is out of memory" in ended.stderr
    assert "called data" in ended.stdout and "3/4" not in ended.stdout
    if broken == "evs":
        assert "runs/quickstart/evs.log is above" in ended.stderr
        assert done.exists(), "the other one was let finish"
    else:
        time.sleep(0.6)
        assert not done.exists(), "the other one was stopped"


@pytest.mark.parametrize(
    ("version", "status"), [("2.10.1", 1), ("2.11.0", 0), ("2.13.0+cpu", 0), ("2.12.0a0+nv1", 0), ("2.14.0", 1)]
)
def test_torch_range_is_the_one_of_pyproject(checkout: Path, version: str, status: int) -> None:
    executable(checkout / ".venv" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    assert call(checkout, f"torch_in_range {version}").returncode == status


@pytest.mark.parametrize(
    ("requires", "status"),
    [
        (["filelock", "nvidia-cublas==13.1; platform_system == 'Linux'"], 0 if sys.platform == "linux" else 1),
        (["cuda-toolkit[cudart]==13.0.2"], 0),
        (["filelock", "nvidia-cublas==13.1; platform_system == 'Plan9'", "nvidia-x; extra == 'x'"], 1),
    ],
)
def test_a_cuda_build_is_recognised_before_it_is_fetched(checkout: Path, requires: list[str], status: int) -> None:
    executable(checkout / ".venv" / "bin" / "python", f'exec "{sys.executable}" "$@"')
    report = checkout / "report.json"
    report.write_text(json.dumps({"install": [{"metadata": {"requires_dist": requires}}]}), encoding="utf-8")
    assert call(checkout, f'report_wants_cuda "{report}"').returncode == status


def test_a_torch_index_that_is_neither_url_nor_folder_is_refused(checkout: Path) -> None:
    bare = 'case "$*" in *"-m pip"*) ;; *"-P -"*) ;; *) exec "{}" "$@" ;; esac'  # sees no torch
    executable(checkout / ".venv" / "bin" / "python", bare.format(sys.executable))
    done = call(checkout, "set_up fit", STTS_TORCH_INDEX="/no such folder")
    assert done.returncode == 1
    assert "STTS_TORCH_INDEX=/no such folder is neither a URL nor a folder" in done.stderr


def test_an_operator_that_does_not_compile_says_why_and_one_that_does_is_kept(checkout: Path) -> None:
    tools, operators = checkout.parent / "bin", checkout.parent / "operators"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (tools / "mkdir").symlink_to(str(shutil.which("mkdir")))
    python = checkout / ".venv" / "bin" / "python"
    environment = {"TORCH_EXTENSIONS_DIR": str(operators)}
    (operators / "cpu_adam").mkdir(parents=True)
    (operators / "cpu_adam" / "lock").touch()
    executable(python, 'case $1 in -c) echo 1.0 ;; *) echo "cc1plus: no such file"; exit 1 ;; esac')
    done = call(checkout, "build_operators", **environment)
    assert done.returncode == 1 and "cc1plus: no such file" in done.stderr
    assert f"the end of {operators}/ShareMemCommBuilder.log is above" in done.stderr
    executable(python, "case $1 in -c) echo 1.0 ;; *) echo compiled ;; esac")
    done = call(checkout, "build_operators", **environment)
    assert done.returncode == 0 and done.stdout.count("compiling") == 1
    assert {file.name for file in operators.glob("*.log")} == {"ShareMemCommBuilder.log", "CPUAdamBuilder.log"}
    assert not (operators / "cpu_adam" / "lock").exists(), "whoever comes next would wait for ever"
    done = call(checkout, "build_operators", **environment)
    assert (done.returncode, done.stdout) == (0, "")
    executable(python, "case $1 in -c) echo 1.1 ;; *) echo compiled ;; esac")
    assert call(checkout, "build_operators", **environment).stdout.count("compiling") == 1, "another torch"
