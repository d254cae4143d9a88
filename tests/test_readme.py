"""The README names what exists: every file, every method, both commands."""

from __future__ import annotations

import re
from pathlib import Path

from stts.pruners.registry import PRUNERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def listed_files() -> set[str]:
    """Paths of the tree block: a folder line ends with '/', files are indented below it."""
    block = README.split("## What is where")[1].split("```")[1]
    paths, folder = set(), ""
    for line in block.strip().splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        else:
            paths.add(folder + name if line.startswith(" ") else name)
    return paths


def test_the_file_tree_is_complete_and_true() -> None:
    present = {
        path.relative_to(ROOT).as_posix()
        for folder, pattern in (
            ("stts", "*.py"),
            ("train", "*.py"),
            ("configs", "*.yaml"),
            ("scripts", "*.sh"),
            ("scripts", "*.py"),
        )
        for path in (ROOT / folder).rglob(pattern)
        if path.name != "__init__.py"
    }
    listed = {path for path in listed_files() if path.startswith(("stts/", "train/", "configs/", "scripts/"))}
    assert listed == present


def test_the_method_table_is_the_registry() -> None:
    table = README.split("## Methods")[1].split("## What is where")[0]
    assert re.findall(r"^\| `([^`]+)`", table, re.MULTILINE) == list(PRUNERS)


def test_the_two_commands_exist_and_nothing_is_left_to_fill_in() -> None:
    for command in ("bash scripts/quickstart.sh", "bash scripts/test.sh"):
        assert command in README and (ROOT / command.split()[1]).is_file()
    assert "@@" not in README
