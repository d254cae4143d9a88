"""How long a file, a class and a function may be: what a reader holds in mind at once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("stts", "train", "scripts", "tests")
FILE, CLASS, FUNCTION, LOOP = 400, 250, 60, 80
"""LOOP: of a function in `naive/`, where a whole method stands in one place to be compared with its paper."""


def too_long(root: Path) -> Iterator[str]:
    """`path: name has so many lines`. Docstrings do not count (more words may explain the same code), nor does the
    signature of a function (it is read as a table)."""
    for path in sorted(path for folder in ROOMS for path in (root / folder).rglob("*.py")):
        text, where = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()
        if (lines := text.count("\n")) > FILE:
            yield f"{where} has {lines} lines, at most {FILE}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                limit = CLASS if isinstance(node, ast.ClassDef) else LOOP if "/naive/" in where else FUNCTION
                lines = size(node)
                if lines > limit:
                    yield f"{where}: {node.name} has {lines} lines, at most {limit}"


def size(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a class, or of the body of a function, without docstrings, its own and those inside it."""
    docstrings = 0
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = inner.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                docstrings += (first.end_lineno or 0) - first.lineno + 1
    start = node.lineno if isinstance(node, ast.ClassDef) else node.body[0].lineno
    return (node.end_lineno or 0) - start + 1 - docstrings


def test_nothing_is_longer_than_a_reader_can_hold() -> None:
    found = list(too_long(ROOT))
    assert not found, "\n" + "\n".join(found)


def test_a_long_function_is_named(tmp_path: Path) -> None:
    (tmp_path / "stts").mkdir()
    body = '    """One.\n\n    Two."""\n' + "    x = 1\n" * (FUNCTION + 1)
    (tmp_path / "stts" / "a.py").write_text("def f():\n" + body)
    assert list(too_long(tmp_path)) == [f"stts/a.py: f has {FUNCTION + 1} lines, at most {FUNCTION}"]
