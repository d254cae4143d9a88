from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from itertools import pairwise

import pytest

from stts.eval.results.plot import draw
from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import DENSE, Cell, render_csv, render_markdown, render_text
from stts.metrics.cost import DecodeCost
from tests.eval.made_up import FULL, result_with, zoo

ADATP = Cell("adatp", 0.5, kind="inside the LLM", label="our reconstruction")


def test_text_holds_the_numbers_and_the_reasons() -> None:
    lines = render_text(result_with(FULL, skipped=7), wide=True).splitlines()
    assert lines[0] == "made up: 12 questions on 4 videos, 4 frames (interior)"
    [stts] = [line.split() for line in lines if line.startswith("stts")]
    assert stts[:4] == ["stts", "0.5", "0.500", "8"] and stts[4] == "83.3"
    assert stts[-6:] == ["0.5", "0", "1.5", "75.0", "%", "3.0"], "LLM, pruner and total TFLOPs, share, median ms"
    [fastv] = [line.split() for line in lines if line.startswith("fastv")]
    assert set(fastv[2:]) == {"-"}
    assert "Not run at 0.1: fastv: too low for layer 2" in lines
    assert any("7 (s0, s1, s2, s3, s4, ...)" in line for line in lines)


def test_notes_stay_short_with_many_rows() -> None:
    refused = [Cell(name, ratio, "too low", "inside the LLM") for ratio in (0.1, 0.05) for name in ("fastv", "dart")]
    result = result_with([*zoo((0.5,)), *refused])
    assert [line for line in render_text(result).splitlines() if line.startswith("Not run")] == [
        "Not run at 0.1: fastv, dart: too low", "Not run at 0.05: fastv, dart: too low"
    ]  # fmt: skip
    records = [
        replace(record, outcomes={key: replace(one, parsed=None) for key, one in record.outcomes.items()})
        for record in result.records[:2]
    ]
    text = render_text(replace(result, records=(*records, *result.records[2:])))
    assert "wrong): dense 1: 2, stts 0.5: 2, random-vit 0.5: 2, easy 0.5: 2, heuristic 0.5: 2, and 17 more rows" in text


def test_every_form_has_a_line_per_cell() -> None:
    result = result_with(FULL)
    assert sum(line.startswith("|") for line in render_markdown(result).splitlines()) == 2 * (2 + len(FULL)), (
        "and FLOPs"
    )
    assert len(render_csv(result).splitlines()) == 1 + len(FULL)


def test_what_decoding_costs_stands_beside_dense() -> None:
    result = result_with([Cell(DENSE), Cell("dycoke", 0.5, kind="before the LLM")])
    assert "decoding" not in render_text(result, wide=True), "files that do not tell"
    costs = {DENSE: DecodeCost(4_000_000, 2**20), result.cells[1].key: DecodeCost(1_000_000, 2**19)}
    records = [
        replace(record, outcomes={key: replace(one, decode=costs[key]) for key, one in record.outcomes.items()})
        for record in result.records
    ]
    result = ComparisonResult.from_json(json.loads(json.dumps(replace(result, records=tuple(records)).to_json())))
    text = render_text(result, wide=True).split("decoding")[1]
    [dycoke] = [line.split() for line in text.splitlines() if line.startswith("dycoke")]
    assert dycoke == ["dycoke", "0.5", "1", "25.0", "%", "0.5", "50.0", "%"]
    assert "| dycoke | 0.5 | 1 | 25.0 % | 0.5 | 50.0 % |" in render_markdown(result)
    assert "decode/flops_share" in render_csv(result).splitlines()[0]


def test_a_block_per_ratio() -> None:
    lines = render_text(result_with(zoo((0.5, 0.1)))).splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("---")]
    assert [b - a - 1 for a, b in pairwise(rules)] == [1, 21], "dense, then the first ratio"
    assert sum(line.startswith("---") for line in render_text(result_with(zoo((0.5,)))).splitlines()) == 1


def test_a_label_stands_wherever_the_name_does() -> None:
    result = result_with([Cell(DENSE), ADATP, Cell("adatp", 0.1, "too low", "inside the LLM", "our reconstruction")])
    text = render_text(result)
    assert text.count("adatp") == text.count("adatp (our reconstruction)") == 4, "two cells, two notes"
    assert "| adatp (our reconstruction) | 0.5 | 0.500 |" in render_markdown(result)
    lines = list(csv.DictReader(io.StringIO(render_csv(result))))
    assert [line["method"] for line in lines] == [DENSE, *["adatp (our reconstruction)"] * 2]
    assert [line["kind"] for line in lines] == ["unpruned", *["inside the LLM"] * 2]


def test_equivalent_retention_is_told_from_what_the_llm_sees_first() -> None:
    result = result_with([Cell(DENSE), Cell("fastv", 0.25, kind="inside the LLM"), Cell("dart", 0.25)])
    row = result.rows[1]
    assert (row.retention_measured, row.retention_at_entry, row.kept_per_frame) == (0.25, 1.0, 0.25 * 64 / 4)
    [note] = [line for line in render_text(result).splitlines() if "equivalent retention" in line]
    assert "): fastv drop tokens inside the LLM" in note, "and not the others"
    assert "equivalent retention" not in render_text(result_with(FULL))


def test_adaptive_counts_show_their_range() -> None:
    result = result_with([Cell(DENSE), Cell("dart", 0.25)], config={"exact": False})
    row = result.rows[1]
    # 0.250, 0.251, ..., 0.261: mean 0.2555, percentile p at place 0.11 p
    assert row.retention_measured == pytest.approx(0.2555)
    assert (row.retention_p5, row.retention_p95) == (pytest.approx(0.25055), pytest.approx(0.26045))
    text = render_text(result)
    assert "dart 0.25: 0.251 to 0.260" in text and "budgets are not equal" in text
    assert "budgets are not equal" not in render_text(result_with(FULL))


def test_signals_and_options_are_named_once_and_kept() -> None:
    cells = [Cell(DENSE), Cell("fastvid", 0.5), Cell("holitom", 0.5), Cell("fastvid", 0.1)]
    made_from = {"probe": "mean query (no pooling head loaded)"}
    signals = {"fastvid@0.5": made_from, "holitom@0.5": {"attn": "last block"}, "fastvid@0.1": made_from}
    result = result_with(cells, signals=signals, config={"pruner_options": {"fastvid": {"variant": "lv", "tau": 0.8}}})
    lines = render_text(result).splitlines()
    assert [line for line in lines if line.startswith(("Signal", "Options"))] == [
        "Options: fastvid variant=lv, tau=0.8.",
        "Signal probe of fastvid: mean query (no pooling head loaded).",
        "Signal attn of holitom: last block.",
    ]
    assert [line["signals"] for line in csv.DictReader(io.StringIO(render_csv(result)))] == [
        "", "probe: mean query (no pooling head loaded)", "attn: last block",
        "probe: mean query (no pooling head loaded)",
    ]  # fmt: skip
    written = json.loads(json.dumps(result.to_json()))
    assert written["rows"][2]["signals"] == {"attn": "last block"}
    assert ComparisonResult.from_json(written).rows == result.rows


def test_one_video_has_no_interval_and_the_table_says_so() -> None:
    made = result_with(FULL)
    one = replace(made, records=tuple(replace(record, video="only.mp4") for record in made.records))
    line = next(line for line in render_text(one, wide=True).splitlines() if line.startswith("stts"))
    assert "83.3 [-]" in line and "-8.3 [-]" in line
    assert "no interval, as all questions are about one video" in render_text(one)
    assert "no p-value is below 0.125" in render_text(made), "four videos"
    [row] = [row for row in one.rows if row.method == "stts"]
    assert (row.accuracy_low, row.difference_high, row.p_value) == (None, None, 1.0)
    assert draw(one)


def test_a_table_for_the_terminal_fits_it_and_says_where_the_rest_is() -> None:
    wide, narrow = render_text(result_with(FULL), wide=True), render_text(result_with(FULL))
    head, rule, *rows = narrow.splitlines()[2:5]
    assert max(map(len, (head, rule, *rows))) <= 100 < max(map(len, wide.splitlines()[2:5]))
    assert head.split()[0] == "method" and head.split()[-2:] == ["FLOPs", "ms"] and "tokens/frame" not in head
    assert narrow.splitlines()[-1].endswith("--wide true, or comparison.md.") and "--wide" not in wide
