"""Tables and plots of the study, from the comparisons that have been run; "not run" stands where one has not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from steps import Step, Study

from stts.data.shapes.scene import OPTIONS
from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import BEFORE, DENSE, Row
from stts.files import write_whole
from stts.metrics.accuracy import paired_difference

NOT_RUN = "not run"


def write_report(study: Study, out: Path) -> Path:
    """README.md and its plots in `out`, each section with the commands it was made by."""
    results = {step.name: _read(step.done) for step in study.steps() if step.done.name == "comparison.json"}
    parts = [_HEAD.format(command=study.command, runs=study.runs), _pretrained(study, results),
             _equal_tokens(study, results, out), _by_family(study, results), _equal_flops(study, results)]  # fmt: skip
    if study.scale.ablations:
        parts.append(_ablations(study, results))
    if study.scale.frames:
        parts.append(_scaling(study, results, out))
    others = sorted({*out.glob("*.md"), *out.glob("*/README.md")} - {out / "README.md"})
    if others:
        links = (path.relative_to(out) for path in others)
        shown = [f"* [{link.stem if link.stem != 'README' else link.parent}]({link})" for link in links]
        parts.append("## Also here\n\n" + "\n".join(shown))
    write_whole(out / "README.md", "\n\n".join(parts) + "\n")
    return out / "README.md"


_HEAD = """# What the study shows, and what it does not

Made by `{command}` (its first lines describe the stages) from the
comparisons under `{runs}`; "not run" stands where a step has not been run, "-" where a method cannot reach a budget
or a model was not trained for it. ShapesQA is a small synthetic world: what separates methods here says nothing about
Video-MME. Accuracies in percent with 95 % intervals clustered by video; where there are several seeds, their mean and
range."""


def _read(path: Path) -> ComparisonResult | None:
    return ComparisonResult.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _commands(steps: Sequence[Step]) -> str:
    return "```bash\n" + "\n".join(step.command for step in steps) + "\n```"


def _section(title: str, text: str, table: str, steps: Sequence[Step]) -> str:
    return f"## {title}\n\n{text}\n\n{table}\n\n{_commands(steps)}"


def _steps(study: Study, stage: str, keep: Callable[[str], bool] = lambda name: True) -> list[Step]:
    return [step for step in study.steps() if step.stage == stage and keep(step.name)]


def _row(result: ComparisonResult | None, method: str, ratio: float = 1.0) -> Row | None:
    """`method` stands without its label ("our reconstruction")."""
    for row in result.rows if result else ():
        if (
            row.method != BEFORE
            and row.method.split(" (")[0] == method
            and abs(row.retention_configured - ratio) < 1e-6
        ):
            return row
    return None


def _percent(row: Row | None) -> str:
    if row is None:
        return NOT_RUN
    if row.accuracy is None or row.accuracy_low is None or row.accuracy_high is None:
        return "-"
    return f"{100 * row.accuracy:.1f} [{100 * row.accuracy_low:.1f}, {100 * row.accuracy_high:.1f}]"


def _spread(rows: Sequence[Row]) -> str:
    """Mean and range over seeds; of a single one, its interval."""
    if len(rows) < 2:
        return _percent(rows[0]) if rows else NOT_RUN
    values = [100 * (row.accuracy or 0.0) for row in rows]
    return f"{fmean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


# --- sections --------------------------------------------------------------------------------------------------------


def _pretrained(study: Study, results: Mapping[str, ComparisonResult | None]) -> str:
    shown = {"every token": "frozen", "single frame": "one_frame", "question only": "nothing"}
    families = sorted({record.family for result in results.values() if result for record in result.records})
    rows = []
    for title, name in shown.items():
        result = results[name]
        by_family = [_share(result, family) for family in families]
        rows.append([title, _percent(_row(result, DENSE)), *by_family])
    chance = [1 / len(OPTIONS[family]) for family in families]
    rows.append(["chance", f"{100 * fmean(chance):.1f}" if chance else "-", *(f"{100 * one:.1f}" for one in chance)])
    which = f"`{study.scale.given}`" if study.scale.given else "pretrained by the commands below"
    text = (
        f"The dense model ({which}) on the test clips; the same questions on clips frozen at their middle frame, and "
        "on the background alone. Chance is unweighted over families."
    )
    steps = [*_steps(study, "data", lambda n: n.startswith("test")), *_steps(study, "pretrain"),
             *_steps(study, "compare", lambda name: name in shown.values())]  # fmt: skip
    return _section("The dense model and its controls", text, _table(["shown", "all", *families], rows), steps)


def _share(result: ComparisonResult | None, family: str) -> str:
    right = [record.outcomes[DENSE].correct for record in result.records if record.family == family] if result else []
    return f"{100 * fmean(right):.1f}" if right else NOT_RUN


def _learned(study: Study, results: Mapping[str, ComparisonResult | None], name: str, ratio: float) -> list[Row]:
    rows = [_row(results[f"{name}-s{seed}"], "stts", ratio) for seed in study.scale.seeds]
    return [row for row in rows if row is not None and row.accuracy is not None]


def _equal_tokens(study: Study, results: Mapping[str, ComparisonResult | None], out: Path) -> str:
    ratios, frozen = study.scale.ratios, results["frozen"]
    rows = [["dense", *[_percent(_row(frozen, DENSE))] * len(ratios)]]
    behind = []
    for name in study.learned():
        values = [_learned(study, results, name, ratio) for ratio in ratios]
        trained = [name.split("-")[1] in ("elastic", str(ratio)) for ratio in ratios]
        cells = [_spread(found) if asked else "-" for found, asked in zip(values, trained, strict=True)]
        rows.append([f"{name} (learned)", *cells])
        runs = [results[f"{name}-s{seed}"] for seed in study.scale.seeds]
        paired = [_paired(runs, f"stts@{ratio:g}", frozen, DENSE) if asked else "-"
                  for ratio, asked in zip(ratios, trained, strict=True)]  # fmt: skip
        behind.append([f"{name} minus dense", *paired])
    rival, elastic = results[study.rival], [results[f"stts-elastic-s{seed}"] for seed in study.scale.seeds]
    rows.append([f"{study.rival} (a rule, likewise)", *(_percent(_row(rival, "novelty", ratio)) for ratio in ratios)])
    rows += [[name, *(_percent(_row(frozen, name, ratio)) for ratio in ratios)] for name in study.scale.pruners]
    over = [_paired(elastic, f"stts@{ratio:g}", rival, f"novelty@{ratio:g}") for ratio in ratios]
    rows += [*behind, [f"stts-elastic minus {study.rival}", *over]]
    rows += [["stts-elastic minus the best frozen", *(_lead(study, results, ratio) for ratio in ratios)]]
    for name, result, method in (("stts-elastic", elastic[0], "stts"), (study.rival, rival, "novelty")):
        found = [_row(result, method, ratio) for ratio in ratios]
        rows.append([f"% kept, {name}", *(f"{100 * (row.retention_measured or 0):.1f}" if row else NOT_RUN
                                          for row in found)])  # fmt: skip
    text = (
        "Frozen pruners run on the dense model, `stts` on the models fine-tuned with it. The last rows are paired by "
        "question, in points, and pool the seeds: the best frozen method is picked on these questions, in its favour. "
        "Where a ratio does not come out even, methods round differently, by about a token (`% kept`), which "
        "matters where tokens are few ([reading](reading.md))."
    )
    if frozen is not None:
        write_whole(out / "retention.png", _plot_retention(study, results))
        text += "\n\n![accuracy over retention](retention.png)"
    steps = [*_steps(study, "finetune"), *_steps(study, "compare", lambda n: n not in ("one_frame", "nothing"))]
    return _section("Accuracy at equal tokens", text, _table(["method", *map(str, ratios)], rows), steps)


def _lead(study: Study, results: Mapping[str, ComparisonResult | None], ratio: float) -> str:
    """Mean over seeds of the paired difference, with the outermost ends of their intervals."""
    frozen = results["frozen"]
    reached = [row for name in study.scale.pruners if (row := _row(frozen, name, ratio)) and row.accuracy is not None]
    if frozen is None or not reached:
        return NOT_RUN
    best = max(reached, key=lambda row: row.accuracy or 0.0).method.split(" (")[0]
    runs = [results[f"stts-elastic-s{seed}"] for seed in study.scale.seeds]
    return f"{_paired(runs, f'stts@{ratio:g}', frozen, f'{best}@{ratio:g}')} ({best})"


def _paired(runs: Sequence[ComparisonResult | None], cell: str, other: ComparisonResult | None, their_cell: str) -> str:
    """In points, on the same questions: a run's `cell` minus `their_cell` of `other`. Mean over the runs, with the
    outermost ends of their intervals."""
    theirs = {record.uid: record.outcomes[their_cell].correct for record in other.records} if other else {}
    found = []
    for run in runs:
        records = [record for record in run.records if record.uid in theirs] if run else []
        if records:
            ours = [record.outcomes[cell].correct for record in records]
            rival = [theirs[record.uid] for record in records]
            found.append(paired_difference(ours, rival, [record.video for record in records]))
    if not found:
        return NOT_RUN
    value = f"{100 * fmean(one.value for one in found):+.1f}"
    lows, highs = ([end for one in found if (end := getattr(one, side)) is not None] for side in ("low", "high"))
    if not lows:  # too few videos for an interval
        return f"{value} [-]"
    return f"{value} [{100 * min(lows):+.1f}, {100 * max(highs):+.1f}]"


def _by_family(study: Study, results: Mapping[str, ComparisonResult | None]) -> str:
    """Where the points of the table above are lost."""
    ratios, frozen = study.scale.ratios, results["frozen"]
    lines = [("dense", [frozen], DENSE)]
    for name in study.learned():
        lines.append((f"{name} (learned)", [results[f"{name}-s{seed}"] for seed in study.scale.seeds], "stts"))
    lines.append((f"{study.rival} (a rule, likewise)", [results[study.rival]], "novelty"))
    lines += [(name, [frozen], name) for name in study.scale.pruners]
    rows = [
        [title, *(_families(runs, DENSE if method == DENSE else f"{method}@{ratio:g}") for ratio in ratios)]
        for title, runs, method in lines
    ]
    names = " / ".join(sorted({record.family for record in frozen.records})) if frozen else NOT_RUN
    text = f"Percent right in {names}; mean over seeds where there are several. From the comparisons above."
    return f"## By family\n\n{text}\n\n{_table(['method', *map(str, ratios)], rows)}"


def _families(runs: Sequence[ComparisonResult | None], cell: str) -> str:
    """Percent right of every family, in the order of their names; mean over the runs."""
    right: dict[str, list[bool]] = {}
    for record in (record for run in runs if run for record in run.records):
        outcome = record.outcomes.get(cell)
        if outcome is not None:
            right.setdefault(record.family, []).append(outcome.correct)
    if not right:
        return "-" if any(runs) else NOT_RUN
    return " / ".join(f"{100 * fmean(answers):.0f}" for _, answers in sorted(right.items()))


def _equal_flops(study: Study, results: Mapping[str, ComparisonResult | None]) -> str:
    """Accuracy interpolated between measured ratios at given shares of the dense FLOPs."""
    curves = {name: _curve(results["frozen"], name, study.scale.ratios) for name in study.scale.pruners}
    seeds = [_curve(results[f"stts-elastic-s{seed}"], "stts", study.scale.ratios) for seed in study.scale.seeds]
    seeds = [curve for curve in seeds if curve]
    shares = (0.4, 0.5, 0.6, 0.7, 0.8)
    rows = []
    if seeds:
        mean = [(fmean(p[0] for p in points), fmean(p[1] for p in points)) for points in zip(*seeds, strict=True)]
        rows.append(["stts-elastic (learned)", *(_at(mean, share) for share in shares)])
    rival = _curve(results[study.rival], "novelty", study.scale.ratios)
    rows.append([f"{study.rival} (a rule, likewise)", *(_at(rival, share) for share in shares)])
    rows += [[name, *(_at(curve, share) for share in shares)] for name, curve in curves.items()]
    text = (
        "Share of the dense model's FLOPs (ViT, pruner, connector and LLM), by linear interpolation between the ratios "
        'measured above; "-" outside of them. Methods that drop before or in the LLM pay the whole ViT.'
    )
    table = _table(["method", *(f"{share:.0%}" for share in shares)], rows)
    return f"## Accuracy at equal FLOPs\n\n{text}\n\n{table}\n\nFrom the comparisons of the section above."


def _curve(result: ComparisonResult | None, method: str, ratios: Sequence[float]) -> list[tuple[float, float]]:
    rows = [_row(result, method, ratio) for ratio in ratios]
    return sorted((row.flops["exact"]["share"], row.accuracy) for row in rows if row and row.accuracy is not None)


def _at(curve: Sequence[tuple[float, float]], share: float) -> str:
    if not curve:
        return NOT_RUN
    x, y = zip(*curve, strict=True)
    return f"{100 * float(np.interp(share, x, y)):.1f}" if x[0] <= share <= x[-1] else "-"


def _ablations(study: Study, results: Mapping[str, ComparisonResult | None]) -> str:
    whole = results[f"stts-0.5-s{study.scale.seeds[0]}"]
    half = results.get(study.ablated(study.shorter)[0]) if study.scale.ablate else whole
    rows = [["STTS at 0.5", _percent(_row(whole, "stts", 0.5)), _families([whole], "stts@0.5"), "-",
             _percent(_row(whole, DENSE))]]  # fmt: skip
    for name in study.scale.ablations:
        folder, method = study.ablated(name)
        result, base = results[folder], whole if name in study.controls else half
        cell = DENSE if name.startswith("dense") else f"{method}@0.5"
        pruned = "-" if cell == DENSE else _percent(_row(result, method, 0.5))
        rows.append([name, pruned, _families([result], cell), _paired([result], cell, base, "stts@0.5"),
                     _percent(_row(result, DENSE))])  # fmt: skip
    families = "/".join(sorted({record.family for record in whole.records})) if whole else "by family"
    text = (
        "One thing changed at a time, one seed; `minus` is paired with STTS at 0.5 by question, in points; the last "
        "column is the same fine-tuned model on every token."
    )
    if study.scale.ablate:
        text += f" Rows below `{study.shorter}` are as long as that, and paired with it."
    head = ["fine-tuned", "at 0.5", families, "minus", "dense"]
    return _section("Ablations", text, _table(head, rows), _steps(study, "ablation"))


def _scaling(study: Study, results: Mapping[str, ComparisonResult | None], out: Path) -> str:
    frames = study.scale.frames
    frozen = [results[f"long-frozen-{count}"] for count in frames]
    lines: dict[str, list[Row | None]] = {"dense (every token)": [_row(result, DENSE) for result in frozen]}
    if f"long-likewise-{frames[0]}" in results:
        lines["dense, fine-tuned likewise"] = [_row(results[f"long-likewise-{count}"], DENSE) for count in frames]
    learned = [*study.learned(), study.long]
    for name in learned:
        lines[f"{name} (learned)"] = [_only(results[f"long-{name}-{count}"], "stts") for count in frames]
    methods = sorted({row.method for result in frozen if result for row in result.rows if row.kind != "unpruned"})
    lines |= {method: [_only(result, method) for result in frozen] for method in methods}
    text = (
        "Clips of 30 s to 5 min whose evidence is timed for the largest number of frames. From 16 frames on every "
        "pruned row has the tokens of 16 dense frames; the dense row pays for all of its own. The last rows are paired "
        "by question, in points: STTS at so many frames against dense at 16, which is the same number of tokens. "
        f"`{study.long}` goes on from the elastic model, on clips of {max(frames)} frames at the tokens of 16."
    )
    if any(frozen):
        write_whole(out / "scaling.png", _plot_scaling(frames, lines))
        text += "\n\n![accuracy over frames](scaling.png)"
    rows = [[name, *map(_percent, found)] for name, found in lines.items()]
    for title, rival in (("dense", "frozen"), ("dense, fine-tuned likewise,", "likewise")):
        if f"long-{rival}-16" not in results:
            continue
        for name in learned:
            cells = [
                _paired([results[f"long-{name}-{count}"]], f"stts@{study.scaling_ratio(count):g}",
                        results[f"long-{rival}-16"], DENSE)
                if count > 16 else "-"
                for count in frames
            ]  # fmt: skip
            rows.append([f"{name} minus {title} at 16 frames", *cells])
    steps = [*_steps(study, "data", lambda name: name.startswith("long")), *_steps(study, "scaling")]
    head = ["method", *(f"{count} frames" for count in frames)]
    return _section("More frames at the same tokens", text, _table(head, rows), steps)


def _only(result: ComparisonResult | None, method: str) -> Row | None:
    return next((row for row in result.rows if row.method == method), None) if result else None


# --- plots -----------------------------------------------------------------------------------------------------------


def _plot_retention(study: Study, results: Mapping[str, ComparisonResult | None]) -> bytes:
    figure, axes = _axes("share of visual tokens kept")
    ratios = [ratio for ratio in study.scale.ratios if _learned(study, results, "stts-elastic", ratio)]
    found = [[100 * (r.accuracy or 0) for r in _learned(study, results, "stts-elastic", ratio)] for ratio in ratios]
    if found:
        middle = [fmean(values) for values in found]
        ends = [[m - min(v) for m, v in zip(middle, found, strict=True)],
                [max(v) - m for m, v in zip(middle, found, strict=True)]]  # fmt: skip
        kept = [_learned(study, results, "stts-elastic", ratio)[0].retention_measured or ratio for ratio in ratios]
        axes.errorbar(
            kept, middle, ends, color="crimson", marker="o", linewidth=2.5, capsize=3, label="stts-elastic", zorder=5
        )
    lines: list[tuple[str, str, Any, float]] = [(study.rival, "novelty", "black", 2.0)]
    lines += [(name, name, colormaps["tab20"](place % 20), 1.3) for place, name in enumerate(study.scale.pruners)]
    for name, method, colour, width in lines:
        rows = [_row(results["frozen" if name == method else name], method, ratio) for ratio in study.scale.ratios]
        points = sorted((r.retention_measured or 0.0, 100 * r.accuracy) for r in rows if r and r.accuracy is not None)
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", linewidth=width, color=colour, label=name)
    return _finish(figure, axes, results["frozen"])


def _plot_scaling(frames: Sequence[int], lines: Mapping[str, Sequence[Row | None]]) -> bytes:
    figure, axes = _axes("frames")
    learned = cycle((("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")))
    for name, rows in lines.items():
        points = [(n, 100 * r.accuracy) for n, r in zip(frames, rows, strict=True) if r and r.accuracy is not None]
        style: dict[str, Any] = {"linewidth": 1.2, "marker": "."}
        if "learned" in name:
            dashes, marker = next(learned)
            style = {"color": "crimson", "linewidth": 2.2, "linestyle": dashes, "marker": marker}
        if points:
            axes.plot(*zip(*points, strict=True), label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(frames, [str(count) for count in frames])
    return _finish(figure, axes, None)


def _axes(label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy (%)")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Figure, axes: Axes, dense: ComparisonResult | None) -> bytes:
    row = _row(dense, DENSE)
    if row is not None:
        axes.axhline(100 * (row.accuracy or 0), color="#555555", linestyle="--", label="dense")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
