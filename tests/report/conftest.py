"""One finished comparison on a tiny model, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from stts.data.shapes.files import write_shapes
from stts.eval.compare import CompareConfig, run_compare

FRAMES, SHOWN = 6, 4


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), sizes={"test": 2}, progress=False)


@pytest.fixture(scope="session")
def compared(tiny_folder: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions on two clips, kept tokens of the first four; fastv cannot reach 0.1. Read only."""
    config = CompareConfig(
        model=tiny_folder,
        data=clips / "test.jsonl",
        out=tmp_path_factory.mktemp("compared") / "out",
        pruners=("novelty", "random", "fastv"),
        retention_ratios=(0.5, 0.1),
        num_frames=FRAMES,
        batch_size=2,
        max_new_tokens=1,
        save_kept=SHOWN,
    )
    run_compare(config, progress=False)
    return config.out
