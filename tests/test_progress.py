"""Progress of long jobs where nobody draws: whole lines, the first and the last among them."""

from __future__ import annotations

import pytest

from stts.progress import progress_bar


def test_a_file_gets_whole_lines_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(8, "compare", "answers", done=2) as bar:
        bar.mininterval = bar.miniters = 0
        for _ in range(3):
            bar.update(2)
    with progress_bar(8, "compare", "answers", shown=False) as bar:
        bar.update(8)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and "\r" not in err and len(lines) == len(set(lines))
    assert lines[0].startswith("compare  2/8") and lines[-1].startswith("compare  8/8")
    assert all("answers/s" in line and line.endswith(" left") for line in lines)
