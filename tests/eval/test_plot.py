from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from stts.eval.plot import draw
from stts.eval.table import (
    BEFORE,
    DENSE,
    Cell,
    ComparisonResult,
    Outcome,
    Record,
    render_csv,
    render_markdown,
    render_text,
)
from stts.metrics.cost import VideoCost


def result_with(cells: list[Cell], skipped: int = 0) -> ComparisonResult:
    """Twelve questions on four videos; the n-th cell gets the last n answers wrong."""
    records = []
    for number in range(12):
        outcomes = {
            cell.key: Outcome("x", "x", number < 12 - place, 4, 64, int(64 * cell.retention_configured), cost)
            for place, cell in enumerate(cells)
            if cell.reason is None
            for cost in [VideoCost(10**12, 0, 0, 0, int(10**12 * cell.retention_configured))]
        }
        records.append(Record(f"q{number}", f"v{number // 3}.mp4", "", "x", outcomes))
    return ComparisonResult(
        {"name": "made up", "num_frames": 4, "sampler": "interior", "batch_size": 3, "positions": None},
        {"device": "CPU", "dtype": "float32"},
        tuple(cells),
        tuple(records),
        tuple({"uid": f"s{number}", "reason": "broken"} for number in range(skipped)),
        {cell.key: (2.0, 3.0, 9.0) for cell in cells},
    )


FULL = [Cell(BEFORE), Cell(DENSE), Cell("stts", 0.5), Cell("random", 0.5), Cell("fastv", 0.1, "too low for layer 2")]


@pytest.mark.parametrize("cells", [FULL, [Cell(DENSE)], [Cell(DENSE), *(Cell(f"m{n}", 0.25) for n in range(9))]])
def test_the_figure_shows_every_method(cells: list[Cell]) -> None:
    image = Image.open(io.BytesIO(draw(result_with(cells))))
    assert image.format == "PNG" and image.width >= 1500
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    orange = (pixels == (0xD5, 0x5E, 0x00)).all(1).sum()  # the first method's colour
    assert (orange > 100) == (len(cells) > 1)


def test_text_holds_the_numbers_and_the_reasons() -> None:
    lines = render_text(result_with(FULL, skipped=7)).splitlines()
    assert lines[0] == "made up: 12 questions on 4 videos, 4 frames (interior)"
    [stts] = [line.split() for line in lines if line.startswith("stts")]
    assert stts[:4] == ["stts", "0.5", "0.500", "8"] and stts[4] == "83.3"
    assert stts[-6:] == ["0.5", "0", "1.5", "75.0", "%", "3.0"], "LLM, pruner and total TFLOPs, share, median ms"
    [fastv] = [line.split() for line in lines if line.startswith("fastv")]
    assert set(fastv[2:]) == {"-"}
    assert "Not run: fastv at 0.1: too low for layer 2" in lines
    assert any("7 (s0, s1, s2, s3, s4, ...)" in line for line in lines)


def test_markdown_and_csv_have_a_line_per_cell() -> None:
    result = result_with(FULL)
    assert sum(line.startswith("|") for line in render_markdown(result).splitlines()) == 2 + len(FULL)
    assert len(render_csv(result).splitlines()) == 1 + len(FULL)
