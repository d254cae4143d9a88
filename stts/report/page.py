"""`stts report`: runs as one HTML file that needs nothing else, neither network nor server."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stts.files import write_whole
from stts.report.run_data import run_data

_ASSETS = Path(__file__).parents[1] / "assets" / "report"
_SCRIPTS = ("base.js", "table.js", "plots.js", "samples.js")
"""One script in this order: the last one starts it."""


def render_page(title: str, runs: Sequence[dict[str, Any]]) -> str:
    """The page. Style, script and data stand inside; its policy forbids it to load anything."""
    style = (_ASSETS / "page.css").read_text(encoding="utf-8")
    script = "\n".join((_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    # `<` is written as an escape, so that no text in the data can end the element it stands in
    data = json.dumps({"title": title, "runs": runs}, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    policy = f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    page = (_ASSETS / "page.html").read_text(encoding="utf-8")
    parts = {"TITLE": html.escape(title), "POLICY": policy, "STYLE": style, "SCRIPT": script, "DATA": data}
    pieces = page.split("@@")  # text, name, text, name, ..., text: what is put in is not searched again
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def report(*runs: Path, out: Path = Path("report.html"), samples: int = 60) -> str:
    """Write runs as one HTML page: table, plots, times, and samples with the tokens every method kept.

    Kept tokens are shown for samples that `stts compare --save_kept N` wrote.

    Args:
        runs: --out folder of `stts compare` or `stts scale`, one or more.
        out: the file.
        samples: how many samples to show of each run.
    """
    write_report(runs, out, num_samples=samples)
    return f"wrote {out} ({out.stat().st_size / 2**20:.1f} MiB)"


def write_report(runs: Sequence[Path], out: Path, *, num_samples: int) -> Path:
    """Write the report of one or more finished runs; whole or not at all."""
    if num_samples < 0:
        raise ValueError(f"--samples {num_samples} must be 0 or more")
    data = [run_data(run, num_samples) for run in runs]
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it, such as {out / 'report.html'}")
    return write_whole(out, render_page(", ".join(dict.fromkeys(run["name"] for run in data)), data))
