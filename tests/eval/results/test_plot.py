from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from stts.eval.results.plot import curves, draw
from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import DENSE, Cell
from tests.eval.made_up import FULL, METHODS, result_with, zoo


def pixels_of(result: ComparisonResult) -> np.ndarray:
    image = Image.open(io.BytesIO(draw(result)))
    assert image.format == "PNG" and image.width >= 1500
    return np.asarray(image.convert("RGB")).reshape(-1, 3)


@pytest.mark.parametrize("cells", [FULL, [Cell(DENSE)], zoo((0.5,)), zoo((0.5, 0.25, 0.15, 0.1, 0.05))])
def test_every_method_is_in_the_figure(cells: list[Cell]) -> None:
    result = result_with(cells)
    pixels = pixels_of(result)
    for curve in curves(result.rows):
        shown = (pixels == np.round(255 * np.array(curve.colour[:3])).astype(np.uint8)).all(1).sum()
        assert shown > 50, f"{curve.points[0].method} has a marker and a place in the legend"


def test_no_two_methods_look_alike_and_a_kind_has_its_own_line() -> None:
    drawn = curves(result_with(zoo((0.5, 0.1))).rows)
    assert [curve.points[0].method for curve in drawn] == [name for names in METHODS.values() for name in names]
    assert len({curve.colour for curve in drawn}) == 21
    for kind in METHODS:
        alike = [curve for curve in drawn if curve.points[0].kind == kind]
        assert len({curve.line for curve in alike}) == 1 and len({curve.marker for curve in alike}) == len(alike)
    assert all([row.retention_configured for row in curve.points] == [0.1, 0.5] for curve in drawn)


def test_a_cell_that_was_not_run_is_not_drawn() -> None:
    assert [curve.points[0].method for curve in curves(result_with(FULL).rows)] == ["stts", "random"]
