"""Saved inputs and outputs of authors' own code, and the rule that none of them may go unread.

Cases lie in `<folder>/<method>/*.safetensors`; the folder is STTS_GOLDEN_DIR or `data/` here, the method is named like
its file in `stts/pruners/`. `tests/golden/test_<method>.py` reads them through `cases(method)`. A file or tensor that
no test read fails the run; folders of methods that do not exist yet are only listed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from torch import Tensor

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("STTS_GOLDEN_DIR", HERE / "data"))
PRUNERS = HERE.parents[1] / "stts" / "pruners"

NO_TENSORS = "(not a safetensors file)"
_read: dict[Path, set[str]] = {}


class Case:
    """One file of vectors. Remembers which tensors were asked for."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self._path = path
        with safe_open(path, "pt") as file:
            self._names = frozenset(file.keys())
            told = file.metadata() or {}
            self.meta: dict[str, Any] = json.loads(told["meta"]) if "meta" in told else told
            """As saved: nested JSON of the STTS cases, texts such as {"tau": "0.8"} of the others."""

    def __str__(self) -> str:
        return self.name

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        _read.setdefault(self._path, set()).add(name)
        return tensor

    def names(self, ending: str) -> list[str]:
        """Names of the tensors that end so."""
        return sorted(name for name in self._names if name.endswith(ending))

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Every tensor below `prefix.`, without the prefix."""
        return {name[len(prefix) + 1 :]: self[name] for name in sorted(self._names) if name.startswith(prefix + ".")}


def cases(method: str, containing: str) -> list[Case]:
    """The cases of a method that hold the tensor `containing`; parametrize over them with `ids=str`."""
    if not FOLDER.is_dir():
        raise ValueError(f"STTS_GOLDEN_DIR={FOLDER} is no folder; expected one subfolder per method")
    found = [Case(path) for path in sorted((FOLDER / method).glob("*.safetensors"))]
    return [case for case in found if containing in case]


def read_text(method: str, name: str) -> str | None:
    """A file of the method that holds no tensors; None where this folder has no such file."""
    path = FOLDER / method / name
    if not path.is_file():
        return None
    _read.setdefault(path, set()).add(NO_TENSORS)
    return path.read_text()


# --- nothing goes unread -----------------------------------------------------------------------------------------

_deselected: set[Path] = set()
_report: list[str] = []


def pytest_deselected(items: list[pytest.Item]) -> None:
    _deselected.update(item.path for item in items)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Only a module that ran whole can be blamed: not one that was narrowed by -k, a node id, or a failure."""
    parts_asked = any("::" in arg for arg in session.config.args)
    if session.exitstatus != pytest.ExitCode.OK or parts_asked or session.config.option.collectonly:
        return
    ran = {item.path for item in session.items}
    for folder in sorted(path for path in FOLDER.iterdir() if path.is_dir()) if FOLDER.is_dir() else []:
        test = HERE / f"test_{folder.name}.py"
        if not (PRUNERS / f"{folder.name}.py").exists():
            _report.append(f"not read: {folder.name}/ (no stts/pruners/{folder.name}.py)")
        elif not test.exists():
            _report.append(
                f"ERROR: {folder.name}/ has vectors and a pruner, but no tests/golden/{test.name} reads them"
            )
        elif test in ran and test not in _deselected:
            _report.extend(f"ERROR: no test reads {line}" for line in _unread(folder))
    if any(line.startswith("ERROR") for line in _report):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _unread(folder: Path) -> list[str]:
    lines = []
    for path in sorted(folder.iterdir()):
        if path.name == "README.md":
            continue
        names = set(Case(path)._names) if path.suffix == ".safetensors" else {NO_TENSORS}
        lines.extend(f"{folder.name}/{path.name}: {name}" for name in sorted(names - _read.get(path, set())))
    return lines


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _report:
        terminalreporter.section("golden vectors")
        for line in _report:
            terminalreporter.line(line, red=line.startswith("ERROR"))
