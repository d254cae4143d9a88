"""`stts scale` end to end: a tiny stock model, real MP4 files, every mode."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stts.cli import main
from stts.data.shapes.files import write_shapes
from stts.eval import compare
from stts.eval.answering import points
from stts.eval.answering.method import Runner
from stts.eval.answering.points import at_point, candidates, option_ids
from stts.eval.benchmarks.base import Question
from stts.eval.compare import FILES, CompareConfig, run_compare
from stts.eval.results.result import ComparisonResult
from stts.eval.results.summary import Row
from stts.eval.results.table import render_text
from stts.eval.scale import ScaleConfig, run_scale
from stts.models.checkpoints.load import load_vlm

CLIPS, FRAMES, CELLS = 2, 4, 16  # 7 x 7 patches are pooled to 4 x 4 tokens a frame


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_shapes(tmp_path_factory.mktemp("shapes"), sizes={"test": CLIPS}, progress=False)
    return folder / "test.jsonl"


@pytest.fixture
def config(tiny_folder: Path, data: Path, tmp_path: Path) -> ScaleConfig:
    return ScaleConfig(
        model=tiny_folder,
        data=data,
        out=tmp_path / "out",
        pruners=("uniform",),
        retention_ratios=(0.5,),
        multiples=(1, 2),
        num_frames=FRAMES,
        max_new_tokens=1,
    )


def run(config: ScaleConfig, **changes: Any) -> ComparisonResult:
    result = run_scale(replace(config, **changes), progress=False)
    assert result is not None
    return result


def row_of(result: ComparisonResult, frames: int, method: str) -> Row:
    [row] = [row for row in result.rows if (row.num_frames, row.method) == (frames, method)]
    return row


def test_frames_times_ratios(config: ScaleConfig) -> None:
    result = run(config)
    tokens = {(row.num_frames, row.method): row.tokens for row in result.rows}
    assert tokens == {
        (4, "dense"): 4 * CELLS, (4, "uniform"): 2 * CELLS, (8, "dense"): 8 * CELLS, (8, "uniform"): 4 * CELLS,
    }  # fmt: skip
    assert {(row.num_samples, row.num_videos) for row in result.rows} == {(3 * CLIPS, CLIPS)}
    dense, more = row_of(result, 4, "dense"), row_of(result, 8, "uniform")
    assert dense.difference is None and more.difference is not None and dense.accuracy is not None
    assert more.difference == pytest.approx((more.accuracy or 0) - dense.accuracy)
    assert more.flops["exact"]["vit"] == 2 * dense.flops["exact"]["vit"], "equal tokens, but the tower sees all"
    assert more.flops["exact"]["share"] == more.flops["exact"]["total"] / dense.flops["exact"]["total"]
    assert sorted(file.name for file in config.out.iterdir()) == sorted(("answers.jsonl", *FILES))
    assert (config.out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    with (config.out / "comparison.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [float(row["tokens"]) for row in found] == [row.tokens for row in result.rows]
    assert ComparisonResult.from_json(json.loads((config.out / "comparison.json").read_text())) == result
    text = render_text(result)
    assert "vs first dense" in text and "on 2 videos, 4, 8 frames" in text


def test_the_verb_is_the_short_way_to_say_a_comparison(config: ScaleConfig, tmp_path: Path) -> None:
    result = run(config, multiples=(1, 2))
    same = CompareConfig(
        model=config.model, data=config.data, out=tmp_path / "same", pruners=("uniform",), retention_ratios=(0.5,),
        num_frames=(4, 8), max_new_tokens=1, batch_size=1,
    )  # fmt: skip
    compared = run_compare(same, progress=False)
    assert compared is not None and compared.records == result.records and compared.cells == result.cells
    alone = run_compare(replace(same, num_frames=8, out=tmp_path / "alone"), progress=False)
    assert alone is not None
    for record, one in zip(alone.records, result.records, strict=True):
        assert record.outcomes["dense"] == one.outcomes["dense at 8 frames"], "a point is the run at its frames"
        assert record.outcomes["uniform@0.5"] == one.outcomes["uniform@0.5 at 8 frames"]


def test_a_budget_is_kept_at_every_number_of_frames(config: ScaleConfig) -> None:
    """The default budget is that of num_frames frames dense."""
    result = run(config, mode="budget", multiples=(1, 2, 3))
    assert [row_of(result, frames, "uniform").tokens for frames in (4, 8, 12)] == [4 * CELLS] * 3
    assert [row_of(result, frames, "uniform").retention_measured for frames in (4, 8)] == [1.0, 0.5]
    small = run(config, mode="budget", budget=20, out=config.out.with_name("small"))
    assert [row_of(small, frames, "uniform").tokens for frames in (4, 8)] == [20, 20]


def test_parts_in_passes_and_in_one_packed_row_say_the_same(
    config: ScaleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    logprobs: dict[str, list[Any]] = {"parallel": [], "packed": []}
    join = points._put_together
    for mode in logprobs:

        def noted(asked: Any, parts: Any, vote: Any, mode: str = mode) -> Any:
            logprobs[mode].append([part.option_logprobs for part in parts])
            return join(asked, parts, vote)

        monkeypatch.setattr(points, "_put_together", noted)
        result = run(config, mode=mode, out=config.out.with_name(mode))
        row = row_of(result, 8, "uniform")
        assert row.parts == 2 and row.tokens == 2 * 2 * CELLS, "costs of a question are sums over its parts"
        assert row.flops["exact"]["total"] == 2 * row_of(result, 4, "uniform").flops["exact"]["total"]
        assert "2 x 4" in render_text(result)
    for one, other in zip(logprobs["parallel"], logprobs["packed"], strict=True):
        for left, right in zip(one, other, strict=True):
            torch.testing.assert_close(torch.tensor(left), torch.tensor(right), atol=1e-5, rtol=1e-5)


def test_every_part_shows_its_own_frames(config: ScaleConfig) -> None:
    tasks = config.open_tasks()
    plain = config.make_source(tasks, 8)
    whole, parts = (at_point(plain, 8, number, prefix="8f/") for number in (1, 2))
    assert whole.keys[0] == "8f/" + tasks[0].questions[0].uid
    assert parts.keys[:2] == [f"{whole.keys[0]}#0", f"{whole.keys[0]}#1"]
    first, second, every = parts[0], parts[1], whole[0]
    assert (every.frames[0::2] == first.frames).all() and (every.frames[1::2] == second.frames).all()  # type: ignore[union-attr,index]
    assert first.timestamps_s.tolist() == every.timestamps_s[0::2].tolist()  # type: ignore[union-attr,index]


def test_what_is_longer_than_the_context_is_refused_or_left_out_but_never_cut(
    config: ScaleConfig, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = shutil.copytree(tiny_folder, tmp_path / "short")
    settings = json.loads((short / "config.json").read_text())
    settings["text_config"]["max_position_embeddings"] = 100  # 4 frames take 64 visual tokens, 8 frames 128
    (short / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"dense at 8 frames .* was made for 100; nothing is ever cut"):
        run(config, model=short)
    assert not config.out.exists(), "found before anything ran"
    result = run(config, model=short, on_overflow="skip")
    assert row_of(result, 8, "dense").reason is not None and row_of(result, 4, "dense").accuracy is not None
    assert row_of(result, 8, "uniform").tokens == 64
    assert "needs a context of" in render_text(result)


def test_a_killed_run_goes_on_where_it_stopped(config: ScaleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    add, count = compare.Store.add, 0

    def stop_later(self: Any, *args: Any) -> None:
        nonlocal count
        count += 1
        if count == 8:  # in the second point
            raise Killed
        add(self, *args)

    whole = run(config, out=config.out.with_name("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(compare.Store, "add", stop_later)
        with pytest.raises(Killed):
            run(config)
    asked: list[int] = []
    answer = Runner.answer
    monkeypatch.setattr(Runner, "answer", lambda self, batch, *a: (asked.append(1), answer(self, batch, *a))[1])
    again = run(config)
    assert len(asked) == 2 * (2 * 3 * CLIPS - 7)
    assert again.records == whole.records and again.cells == whole.cells
    asked.clear()
    run(config)
    assert not asked, "a finished run is read"


def test_the_tower_in_pieces_says_the_same(config: ScaleConfig) -> None:
    whole = run(config, pruners=("uniform", "heuristic"))
    pieces = run(config, pruners=("uniform", "heuristic"), chunk_frames=3, out=config.out.with_name("pieces"))
    assert row_of(pieces, 8, "uniform").accuracy == row_of(whole, 8, "uniform").accuracy
    assert "needs all frames of a video at once" in (row_of(pieces, 8, "heuristic").reason or "")


def test_what_an_answer_may_be(tiny_folder: Path) -> None:
    def question(answer: str | None, *options: str) -> Question:
        return Question(
            task="t", doc_id=0, uid="u", video=Path("v"), question="?", options=tuple(options), answer=answer
        )

    assert candidates(question("red", "red", "blue")) == ("red", "blue")
    assert candidates(question("B", "red", "blue")) == candidates(question(None, "red", "blue")) == ("A", "B")
    with pytest.raises(ValueError, match="no options"):
        candidates(question("red"))
    _, processor = load_vlm(tiny_folder)
    ids = option_ids(processor, ("red", "blue"))
    assert ids == [processor.tokenizer(word)["input_ids"][0] for word in ("red", "blue")]
    with pytest.raises(ValueError, match="first token"):
        option_ids(processor, ("red circle", "red square"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "more"}, "--mode"),
        ({"multiples": (2, 1)}, "increasing"),
        ({"multiples": (0,)}, "from 1 on"),
        ({"budget": 5}, "goes with --mode budget"),
        ({"parts": (2,)}, "--parts and --packed follow from --mode"),
        ({"mode": "packed", "chunk_frames": 8}, "use --mode parallel"),
        ({"retention_ratios": (2.0,)}, "--retention_ratios"),
        ({"pruners": ("sttss",)}, "unknown"),
        ({"save_kept": 3}, "--save_kept"),
    ],
)
def test_settings_that_make_no_sense(config: ScaleConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


@pytest.mark.slow
def test_the_verb(tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"--model {tiny_folder} --data {data} --num_frames 4 --max_new_tokens 1 --multiples 1 2 --pruners novelty"
    for mode in ("frames", "budget", "parallel", "packed"):
        given = [*words.split(), "--mode", mode, "--out", str(tmp_path / mode), "--retention_ratios", "0.5"]
        assert main(["scale", *given]) == 0
        out = capsys.readouterr().out
        assert "vs first dense" in out and all((tmp_path / mode / name).is_file() for name in FILES)
    assert main(["scale", *words.split(), "--budget", "5", "--out", str(tmp_path / "x")]) == 2
    assert capsys.readouterr().err.startswith("error: --budget")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": (8, 4)}, r"--num_frames \[8, 4\] must be at least 1, and several must increase"),
        ({"parts": (1, 2, 3)}, "one for each of --num_frames"),
        ({"parts": (0,)}, "one number from 1 on"),
        ({"budget": 0}, "at least 1 token"),
        ({"packed": True}, "--packed goes with --parts"),
        ({"vote": "loudest"}, "--vote 'loudest'"),
        ({"budget": 9, "match": "flops", "match_to": "uniform"}, "--match flops"),
        ({"save_kept": 2}, "--save_kept goes with one number"),
    ],
)
def test_points_that_make_no_sense(config: ScaleConfig, changes: dict[str, Any], message: str) -> None:
    points = {"model": config.model, "data": config.data, "out": config.out, "pruners": ("uniform",)}
    with pytest.raises(ValueError, match=message):
        CompareConfig(**{**points, "num_frames": (4, 8), **changes})
