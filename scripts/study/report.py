"""Tables and plots of the study, from the comparisons that have been run; "not run" stands where one has not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from cells import (
    NOT_RUN,
    Results,
    at_share,
    best_frozen,
    by_families,
    find_row,
    flops_curves,
    lead_over_frozen,
    learned_rows,
    only_row,
    paired_points,
    percent,
    read_comparison,
    share_right,
    spread,
)
from plots import draw_retention, draw_scaling
from steps import Step, Study

from stts.data.shapes.scene import OPTIONS
from stts.eval.results.table import DENSE, Row
from stts.files import write_whole

COMMANDS = "commands.md"


def write_report(study: Study, out: Path) -> Path:
    """README.md and its plots in `out`, the finding first, and `COMMANDS`, the commands behind each section."""
    results = {step.name: read_comparison(step.done) for step in study.steps() if step.done.name == "comparison.json"}
    sections = [dense_and_controls(study, results), _equal_tokens(study, results, out), _by_family(study, results),
                _equal_flops(study, results)]  # fmt: skip
    if study.scale.ablations:
        sections.append(_ablations(study, results))
    if study.scale.frames:
        sections.append(_scaling(study, results, out))
    return write_page(study, out, [_TITLE, *_other_worlds(out), *_finding(study, results)], sections)


def write_page(study: Study, out: Path, begin: Sequence[str], sections: Sequence[Section]) -> Path:
    """`begin`, title and finding, above the sections; and beside it the commands."""
    head = _HEAD.format(command=study.command, runs=study.runs)
    parts = [*begin, head, *(section.shown for section in sections)]
    others = sorted({*out.glob("*.md"), *out.glob("*/README.md")} - {out / "README.md", out / COMMANDS})
    if others:
        links = (path.relative_to(out) for path in others)
        shown = [f"* [{link.stem if link.stem != 'README' else link.parent}]({link})" for link in links]
        parts.append("## Also here\n\n" + "\n".join(shown))
    write_whole(out / "README.md", ("\n\n".join(parts) + "\n").encode())
    commands = [_COMMANDS_HEAD, *(section.commands for section in sections if section.steps)]
    write_whole(out / COMMANDS, ("\n\n".join(commands) + "\n").encode())
    return out / "README.md"


def _other_worlds(out: Path) -> list[str]:
    """What the pages of the worlds with distractors say first, with their figures, and a title for what follows."""
    parts = []
    for scale in ("frozen_tower", "distractors"):
        page = out / scale / "README.md"
        if page.exists():
            title, rest = page.read_text(encoding="utf-8").split("\n", 1)
            first = re.sub(r"\]\((?=[\w.]+\))", f"]({scale}/", rest.partition("\nMade by ")[0].strip())
            parts += [f"#{title}", first]
    return [*parts, "## Where change is what matters"] if parts else []


def _finding(study: Study, results: Results) -> list[str]:
    """What the tables say, in a few sentences made of their numbers; nothing before the main rows have been run."""
    frozen, rival = results["frozen"], results[study.rival]
    elastic = [results[f"stts-elastic-s{seed}"] for seed in study.scale.seeds]
    ratios = [0.5, min(study.scale.ratios)]
    if frozen is None or rival is None or not all(elastic):
        return []
    dense = percent(find_row(frozen, DENSE)).split()[0]
    lines, against = [], []
    for ratio in ratios:
        best, ours = best_frozen(study, results, ratio), learned_rows(study, results, "stts-elastic", ratio)
        if best is not None:
            lines.append(
                f"At {ratio:.0%} of the tokens the VLM fine-tuned with STTS answers **{spread(ours).split()[0]} %**; "
                f"with the best of {len(study.scale.pruners)} frozen pruners ({best.method}) the pretrained one "
                f"answers {percent(best).split()[0]} %, and on every token {dense} %."
            )
        rule = find_row(rival, "novelty", ratio)
        kept = " and ".join(f"{100 * (row.retention_measured or 0):.1f} %" for row in (ours[0], rule) if row)
        over = paired_points(elastic, f"stts@{ratio:g}", rival, f"novelty@{ratio:g}")
        against.append(f"{over} at {ratio:.0%} (kept: {kept})")
    lines.append(
        "The rival that counts is a fixed rule (`novelty`: keep what changed), fine-tuned in the same way. STTS minus "
        f"the rule, in points: {', '.join(against)}."
    )
    cheapest = {name: min(curve) for name, curve in flops_curves(study, results).items() if curve}
    name = min(cheapest, key=lambda name: cheapest[name])
    lines.append(f"The lowest cost that a method reaches is that of {name}: {100 * cheapest[name][1]:.1f} % right at "
                 f"{cheapest[name][0]:.0%} of the dense FLOPs.")  # fmt: skip
    if study.scale.frames and (long := _only_long(study, results)):
        lines.append(long)
    lines.append("ShapesQA is a small synthetic world: what separates methods here says nothing about Video-MME.")
    lines.append("Why, and what failed: [how to read it](reading.md).")
    return ["\n".join(f"* {line}" for line in lines)]


def _only_long(study: Study, results: Results) -> str:
    """What the largest number of frames brings at the tokens of 16 dense ones."""
    most, dense = max(study.scale.frames), find_row(results["long-frozen-16"], DENSE)
    row = only_row(results[f"long-{study.long}-{most}"], "stts")
    if row is None or dense is None:
        return ""
    return (
        f"More frames at equal tokens: at the token count of 16 frames, STTS on {most} frames, trained on as many, "
        f"answers {percent(row)} %; 16 dense frames {percent(dense)} %."
    )


_TITLE = "# Does learning the scores pay?"
_HEAD = """Made by `{command}` (its first lines describe the stages) from the
comparisons under `{runs}`: [every command](commands.md). "not run" stands where a step has not been
run, "-" where a method cannot reach a budget or a model was not trained for it. Accuracies in percent with 95 %
intervals clustered by video; where there are several seeds, their mean and range."""
_COMMANDS_HEAD = """# The commands behind the tables

One step a line, from the root of the repository, by section of [the page](README.md)."""


@dataclass(frozen=True)
class Section:
    """A part of the page, and the steps it was made by."""

    title: str
    text: str
    table: str
    steps: Sequence[Step] = ()

    @property
    def shown(self) -> str:
        return f"## {self.title}\n\n{self.text}\n\n{self.table}"

    @property
    def commands(self) -> str:
        lines = "\n".join(step.command for step in self.steps)
        return f"## {self.title}\n\n```bash\n{lines}\n```"


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def steps_of(study: Study, stage: str, keep: Callable[[str], bool] = lambda name: True) -> list[Step]:
    return [step for step in study.steps() if step.stage == stage and keep(step.name)]


# --- sections --------------------------------------------------------------------------------------------------------


def dense_and_controls(study: Study, results: Results) -> Section:
    shown = {"every token": "frozen", "single frame": "one_frame", "question only": "nothing"}
    families = sorted({record.family for result in results.values() if result for record in result.records})
    rows = []
    for title, name in shown.items():
        result = results[name]
        by_family = [share_right(result, family) for family in families]
        rows.append([title, percent(find_row(result, DENSE)), *by_family])
    chance = [1 / len(OPTIONS[family]) for family in families]
    rows.append(["chance", f"{100 * fmean(chance):.1f}" if chance else "-", *(f"{100 * one:.1f}" for one in chance)])
    which = f"`{study.scale.given}`" if study.scale.given else "pretrained by [these commands](commands.md)"
    text = (
        f"The dense model ({which}) on the test clips; the same questions on clips frozen at their middle frame, and "
        "on the background alone. Chance is unweighted over families."
    )
    steps = [*steps_of(study, "data", lambda n: n.startswith("test")), *steps_of(study, "pretrain"),
             *steps_of(study, "compare", lambda name: name in shown.values())]  # fmt: skip
    return Section("The dense model and its controls", text, as_table(["shown", "all", *families], rows), steps)


def _equal_tokens(study: Study, results: Results, out: Path) -> Section:
    ratios, frozen = study.scale.ratios, results["frozen"]
    rows = [["dense", *[percent(find_row(frozen, DENSE))] * len(ratios)]]
    behind = []
    for name in study.learned():
        values = [learned_rows(study, results, name, ratio) for ratio in ratios]
        trained = [name.split("-")[1] in ("elastic", str(ratio)) for ratio in ratios]
        cells = [spread(found) if asked else "-" for found, asked in zip(values, trained, strict=True)]
        rows.append([f"{name} (learned)", *cells])
        runs = [results[f"{name}-s{seed}"] for seed in study.scale.seeds]
        paired = [paired_points(runs, f"stts@{ratio:g}", frozen, DENSE) if asked else "-"
                  for ratio, asked in zip(ratios, trained, strict=True)]  # fmt: skip
        behind.append([f"{name} minus dense", *paired])
    rival, elastic = results[study.rival], [results[f"stts-elastic-s{seed}"] for seed in study.scale.seeds]
    likewise = (percent(find_row(rival, "novelty", ratio)) for ratio in ratios)
    rows.append([f"{study.rival} (a rule, likewise)", *likewise])
    rows += [[name, *(percent(find_row(frozen, name, ratio)) for ratio in ratios)] for name in study.scale.pruners]
    over = [paired_points(elastic, f"stts@{ratio:g}", rival, f"novelty@{ratio:g}") for ratio in ratios]
    rows += [*behind, [f"stts-elastic minus {study.rival}", *over]]
    rows += [["stts-elastic minus the best frozen", *(lead_over_frozen(study, results, ratio) for ratio in ratios)]]
    for name, result, method in (("stts-elastic", elastic[0], "stts"), (study.rival, rival, "novelty")):
        found = [find_row(result, method, ratio) for ratio in ratios]
        rows.append([f"% kept, {name}", *(f"{100 * (row.retention_measured or 0):.1f}" if row else NOT_RUN
                                          for row in found)])  # fmt: skip
    text = (
        "Frozen pruners run on the dense model, `stts` on the models fine-tuned with it. The last rows are paired by "
        "question, in points, and pool the seeds: the best frozen method is picked on these questions, in its favour. "
        "Where a ratio does not come out even, methods round differently, by about a token (`% kept`), which "
        "matters where tokens are few ([reading](reading.md))."
    )
    if frozen is not None:
        write_whole(out / "retention.png", draw_retention(*_retention_curves(study, results)))
        text += "\n\n![accuracy over retention](retention.png)"
    steps = [*steps_of(study, "finetune"), *steps_of(study, "compare", lambda n: n not in ("one_frame", "nothing"))]
    return Section("Accuracy at equal tokens", text, as_table(["method", *map(str, ratios)], rows), steps)


def _by_family(study: Study, results: Results) -> Section:
    """Where the points of the table above are lost."""
    ratios, frozen = study.scale.ratios, results["frozen"]
    lines = [("dense", [frozen], DENSE)]
    for name in study.learned():
        lines.append((f"{name} (learned)", [results[f"{name}-s{seed}"] for seed in study.scale.seeds], "stts"))
    lines.append((f"{study.rival} (a rule, likewise)", [results[study.rival]], "novelty"))
    lines += [(name, [frozen], name) for name in study.scale.pruners]
    rows = [
        [title, *(by_families(runs, DENSE if method == DENSE else f"{method}@{ratio:g}") for ratio in ratios)]
        for title, runs, method in lines
    ]
    names = " / ".join(sorted({record.family for record in frozen.records})) if frozen else NOT_RUN
    text = f"Percent right in {names}; mean over seeds where there are several. From the comparisons above."
    return Section("By family", text, as_table(["method", *map(str, ratios)], rows))


def _equal_flops(study: Study, results: Results) -> Section:
    """Accuracy interpolated between measured ratios at given shares of the dense FLOPs."""
    shares = (0.4, 0.5, 0.6, 0.7, 0.8)
    rows = [
        [name, *(at_share(curve, share) for share in shares)] for name, curve in flops_curves(study, results).items()
    ]
    text = (
        "Share of the dense model's FLOPs (ViT, pruner, connector and LLM), by linear interpolation between the ratios "
        'measured above; "-" outside of them. Methods that drop before or in the LLM pay the whole ViT.'
    )
    table = as_table(["method", *(f"{share:.0%}" for share in shares)], rows)
    return Section("Accuracy at equal FLOPs", text, table)


def _ablations(study: Study, results: Results) -> Section:
    whole = results[f"stts-0.5-s{study.scale.seeds[0]}"]
    half = results.get(study.ablated(study.shorter)[0]) if study.scale.ablate else whole
    rows = [["STTS at 0.5", percent(find_row(whole, "stts", 0.5)), by_families([whole], "stts@0.5"), "-",
             percent(find_row(whole, DENSE))]]  # fmt: skip
    for name in study.scale.ablations:
        folder, method = study.ablated(name)
        result, base = results[folder], whole if name in study.controls else half
        cell = DENSE if name.startswith("dense") else f"{method}@0.5"
        pruned = "-" if cell == DENSE else percent(find_row(result, method, 0.5))
        rows.append([name, pruned, by_families([result], cell), paired_points([result], cell, base, "stts@0.5"),
                     percent(find_row(result, DENSE))])  # fmt: skip
    families = "/".join(sorted({record.family for record in whole.records})) if whole else "by family"
    text = (
        "One thing changed at a time, one seed; `minus` is paired with STTS at 0.5 by question, in points; the last "
        "column is the same fine-tuned model on every token."
    )
    if study.scale.ablate:
        text += f" Rows below `{study.shorter}` are as long as that, and paired with it."
    head = ["fine-tuned", "at 0.5", families, "minus", "dense"]
    return Section("Ablations", text, as_table(head, rows), steps_of(study, "ablation"))


def _scaling(study: Study, results: Results, out: Path) -> Section:
    frames = study.scale.frames
    frozen = [results[f"long-frozen-{count}"] for count in frames]
    lines: dict[str, list[Row | None]] = {"dense (every token)": [find_row(result, DENSE) for result in frozen]}
    if f"long-likewise-{frames[0]}" in results:
        lines["dense, fine-tuned likewise"] = [find_row(results[f"long-likewise-{count}"], DENSE) for count in frames]
    learned = [*study.learned(), study.long]
    for name in learned:
        lines[f"{name} (learned)"] = [only_row(results[f"long-{name}-{count}"], "stts") for count in frames]
    methods = sorted({row.method for result in frozen if result for row in result.rows if row.kind != "unpruned"})
    lines |= {method: [only_row(result, method) for result in frozen] for method in methods}
    text = (
        "Clips of 30 s to 5 min whose evidence is timed for the largest number of frames. From 16 frames on every "
        "pruned row has the tokens of 16 dense frames; the dense row pays for all of its own. The last rows are paired "
        "by question, in points: STTS at so many frames against dense at 16, which is the same number of tokens. "
        f"`{study.long}` goes on from the elastic model, on clips of {max(frames)} frames at the tokens of 16."
    )
    if any(frozen):
        points = {
            name: [(n, 100 * r.accuracy) for n, r in zip(frames, rows, strict=True) if r and r.accuracy is not None]
            for name, rows in lines.items()
        }
        write_whole(out / "scaling.png", draw_scaling(frames, points))
        text += "\n\n![accuracy over frames](scaling.png)"
    rows = [[name, *map(percent, found)] for name, found in lines.items()]
    for title, rival in (("dense", "frozen"), ("dense, fine-tuned likewise,", "likewise")):
        if f"long-{rival}-16" not in results:
            continue
        for name in learned:
            cells = [
                paired_points([results[f"long-{name}-{count}"]], f"stts@{study.scaling_ratio(count):g}",
                        results[f"long-{rival}-16"], DENSE)
                if count > 16 else "-"
                for count in frames
            ]  # fmt: skip
            rows.append([f"{name} minus {title} at 16 frames", *cells])
    steps = [*steps_of(study, "data", lambda name: name.startswith("long")), *steps_of(study, "scaling")]
    head = ["method", *(f"{count} frames" for count in frames)]
    return Section("More frames at the same tokens", text, as_table(head, rows), steps)


def _retention_curves(
    study: Study, results: Results
) -> tuple[list[tuple[float, list[float]]], dict[str, list[tuple[float, float]]], float | None]:
    """(share kept, percent right of every seed) of the elastic STTS; (share kept, percent right) of the rule and of
    every frozen pruner by name; percent right of dense."""
    seeds = [(ratio, learned_rows(study, results, "stts-elastic", ratio)) for ratio in study.scale.ratios]
    elastic = [(rows[0].retention_measured or ratio, [100 * (row.accuracy or 0) for row in rows])
               for ratio, rows in seeds if rows]  # fmt: skip
    lines = {}
    for name, method in [(study.rival, "novelty"), *((name, name) for name in study.scale.pruners)]:
        rows = [find_row(results["frozen" if name == method else name], method, ratio) for ratio in study.scale.ratios]
        reached = [row for row in rows if row and row.accuracy is not None]
        lines[name] = sorted((row.retention_measured or 0.0, 100 * (row.accuracy or 0)) for row in reached)
    dense = find_row(results["frozen"], DENSE)
    return elastic, lines, None if dense is None else 100 * (dense.accuracy or 0)
