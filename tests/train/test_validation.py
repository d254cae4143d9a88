"""What validation says of the tokens that are kept: `stts compare` counts the same on the same clips."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loggers import CSVLogger

from stts.data.shapes.clips import ShapesConfig
from stts.data.shapes.files import write_shapes
from stts.eval.compare import CompareConfig, run_compare
from stts_train.batches import Phase
from stts_train.callbacks import ProgressLines
from stts_train.console import TIE, print_wrapped
from stts_train.data_module import VideoData
from stts_train.module import VideoFinetune

WORLD = ShapesConfig(
    families=("order", "count", "flash"), ask_by="colour", grid=4, num_sampled=8, distractors=(3, 5)
)  # fmt: skip
READING: dict[str, Any] = {"num_frames": 8, "num_workers": 0, "val_batch_size": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("world") / "data"
    return write_shapes(out, sizes={"val": 3}, config=WORLD, files="png", progress=False) / "val.jsonl"


def validate(model: Path, data: VideoData, out: Path) -> dict[str, float]:
    module = VideoFinetune(str(model), "novelty", retention_ratio=0.4, pruner_options={})
    trainer = pl.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        logger=CSVLogger(out), callbacks=[ProgressLines()],
    )  # fmt: skip
    [values] = trainer.validate(module, datamodule=data, verbose=False)
    return dict(values)


def test_evidence_kept_is_that_of_compare(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CompareConfig(
        model=tiny_folder, data=data, out=tmp_path / "compare", pruners=("novelty",), retention_ratios=(0.4,),
        num_frames=8, batch_size=9, max_new_tokens=1,
    )  # fmt: skip
    row = run_compare(config, progress=False).rows[-1]
    assert row.evidence_kept and row.distractors_kept and row.evidence_kept < 1, "else equal by chance"
    capsys.readouterr()
    files = VideoData("jsonl", str(data), str(data), **READING)
    drawn = VideoData("shapes", shapes=WORLD, phases=[Phase(1)], num_val_clips=3, **READING)
    for name, source in (("files", files), ("drawn", drawn)):
        values = validate(tiny_folder, source, tmp_path / name)
        assert values["val/evidence_kept"] == pytest.approx(row.evidence_kept), name
        assert values["val/distractors_kept"] == pytest.approx(row.distractors_kept), name
        assert f"evidence_kept {row.evidence_kept:.4f}" in capsys.readouterr().out, "in the progress line"
        [log] = (tmp_path / name).glob("**/metrics.csv")
        [line] = csv.DictReader(log.open())
        assert float(line["val/evidence_kept"]) == pytest.approx(row.evidence_kept, abs=1e-6)


@pytest.mark.parametrize("changes", [{"num_frames": 4}, {"max_fps": 1.0}], ids=str)
def test_other_frames_than_those_labelled_are_not_counted(
    tiny_folder: Path, data: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    values = validate(tiny_folder, VideoData("jsonl", str(data), str(data), **(READING | changes)), tmp_path)
    assert "val/accuracy" in values and not {"val/evidence_kept", "val/distractors_kept"} & set(values)


def test_clips_without_labels_are_not_counted(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    other = data.with_name("own.jsonl")
    other.write_text(data.read_text())
    values = validate(tiny_folder, VideoData("jsonl", str(other), str(other), **READING), tmp_path)
    assert "val/accuracy" in values and "val/evidence_kept" not in values


def test_lines_of_progress_fit_a_terminal_and_keep_names_with_their_values(capsys: pytest.CaptureFixture[str]) -> None:
    losses = "  ".join(f"loss_number_{number}{TIE}0.1234" for number in range(12))
    print_wrapped(f"validation at step 480:  {losses}")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 100 and all(line.startswith("  ") for line in lines[1:])
    assert all("loss_number_" not in line or line.endswith("0.1234") for line in lines), "no value alone on a line"
    path = "/data/" + "a" * 120
    print_wrapped(f"recipe   model.yaml; fitted: --data.val=null --data.train={path} --trainer.max_steps=4", indent=9)
    assert f"--data.train={path}" in capsys.readouterr().out.splitlines()[1].split(), "a path can be copied"
