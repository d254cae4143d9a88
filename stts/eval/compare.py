"""`stts compare`: dense, learned and training-free pruners on the same model, frames, prompts and token budgets.

Every batch is decoded and preprocessed once and then answered by every method in turn, dense first, so that nothing but
the pruner differs. Batches are noted as they finish; a killed run goes on behind the last one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentParser, set_parsing_settings
from torch import Tensor
from tqdm import tqdm
from transformers import ProcessorMixin

from stts.budget import check_ratio
from stts.data.collate import Batch, Collator
from stts.data.datasets import OnError, Sample, Skipped, VideoJsonl
from stts.eval.kept import kept_tensors
from stts.eval.runner import Runner, asked_of, environment, make_baseline, make_runners
from stts.eval.store import Store, file_stamps
from stts.eval.table import ComparisonResult, Record, render_text
from stts.metrics.accuracy import grade
from stts.models.base import host_info
from stts.models.load import load_vlm
from stts.models.signals import load_siglip
from stts.pruners.registry import PRUNERS

Positions = Literal["original", "compact"]


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compare pruners with dense on one model and one data set."""

    model: str | Path
    """Folder of the (fine-tuned) model, or hub id. Learned pruners take their weights from this folder."""
    data: Path
    """JSONL of questions on videos, each with a short answer."""
    out: Path
    """Folder for comparison.json, .csv, .md and .png."""
    pruners: tuple[str, ...] = (
        "stts", "random", "visionzip", "fastvid", "holitom", "tango", "vidcom2", "fastv"
    )  # fmt: skip
    """Names (see `stts pruners`) or module:Class. Dense is always run, so `none` adds nothing."""
    pruner_options: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Options by pruner, such as {tango: {compat: official}, fastvid: {variant: lv}}."""
    retention_ratios: tuple[float, ...] = (0.5, 0.25, 0.1)
    """Fractions of visual tokens kept, each in (0, 1]; a mean over the LLM's layers."""
    exact: bool = True
    """Every method keeps exactly the planned count; false: each release's own count, which is measured."""
    siglip: str | Path | None = None
    """Folder or hub id of a SigLIP checkpoint whose pooling head and text tower make the signals that the model itself
    lacks; None: fallbacks, named under the table."""
    baseline_model: str | Path | None = None
    """The same model before fine-tuning, for a dense row that shows what fine-tuning itself changed."""
    num_frames: int = 16
    """Frames per video, at most."""
    sampler: str = "uniform_inclusive"
    """How frames are chosen, see stts/data/sampling.py."""
    batch_size: int = 16
    """Questions answered at once."""
    max_new_tokens: int = 8
    """Longest answer."""
    limit: int | None = None
    """Use the first `limit` rows only."""
    on_error: OnError = "raise"
    """What a broken video does: raise, or skip (counted and listed)."""
    seed: int = 0
    """Of the random pruners; decoding is greedy."""
    positions: Positions | None = None
    """Positions of surviving tokens in the LLM; None: as each pruner declares."""
    save_kept: int | Literal["all"] = 0
    """Of how many samples, from the first on, to write which tokens every method kept, for `stts report`."""
    name: str | None = None
    """Title; None: name of the model folder."""
    overwrite: bool = False
    """Throw an earlier comparison in `out` away. Without it the same comparison goes on, another one is refused."""

    def __post_init__(self) -> None:
        for flag in ("pruners", "retention_ratios"):
            values = tuple(getattr(self, flag))
            object.__setattr__(self, flag, values)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"--{flag} {list(values)} must name at least one value, each once")
        for name in self.pruners:
            if name not in PRUNERS and ":" not in name:
                raise ValueError(f"--pruners: {name!r} is unknown; known: {', '.join(PRUNERS)}; your own: module:Class")
        unknown = sorted(set(self.pruner_options) - (set(self.pruners) - {"none"}))
        if unknown:
            raise ValueError(f"--pruner_options: {unknown} are not among --pruners {list(self.pruners)}")
        for ratio in self.retention_ratios:
            try:
                check_ratio(ratio)
            except ValueError as error:
                raise ValueError(f"--retention_ratios: {error}") from error
        for flag in ("num_frames", "batch_size", "max_new_tokens", "limit"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise ValueError(f"--{flag} {value} must be at least 1")
        if self.save_kept != "all" and self.save_kept < 0:
            raise ValueError(f"--save_kept {self.save_kept} must be 0, a number of samples, or all")
        for flag, allowed in (("on_error", get_args(OnError)), ("positions", (None, *get_args(Positions)))):
            if getattr(self, flag) not in allowed:
                raise ValueError(f"--{flag} {getattr(self, flag)!r} must be one of {allowed}")
        for flag in ("model", "baseline_model", "siglip"):
            path = getattr(self, flag)
            hub_id = isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~"))
            if path is not None and not Path(path).is_dir() and not hub_id:
                raise ValueError(f"--{flag} {str(path)!r} is no folder; give a model folder or a hub id owner/name")
        if not Path(self.data).is_file():
            hint = "it is a folder: name the JSONL file in it" if Path(self.data).is_dir() else "check the path"
            raise ValueError(f"--data {str(self.data)!r} is no file; {hint}")

    @property
    def title(self) -> str:
        return self.name or Path(self.model).resolve().name


def run_compare(config: CompareConfig, *, progress: bool = True) -> ComparisonResult:
    """Run a comparison, go on with it, or read the finished one; its files appear in `config.out` whole or not at all.

    ValueError: `out` holds something else, a row has no video or no usable answer, a learned pruner has no weights, a
    video is broken (unless on_error="skip")."""
    settings = {item.name: _plain(getattr(config, item.name)) for item in fields(config)}
    identity = {name: value for name, value in settings.items() if name not in ("out", "overwrite", "name")}
    identity["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"  # times never mix
    identity["files"] = file_stamps(config.model, config.baseline_model, config.siglip, config.data)
    store = Store(Path(config.out), identity, overwrite=config.overwrite)
    if store.finished is not None:
        return store.finished

    data = VideoJsonl(config.data, sampler=config.sampler, num_frames=config.num_frames, on_error=config.on_error)
    samples = data.samples[: config.limit]
    for sample in samples:
        _check(sample)
    model, processor = load_vlm(config.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    siglip = None if config.siglip is None else load_siglip(config.siglip)
    if siglip is not None:
        siglip.check(host_info(model))
    runners = make_runners(
        model,
        config.model,
        pruners=config.pruners,
        retention_ratios=config.retention_ratios,
        exact=config.exact,
        positions=config.positions,
        options=config.pruner_options,
        siglip=siglip,
        seed=config.seed,
    )
    if config.baseline_model is not None:
        runners.insert(0, make_baseline(config.baseline_model, model, processor))
    active = [runner for runner in runners if runner.pruning is not None]
    failed: dict[str, str] = {key: reason for note in store.batches for key, reason in note["failed"].items()}
    collate = Collator(processor, training=False)
    shown = {sample.uid for sample in samples[: None if config.save_kept == "all" else config.save_kept]}
    warm = False
    first = len(store.batches) * config.batch_size
    bar = tqdm(
        total=len(samples) * len(active),
        initial=min(first, len(samples)) * len(active),
        desc="compare",
        unit="answer",
        disable=not progress,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file needs no line per batch
    )
    with bar:
        for start in range(first, len(samples), config.batch_size):
            places = range(start, min(start + config.batch_size, len(samples)))
            items = [data[place] for place in places]
            skipped = [asdict(item) for item in items if isinstance(item, Skipped)]
            bar.update(len(skipped) * len(active))
            batch = collate(items)
            note: dict[str, Any] = {"records": [], "ms": {}, "signals": {}, "failed": {}, "skipped": skipped}
            kept: dict[str, Tensor] = {}
            if batch is not None:
                running = [runner for runner in active if runner.cell.key not in failed]
                found, kept = _answer(batch.to(model.device), running, processor, config, bar, shown)
                note |= found
                failed |= note["failed"]
                if not warm or len(batch.uids) < config.batch_size:
                    note["ms"] = {}  # the first pass warms caches, a short batch costs more per sample: not comparable
                warm = True
            store.add(note, kept)

    result = ComparisonResult(
        config={**settings, "name": config.title},
        environment=environment(model),
        cells=tuple(replace(runner.cell, reason=failed.get(runner.cell.key, runner.cell.reason)) for runner in runners),
        records=tuple(Record.from_json(row) for note in store.batches for row in note["records"]),
        skipped=tuple(item for note in store.batches for item in note["skipped"]),
        batch_ms={
            runner.cell.key: tuple(note["ms"][runner.cell.key] for note in store.batches if note["ms"])
            for runner in active
            if runner.cell.key not in failed
        },
        signals={key: made for note in store.batches for key, made in note["signals"].items() if made},
    )
    if not result.records:
        raise ValueError(f"none of the {len(samples)} videos of {config.data} can be read; first: {result.skipped[0]}")
    store.finish(result)
    return result


def _answer(
    batch: Batch,
    runners: Sequence[Runner],
    processor: ProcessorMixin,
    config: CompareConfig,
    bar: Any,
    shown: Collection[str],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Records (as JSON), milliseconds per sample and signals of one batch, every method in turn; and the tokens that
    pruners kept of the samples `shown`.

    A pruner that refuses a video is noted under "failed"; the others go on."""
    found: dict[str, list[dict[str, Any]]] = {}
    ms: dict[str, float] = {}
    signals: dict[str, Mapping[str, str]] = {}
    failed: dict[str, str] = {}
    kept: dict[str, Tensor] = {}
    for runner in runners:
        key = runner.cell.key
        try:
            answered = runner.answer(batch, processor, config.max_new_tokens)
        except ValueError as error:
            if runner.cell.kind == "unpruned":
                raise
            failed[key] = f"stopped at sample {batch.uids[0]!r} or one beside it: {' '.join(str(error).split())}"
        else:
            found[key] = [asdict(outcome) for outcome in answered.outcomes]
            ms[key] = answered.elapsed_ms / len(batch.uids)
            signals[key] = answered.report.signals
            if runner.cell.kind != "unpruned":
                kept |= kept_tensors(key, answered.report, batch.uids, batch.timestamps_s, shown)
        bar.update(len(batch.uids))
    base = Path(config.data).parent.resolve()
    records = [
        {
            "uid": sample.uid,
            "video": sample.video.relative_to(base).as_posix() if sample.video else "",
            "family": str(sample.meta.get("family", "")),
            "answer": answer,
            "question": asked_of(sample),
            "outcomes": {key: outcomes[row] for key, outcomes in found.items()},
        }
        for row, (sample, answer) in enumerate(zip(batch.samples, batch.answers, strict=True))
    ]
    return {"records": records, "ms": ms, "signals": signals, "failed": failed}, kept


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _check(sample: Sample) -> None:
    """Before anything slow: one video, no image, an answer that can be right."""
    if sample.video is None or sample.images:
        raise ValueError(f"--data: row {sample.uid!r} must show one video and no image; leave it out")
    options = sample.meta.get("options") or ()
    if not isinstance(options, (list, tuple)) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"--data: row {sample.uid!r}: 'options' is {options!r}, expected a list of texts")
    last = sample.messages[-1]
    try:
        grade("", last.text if last.role == "assistant" else "", options)
    except ValueError as error:
        raise ValueError(f"--data: row {sample.uid!r}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """`stts compare`: prints the table. Bad input prints one line on stderr and gives 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog="stts compare", description=CompareConfig.__doc__)
    parser.add_argument("--config", action="config", help="YAML file with these settings.")
    parser.add_class_arguments(CompareConfig, as_group=False)
    settings = parser.parse_args(_join_lists(args)).as_dict()
    settings.pop("config", None)
    try:
        config = CompareConfig(**settings)
        result = run_compare(config)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{render_text(result)}\n\nwritten: {config.out}/comparison.json, .csv, .md, .png")
    return 0


def _join_lists(args: Sequence[str]) -> list[str]:
    """`--pruners a b` and `--pruners a,b` become the `--pruners [a,b]` that the parser reads."""
    hints = get_type_hints(CompareConfig)
    flags = {f"--{item.name}" for item in fields(CompareConfig) if get_origin(hints[item.name]) is tuple}
    joined: list[str] = []
    words = [part for arg in args for part in (arg.split("=", 1) if arg.split("=", 1)[0] in flags else [arg])]
    while words:
        joined.append(words.pop(0))
        if joined[-1] in flags:
            values = []
            while words and not words[0].startswith("--"):
                values.append(words.pop(0).strip("[]"))
            joined.append(f"[{','.join(values)}]")
    return joined
