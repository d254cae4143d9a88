"""The generated pages of docs/: methods, families and the code map, from the registry, the tables and the docstrings;
and the help of every verb, from its parser.

    python scripts/make_docs.py

writes them. What stands above the marker of a page is written by hand and stays. Tests compare all of it with the
code."""

from __future__ import annotations

import ast
import importlib
import io
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path

from stts import cli
from stts.command_line import make_parser
from stts.models.families.base import ADAPTERS
from stts.models.families.published import PUBLISHED
from stts.pruners.listing import MATRIX, describe_pruner, pruner_lines
from stts_train.cli import ReadingCLI, read_config
from stts_train.parser import FitParser
from stts_train.plan_cli import PlanCLI

ROOT = Path(__file__).resolve().parents[1]
MARKER = "<!-- Below this line: written by `python scripts/make_docs.py`. -->"
_FOLDERS = {
    "stts/assets/support": "Which pruner runs on which family: the table that the tests check.",
    "stts/assets/help": "What `stts VERB --help` prints, written by scripts/make_docs.py from the parsers.",
}
"""Folders whose files have no place for a comment, and no README."""


def main() -> int:
    for name, text in pages().items():
        (ROOT / "docs" / name).write_text(text, encoding="utf-8")
        print(f"wrote docs/{name}")
    cli.HELP.mkdir(exist_ok=True)
    for name, text in helps().items():
        (cli.HELP / f"{name}.txt").write_text(text, encoding="utf-8")
    print(f"wrote {cli.HELP.relative_to(ROOT)}")
    return 0


def helps() -> dict[str, str]:
    """Name of a file in stts/assets/help -> what the parser of that verb, or of that form of it, prints."""
    forms = {f"{verb}{option.replace('--', '-')}": (verb, target) for (verb, option), target in cli.FORMS.items()}
    texts = {}
    for name, (verb, target) in ({verb: (verb, target) for verb, (_, target) in cli.VERBS.items()} | forms).items():
        if verb not in ("fit", "plan"):
            module, _, function = target.partition(":")
            parser = make_parser(getattr(importlib.import_module(module), function), f"stts {verb}")
            texts[name.replace(" ", "-")] = parser.format_help()
    fits = (("fit", ReadingCLI, False), ("fit-trainer", ReadingCLI, True), ("plan", PlanCLI, False))
    for name, cli_class, trainer in fits:
        FitParser.trainer_help = trainer
        text = io.StringIO()
        with redirect_stdout(text), suppress(SystemExit):  # Lightning's object parses when it is made
            read_config(["--help"], cli_class)
        texts[name] = text.getvalue()
    FitParser.trainer_help = False
    return texts


def pages() -> dict[str, str]:
    """Name of a page in docs/ -> its text."""
    made = {"methods.md": methods(), "families.md": families(), "code_map.md": code_map()}
    return {name: f"{_by_hand(name)}{MARKER}\n\n{text}\n" for name, text in made.items()}


def _by_hand(name: str) -> str:
    text, marker, _ = (ROOT / "docs" / name).read_text(encoding="utf-8").partition(MARKER)
    if not marker:
        raise ValueError(f"docs/{name} has no line {MARKER!r}; put it where the generated part begins")
    return text


def methods() -> str:
    """A table of all pruners, then what each says of itself."""
    head = ("name", "acts", "learned", "keeps", "paper", "file")
    rows, details = [], []
    for line in pruner_lines():
        files = [f"`{module.removeprefix('stts.pruners.')}.py`" for module in line.modules]
        papers = [f"[{paper}](https://arxiv.org/abs/{paper})" for paper in line.papers]
        rows.append([f"[`{line.name}`](#{_slug(line.name)})", _acts(line.sites), "**yes**" if line.learned else "no",
                     " ".join(map(_escaped, line.keeps)), _listed(papers), _listed(files)])  # fmt: skip
        facts = (f"acts at: {line.sites}", f"signals: {line.signals}", f"positions: {line.positions}",
                 f"newlines: {line.newlines}")  # fmt: skip
        details.append(f"### `{line.name}`\n\n{'; '.join(facts)}\n\n```text\n{describe_pruner(line.name)}\n```")
    return "\n\n".join([_table(head, rows), "## Each method", *details])


def _acts(sites: str) -> str:
    words = {"vit": "in the ViT", "pre_llm": "before the LLM", "llm": "in the LLM"}
    return _listed(words[site.split()[0]] for site in sites.split(", ")) if sites != "-" else "-"


def families() -> str:
    """The adapters with the checkpoints whose shapes are known, and the table of what runs where."""
    rows = []
    for family, target in ADAPTERS.items():
        module = target.partition(":")[0]
        file = f"{module.replace('.', '/')}.py"
        known = [f"`{name}`" for name, parts in PUBLISHED.items() if parts["model_type"] == family]
        rows.append([f"`{family}`", _escaped(summary(ROOT / file)), _listed(known), f"`{file}`"])
    table = _table(("`model_type`", "what it is", "shapes known to `stts plan`", "file"), rows)
    return f"{table}\n\n## What runs where\n\n{MATRIX.read_text(encoding='utf-8').strip()}"


def code_map() -> str:
    """Every file of the code with the first sentence that it says of itself."""
    parts = []
    for top in ("stts", "train", "scripts", "configs"):
        rows = [[f"`{path.relative_to(ROOT)}`", _escaped(summary(path))] for path in described_files(ROOT / top)]
        parts.append(f"## {top}/\n\n{_table(('file', 'what it holds'), rows)}")
    return "\n\n".join(parts)


def described_files(top: Path) -> list[Path]:
    """The files under `top` that have a place for a comment and are not empty; a folder stands for the other ones."""
    files = sorted(path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    speaking = {path for path in files if path.suffix in _COMMENTS and path.stat().st_size}
    silent = {path.parent for path in files if path.suffix not in _COMMENTS}
    return sorted(speaking | silent, key=lambda path: (path.parent if path.is_file() else path, path))


def summary(path: Path) -> str:
    """First sentence of a module's docstring, of the first comment of another file, or of a folder's README."""
    if path.is_dir():
        name, readme = path.relative_to(ROOT).as_posix(), path / "README.md"
        if name not in _FOLDERS and not readme.is_file():
            raise ValueError(f"{name} holds files without a comment; write a README.md there that says what they are")
        return _FOLDERS.get(name) or readme.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
    text = path.read_text(encoding="utf-8")
    said = ast.get_docstring(ast.parse(text)) if path.suffix == ".py" else _first_comment(path.suffix, text)
    if not said:
        raise ValueError(f"{path.relative_to(ROOT)} does not say what it holds; begin it with a docstring or comment")
    paragraph = " ".join(said.split("\n\n")[0].split())
    return re.split(r"(?<=[.?!])\s+(?=[A-Z`(])|: *$", paragraph, maxsplit=1)[0]


_COMMENTS = {
    ".py": "", ".sh": r"(?:#(?!!|\s*shellcheck) ?.*\n)+", ".yaml": r"(?:# ?.*\n)+", ".js": r"(?:// ?.*\n)+",
    ".css": r"/\*.*?\*/", ".html": r"<!--.*?-->",
}  # fmt: skip


def _first_comment(suffix: str, text: str) -> str:
    found = re.search(_COMMENTS[suffix], text, re.DOTALL if suffix in (".css", ".html") else 0)
    if found is None:
        return ""
    if suffix in (".css", ".html"):
        return found[0].strip("/*<!-> ")
    return "\n".join(line.lstrip("#/").strip(" -") for line in found[0].splitlines())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _listed(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words)) or "-"


def _slug(name: str) -> str:
    """As GitHub and MkDocs name a heading."""
    return re.sub(r"[^\w-]", "", name.lower())


def _escaped(text: str) -> str:
    """Safe in a cell; what stands in backticks stays as it is."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(part if part.startswith("`") else re.sub(r"([<*_\[\]])", r"\\\1", part) for part in parts)


if __name__ == "__main__":
    sys.exit(main())
