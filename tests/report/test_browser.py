"""The page of `stts report` in a real browser: no errors, no requests, and everything can be reached by keyboard."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from stts.report.page import render_page, write_report
from stts.report.run_data import run_data
from tests.report.browser import Page, find_browser

pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium: apt-get install chromium (or google-chrome on the PATH)"
)


@pytest.fixture(scope="module")
def report(compared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report([compared], tmp_path_factory.mktemp("page") / "report.html", num_samples=6)


@pytest.fixture(scope="module")
def browser(report: Path) -> Iterator[Page]:
    with Page(report) as page:
        yield page


@pytest.fixture
def page(browser: Page, report: Path) -> Iterator[Page]:
    """Freshly loaded; whatever the test did, nothing may have gone wrong or been asked of the network."""
    browser.errors.clear()
    browser.send("Page.navigate", url=report.as_uri())
    browser.wait("document.readyState === 'complete' && document.querySelectorAll('#cards canvas').length > 0")
    yield browser
    assert browser.errors == []
    assert {url.split(":")[0] for url in browser.requests} <= {"file", "data"}


def pixels(page: Page, card: int, x: float, y: float) -> list[int]:
    canvas = f"document.querySelectorAll('#cards canvas')[{card}]"
    place = f"Math.floor({canvas}.width * {x}), Math.floor({canvas}.height * {y}), 1, 1"
    return list(page.js(f"Array.from({canvas}.getContext('2d').getImageData({place}).data)"))


def select(page: Page, name: str, value: str) -> None:
    page.js(f"$('{name}').value = '{value}'; $('{name}').dispatchEvent(new Event('change'))")


def test_table_plots_and_cards_are_there(page: Page) -> None:
    assert page.js("document.querySelectorAll('#table tbody tr').length") == 7, "dense, and 3 methods at 2 ratios"
    assert "not run" in page.js("document.querySelector('#table tbody').textContent")
    assert page.js("document.querySelectorAll('#panels .panel').length") == 3
    assert page.js("document.querySelectorAll('#panels .panel')[0].querySelectorAll('.point').length") == 6
    assert page.js("[...document.querySelectorAll('.card h3')].map(one => one.textContent)") == [
        "dense", "novelty 0.5", "random 0.5", "fastv 0.5"
    ]  # fmt: skip


def test_a_click_sorts_both_ways_and_rows_without_value_stay_last(page: Page) -> None:
    flops = "[...document.querySelectorAll('#table tbody tr')].map(row => row.children[6]?.textContent ?? '-')"
    button = "[...document.querySelectorAll('thead button')].find(one => one.textContent === 'FLOPs')"
    page.js(f"{button}.click()")
    down = page.js(flops)
    assert page.js("document.querySelectorAll('th[aria-sort=descending]').length") == 1
    page.js(f"{button}.click()")
    up = page.js(flops)
    assert down[-1] == up[-1] == "-" and down[0] == up[-2] and down[0] != up[0]
    assert page.js("document.activeElement.textContent") == "FLOPs", "the keyboard stays where it was"


def test_what_decoding_costs_stands_beside_dense(page: Page, compared: Path) -> None:
    heads = page.js("[...document.querySelectorAll('thead button')].map(one => one.textContent)")
    lines = page.js(
        "[...document.querySelectorAll('#table tbody tr')].map(row => [...row.children].map(one => one.textContent))"
    )
    shown = {(line[0], line[1]): line for line in lines}
    rows = [row for row in run_data(compared, 0)["rows"] if row["decode"]]
    assert len(rows) == 6, "dense, and all that was run"
    for row in rows:
        line = shown[row["method"], f"{row['retention_configured']:g}"]
        for head, name, share, size in (
            ("decode MFLOPs", "flops", "flops_share", 1e6),
            ("cache MiB", "cache_bytes", "cache_share", 2**20),
        ):
            value, part = line[heads.index(head)].split(" ", 1)
            assert float(value) == pytest.approx(row["decode"][name] / size, rel=5e-3)
            assert part == f"[{100 * row['decode'][share]:.1f} %]" and (part == "[100.0 %]") == (
                row["method"] == "dense"
            )


def test_arrows_move_the_scrubber_and_the_picture(page: Page) -> None:
    page.js("document.querySelector('#frame').focus()")
    assert page.js("document.querySelector('#time').textContent").startswith("4 of 6"), "opened at the middle"
    page.press("Home")
    assert page.js("document.querySelector('#time').textContent").startswith("1 of 6")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.js("document.querySelector('#time').textContent").startswith("3 of 6")
    assert page.js("document.querySelector('.card canvas').getAttribute('aria-label')").startswith("dense, frame 3")
    assert (
        page.js(
            "[...document.querySelector('.card .budget').querySelectorAll('.level')].findIndex(b => b.matches('.now'))"
        )
        == 2
    )
    page.press("End")
    assert page.js("document.querySelector('#time').textContent").startswith("6 of 6")


def test_play_walks_through_the_frames_and_the_scrubber_stops_it(page: Page) -> None:
    shown = "document.querySelector('#time').textContent"
    page.js("document.querySelector('#play').click()")
    assert page.js("document.querySelector('#play').textContent") == "Pause"
    page.wait(f"{shown}.startsWith('6 of 6')")
    page.wait(f"{shown}.startsWith('2 of 6')")
    page.js("document.querySelector('#frame').focus()")
    page.press("Home")
    assert page.js("document.querySelector('#play').textContent") == "Play"
    assert page.js(shown).startswith("1 of 6")


def test_dropped_cells_are_dark_and_kept_ones_as_in_the_frame(page: Page) -> None:
    page.wait("[...pictures.values()].every(image => image.complete)")
    for frame in range(6):
        page.js(f"goTo({frame})")
        page.wait("[...pictures.values()].every(image => image.complete)")
        page.js("redraw()")
        mask = page.js(f"Array.from(cards[2].mask.subarray({frame} * cards[2].per, {frame + 1} * cards[2].per))")
        for cell, kept in enumerate(mask):
            x, y = (cell % 4 + 0.5) / 4, (cell // 4 + 0.5) / 4
            plain, shown = pixels(page, 0, x, y), pixels(page, 2, x, y)
            assert shown == plain if kept else all(a <= b * 0.22 + 2 for a, b in zip(shown[:3], plain, strict=False))


def test_the_heat_map_changes_the_cards_that_have_scores(page: Page) -> None:
    before = [pixels(page, card, 0.5, 0.1) for card in range(3)]
    page.js("document.querySelector('#heat').click()")
    after = [pixels(page, card, 0.5, 0.1) for card in range(3)]
    assert before[0] == after[0] and before[1] != after[1], "dense has no scores, novelty has"
    assert page.js("document.querySelector('#scale').hidden") is False


def test_filters_leave_the_samples_that_fit(page: Page) -> None:
    assert page.js("document.querySelectorAll('#sample option').length") == 6
    family = page.js("document.querySelector('#family').options[1].value")
    select(page, "family", family)
    wanted = page.js(f"run.samples.filter(sample => sample.family === '{family}').length")
    assert page.js("document.querySelectorAll('#sample option').length") == wanted < 6
    page.js("document.querySelector('#family').selectedIndex = 0; document.querySelector('#differ').click()")
    differing = page.js(
        "run.samples.filter(sample => new Set(['dense', 'novelty@0.5', 'random@0.5', 'fastv@0.5']"
        ".map(key => sample.outcomes[key].said.trim())).size > 1).length"
    )
    assert page.js("document.querySelectorAll('#sample option').length") == differing


def test_next_and_previous_walk_through_the_samples(page: Page) -> None:
    page.js("document.querySelector('#next').click()")
    assert page.js("document.querySelector('#found').textContent").startswith("2 of 6")
    for _ in range(4):
        page.js("document.querySelector('#next').click()")
    assert page.js("document.querySelector('#next').disabled") is True
    assert "--save_kept" in page.js("document.querySelector('#remark').textContent"), "not written for the last two"
    page.js("document.querySelector('#previous').click()")
    assert page.js("document.querySelector('#found').textContent").startswith("5 of 6")


def test_another_ratio_shows_its_methods(page: Page) -> None:
    select(page, "ratio", "0.1")
    names = page.js("[...document.querySelectorAll('.card h3')].map(one => one.textContent)")
    assert names == ["dense", "novelty 0.1", "random 0.1"]


def test_points_tell_their_values_to_keyboard_and_pointer(page: Page) -> None:
    page.js("document.querySelector('.panel .point[tabindex=\"0\"]').focus()")
    assert page.js("document.querySelector('.panel .tip').hidden") is False
    first = page.js("document.activeElement.getAttribute('aria-label')")
    assert "accuracy" in first and "tokens per frame" in first
    page.press("ArrowRight")
    assert page.js("document.activeElement.getAttribute('aria-label')") != first
    assert page.js("document.querySelectorAll('.panel')[0].querySelectorAll('[tabindex=\"0\"]').length") == 1
    page.js("document.activeElement.blur(); document.querySelector('#panels').scrollIntoView()")
    mark = "document.querySelectorAll('.panel')[1].querySelector('.mark').getBoundingClientRect()"
    box = page.js(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({mark})")
    page.move_to(*box)
    assert "FLOPs" in page.js("document.querySelectorAll('.panel')[1].querySelector('.tip').textContent")


def test_the_legend_hides_one_method_or_all(page: Page) -> None:
    points = "document.querySelectorAll('.panel')[0].querySelectorAll('.point').length"
    page.js("[...document.querySelectorAll('#legend button')].find(one => one.textContent === 'novelty').click()")
    assert page.js(points) == 6 - 2
    both = "[...document.querySelectorAll('#legend button')].at(-1)"
    page.js(f"{both}.click()")
    assert page.js(points) == 6, "something was hidden: show all"
    page.js(f"{both}.click()")
    assert page.js(points) == 1, "dense stays"
    assert page.js("document.querySelectorAll('#legend [aria-pressed=false]').length") == 3


def test_tab_reaches_every_control_once(page: Page) -> None:
    page.js("document.body.focus()")
    seen = []
    for _ in itertools.repeat(None, 60):
        page.press("Tab")
        seen.append(
            page.js("document.activeElement.id || document.activeElement.className || document.activeElement.tagName")
        )
        if seen[-1] == "heat":
            break
    for control in ("scroll", "family", "wrong", "differ", "ratio", "sample", "next", "play", "frame", "heat"):
        assert control in seen, seen


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(page: Page, width: int) -> None:
    page.resize(width, 844)
    try:
        assert page.js("document.documentElement.scrollWidth") <= width
        cards = page.js("[...document.querySelectorAll('.card')].map(one => one.getBoundingClientRect().width)")
        assert min(cards) >= 150
    finally:
        page.resize(1280, 900)


@pytest.fixture(scope="module")
def full(compared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A page with what longer runs add: several tasks, formulas, phase times, an equal-FLOPs row; and a scaling run."""
    run = run_data(compared, 6)
    for row in run["rows"]:
        if row["reason"] is None:
            half = {"accuracy": 0.5, "accuracy_low": 0.4, "accuracy_high": 0.6, "difference": None, "num_unparsed": 3}
            row["tasks"] = {"mvbench": half, "videomme": {**half, "accuracy": row["accuracy"], "num_unparsed": 0}}
            exact = row["flops"]["exact"]
            row["flops"] = {"exact": exact, "macs": {"total": exact["total"] / 2, "share": exact["share"]}}
            row["time_ms"] = {"vit": 8.0, "prefill": 10 * row["retention_measured"], "ttft": 20.0}
            row["p_value"] = None if row["kind"] == "unpruned" else 0.0004
    equal = dict(run["rows"][1], equal_flops_to="random 0.5", retention_configured=0.4837261)
    run["rows"].append(equal)
    rows = [
        {
            "num_frames": frames, "parts": 1, "method": method, "kind": kind, "retention_configured": ratio,
            "reason": None, "accuracy": 0.5 + 0.001 * frames, "accuracy_low": 0.4, "accuracy_high": 0.7,
            "num_samples": 30, "num_videos": 10, "difference": None, "tokens": 16 * frames * ratio,
            "flops": {"exact": {"total": 1e7 * frames, "share": frames / 16}},
            "ms_per_sample": None if method == "dense" else 100 * frames,
        }
        for frames in (16, 32, 64)
        for method, kind, ratio in (("dense", "unpruned", 1.0), ("novelty", "before the LLM", 0.5))
    ]  # fmt: skip
    points = {
        "name": "long", "summary": "long", "points": True, "budget": False, "rows": rows, "notes": ["a note"],
        "cells": [], "samples": [], "num_samples": 0, "frames": [],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("full") / "report.html"
    path.write_text(render_page("full", [run, points]), encoding="utf-8")
    with Page(path) as page:
        yield page
        assert page.errors == []


def texts(page: Page, selector: str) -> list[str]:
    return list(page.js(f"[...document.querySelectorAll('{selector}')].map(one => one.textContent)"))


def test_tasks_families_and_formulas_change_table_and_plots(full: Page) -> None:
    select(full, "run", "0")
    assert {"p", "TTFT ms"} < set(texts(full, "thead button")), "columns that have values are there"
    assert not {"peak GiB", "retained %"} & set(texts(full, "thead button")), "and no others"
    assert "at the FLOPs of random 0.5" in texts(full, "#table tbody th")[-1]
    assert {"<0.001", "-"} <= set(texts(full, "#table td"))
    shown = "#table tbody tr td:nth-of-type(2)"
    every = texts(full, shown)
    select(full, "part", "tmvbench")
    assert {text for text in texts(full, shown) if "not run" not in text} == {"50.0 [40.0, 60.0]"}
    assert "unparsed" in texts(full, "thead button")
    marks = full.js("[...document.querySelectorAll('.panel')[1].querySelectorAll('.point')].map(p => p.ariaLabel)")
    assert all("accuracy 50.0 %" in mark for mark in marks)
    family = full.js("[...$('part').options].map(one => one.value).find(one => one.startsWith('f'))")
    select(full, "part", family)
    assert "vs dense" in texts(full, "thead button")[3] and set(texts(full, "#table td:nth-of-type(3)")) == {"-"}
    select(full, "part", "")
    assert texts(full, shown) == every
    before = texts(full, "#table tbody tr:first-child td")
    select(full, "formula", "macs")
    assert texts(full, "#table tbody tr:first-child td") != before


def test_bars_show_where_the_time_goes(full: Page) -> None:
    select(full, "run", "0")
    assert texts(full, "#phases span") == [" ViT", " prefill"]
    prefill = "[...document.querySelectorAll('#bars .stack')].map(bar => bar.children[1].style.width)"
    widths = full.js(prefill)
    share = [float(width.removesuffix("%")) for width in widths]
    assert share[0] == pytest.approx(100 * 10 / 18, abs=0.01) and share[1] == pytest.approx(share[0] / 2, abs=0.1)
    assert full.js("document.querySelector('#bars .stack').getAttribute('aria-label')") == "ViT 8.0 ms, prefill 10.0 ms"


def test_several_numbers_of_frames_have_curves_along_them_and_no_samples(full: Page) -> None:
    select(full, "run", "1")
    assert full.js("$('samples').hidden && $('times').hidden && $('choices').hidden") is True
    assert texts(full, "#table tbody th") == ["dense", "novelty"] * 3
    points = "[...document.querySelectorAll('.panel')].map(one => one.querySelectorAll('.point').length)"
    assert full.js(points) == [6, 6, 3]
    assert full.js("document.querySelectorAll('.panel')[0].querySelectorAll('.curve').length") == 2
    label = full.js("document.querySelectorAll('.panel')[1].querySelector('.point').ariaLabel")
    assert "dense, 16 frames" in label and "160 M" in label
    assert "MFLOPs per question" in full.js("document.querySelectorAll('.panel')[1].textContent")
    full.resize(390, 844)
    assert full.js("document.documentElement.scrollWidth") <= 390
    full.resize(1280, 900)
    select(full, "run", "0")
    assert full.js("$('samples').hidden") is False


CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => { for (; node; node = node.parentElement) { const c = parse(getComputedStyle(node)
    .backgroundColor); if (c.length < 4 || c[3] > 0) return c; } };
  const worst = [];
  const tags = 'h1, h2, h3, p, th, td, small, label, button, select, dt, dd, li, summary, span';
  for (const node of document.querySelectorAll(tags)) {
    if (!node.textContent.trim() || !node.checkVisibility() || node.disabled) continue;
    const [a, b] = [light(parse(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) worst.push([node.tagName, node.className, ratio]);
  }
  return worst;
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(page: Page, scheme: str) -> None:
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    assert page.js(CONTRAST) == []
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
