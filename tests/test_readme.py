"""The README names what exists: every method, both commands."""

from __future__ import annotations

import re
from pathlib import Path

from stts.pruners.registry import PRUNERS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_method_table_is_the_registry() -> None:
    table = README.split("## Methods")[1].split("## How it is checked")[0]
    assert re.findall(r"^\| `([^`]+)`", table, re.MULTILINE) == list(PRUNERS)


def test_the_two_commands_exist_and_nothing_is_left_to_fill_in() -> None:
    for command in ("bash scripts/quickstart.sh", "bash scripts/test.sh"):
        assert command in README and (ROOT / command.split()[1]).is_file()
    assert "@@" not in README
