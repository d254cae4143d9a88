"""Pruners that are not in the registry: `package.module:Class` and `file.py:Class`, and a first file to start from."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from stts.files import write_whole

TEMPLATE = Path(__file__).parents[1] / "assets" / "pruner" / "my_pruner.py"


def is_own(name: str) -> bool:
    """Whether the name has the form of one that is not in the registry."""
    return ":" in name


def load_own(name: str) -> Any:
    """The class that `file.py:Class` or `package.module:Class` names; modules of the current folder are found too.

    ValueError that says what is not there."""
    place, _, attribute = name.rpartition(":")
    try:
        module = _of_file(Path(place)) if place.endswith(".py") else _of_path(place)
        return getattr(module, attribute)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise ValueError(
            f"pruner {name!r} could not be loaded ({error}); expected 'file.py:Class', or 'module:Class' of a module "
            "in this folder or on the Python path"
        ) from error


def source_of(name: str) -> Path | None:
    """The file that `name` is loaded from; None for a name of the registry, or where there is no such file."""
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return Path(place)
    spec = _found(place) if place else None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


def _of_file(file: Path) -> ModuleType:
    """Loaded once a process for every path and time of change, so that the class stays the same one."""
    file = file.resolve()
    digest = hashlib.sha256(f"{file} {file.stat().st_mtime_ns}".encode()).hexdigest()[:12]
    known = f"stts_own_{file.stem}_{digest}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, file)
        assert spec is not None and spec.loader is not None, "the name ends in .py"
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module  # dataclasses look their module up
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[known]
            raise
    return sys.modules[known]


def _of_path(place: str) -> ModuleType:
    _found(place)
    return importlib.import_module(place)


def _found(place: str) -> Any:
    """The module's spec; puts the current folder at the end of the path where it is only there: a console script has
    its own folder on the path instead."""
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        spec = None
    here = Path.cwd() / place.split(".")[0]
    if spec is None and str(Path.cwd()) not in sys.path and (here.is_dir() or here.with_suffix(".py").is_file()):
        sys.path.append(os.getcwd())
        importlib.invalidate_caches()
        return _found(place)
    return spec


def write_template(file: Path) -> str:
    """Write a commented method to start from; returns its name. ValueError: the file is there, or no `name.py`."""
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise ValueError(f"--new {file} must be a Python file such as my_pruner.py")
    if file.exists():
        raise ValueError(f"--new {file} is there already; name another file")
    name = "".join(word.capitalize() for word in file.stem.split("_"))
    write_whole(file, TEMPLATE.read_text(encoding="utf-8").replace("MyPruner", name))
    return f"{file}:{name}"
