"""The one-way order of the rooms, read from the import statements. Imports inside functions count too."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

# A room imports from itself and from rooms to its left. `stts` is the facade `stts/__init__.py`.
LOWEST = ["files", "progress", "command_line", "tokens", "budget"]
LIBRARY = [*LOWEST, "packing", "data", "metrics", "pruners", "models", "stts", "eval", "report"]
ORDER = [*LIBRARY, "doctor", "train", "cli"]
# Rooms inside a room, in their order: `models/pruning` imports from `models/families`, never the other way round.
INSIDE = {
    "models": ["families", "pruning", "checkpoints"],
    "eval": ["benchmarks", "answering", "results"],
}
FORBIDDEN_IN_LIBRARY = {"lightning", "pytorch_lightning", "deepspeed", "wandb"}
# Files of these rooms stand alone: each may import the shared parts, and only the doors may import everything.
SHARED = {
    "pruners": {
        "base",
        "density",
        "frames",
        "ops",
        "scorer",
        "simple",
        "st_rope",
        "tango_pools",
        "teacher",
        "temporal",
    },
    "models/families": {"base", "visual", "attention", "qwen_vl", "llava_layout"},
}
DOORS = {
    "pruners": {"__init__", "registry", "listing", "chain"},
    "models/families": {"__init__"},
}


def imported_modules(path: Path, package: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(line, dotted name in parts) of every import; `from a import b` gives a.b, which may be a name inside a."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = above + (node.module.split(".") if node.module else [])
            yield from ((node.lineno, [*base, alias.name]) for alias in node.names)


def room_of(module: list[str]) -> str | None:
    """The room of one of our modules, None for other libraries and for `stts._compat` and `stts.__version__`."""
    if module[0] in ("stts_train", "train"):
        return "train"
    if module[0] != "stts":
        return None
    if len(module) == 1 or module[1] not in ORDER:
        return None if len(module) > 1 and module[1].startswith("_") and module[1] != "__init__" else "stts"
    return module[1]


def offences(root: Path) -> list[str]:
    """`path:line: reason` for every import in stts/ and train/ that breaks a rule."""
    found = []
    for path in sorted([*root.glob("stts/**/*.py"), *root.glob("train/**/*.py")]):
        here = list(path.relative_to(root).with_suffix("").parts)
        room = room_of(here)
        for line, module in imported_modules(path, here[:-1]):
            reason = offence(here, room, module, room_of(module))
            if reason:
                found.append(f"{path.relative_to(root).as_posix()}:{line}: {reason}")
    return found


def offence(here: list[str], room: str | None, module: list[str], target: str | None) -> str | None:
    if here[0] == "stts" and module[0] in FORBIDDEN_IN_LIBRARY:
        return f"the library must run without {module[0]}; move this to train/"
    if target is None:
        return None
    if room is None or ORDER.index(target) > ORDER.index(room):
        return f"{room or here[-1]} imports {'.'.join(module)}, but {target} lies to its right"
    if room == target and room in INSIDE:
        order = INSIDE[room]
        mine, theirs = (order.index(name) if name in order else len(order) for name in (here[2], [*module, ""][2]))
        if theirs > mine:
            return f"{room}/{here[2]} imports {'.'.join(module)}, which lies to its right inside {room}"
    inner = "/".join(here[1:-1])
    alone = inner in SHARED and module[1 : len(here) - 1] == here[1:-1] and len(module) >= len(here)
    if alone and here[-1] not in DOORS[inner] and module[len(here) - 1] not in {here[-1], *SHARED[inner]}:
        return f"{here[-1]} imports its neighbour {'.'.join(module)}; move what they share to {sorted(SHARED[inner])}"
    return None


def circles(root: Path) -> list[str]:
    """Groups of modules that import each other, `a -> b -> a`; imports inside functions count too."""
    files = {module_name(path, root): path for path in [*root.glob("stts/**/*.py"), *root.glob("train/**/*.py")]}
    edges: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        targets = set()
        for _, module in imported_modules(path, package):
            parts = ["stts_train", *module[1:]] if module[0] == "train" else module
            whole, above = ".".join(parts), ".".join(parts[:-1])
            targets |= {whole if whole in files else above} & files.keys()
        edges[name] = targets - {name}
    found = []
    for start in sorted(edges):
        path_to = {start: [start]}
        queue = [start]
        while queue:
            here = queue.pop(0)
            for target in sorted(edges[here]):
                if target == start and start == min(path_to[here]):
                    found.append(" -> ".join([*path_to[here], start]))
                if target not in path_to:
                    path_to[target] = [*path_to[here], target]
                    queue.append(target)
    return found


def module_name(path: Path, root: Path) -> str:
    parts = list(path.relative_to(root).with_suffix("").parts)
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(["stts_train", *parts[1:]] if parts[0] == "train" else parts)


def test_no_module_imports_itself_by_way_of_another() -> None:
    found = circles(REPOSITORY)
    assert not found, "\n" + "\n".join(found)


def test_a_circle_is_named(tmp_path: Path) -> None:
    for name, code in (("a", "from stts.b import x"), ("b", "def late():\n    import stts.c"), ("c", "import stts.a")):
        (tmp_path / "stts").mkdir(exist_ok=True)
        (tmp_path / "stts" / f"{name}.py").write_text(code)
    assert circles(tmp_path) == ["stts.a -> stts.b -> stts.c -> stts.a"]


def test_imports_go_one_way() -> None:
    found = offences(REPOSITORY)
    assert not found, "\n" + "\n".join(found)


def test_every_room_is_in_the_order() -> None:
    rooms = {path.stem if path.suffix else path.name for path in (REPOSITORY / "stts").iterdir()}
    assert {room for room in rooms if not room.startswith(("_", "."))} - {"assets"} <= set(ORDER)


@pytest.mark.parametrize(
    ("file", "code", "reason"),
    [
        ("stts/tokens.py", "from stts.packing.segments import Segments", "packing lies to its right"),
        ("stts/packing/pack.py", "import stts.models.pruning.tower", "models lies to its right"),
        ("stts/packing/pack.py", "from stts import data", "data lies to its right"),
        ("stts/packing/pack.py", "from ..pruners import base", "pruners lies to its right"),
        ("stts/data/video/sample.py", "def late():\n    from stts.eval import compare", "eval lies to its right"),
        ("stts/models/pruning/tower.py", "from stts import pruning", "stts lies to its right"),
        ("stts/eval/compare.py", "import stts_train.module", "train lies to its right"),
        ("stts/_compat.py", "import stts.tokens", "tokens lies to its right"),
        ("stts/cli.py", "def fit():\n    import lightning.pytorch", "without lightning"),
        ("stts/eval/compare.py", "import wandb", "without wandb"),
        ("stts/pruners/tango.py", "from stts.pruners.visionzip import VisionZip", "imports its neighbour"),
        ("stts/pruners/ops.py", "from .novelty import Novelty", "imports its neighbour"),
        ("stts/models/families/qwen3_vl.py", "from stts.models.families import molmo2", "imports its neighbour"),
        ("stts/models/families/base.py", "from stts.models.pruning import tower", "right inside models"),
        ("stts/eval/answering/loop.py", "from stts.eval.results import table", "right inside eval"),
    ],
)
def test_a_wrong_import_is_reported_with_its_line(tmp_path: Path, file: str, code: str, reason: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text("# one line above\n" + code + "\n")
    [found] = offences(tmp_path)
    assert found.startswith(f"{file}:{2 + code.count(chr(10))}: ") and reason in found


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("stts/budget.py", "from stts.tokens import Grid"),
        ("stts/packing/pack.py", "import stts._compat\nimport torch\nfrom stts.packing import segments"),
        (
            "stts/models/checkpoints/load.py",
            "from stts import __version__\nfrom stts.models.families.base import Host",
        ),
        ("stts/__init__.py", "import stts._compat\nfrom stts.models.pruning import pruning"),
        ("stts/eval/compare.py", "import stts\nfrom stts import pruning"),
        ("stts/pruners/registry.py", "from stts.pruners.chain import Chain\nfrom stts.pruners import novelty"),
        ("stts/pruners/stts.py", "from .scorer import Scorer\nfrom stts.pruners.temporal import temporal_loss"),
        (
            "stts/models/families/molmo2.py",
            "from .base import Host\nfrom stts.pruners.base import Pruner",
        ),
        ("stts/cli.py", "def fit():\n    from stts_train.cli import main"),
        ("train/module.py", "import lightning\nimport stts\nfrom stts_train.callbacks import Progress"),
    ],
)
def test_a_right_import_is_let_through(tmp_path: Path, file: str, code: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(code + "\n")
    assert offences(tmp_path) == []


@pytest.mark.parametrize(
    "path", [*REPOSITORY.glob("stts/**/*.py"), *REPOSITORY.glob("train/*.py")], ids=lambda p: p.name
)
def test_what_transformers_5_17_lacks_is_imported_where_it_is_used(path: Path) -> None:
    """Molmo2 came later; `stts fit` of another family must not need it."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers"):
            assert not [alias.name for alias in node.names if "molmo2" in f"{node.module}.{alias.name}".lower()]


FAMILY_NAMES = re.compile("molmo|qwen|llava", re.IGNORECASE)
FAMILY_ROOMS = (
    "stts/models/families/", "stts/data/processors.py", "stts/models/checkpoints/llava_video.py", "stts/pruners/",
    "stts/eval/benchmarks/", "stts/assets/",
)  # fmt: skip
# Words with a family's name in them that name something else: a data set, a suite, a release, another project's grader.
NOT_A_FAMILY = {
    "train/publish.py": "from_llava_video|checkpoints.llava_video|convert_llava_video|LLaVA-Video",  # a verb's option
    "stts/data/rows.py": "LLaVA-Video-178K",
    "stts/data/video/samplers.py": "LLaVA-Video loader",
    "stts/eval/run_config.py": "molmo2_13",
    "stts/metrics/extract.py": "Molmo2",
    "stts/models/checkpoints/load.py": "from_llava_video|llava_qwen|LLaVA-Video's original files",
    "stts/models/checkpoints/shapes_vlm.py": "LLaVA-OneVision|LlavaOnevision|qwen2",  # the class it writes
    "stts/models/checkpoints/stts_release.py": "allenai/molmo2",
}


def family_names(root: Path) -> list[str]:
    """`path:line: text` of every line outside the rooms of families that names one."""
    found = []
    for path in sorted([*root.glob("stts/**/*.py"), *root.glob("train/**/*.py")]):
        name = path.relative_to(root).as_posix()
        if name.startswith(FAMILY_ROOMS):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            rest = re.sub(NOT_A_FAMILY[name], "", line) if name in NOT_A_FAMILY else line
            if FAMILY_NAMES.search(rest):
                found.append(f"{name}:{number}: {line.strip()}")
    return found


def test_what_is_known_of_a_family_is_in_its_adapter() -> None:
    found = family_names(REPOSITORY)
    assert not found, "move this to a member of the adapter, or to stts/data/processors.py:\n" + "\n".join(found)


def test_a_line_that_names_a_family_is_reported(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "plan.py").write_text('marks = 7\nif family == "molmo2":\n    marks = 10\n')
    (tmp_path / "stts" / "pruners").mkdir(parents=True)
    (tmp_path / "stts" / "pruners" / "tango.py").write_text("# the release's Qwen branch\n")
    assert family_names(tmp_path) == ['train/plan.py:2: if family == "molmo2":']


def test_reports_and_clips_are_made_without_transformers() -> None:
    """Importing its models takes seconds of every command that needs none."""
    code = "import sys, stts.report.page, stts.data.shapes.files; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
