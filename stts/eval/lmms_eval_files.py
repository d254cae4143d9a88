"""The files of one evaluation, as lmms-eval writes them, with our own block in each.

MODEL/DATE_results.json         results by task under "METRIC,none"; "stts": pruner, identity, efficiency, intervals
MODEL/DATE_samples_TASK.jsonl   a line per question; "stts": uid, frames, what was kept, how the answer was read
MODEL/DATE_submission_TASK.json for tasks whose answers only a server has

Metrics stand under lmms-eval's own names and scales beside `acc`, which is always 0 to 1.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stts.eval.answering.cell import DENSE, Cell
from stts.eval.answering.loop import Answers
from stts.eval.answering.method import Answer
from stts.eval.answering.questions import Asked, Source, Task
from stts.eval.benchmarks.scores import Scored, Scores
from stts.eval.benchmarks.tasks import SUITES, suite_score
from stts.eval.results.dense_reference import DenseReference
from stts.eval.run_config import notes_on_tasks
from stts.metrics.cost import VideoCost

if TYPE_CHECKING:
    from stts.eval.run_config import EvalConfig

RESULTS, SAMPLES = "_results.json", "_samples_"


@dataclass(frozen=True, kw_only=True)
class Run:
    """An evaluation with all its answers."""

    config: EvalConfig
    source: Source
    answers: Answers
    cell: Cell
    scores: Mapping[str, Scores]
    """By task; tasks without public answers are absent."""
    reference: DenseReference | None
    environment: Mapping[str, Any]
    identity: Mapping[str, Any]
    config_hash: str
    began: str
    weights_gib: float
    recorded: Sequence[str] = ()
    """Notes on settings that come from the model's folder."""

    @property
    def said(self) -> Mapping[str, Answer]:
        return self.answers.said[self.cell.key]

    @property
    def pruner(self) -> str:
        return "none" if self.cell.method == DENSE else self.cell.method

    def asked(self, task: Task) -> list[Asked]:
        """Answered questions of a task, by place."""
        items = [asked for asked in self.source.asked if asked.task is task and asked.key in self.said]
        return sorted(items, key=lambda asked: asked.question.doc_id)


def result_files(run: Run) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of results.json, and every file by its name under `out`, the results last."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "__", str(run.config.model).strip("/."))[-120:]
    base = f"{name}/{run.began}"
    files: dict[str, str] = {}
    rows: dict[str, dict[str, Any]] = {}
    for task in run.source.tasks:
        asked = run.asked(task)
        if not asked:
            continue
        graded = {item.uid: item for item in run.scores[task.name].scored} if task.name in run.scores else {}
        lines = [_sample(run, one, graded.get(one.question.uid)) for one in asked]
        files[f"{base}{SAMPLES}{task.name}.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines)
        rows[task.name] = _row(run, task, asked, graded)
        if (submission := _submission(task, asked, run.said)) is not None:
            files[f"{base}_submission_{task.name}.json"] = json.dumps(submission, indent=1) + "\n"
    results = _results(run, rows, name)
    files[f"{base}{RESULTS}"] = json.dumps(results, indent=1) + "\n"
    return results, files


def _submission(task: Task, asked: Sequence[Asked], said: Mapping[str, Answer]) -> Any:
    make = getattr(task.benchmark, "submission", None)
    if make is None or all(one.question.answer is not None for one in asked):
        return None
    return make([one.question for one in asked], {one.question.uid: said[one.key].prediction for one in asked})


def _sample(run: Run, asked: Asked, graded: Scored | None) -> dict[str, Any]:
    question, said, shown = asked.question, run.said[asked.key], run.answers.asked[asked.key]
    benchmark = asked.task.benchmark
    doc = json.dumps(dict(question.doc), default=str, sort_keys=True)
    metrics: dict[str, Any] = {}
    if graded is not None:
        metrics["acc"] = float(graded.correct)
        if benchmark.their_metric:
            metrics[benchmark.their_metric[0]] = {"pred_answer": graded.parsed or "", "answer": question.answer}
    return {
        "doc_id": question.doc_id,
        "target": question.answer or "",
        "filtered_resps": [said.prediction],
        "input": shown["input"],
        "doc_hash": hashlib.sha256(doc.encode()).hexdigest(),
        "token_counts": [{"input_tokens": said.num_input_tokens, "output_tokens": said.num_output_tokens}],
        "input_media": [asked.video],
        **metrics,
        "stts": {
            "uid": asked.key,
            "video": asked.video,
            "frame_times": shown["frame_times"],
            "sampler": run.config.sampler or benchmark.sampler,
            "n_dense": said.num_groups,
            "n_kept": said.num_kept,
            "retention_measured": said.retention,
            "kept_per_frame": said.kept_per_frame,
            "pruner": run.pruner,
            "pred": graded.parsed if graded else None,
            "parse": "X11" if run.config.scoring == "strict" else run.config.scoring,
            "correct": graded.correct if graded else None,
            "counted": graded.counted if graded else None,
            "flops": said.cost.total,
            "flops_dense": _dense(said).total,
            "ms": dict(run.answers.sample_ms.get(run.cell.key, {}).get(asked.key, {})),
        },
    }


def _row(run: Run, task: Task, asked: Sequence[Asked], graded: Mapping[str, Scored]) -> dict[str, Any]:
    """One task in our own words: everything 0 to 1, means over questions."""
    said = [run.said[one.key] for one in asked]
    scores = run.scores.get(task.name)
    own = ("acc", "acc_low", "acc_high", "macro", "stderr", "stderr_clustered", "parse_failures")
    ms = run.answers.sample_ms.get(run.cell.key, {})
    timed = [ms[one.key]["generate"] for one in asked if one.key in ms]
    row: dict[str, Any] = {
        "num_samples": len(asked),
        "num_videos": len({one.video for one in asked}),
        "missing_video": len(task.loaded.missing_video),
        "bad_rows": len(task.loaded.bad_rows),
        **{name: scores.metrics.get(name) if scores else None for name in own},
        "headline": scores.headline if scores else None,
        "retention_measured": _mean([one.retention for one in said]),
        "kept_per_frame": _mean([one.retention * one.num_groups / one.num_frames for one in said]),
        "flops_share": sum(one.cost.total for one in said) / sum(_dense(one).total for one in said),
        "ms": statistics.median(timed) if timed else None,
    }
    if scores is not None:
        row["groups"] = {
            name: {value: dict(vars(score)) for value, score in members.items()}
            for name, members in scores.groups.items()
        }
    if run.reference is not None and graded:
        counted = [one for one in asked if graded[one.question.uid].counted]
        correct = {one.key: graded[one.question.uid].correct for one in counted}
        row["dense"] = run.reference.paired(correct, {one.key: one.video for one in asked})
    return row


def _results(run: Run, rows: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Any]:
    config, end = run.config, datetime.now()
    begin = datetime.strptime(run.began, "%Y%m%d_%H%M%S")
    tasks = {task.name: task for task in run.source.tasks if task.name in rows}
    headlines = {task: row["headline"] for task, row in rows.items()}
    suites = {suite: suite_score(suite, headlines) for suite, names in SUITES.items() if set(names) <= set(tasks)}
    model_args = {
        "pretrained": str(config.model),
        "pruner": run.pruner,
        "retention_ratio": config.retention_ratio or 1.0,
    }
    return {
        "results": {task: _metrics(tasks[task], run.scores.get(task)) for task in tasks},
        "groups": {suite: {"alias": suite, "acc,none": score} for suite, score in suites.items()},
        "group_subtasks": {task: [] for task in tasks} | {suite: list(SUITES[suite]) for suite in suites},
        "configs": {task: _task_config(run, tasks[task]) for task in tasks},
        "versions": dict.fromkeys(tasks, "stts"),
        "n-shot": dict.fromkeys(tasks, 0),
        "higher_is_better": {task: {"acc": True} for task in tasks},
        "n-samples": {
            task: {
                "original": len(tasks[task].loaded.questions) + rows[task]["missing_video"] + rows[task]["bad_rows"],
                "effective": rows[task]["num_samples"],
                "missing_video": rows[task]["missing_video"],
                "bad_rows": rows[task]["bad_rows"],
            }
            for task in tasks
        },
        "config": {
            "model": "stts",
            "model_args": ",".join(f"{key}={value}" for key, value in model_args.items()),
            "batch_size": config.batch_size,
            "device": run.environment["device"],
            "limit": config.limit,
            "gen_kwargs": {"temperature": 0, "do_sample": False, "max_new_tokens": config.max_new_tokens},
            **{f"{part}_seed": config.seed for part in ("random", "numpy", "torch", "fewshot")},
        },
        "git_hash": None,
        "date": begin.timestamp(),
        "task_hashes": {task: _hash(tasks[task].loaded.files) for task in tasks},
        "model_source": "stts",
        "model_name": str(config.model),
        "model_name_sanitized": name,
        "start_time": begin.timestamp(),
        "end_time": end.timestamp(),
        "total_evaluation_time_seconds": str((end - begin).total_seconds()),
        "stts": _own_block(run, rows, suites),
    }


def _own_block(run: Run, rows: Mapping[str, Mapping[str, Any]], suites: Mapping[str, float | None]) -> dict[str, Any]:
    """What lmms-eval has no place for."""
    config = run.config
    return {
        "pruner": run.pruner,
        "label": run.cell.label,
        "retention_ratio": config.retention_ratio or 1.0,
        "stage": run.cell.kind,
        "positions": run.cell.positions or None,
        "config_hash": run.config_hash,
        "identity": dict(run.identity),
        "settings": {key: value for key, value in config.settings().items() if key not in ("out", "overwrite")},
        "checkpoint": str(config.model),
        "dense_reference": None if run.reference is None else str(run.reference.folder),
        "scoring": config.scoring,
        "signals": dict(run.answers.signals.get(run.cell.key, {})),
        "skipped": [dict(item) for item in run.answers.skipped],
        "missing_video": [why for task in run.source.tasks for why in task.loaded.missing_video],
        "bad_rows": [why for task in run.source.tasks for why in task.loaded.bad_rows],
        "notes": [*run.recorded, *notes_on_tasks(run.source.tasks)],
        "tasks": dict(rows),
        "suites": suites,
        "efficiency": _efficiency(run),
    }


def _metrics(task: Task, scores: Scores | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {"alias": task.benchmark.title}
    if scores is None:
        return {**metrics, "acc,none": None, "acc_stderr,none": "N/A"}
    for name, value in scores.metrics.items():
        if name not in ("stderr", "stderr_clustered"):
            metrics[f"{name},none"] = value
            metrics[f"{name}_stderr,none"] = "N/A"
    return {
        **metrics,
        "acc_stderr,none": scores.metrics.get("stderr"),
        "acc_stderr_clustered,none": scores.metrics.get("stderr_clustered"),
    }


def _task_config(run: Run, task: Task) -> dict[str, Any]:
    benchmark = task.benchmark
    return {
        "task": task.name,
        "dataset_path": Path(task.root).name,
        "num_frames": run.config.num_frames,
        "sampler": run.config.sampler or benchmark.sampler,
        "prompt": run.config.wordings.get(task.name, benchmark.wording),
        "max_new_tokens": run.config.max_new_tokens or benchmark.max_new_tokens,
        "scoring": run.config.scoring,
        "files": dict(task.loaded.files),
    }


def _efficiency(run: Run) -> dict[str, Any]:
    """Section by section: tokens, FLOPs by formula `exact` without text, times, memory, machine."""
    said = list(run.said.values())
    kept = sorted(one.retention * one.num_groups for one in said)
    parts = ("vit", "vit_embed", "pruner", "connector", "llm")
    flops = {part: _mean([getattr(one.cost, part) for one in said]) for part in parts}
    dense = {part: _mean([getattr(_dense(one), part) for one in said]) for part in parts}
    phases = run.answers.ms.get(run.cell.key, {})
    peak = run.answers.peak_gib.get(run.cell.key)
    return {
        "formula": "exact",
        "include_text": False,
        "causal": False,
        "tokens": {
            "dense": _mean([one.num_groups for one in said]),
            "kept_mean": _mean(kept),
            "kept_p5": kept[int(0.05 * (len(kept) - 1))],
            "kept_p95": kept[round(0.95 * (len(kept) - 1))],
            "err": _mean([one.retention for one in said]),
        },
        "flops": {
            **{"llm_prefill" if part == "llm" else part: value for part, value in flops.items()},
            "total": sum(flops.values()),
            "ratio_llm": flops["llm"] / dense["llm"],
            "ratio_total": sum(flops.values()) / sum(dense.values()),
        },
        "time_ms": {
            **{name: statistics.median(values) for name, values in phases.items() if values},
            "n": max((len(values) for values in phases.values()), default=0),
            "stat": "median",
        },
        "memory_gib": {"weights": run.weights_gib, "peak_alloc": peak},
        "env": dict(run.environment),
    }


def _dense(answer: Answer) -> VideoCost:
    assert answer.dense_cost is not None, "answers of this run hold it"
    return answer.dense_cost


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(content), sort_keys=True).encode()).hexdigest()
