"""Shape letters mean one thing: the legend of `stts/tokens.py` holds everywhere; other files add their own letters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LETTERS = set(re.findall(r"^    ([A-Za-z])  ", (ROOT / "stts" / "tokens.py").read_text(encoding="utf-8"), re.MULTILINE))
FILES = [path for folder in ("stts", "train", "scripts") for path in sorted((ROOT / folder).rglob("*.py"))]
LEGEND = re.compile(r"Shape suffixes.*?(?=\n\n|\"\"\")", re.DOTALL)


def test_the_legend_has_the_letters_that_most_files_use() -> None:
    assert {"N", "G", "K", "T", "P", "U", "S", "F", "D"} <= LETTERS


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_other_file_gives_a_shared_letter_another_meaning(path: Path) -> None:
    if path.name == "tokens.py":
        return
    for legend in LEGEND.findall(path.read_text(encoding="utf-8")):
        own = {letter for names in re.findall(r"((?:[A-Za-z], )*[A-Za-z]) = ", legend) for letter in names.split(", ")}
        assert not own & LETTERS, f"{sorted(own & LETTERS)} are explained in stts/tokens.py; choose other letters"
