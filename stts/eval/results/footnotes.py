"""What the numbers of a comparison rest on, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from stts.eval.answering.cell import DENSE, Cell
from stts.metrics.accuracy import note_on_videos, paired_difference

if TYPE_CHECKING:
    from stts.eval.results.result import ComparisonResult


def title_of(result: ComparisonResult) -> str:
    """What was asked, in a line."""
    first = next(row for row in result.rows if row.method == DENSE)
    config = result.config
    return (
        f"{config['name']}: {first.num_samples} questions on {first.num_videos} videos, "
        f"{', '.join(map(str, result.frames))} frames "
        f"({config['sampler']})"
    )


def interval(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    """In percent, such as "66.7 [42.0, 85.1]"; sign "+" for differences."""
    if value is None:
        return "-"
    if low is None or high is None:  # all questions are about one video: a note under the table says so
        return f"{100 * value:{sign}.1f} [-]"
    return f"{100 * value:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def _notes_on_trained(result: ComparisonResult) -> list[str]:
    """Which folders stand behind the names of --trained, and the first of them against each of the others."""
    trained = result.config.get("trained") or {}
    if not trained:
        return []
    folders = ", ".join(f"{name} = {folder}" for name, folder in trained.items())
    notes = [f"Fine-tuned, each with the pruner that its folder records: {folders}."]
    first, *others = trained
    for other in others:
        found = [text for cell in result.cells if cell.method == first if (text := _against(result, cell, other))]
        if found:
            notes.append(f"{first} minus {other}, paired over all questions, in points: {'; '.join(found)}.")
    return notes


def _against(result: ComparisonResult, cell: Cell, other: str) -> str:
    """What a cell has over the one of `other` at the same budget; "" where one of the two was not run."""
    theirs = replace(cell, method=other).key
    both = [record for record in result.records if cell.key in record.outcomes and theirs in record.outcomes]
    if not both:
        return ""
    ours, rival = ([record.outcomes[key].correct for record in both] for key in (cell.key, theirs))
    found = paired_difference(ours, rival, [f"{record.task}/{record.video}" for record in both])
    frames = f" of {cell.num_frames} frames" if result.has_points else ""
    return f"{interval(found.value, found.low, found.high, '+')} at {cell.retention_configured:g}{frames}"


def _notes_on_evidence(result: ComparisonResult) -> list[str]:
    if all(row.evidence_kept is None for row in result.rows):
        return []
    return [
        "Evidence, distractors: what is kept of the tokens that show things which come and go, and of those that show "
        "what no question is about, by the labels beside clips; beyond the first frame, after a method's last stage."
    ]


def notes_on(result: ComparisonResult) -> list[str]:
    """What the numbers rest on, a line each."""
    timed = max((row.num_timed_batches for row in result.rows), default=0)
    where = f"{result.environment['device']}, {result.environment['dtype']}"
    notes = [
        f"Positions of surviving tokens: {_positions(result)}.",
        "95 % intervals, clustered by video; vs dense is paired, in points.",
        *_notes_on_trained(result),
        *_notes_on_evidence(result),
        *_notes_on_points(result),
        *_notes_on_videos(result),
        "FLOPs: formula `exact` (2 per multiply-add), mean per video, text tokens not counted; total adds patch "
        "embedding and connector.",
        *_notes_on_tasks(result),
        f"ms/sample: generate, median of {timed} full batches of {result.config['batch_size']} after one to warm up; "
        f"{where}."
        if timed
        else "ms/sample: no full batch after the one to warm up, so nothing was timed.",
        *_notes_on_phases(result),
        *_notes_on_counts(result),
        *_notes_on_methods(result),
    ]
    unparsed = sorted((row for row in result.rows if row.num_unparsed), key=lambda row: -(row.num_unparsed or 0))
    if unparsed:
        most = _five([f"{row.method} {row.retention_configured:g}: {row.num_unparsed}" for row in unparsed])
        notes.append(f"Answers that could not be parsed (counted as wrong): {most}.")
    if result.skipped:
        names = ", ".join(item["uid"] for item in result.skipped[:5]) + (", ..." if len(result.skipped) > 5 else "")
        notes.append(f"Skipped, video not readable: {len(result.skipped)} ({names}); reasons in comparison.json.")
    refused: dict[tuple[float, str], list[str]] = {}
    for row in result.rows:
        if row.reason is not None:
            refused.setdefault((row.retention_configured, row.reason), []).append(row.method)
    notes += [f"Not run at {ratio:g}: {_names(names)}: {reason}" for (ratio, reason), names in refused.items()]
    return notes


def _notes_on_videos(result: ComparisonResult) -> list[str]:
    """Where the videos are too few for an interval or a small p-value."""
    counts = dict.fromkeys(task["num_videos"] for row in result.rows for task in row.tasks.values())
    return [note for note in map(note_on_videos, counts) if note]


def _notes_on_points(result: ComparisonResult) -> list[str]:
    config, notes = result.config, []
    if len(result.frames) > 1:
        notes.append(
            f"vs first dense, of dense: with dense at {result.frames[0]} frames on the same questions. tokens: visual "
            "tokens at the first layer of the LLM; equal tokens are not equal FLOPs, the tower sees every frame."
        )
    if config.get("budget") is not None:
        notes.append("With --budget, kept is the ratio of the first video; every video has its own.")
    if any(cell.parts > 1 for cell in result.cells):
        row = "one packed row" if config["packed"] else "a pass each"
        notes.append(
            f"Frames as 4 x 16: 4 interleaved parts of 16, {row}; their options are scored and put together by "
            f"{config['vote']}; costs, tokens and times are sums over the parts."
        )
    if config.get("chunk_frames"):
        notes.append(
            f"The tower ran on {config['chunk_frames']} frames at a time; the blocks before the choice of a learned "
            "pruner ran twice, which the FLOPs leave out."
        )
    return notes


def _positions(result: ComparisonResult) -> str:
    users: dict[str, list[str]] = {}
    for cell in result.cells:
        if cell.positions:
            users.setdefault(cell.positions, []).append(cell.title)
    if not users:  # nothing was pruned, or a file of before cells said it
        return result.config["positions"] or "as each pruner declares"
    return "; ".join(users) if len(users) == 1 else "; ".join(f"{at}: {_names(names)}" for at, names in users.items())


def _notes_on_tasks(result: ComparisonResult) -> list[str]:
    notes = list(result.notes)
    scoring = result.config.get("scoring", "strict")
    if scoring != "strict":
        notes.append(f"Answers were read as other scorers do (--scoring {scoring}), not strictly.")
    if len(result.tasks) > 1:
        notes += [
            "A task's column is the number it is known by; mean and suites are unweighted means of those, retained is "
            "the mean over that of dense. accuracy and vs dense: micro accuracy, meaned over tasks.",
        ]
    reference = {row.equal_flops_to for row in result.rows if row.equal_flops_to}
    if reference:
        notes.append(
            f"Rows with equal FLOPs: kept was solved so that ViT, connector, LLM and the pruner's own work together "
            f"cost what {_names(sorted(reference))} costs; see total for what was measured."
        )
    return notes


def _notes_on_phases(result: ComparisonResult) -> list[str]:
    if not any(row.time_ms for row in result.rows):
        return []
    return [
        "Phases: ttft = vit + prune + connect + prefill, what papers report; ttft_e2e adds reading the video and "
        "preprocessing it, which every method of a batch shares."
    ]


def _notes_on_counts(result: ComparisonResult) -> list[str]:
    run = [row for row in result.rows if row.retention_measured is not None]
    notes = []
    inside = [row.method for row in run if (row.retention_at_entry or 0) - (row.retention_measured or 0) > 1e-9]
    if inside:
        notes.append(
            "measured and tokens/frame are means over the LLM's layers (equivalent retention): "
            f"{_names(inside)} drop tokens inside the LLM, whose first layers see more."
        )
    if not result.config["exact"]:
        notes.append("Counts are each release's own (--exact false): budgets are not equal, compare at `measured`.")
        varying = [row for row in run if f"{row.retention_p5:.3f}" != f"{row.retention_p95:.3f}"]
        varying.sort(key=lambda row: (row.retention_p5 or 0) - (row.retention_p95 or 0))
        if varying:
            ranges = [
                f"{row.method} {row.retention_configured:g}: {row.retention_p5:.3f} to {row.retention_p95:.3f}"
                for row in varying
            ]
            notes.append(f"measured varies by video (5th to 95th percentile): {_five(ranges)}.")
    return notes


def _notes_on_methods(result: ComparisonResult) -> list[str]:
    """Options that were set, and what signals were made from: one line per signal and source."""
    notes = []
    options = [
        f"{name} {', '.join(f'{key}={value}' for key, value in values.items())}"
        for name, values in result.config["pruner_options"].items()
    ]
    if options:
        notes.append(f"Options: {'; '.join(options)}.")
    users: dict[tuple[str, str], list[str]] = {}
    for row in result.rows:
        for signal in row.signals.items():
            users.setdefault(signal, []).append(row.method)
    notes += [f"Signal {signal} of {_names(methods)}: {source}." for (signal, source), methods in users.items()]
    return notes


def _names(methods: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(methods))


def _five(texts: Sequence[str]) -> str:
    rest = f", and {len(texts) - 5} more rows in comparison.csv" if len(texts) > 5 else ""
    return ", ".join(texts[:5]) + rest
