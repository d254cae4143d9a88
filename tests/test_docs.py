"""The pages of docs/: generated ones equal the code, links lead somewhere, commands are understood by the parsers."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stts import cli
from stts.command_line import read
from stts.data.rows import Samples
from stts.pruners.registry import PRUNERS
from tests.scripts import load_script

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["methods.md", "families.md", "code_map.md"])
def test_generated_pages_equal_the_code(name: str) -> None:
    made = load_script("make_docs").pages()[name]
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == made, "run `python scripts/make_docs.py`"


def test_the_walks_name_what_exists_in_at_most_twelve_files_each() -> None:
    text = (ROOT / "docs" / "code_map.md").read_text(encoding="utf-8")
    for file in re.findall(r"`((?:stts|train|scripts|configs)/[\w/.]+\.\w+)`", text):
        assert (ROOT / file).is_file(), file
    walks = [part for part in text.split("\n## ") if part.startswith("One ")]
    assert len(walks) == 2
    for walk in walks:
        hops = re.findall(r"^\| \d+ \| `([^`]+)` \| ([^|]+) \|", walk, re.MULTILINE)
        assert 8 <= len({file for file, _ in hops}) <= 12
        for file, calls in hops:
            missing = set(re.findall(r"`([^`]+)`", calls)) - _names(ROOT / file)
            assert not missing, f"{file} has no {missing}"


def _names(file: Path) -> set[str]:
    """Functions and classes of a module, methods as Class.method."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    defined = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    methods = {
        f"{node.name}.{part.name}"
        for node in defined
        if isinstance(node, ast.ClassDef)
        for part in node.body
        if isinstance(part, ast.FunctionDef)
    }
    return {node.name for node in defined} | methods


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_the_site_shows_every_page() -> None:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    nav = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"]
    names = list(_leaves(nav))
    assert sorted(names) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in DOCS)


def _leaves(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from _leaves(part)


def _commands() -> Iterator[Any]:
    for page in PAGES:
        for kind, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if kind in ("bash", "console"):
                lines = block.replace("\\\n", " ").splitlines()
                if kind == "console":  # the other lines are output
                    lines = [line[2:].partition(" | ")[0] for line in lines if line.startswith("$ ")]
                for line in lines:
                    for command in line.split("&&"):
                        words = shlex.split(command, comments=True)
                        if words:
                            yield pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")


@pytest.mark.parametrize("words", {param.id: param for param in _commands()}.values())
def test_commands_are_understood(words: list[str]) -> None:
    while "=" in words[0]:  # VARIABLE=value
        words = words[1:]
    match words:
        case ["stts", *rest] | ["torchrun", "--nproc-per-node", _, "-m", "stts.cli", *rest]:
            _check_verb(rest)
        case ["sbatch", *rest] | ["bash", *rest]:
            script = next(word for word in rest if not word.startswith("-"))
            assert (ROOT / script).is_file(), script
        case ["python", "-m", "pytest", *rest]:
            for path in (word for word in rest if word.startswith("tests/")):
                assert (ROOT / path).exists(), path
        case ["python", script, *rest]:
            text = (ROOT / script).read_text(encoding="utf-8")
            for option in (word for word in rest if word.startswith("--")):
                assert f'"{option}"' in text, f"{script} has no {option}"
        case _:
            assert words[0] in ("pip", "mkdocs", "source", "export", "ruff", "mypy", "mkdir", "tar"), words
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), word


def _check_verb(words: list[str]) -> None:
    """The real parser of the verb reads the words."""
    number = 2 if " ".join(words[:2]) in cli.VERBS else 1
    verb, rest = " ".join(words[:number]), words[number:]
    if verb.startswith("--"):
        assert verb in ("--help", "--version")
        return
    assert verb in cli.VERBS
    if verb in ("fit", "plan"):
        from stts_train.cli import ReadingCLI, read_config
        from stts_train.plan_cli import PlanCLI

        rest = [word for word in rest if word != "--dry-run"]
        rest += [] if "--out" in rest else ["--out", "runs/x"]
        assert read_config(rest, PlanCLI if verb == "plan" else ReadingCLI)
        return
    module, _, name = cli.target_of(verb, rest).partition(":")
    if "--help" not in rest:
        read(getattr(importlib.import_module(module), name), f"stts {verb}", rest)
    for place, word in enumerate(rest):
        if word in ("--pruner", "--pruners"):
            for pruner in rest[place + 1].strip("[]").split(","):
                assert pruner in PRUNERS or ":" in pruner, pruner


def test_the_rows_shown_are_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    [rows] = [block for kind, block in BLOCK.findall(text) if kind == "json"]
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    samples = Samples(tmp_path / "rows.jsonl")
    assert [sample.uid for sample in samples] == ["a1", "a2", "a3"]
    assert [bool(sample.video) for sample in samples] == [True, True, False] and samples[1].clip == (3.0, 9.5)


def test_the_pruner_of_the_page_keeps_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "add_a_pruner.md").read_text(encoding="utf-8")
    [code] = [block for kind, block in BLOCK.findall(text) if kind == "python"]
    (tmp_path / "my_pruner.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.main(["pruners", "--check", "my_pruner:MyNovelty"]) == 0
