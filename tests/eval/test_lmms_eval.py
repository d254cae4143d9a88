"""Our model inside the real lmms-eval, in an environment that the script makes; both frameworks must agree."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VENV = ROOT / ".venv-lmms-eval"
INSIDE = """import stts
from types import SimpleNamespace as Part
from lmms_eval.models import get_model, list_available_models
from stts.eval.lmms_eval import STTS, cut, generation, _piece
assert "stts" in list_available_models() and get_model("stts") is STTS and not STTS.is_simple
assert generation({}) == {"max_new_tokens": 1024}
assert generation({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1}) == {
    "max_new_tokens": 16, "num_beams": 1}
assert generation({"temperature": 0.5})["do_sample"] is True
assert cut(" B. yes\\n\\nBecause", ["\\n\\n"]) == "B. yes" and cut("a ", None) == "a"
assert _piece(Part(type="video", url={"url": "a.mp4", "video_start": 2, "video_end": 5}), "u").clip == (2.0, 5.0)
assert _piece(Part(type="video", url="a.mp4", start_time=None, end_time=None), "u").clip is None
try:
    _piece(Part(type="audio", url="a.wav"), "u")
except ValueError as error:
    assert "brings audio" in str(error)
else:
    raise AssertionError("audio was taken")
"""


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PYTHONPATH")}
    return subprocess.run(command, env={**kept, **environment}, capture_output=True, text=True, timeout=900)


def samples(out: Path) -> list[dict[str, Any]]:
    [path] = (out / "lmms-eval").rglob("*_samples_shapesqa.jsonl")
    return sorted(map(json.loads, path.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])


@pytest.mark.slow
def test_lmms_eval_gets_the_same_answers_and_accuracy(tmp_path: Path) -> None:
    """Skips where lmms-eval cannot be installed, and only there. One test: installing twice at once would clash."""
    made = tmp_path / "with space"
    done = run("bash", ROOT / "scripts" / "lmms_eval.sh", STTS_LMMS_OUT=str(made))
    if done.returncode and not (VENV / "installed-lmms-eval").is_file():
        pytest.skip(f"lmms-eval cannot be installed here: {' '.join(done.stderr.splitlines()[-3:])}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "18 of 18 answers are the same" in done.stdout

    ours = json.loads((made / "compare" / "comparison.json").read_text(encoding="utf-8"))
    cell = "tango@0.25"
    said = [row["outcomes"][cell]["prediction"] for row in ours["records"]]
    theirs = samples(made)
    assert [row["filtered_resps"] for row in theirs] == said and len(set(said)) > 3
    assert [row["target"] for row in theirs] == [row["answer"] for row in ours["records"]]
    [path] = (made / "lmms-eval").rglob("*_results.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    [row] = [row for row in ours["rows"] if row["method"] == "tango"]
    assert results["results"]["shapesqa"]["exact_match,none"] == pytest.approx(row["accuracy"])
    assert results["throughput"]["avg_retention_measured"] == pytest.approx(0.25)
    assert results["config"]["model"] == "stts" and "pruner=tango" in results["config"]["model_args"]

    inside = run(VENV / "bin" / "python", "-c", INSIDE)
    assert inside.returncode == 0, inside.stderr
