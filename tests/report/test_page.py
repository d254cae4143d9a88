"""`stts report`: what the page holds, and that it can load nothing."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stts.cli import main as stts
from stts.eval.answering.cell import Cell
from stts.eval.answering.kept_tokens import read_kept
from stts.eval.benchmarks.tomato import KINDS
from stts.eval.results.result import ComparisonResult
from stts.report.page import render_page
from stts.report.run_data import Pictures, first_of_cells, headline, kept_data, ranks, run_data
from stts.tokens import Grid
from tests.eval.made_up import FULL, result_with
from tests.report.conftest import FRAMES, SHOWN


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside in self.texts:
            self.texts[self._inside].append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def data_in(page: str) -> Any:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def mask_of(sample: dict[str, Any], key: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(sample["kept"][key]["mask"]), np.uint8)


def test_the_page_holds_the_table_the_samples_and_what_was_kept(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stts(["report", str(compared), "--out", str(tmp_path / "deep" / "r.html"), "--samples", "5"]) == 0
    assert "wrote" in capsys.readouterr().out
    [run] = data_in((tmp_path / "deep" / "r.html").read_text())["runs"]
    result = ComparisonResult.from_json(json.loads((compared / "comparison.json").read_text()))
    assert [(row["method"], row["accuracy"], row["reason"]) for row in run["rows"]] == [
        (row.method, row.accuracy, row.reason) for row in result.rows
    ]
    assert [cell["key"] for cell in run["cells"]] == [c.key for c in result.cells if c.reason is None]
    assert len(run["samples"]) == 5 and run["num_samples"] == 6
    kept = read_kept(compared, {record.uid for record in result.records})
    for sample, record in zip(run["samples"], result.records, strict=False):
        assert (sample["uid"], sample["question"], sample["answer"]) == (record.uid, record.question, record.answer)
        assert {k: one["said"] for k, one in sample["outcomes"].items()} == {
            k: one.prediction for k, one in record.outcomes.items()
        }
        if record.uid in kept:
            for key, index in kept[record.uid].index.items():
                assert mask_of(sample, key).nonzero()[0].tolist() == index.tolist()
            assert "scores" in sample["kept"]["novelty@0.5"]
    assert [bool(sample["kept"]) for sample in run["samples"]] == [True] * SHOWN + [False]


def test_frames_are_embedded_once_per_video_and_are_those_of_the_comparison(compared: Path, clips: Path) -> None:
    run = run_data(compared, 6)
    assert [sample["frames"] for sample in run["samples"]] == [0, 0, 0, 1, 1, 1], "three questions share a clip"
    assert [len(frames) for frames in run["frames"]] == [FRAMES, FRAMES]
    head, _, body = run["frames"][0][0].partition(",")
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(body))), np.float64)
    from stts.data.video.sample import sample_frames

    true = sample_frames(clips / "test" / "test-000000.mp4", num_frames=FRAMES).frames[0]
    assert head == "data:image/jpeg;base64" and shown.shape == true.shape and np.abs(shown - true).mean() < 6


def test_the_headline_sets_the_best_pruned_row_beside_the_best_dense_one() -> None:
    cells = [Cell("dense"), Cell("novelty", 0.5, kind="before the LLM")]
    assert headline(result_with(cells).rows) == (
        "novelty keeps 50% of the tokens, 75% of the FLOPs: 91.7 % right, 8.3 below dense."
    )
    learned = Cell("stts", 0.25, kind="learned")
    assert headline(result_with([*cells, learned]).rows).startswith("stts keeps 25% of the tokens, 62% of the FLOPs")
    assert headline(result_with(cells[:1]).rows) == ""


def test_frames_are_found_from_another_folder(
    compared: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A comparison started in the folder of its data names it by a relative path."""
    run = tmp_path / "work" / "runs" / "compare"
    shutil.copytree(compared, run)
    shutil.copytree(clips, tmp_path / "work" / "clips")
    file = run / "comparison.json"
    content = json.loads(file.read_text())
    content["config"]["data"] = "clips/test.jsonl"
    file.write_text(json.dumps(content))
    monkeypatch.chdir(tmp_path)
    assert len(run_data(Path("work/runs/compare"), 1)["frames"]) == 1


def test_frames_of_a_benchmark_come_from_its_own_folder(clips: Path, tmp_path: Path) -> None:
    rows = {"0": {"question": "a ?", "options": ["x", "y"], "answer": 0, "key": "k", "demonstration_type": "object",
                  "motion_type": "m"}}  # fmt: skip
    (tmp_path / "data").mkdir()
    (tmp_path / "videos" / "object").mkdir(parents=True)
    for kind in KINDS:
        (tmp_path / "data" / f"{kind}.json").write_text(json.dumps(rows if kind == "count" else {}))
    shutil.copy(clips / "test" / "test-000000.mp4", tmp_path / "videos" / "object" / "k.mp4")
    pictures = Pictures({"tasks": ["tomato"], "data_root": str(tmp_path), "num_frames": 3, "sampler": None})
    assert pictures.of("count/0", 3) == (0, "") and len(pictures.encoded[0]) == 3
    assert "no longer" in pictures.of("count/1", 3)[1]


def test_without_the_videos_the_grid_alone_is_shown_and_the_reason_told(compared: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(compared, moved)
    made = json.loads((moved / "comparison.json").read_text())
    made["config"]["data"] = str(tmp_path / "gone.jsonl")
    (moved / "comparison.json").write_text(json.dumps(made))
    run = run_data(moved, 6)
    assert run["frames"] == [] and {sample["frames"] for sample in run["samples"]} == {None}
    assert "gone.jsonl" in run["samples"][0]["missing"]
    assert mask_of(run["samples"][0], "novelty@0.5").sum() == FRAMES * 16 // 2


def test_nothing_is_loaded_and_the_policy_names_exactly_this_style_and_script(compared: Path) -> None:
    page = render_page("a", [run_data(compared, 6)])
    elements = Elements(page)
    for tag, attributes in elements.tags:
        assert not {"src", "href", "action", "srcset"} & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes), "the policy forbids it"
    _, script = elements.texts["script"]
    [style] = elements.texts["style"]
    assert (
        "url(" not in style
        and "@import" not in style
        and "fetch(" not in script
        and "http" not in script.replace("http://www.w3.org/2000/svg", "")
    )
    [policy] = [given["content"] for tag, given in elements.tags if given.get("http-equiv")]
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    for text in (style, script):
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_every_label_and_region_points_at_something(compared: Path) -> None:
    tags = Elements(render_page("a", [run_data(compared, 1)])).tags
    ids = [given["id"] for _, given in tags if "id" in given]
    assert len(ids) == len(set(ids))
    pointed = [given[name] for _, given in tags for name in ("aria-labelledby", "for") if name in given]
    assert pointed and set(pointed) <= set(ids)


def test_text_from_models_and_data_cannot_leave_its_place() -> None:
    evil = "</script><script>alert(1)</script><!--@@DATA@@"
    run = {"name": evil, "rows": [], "samples": []}
    page = render_page(evil, [run])
    assert data_in(page)["runs"] == [run]
    assert page.count("<script") == 2 and "alert(1)</script>" not in page.replace("&lt;/script&gt;", "")


def test_several_numbers_of_frames_report_beside_one(compared: Path, tmp_path: Path) -> None:
    cells = [Cell("dense", num_frames=4), Cell("dense", point=1, num_frames=8)]
    made = result_with(cells, config={"num_frames": [4, 8], "name": "long", "budget": 9, "data": "gone"}).to_json()
    (tmp_path / "comparison.json").write_text(json.dumps(made))
    assert stts(["report", str(compared), str(tmp_path), "--out", str(tmp_path / "r.html"), "--samples", "1"]) == 0
    first, second = data_in((tmp_path / "r.html").read_text())["runs"]
    assert (first["points"], second["points"], second["budget"]) == (False, True, True)
    assert [row["num_frames"] for row in second["rows"]] == [4, 8] and second["samples"] == second["cells"] == []
    assert second["summary"].startswith("long: 12 questions on 4 videos, 4, 8 frames")


def test_several_comparisons_share_a_page_and_a_folder_without_one_is_refused(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.html"
    assert stts(["report", str(compared), str(compared), "--out", str(out), "--samples", "1"]) == 0
    assert len(data_in(out.read_text())["runs"]) == 2
    assert stts(["report", str(tmp_path), "--out", str(out)]) == 2
    assert "holds no comparison.json" in capsys.readouterr().err
    assert stts(["report", str(compared), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert stts(["report", str(compared), "--samples", "-1"]) == 2


def test_a_comparison_from_before_kept_tokens_still_reports(tmp_path: Path) -> None:
    made = result_with(FULL, config={"data": str(tmp_path / "gone.jsonl")}).to_json()
    for record in made["records"]:
        del record["question"]
    (tmp_path / "comparison.json").write_text(json.dumps(made))
    run = run_data(tmp_path, 2)
    assert [row["reason"] for row in run["rows"]][-1] == "too low for layer 2" and len(run["cells"]) == len(FULL) - 1
    assert run["samples"][0]["kept"] == {} and run["samples"][0]["question"] == ""


def test_scores_are_shown_by_rank_also_where_some_are_infinite() -> None:
    scores = torch.tensor([0.5, float("inf"), -2.0, 0.5])
    assert ranks(scores.numpy()).tolist() == [128, 255, 1, 128]
    assert ranks(np.zeros(3, np.float32)).tolist() == [1, 1, 1]
    assert ranks(np.array([np.nan, 2.0, 5.0], np.float32)).tolist() == [0, 1, 255], "0: gone before it was scored"
    made = kept_data(Grid(2, 1, 2), [0.0, 0.5], {"a@0.5": torch.tensor([1, 2])}, {})
    assert made["grid"] == [2, 1, 2] and list(made["kept"]["a@0.5"]) == ["mask"]
    assert base64.b64decode(made["kept"]["a@0.5"]["mask"]) == bytes([0, 1, 1, 0])


def test_a_cell_of_two_frames_shows_the_first() -> None:
    frames = np.arange(5, dtype=np.uint8)[:, None, None, None]
    assert first_of_cells(frames, 3).flatten().tolist() == [0, 2, 4]
    assert first_of_cells(frames, 5).flatten().tolist() == [0, 1, 2, 3, 4]
    assert first_of_cells(frames[:1], 1).flatten().tolist() == [0]
