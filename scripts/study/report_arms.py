"""The page of a study with arms: what each way of choosing tokens answers, and what it keeps of the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from arms import ARMS, OURS, RIVAL, TRAINED_AT, ArmsStudy
from cells import (
    NOT_RUN,
    Results,
    best_frozen,
    by_families,
    find_row,
    paired_points,
    percent,
    read_comparison,
    spread,
)
from report import Section, as_table, dense_and_controls, steps_of, write_page
from report_worlds import further_section, retention_panels, scaling_section, worlds_section, write_figure

from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import DENSE, Row


def write_arms(study: ArmsStudy, out: Path) -> Path:
    """README.md in `out`, the finding first, and the commands beside it."""
    results = {step.name: read_comparison(step.done) for step in study.steps() if step.done.name == "comparison.json"}
    sections = [_at_equal_tokens(study, results), _paired(study, results), _families(study, results)]
    sections.append(dense_and_controls(study, results))
    begin = [f"# {study.scale.title}", *_finding(study, results)]
    if study.scale.further:
        sections.append(further_section(study, results))
        begin += write_figure(out / "retention.png", retention_panels(study, results), "accuracy and evidence kept")
    if study.scale.worlds:
        sections.append(worlds_section(study, results, out))
    if study.scale.frames:
        sections.append(scaling_section(study, results))
    return write_page(study, out, begin, sections)


def _runs(study: ArmsStudy, results: Results, arm: str) -> list[ComparisonResult]:
    found = (results[study.run_name(arm, seed)] for seed in study.seeds(arm))
    return [result for result in found if result is not None]


def _rows(study: ArmsStudy, results: Results, arm: str, ratio: float) -> list[Row]:
    rows = (find_row(result, ARMS[arm].method, ratio) for result in _runs(study, results, arm))
    return [row for row in rows if row is not None and row.accuracy is not None]


def _minus(study: ArmsStudy, results: Results, arm: str, other: str, ratio: float) -> str:
    """Paired by question and seed, in points; `other` is an arm, or a cell of the frozen comparison."""
    cell = f"{ARMS[arm].method}@{ratio:g}"
    if other not in ARMS:
        return paired_points(_runs(study, results, arm), cell, results["frozen"], other)
    their_cell = f"{ARMS[other].method}@{ratio:g}"
    found = [
        paired_points([results[study.run_name(arm, seed)]], cell, results[study.run_name(other, seed)], their_cell)
        for seed in study.seeds(arm)
        if seed in study.seeds(other)
    ]
    return "; ".join(found)


def _finding(study: ArmsStudy, results: Results) -> list[str]:
    """In few sentences."""
    if results["frozen"] is None or not all(_runs(study, results, arm) for arm in (OURS, RIVAL, "stts")):
        return []
    lines = _in_pairs(study, results, ("teacher-longer", "evs-longer"), "Fine-tuned at 25% for 480 steps, STTS with")
    for ratio in study.scale.ratios:
        ours, rule, plain = (_rows(study, results, arm, ratio) for arm in (OURS, RIVAL, "stts"))
        best = best_frozen(study, results, ratio)
        lines.append(
            f"After 160 steps STTS with the teacher answers **{spread(ours).split()[0]} %** at {ratio:.0%}, the rule "
            f"fine-tuned likewise {spread(rule).split()[0]} %, STTS as published {spread(plain).split()[0]} %, the "
            f"best frozen pruner ({best.method if best else '-'}) {percent(best).split()[0]} %; teacher minus rule, in "
            f"points, by seed: {_minus(study, results, OURS, RIVAL, ratio)}."
        )
    elastic = "teacher-elastic-even", "evs-elastic-even"
    lines += _in_pairs(study, results, elastic, "Fine-tuned at ratios from 0.1 to 0.5 for 209 steps,")
    kept = [", ".join(_share(rows, name) for rows in (ours, rule, plain)) for name in ("evidence", "distractors")]
    distractors = "" if "-" in kept[1] else f", and of the distractors {kept[1]} %"
    lines.append(
        f"At {ratio:.0%} the teacher's scorer, the rule and STTS as published keep, in this order, {kept[0]} % of the "
        f"evidence{distractors}."
    )
    number = len(study.scale.seeds)
    lines.append(
        f"On every token the VLM answers {percent(find_row(results['frozen'], DENSE))} % before fine-tuning; "
        f"{'one seed' if number == 1 else f'{number} seeds'}, a VLM of 0.9 M parameters, one synthetic world: "
        "[how to read it](reading.md), and what has not been run."
    )
    return ["\n".join(f"* {line}" for line in lines)]


def _in_pairs(study: ArmsStudy, results: Results, arms: tuple[str, str], words: str) -> list[str]:
    """What the teacher and the rule answer at every ratio at which both were compared, as means of their seeds, and
    their paired difference, by seed."""
    told = []
    for ratio in study.scale.further:
        rows = [_rows(study, results, arm, ratio) for arm in arms if arm in study.scale.arms]
        if len(rows) == len(arms) and all(rows):
            means = (spread(found).split()[0] for found in rows)
            told.append(f"{' and '.join(means)} % at {ratio:.0%} ({_minus(study, results, *arms, ratio)})")
    return [f"{words} the teacher and the rule `{ARMS[RIVAL].method}` answer {', '.join(told)}."] if told else []


def _share(rows: Sequence[Row | None], name: str) -> str:
    values = [getattr(row, f"{name}_kept") for row in rows if row is not None]
    known = [100 * value for value in values if value is not None]
    return f"{fmean(known):.1f}" if known else "-" if rows else NOT_RUN


def _at_equal_tokens(study: ArmsStudy, results: Results) -> Section:
    frozen, ratios = results["frozen"], study.scale.ratios
    rows = [["every token", *(part for _ in ratios for part in (percent(find_row(frozen, DENSE)), "100.0", "100.0"))]]

    def line(title: str, found: Iterable[list[Row]]) -> list[str]:
        parts = ((spread(rows), _share(rows, "evidence"), _share(rows, "distractors")) for rows in found)
        return [title, *(part for three in parts for part in three)]

    for arm in study.scale.arms:
        rows.append(line(f"**{ARMS[arm].title}**", (_rows(study, results, arm, ratio) for ratio in ratios)))
    for name in study.scale.pruners:
        found = (find_row(frozen, name, ratio) for ratio in ratios)
        rows.append(line(name, ([] if row is None else [row] for row in found)))
    head = [f"{name}{ratio:g}" for ratio in ratios for name in ("", "evidence kept at ", "distractors kept at ")]
    text = (
        f"In bold what was fine-tuned at {TRAINED_AT:g}, all on the same clips and, unless a row says "
        "otherwise, for 160 steps; below it pruners "
        "on the VLM as it is. Evidence and distractors in percent of their cells beyond the first frame."
    )
    apart = ("one_frame", "nothing", "world-", "further-", "long-")
    steps = [*steps_of(study, "finetune"), *steps_of(study, "compare", lambda name: not name.startswith(apart))]
    return Section("Accuracy and evidence at equal tokens", text, as_table(["method", *head], rows), steps)


def _paired(study: ArmsStudy, results: Results) -> Section:
    others = {RIVAL: "the rule", OURS: "the teacher", "stts": "as published", DENSE: "every token"}
    head, rows = [f"minus {name} at {ratio:g}" for name in others.values() for ratio in study.scale.ratios], []
    for arm in study.scale.arms:
        pairs = ((other, ratio) for other in others for ratio in study.scale.ratios)
        cells = ("" if arm == other else _minus(study, results, arm, other, ratio) for other, ratio in pairs)
        rows.append([f"**{ARMS[arm].title}**", *cells])
    text = "In points, by question and seed; every token is that of the VLM before fine-tuning."
    return Section("Paired differences", text, as_table(["method", *head], rows))


def _families(study: ArmsStudy, results: Results) -> Section:
    frozen, ratios = results["frozen"], study.scale.ratios
    rows = [["every token", *[by_families([frozen], DENSE)] * len(ratios)]]
    for arm in study.scale.arms:
        method = ARMS[arm].method
        cells = (by_families(_runs(study, results, arm), f"{method}@{ratio:g}") for ratio in ratios)
        rows.append([f"**{ARMS[arm].title}**", *cells])
    for name in study.scale.pruners:
        rows.append([name, *(by_families([frozen], f"{name}@{ratio:g}") for ratio in ratios)])
    names = " / ".join(sorted({record.family for record in frozen.records})) if frozen else NOT_RUN
    text = f"Percent right in {names}; mean over seeds where there are several."
    return Section("By family", text, as_table(["method", *map(str, ratios)], rows))
