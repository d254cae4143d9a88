"""What `stts eval`, `stts compare` and `stts scale` refuse alike, before a model is loaded or a question asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stts.eval.compare import CompareConfig, run_compare
from stts.eval.evaluate import run_eval
from stts.eval.run_config import EvalConfig
from stts.eval.scale import ScaleConfig, run_scale
from tests.data.video.clips import numbered_images, write_video
from tests.eval.benchmarks import test_five_options, test_videomme
from tests.eval.benchmarks.folders import touch, write_jsonl, write_parquet

VERBS: list[tuple[type[Any], Callable[..., Any], dict[str, Any]]] = [
    (EvalConfig, run_eval, {"pruner": "none"}),
    (CompareConfig, run_compare, {"pruners": ("uniform",)}),
    (ScaleConfig, run_scale, {"pruners": ("uniform",)}),
]
ids = ["eval", "compare", "scale"]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A model folder that cannot be loaded and a video that cannot be read: nothing may get that far."""
    (tmp_path / "model").mkdir()
    touch(tmp_path, "data/v.mp4")
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    write_jsonl(tmp_path, "data/q.jsonl", [{"id": "1", "video": "v.mp4", "conversations": turns}])
    return {"model": tmp_path / "model", "out": tmp_path / "out", "num_frames": 2}


@pytest.mark.parametrize(("kind", "verb", "more"), VERBS, ids=ids)
def test_a_data_root_beside_a_file_is_not_dropped(
    given: dict[str, Any], kind: type[Any], verb: Callable[..., Any], more: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"--data_root .* goes with --tasks, and --data names a file"):
        kind(**given, **more, data=tmp_path / "data/q.jsonl", data_root=tmp_path)


@pytest.mark.parametrize(("kind", "verb", "more"), VERBS, ids=ids)
def test_an_unknown_scoring(
    given: dict[str, Any], kind: type[Any], verb: Callable[..., Any], more: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="--scoring 'mine' is unknown for jsonl; known: strict, compat"):
        verb(kind(**given, **more, data=tmp_path / "data/q.jsonl", scoring="mine"), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "verb", "more"), VERBS[1:], ids=ids[1:])
def test_hidden_answers_cannot_be_compared(
    given: dict[str, Any], kind: type[Any], verb: Callable[..., Any], more: dict[str, Any], tmp_path: Path
) -> None:
    write_parquet(tmp_path, f"MC/{test_five_options.EGO}", [test_five_options.ego("1", None)])
    touch(tmp_path, "videos/v1.mp4")
    with pytest.raises(ValueError, match="egoschema has 1 answers that are not public"):
        verb(kind(**given, **more, tasks=("egoschema",), data_root=tmp_path), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "verb", "more"), VERBS, ids=ids)
def test_a_slash_behind_the_model_changes_nothing(
    given: dict[str, Any], kind: type[Any], verb: Callable[..., Any], more: dict[str, Any], tmp_path: Path
) -> None:
    same = {**given, **more, "data": tmp_path / "data/q.jsonl"}
    plain, slash = (kind(**{**same, "model": f"{tmp_path}/model{end}"}) for end in ("", "/"))
    assert plain == slash and plain.identity([]) == slash.identity([])
    assert kind(**{**same, "model": "owner/name/"}).model == "owner/name"
    if hasattr(plain, "trained"):
        assert kind(**{**same, "trained": {"mine": f"{tmp_path}/model/"}}).trained == {"mine": f"{tmp_path}/model"}


def subtitled(root: Path) -> Path:
    """Video-MME with subtitles, on videos that can be read."""
    write_parquet(root, test_videomme.TABLE, test_videomme.ROWS[:2])
    touch(root, "data/aaa.mp4", "subtitle/aaa.srt")
    (root / "subtitle/aaa.srt").write_text(test_videomme.SRT)
    for row in test_videomme.ROWS[:2]:
        write_video(root / f"data/{row['videoID']}.mp4", numbered_images(12, 56, 56), fps=3)
    return root


def test_scale_shows_subtitles_as_eval_does(tiny_folder: Path, tmp_path: Path) -> None:
    result = run_scale(
        ScaleConfig(
            model=tiny_folder, out=tmp_path / "out", tasks=("videomme_w_subtitle",), data_root=subtitled(tmp_path),
            pruners=("uniform",), retention_ratios=(0.5,), multiples=(1, 2), num_frames=2, max_new_tokens=1,
        ),
        progress=False,
    )  # fmt: skip
    assert result is not None and all(row.num_samples == 2 for row in result.rows)
