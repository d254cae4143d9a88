"""The README: short, complete, and its first lines run as printed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stts import cli
from stts.pruners.listing import pruner_lines
from stts.pruners.registry import PRUNERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_it_is_short_and_shows_a_result_first() -> None:
    assert len(README.split()) <= 1300, "move it to a page of docs/"
    head = "\n".join(README.splitlines()[:35])
    assert head.count("```python") == 1 and re.search(r"^\w+ \[\d+\] of \[\d+\]$", head, re.MULTILINE)


def test_every_method_has_its_name_one_line_and_its_paper() -> None:
    rows = [line.split(" | ") for line in _section("Methods").splitlines() if line.startswith("| `")]
    named = {name: cells[-1] for cells in rows for name in re.findall(r"`([^`]+)`", cells[0])}
    assert set(named) == set(PRUNERS), "the table of methods in README.md names every registered pruner, and no other"
    for line in pruner_lines():
        if line.papers:  # of a wrapper the first is its own
            assert f"[{line.papers[0]}](https://arxiv.org/abs/{line.papers[0]})" in named[line.name], line.name


def test_the_two_commands_exist_and_nothing_is_left_to_fill_in() -> None:
    for command in ("bash scripts/quickstart.sh", "bash scripts/test.sh"):
        assert command in README and (ROOT / command.split()[1]).is_file()
    assert "@@" not in README


def test_the_first_lines_print_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shell, code, printed, session = re.findall(r"```\w*\n(.*?)```", README, re.DOTALL)[:4]
    [made] = re.findall(r"stts (data shapes .*)", shell)
    argv = [word if word != "clips" else str(tmp_path / "clips") for word in made.split()]
    assert cli.main(argv) == 0
    (tmp_path / "stts").symlink_to(ROOT / "stts")  # the code names the shipped model from the root of a checkout
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == printed, done.stderr
    [(command, said)] = re.findall(r"^\$ stts (ask .*)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE)
    places = {"clips/": f"{tmp_path}/clips/", "stts/assets": f"{ROOT}/stts/assets", "kept.png": f"{tmp_path}/kept.png"}
    for name, place in places.items():
        command, said = command.replace(name, place), said.replace(name, place)
    capsys.readouterr()
    assert cli.main(shlex.split(command)) == 0
    assert _untimed(capsys.readouterr().out) == _untimed(said)


def _untimed(text: str) -> str:
    """Milliseconds, and what they save, are those of a machine."""
    return re.sub(r" +(-?\d+\.\d|-?\d+%)", " #", text)
