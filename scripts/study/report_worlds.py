"""Sections of the page with arms: other numbers of tokens than in training, and other clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from arms import ARMS, FROZEN, OF_MORE_FRAMES, OURS, RIVAL, TRAINED_AT, ArmsStudy
from cells import NOT_RUN, Results, by_families, find_row, paired_points, percent
from plots import Panel, Seeds, draw_panels
from report import Section, as_table, steps_of

from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import DENSE, Row
from stts.files import write_whole

_FURTHER = {
    "evs-longer": f"evs, 480 steps at {TRAINED_AT:g}",
    "teacher-longer": f"teacher, 480 steps at {TRAINED_AT:g}",
    "evs-elastic": "evs, 160 steps at 0.1 to 0.5",
    "teacher-elastic": "teacher, 160 steps at 0.1 to 0.5",
    "evs-elastic-even": "evs, 209 steps at 0.1 to 0.5",
    "teacher-elastic-even": "teacher, 209 steps at 0.1 to 0.5",
}
_MAIN = {
    OURS: f"teacher, 160 steps at {TRAINED_AT:g}",
    RIVAL: f"evs, 160 steps at {TRAINED_AT:g}",
    FROZEN: "evs, frozen",
}
_STYLES: Mapping[str, Mapping[str, Any]] = {
    _MAIN[OURS]: {"color": "crimson", "marker": "o", "linewidth": 2.4, "zorder": 5},
    _MAIN[RIVAL]: {"color": "black", "marker": "s", "linewidth": 2.0},
    _MAIN[FROZEN]: {"color": "#888888", "marker": "^", "linewidth": 1.6},
    _FURTHER["teacher-longer"]: {"color": "crimson", "marker": "o", "linestyle": "--", "fillstyle": "none"},
    _FURTHER["evs-longer"]: {"color": "black", "marker": "s", "linestyle": "--", "fillstyle": "none"},
    "every token, frozen": {"color": "#1f77b4", "linestyle": ":", "linewidth": 1.6},
}  # fmt: skip


def write_figure(path: Path, panels: Sequence[Panel], words: str) -> list[str]:
    """The line that shows the figure; nothing where there is nothing to draw."""
    if not any(panel.lines for panel in panels):
        return []
    write_whole(path, draw_panels(panels, _STYLES))
    return [f"![{words}]({path.name})"]


# --- tokens ----------------------------------------------------------------------------------------------------------


def _by_ratio(study: ArmsStudy, results: Results) -> dict[str, dict[float, list[Row]]]:
    """Line -> ratio -> a row for every seed."""

    def rows(names: Sequence[str], method: str, ratio: float) -> list[Row]:
        found = (find_row(results[name], method, ratio) for name in names)
        return [row for row in found if row is not None and row.accuracy is not None]

    lines: dict[str, dict[float, list[Row]]] = {}
    for who, name in _MAIN.items():
        lines[name] = {}
        for ratio in study.scale.further:
            method = ARMS[RIVAL if who == FROZEN else who].method
            many = who != FROZEN and ratio in study.scale.ratios
            runs = [study.run_name(who, seed) for seed in study.seeds(who)] if many else [study.further_name(who)]
            lines[name][ratio] = rows(runs, method, ratio)
    for arm, name in _FURTHER.items():
        if arm in study.scale.arms:
            runs = [study.run_name(arm, seed) for seed in study.seeds(arm)]
            lines[name] = {ratio: rows(runs, ARMS[arm].method, ratio) for ratio in study.scale.further}
    return lines


def retention_panels(study: ArmsStudy, results: Results) -> list[Panel]:
    lines = {name: rows for name, rows in _by_ratio(study, results).items() if name in _STYLES and any(rows.values())}
    ticks = [round(100 * ratio) for ratio in sorted(study.scale.further)]

    def points(attribute: str) -> dict[str, Seeds]:
        found = {}
        for name, ratios in lines.items():
            pairs = ((100 * (rows[0].retention_measured or 0), rows) for rows in ratios.values() if rows)
            found[name] = sorted((x, [100 * (getattr(row, attribute) or 0) for row in rows]) for x, rows in pairs)
        return found

    dense = find_row(results["frozen"], DENSE)
    flat = {} if dense is None else {"every token, frozen": [(tick, [100 * (dense.accuracy or 0)]) for tick in ticks]}
    kept = "tokens kept (%)"
    return [
        Panel(kept, "accuracy (%)", points("accuracy") | flat if lines else {}, ticks, log=True),
        Panel(kept, "evidence kept (%)", points("evidence_kept"), ticks, log=True),
    ]


def further_section(study: ArmsStudy, results: Results) -> Section:
    def cell(rows: Sequence[Row]) -> str:
        if not rows:
            return NOT_RUN
        values = [[getattr(row, name) for row in rows] for name in ("accuracy", "evidence_kept", "distractors_kept")]
        return " / ".join("-" if None in three else f"{100 * fmean(three):.1f}" for three in values)

    by_ratio = _by_ratio(study, results)
    rows = [[name, *(cell(by_ratio[name][ratio]) for ratio in study.scale.further)] for name in by_ratio]
    text = (
        "Percent right / evidence kept / distractors kept. Means of all seeds at the ratios of the table above and in "
        "rows of 209 and 480 steps, elsewhere the first seed. At 0.103 every method keeps 15 of 144 tokens. Of the "
        "frozen pruners `evs` alone was compared at every ratio."
    )
    steps = steps_of(study, "compare", lambda name: name.startswith("further"))
    return Section("At other ratios", text, as_table(["method", *map(str, study.scale.further)], rows), steps)


# --- worlds ----------------------------------------------------------------------------------------------------------


def _world(study: ArmsStudy, results: Results, world: str, who: str) -> tuple[ComparisonResult | None, str]:
    return results[study.world_name(world, who)], ARMS[RIVAL if who == FROZEN else who].method


def world_panels(study: ArmsStudy, results: Results) -> list[Panel]:
    """Accuracy at every ratio, and that of `order`, which asks for most, at the smallest."""
    worlds = [world for world in study.scale.worlds if world.isdigit()]

    def panel(ratio: float, family: str | None) -> Panel:
        lines: dict[str, Seeds] = {}
        for who, name in [*_MAIN.items(), (DENSE, "every token, frozen")]:
            points = []
            for world in worlds:
                result, method = _world(study, results, world, FROZEN if who == DENSE else who)
                right = _right(result, DENSE if who == DENSE else f"{method}@{ratio:g}", family)
                points += [(float(world), [100 * fmean(right)])] if right else []
            if points:
                lines[name] = points
        what = f"right in {family}" if family else "accuracy"
        label = f"{what} at {ratio:.0%} of the tokens (%)"
        return Panel("distractors in every frame", label, lines, [float(world) for world in worlds])

    return [*(panel(ratio, None) for ratio in study.scale.ratios), panel(min(study.scale.ratios), "order")]


def _right(result: ComparisonResult | None, cell: str, family: str | None) -> list[bool]:
    records = [record for record in result.records if family in (None, record.family)] if result else []
    return [record.outcomes[cell].correct for record in records if cell in record.outcomes]


def worlds_section(study: ArmsStudy, results: Results, out: Path) -> Section:
    head = ["distractors a frame", "every token, frozen"]
    for ratio in study.scale.ratios:
        head += [
            f"{name.partition(',')[0]}{', frozen' if who == FROZEN else ''} at {ratio:g}" for who, name in _MAIN.items()
        ]
        head.append(f"teacher minus evs at {ratio:g}")
    rows = []
    for world in study.scale.worlds:
        title = world if world.isdigit() else f"{world} world"
        row = [title, percent(find_row(_world(study, results, world, FROZEN)[0], DENSE))]
        for ratio in study.scale.ratios:
            for who in _MAIN:
                result, method = _world(study, results, world, who)
                found, families = find_row(result, method, ratio), by_families([result], f"{method}@{ratio:g}")
                row.append(f"{percent(found).split()[0]}; {families}; {_kept(found)}" if found else NOT_RUN)
            ours, rival = (_world(study, results, world, who) for who in (OURS, RIVAL))
            row.append(paired_points([ours[0]], f"{ours[1]}@{ratio:g}", rival[0], f"{rival[1]}@{ratio:g}"))
        rows.append(row)
    text = (
        "The models of the first seed, fine-tuned among 3 to 5 distractors, on the same scenes with none to five, on "
        "clips of `--scale cpu`, and with a background that shakes (by up to 2 pixels) or drifts (by 1 a frame) or an "
        "exposure that flickers (by up to 20 %); nothing is fine-tuned anew. Percent right; in count / flash / order; "
        "evidence / distractors kept. The last column is paired by question, in points."
    )
    shown = write_figure(out / "worlds.png", world_panels(study, results), "accuracy as distractors grow")
    text = "\n\n".join([text, *shown])
    steps = [*steps_of(study, "data", lambda name: name.startswith("world")),
             *steps_of(study, "compare", lambda name: name.startswith("world"))]  # fmt: skip
    return Section("As distractors grow, and in other worlds", text, as_table(head, rows), steps)


def scaling_section(study: ArmsStudy, results: Results) -> Section:
    """More frames of long clips at the tokens of 16 dense ones."""
    names = _MAIN | {arm: ARMS[arm].title for arm in OF_MORE_FRAMES}
    head = ["frames", "tokens kept", "every token, frozen", *names.values(), "the last two, teacher minus evs"]
    rows = []
    for frames in study.scale.frames:
        ratio = study.scaling_ratio(frames)
        found = {who: results[study.scaling_name(frames, who)] for who in names}
        methods = {who: ARMS[RIVAL if who == FROZEN else who].method for who in names}
        right = (percent(find_row(found[who], methods[who], ratio)) for who in names)
        ours, rival = ((found[who], f"{methods[who]}@{ratio:g}") for who in OF_MORE_FRAMES)
        minus = paired_points([ours[0]], ours[1], *rival)
        rows.append([str(frames), f"{ratio:.0%}", percent(find_row(found[FROZEN], DENSE)), *right, minus])
    text = (
        f"{study.scale.num_long} clips of 30 s to 5 min, models of the first seed. Every column but `every token` "
        "spends the tokens of 16 frames."
    )
    steps = steps_of(study, "compare", lambda name: name.startswith("long-"))
    return Section("More frames at equal tokens", text, as_table(head, rows), steps)


def _kept(row: Row) -> str:
    shares = (row.evidence_kept, row.distractors_kept)
    return " / ".join("-" if share is None else f"{100 * share:.0f}" for share in shares)
