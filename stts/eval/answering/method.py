"""One method on one batch: answers, what was kept, what it cost, how long it took."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin

import stts
from stts.data.collate import Batch
from stts.eval.answering.answer import Answer
from stts.eval.answering.cell import BEFORE, DENSE, Cell, Kind
from stts.metrics.cost import VlmShape, decode_cost, llm_prefill_flops, tokens_per_layer
from stts.models.checkpoints.chat import question_of
from stts.models.checkpoints.load import load_pruner, load_vlm, pruner_settings
from stts.models.families.base import host_info, make_adapter, vlm_shape
from stts.models.pruning.context import Pruning
from stts.models.pruning.phases import Phases
from stts.models.pruning.report import Report, cost_of, planned_cost
from stts.models.pruning.shared_tower import SharedTower
from stts.models.pruning.siglip import SiglipSource
from stts.models.pruning.visual_pass import Phase
from stts.pruners.base import Positions, Pruner
from stts.pruners.check import HOST
from stts.pruners.registry import PRUNERS, make_pruner
from stts.pruners.simple import Dense

_SEEDED = ("random", "random-vit")


@runtime_checkable
class Labelled(Protocol):
    """A pruner whose name alone would mislead, such as our reconstruction of a method without public code."""

    @property
    def label(self) -> str: ...


@dataclass(frozen=True)
class Measured:
    """How one batch went."""

    ms: dict[str, float]
    """Milliseconds of the batch by phase (`pruning/phases.py`), `ttft` on the device, and `generate`: all of it. Where
    the tower's output was that of the method before, with the time that its run took."""
    peak_gib: float | None
    """Most memory allocated meanwhile, weights included; None on a CPU."""
    report: Report


Texts = list[tuple[str, int, list[float] | None]]
"""Per row of a batch: the text, its number of tokens with the end token, and log-probabilities of the options."""


@dataclass(frozen=True)
class Runner:
    """A cell of the table with the pruner attached to its model, or the reason why there is none in `cell`."""

    cell: Cell
    pruning: Pruning | None

    def generate(self, batch: Batch, processor: ProcessorMixin, max_new_tokens: int) -> tuple[Texts, Measured]:
        """Greedy answers to `batch`, each row of which shows one video."""
        assert self.pruning is not None
        model = self.pruning.model

        def greedy() -> Tensor:
            ids_BL: Tensor = model.generate(
                **batch.inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                temperature=None, top_p=None, top_k=None,  # silences a warning where the checkpoint sets them
            )  # fmt: skip
            return ids_BL

        ids_BL, measured = self.timed(batch, greedy)
        new_BL = ids_BL[:, batch.inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(new_BL, skip_special_tokens=True)
        return [(text, length, None) for text, length in zip(texts, _lengths(new_BL, model), strict=True)], measured

    def timed(self, batch: Batch, call: Callable[[], Tensor]) -> tuple[Tensor, Measured]:
        """What `call`, a generate or a forward pass, gives under the pruner, which is told about the videos."""
        assert self.pruning is not None
        device, tower = self.pruning.model.device, self.pruning.tower
        before_ms = tower.spared_ms if isinstance(tower, SharedTower) else 0.0
        with self.pruning, torch.inference_mode():
            questions = [question_of(sample) for sample in batch.samples]
            self.pruning.describe(batch.video_uids, batch.timestamps_s, questions)
            begin = _now(device)
            with Phases(self.pruning) as phases:
                output = call()
            elapsed_ms, times = 1000 * (_now(device) - begin), phases.times
            report = self.pruning.last
        assert report is not None, "a batch of videos leaves a report"
        ms = {phase: getattr(times, f"{phase}_ms") for phase in (*get_args(Phase), "ttft")} | {"generate": elapsed_ms}
        if isinstance(tower, SharedTower):  # every method is told what it would take alone
            ms |= {phase: ms[phase] + tower.spared_ms - before_ms for phase in ("generate", "vit", "ttft")}
        return output, Measured(ms, times.peak_alloc_gib, report)

    def answer(self, batch: Batch, processor: ProcessorMixin, max_new_tokens: int) -> tuple[list[Answer], Measured]:
        """Greedy answers with what they kept and cost."""
        assert self.pruning is not None
        texts, measured = self.generate(batch, processor, max_new_tokens)
        report, model = measured.report, self.pruning.model
        shape, host = vlm_shape(model.config), self.pruning.adapter.host
        num_input = batch.inputs["attention_mask"].sum(1).tolist()
        answers = []
        for row, (text, num_tokens, option_logprobs) in enumerate(texts):
            grid, tokens = report.grids[row], _tokens(report, row, shape)
            answers.append(
                Answer(
                    prediction=text,
                    num_frames=grid.t,
                    num_groups=grid.num_groups,
                    num_kept=report.llm_counts[row][0],
                    retention=report.retention_per_video[row],
                    cost=cost_of(shape, host, self.pruning.pruner, report, row),
                    dense_cost=planned_cost(Dense(), shape, host, grid, 1.0),
                    llm_flops={name: llm_prefill_flops(shape.llm, tokens, name) for name in ("fastv", "pdrop")},
                    decode=decode_cost(
                        shape.llm,
                        tokens,
                        model.dtype.itemsize,
                        first=report.decode_layer,
                        num_visible=report.decode_keys[row] if report.decode_keys else 0,
                    ),
                    kept_per_frame=torch.bincount(report.index[row].cpu() // grid.per_frame, minlength=grid.t).tolist(),
                    num_input_tokens=num_input[row],
                    num_output_tokens=num_tokens,
                    option_logprobs=option_logprobs,
                )
            )
        return answers, measured


def make_runners(
    model: PreTrainedModel,
    path: str | Path,
    *,
    pruners: Sequence[str],
    retention_ratios: Sequence[float],
    exact: bool,
    positions: Positions | None,
    options: Mapping[str, Mapping[str, Any]],
    siglip: SiglipSource | None,
    seed: int,
) -> list[Runner]:
    """Dense, then every ratio with every pruner; learned weights and their options come from the folder `path`.

    `options` are set by pruner name, on top of those. Runners asked one after another about the same frames share the
    tower's work (`SharedTower`).

    ValueError for an unknown pruner and a learned one without weights. A cell that this model cannot run (a ratio no
    video reaches, a site it lacks) is kept, with the reason."""
    tower = SharedTower(make_adapter(model).tower_attention())
    runners = [Runner(Cell(DENSE), Pruning(model, "none", tower=tower))]
    by_name = {name: _load(path, model, name, seed, options.get(name, {})) for name in pruners if name != "none"}
    for ratio in retention_ratios:
        for name, pruner in by_name.items():
            reason, pruning = None, None
            try:
                pruning = Pruning(
                    model, pruner, retention_ratio=ratio, exact=exact, positions=positions, siglip=siglip, tower=tower
                )
            except ValueError as error:
                reason = str(error)
            at = pruning.positions if pruning is not None else ""
            cell = Cell(name, ratio, reason, kind_of(pruner), label_of(pruner), positions=at)
            runners.append(Runner(cell, pruning))
    return runners


def cell_of(pruning: Pruning) -> Cell:
    """The cell of a pruner that was put on a model."""
    pruner, name = pruning.pruner, pruning.name or type(pruning.pruner).__name__
    return Cell(
        name, pruning.retention_ratio, kind=kind_of(pruner), label=label_of(pruner), positions=pruning.positions
    )


def label_of(pruner: Pruner) -> str:
    """What must stand wherever the method is named; "" for most."""
    return ", ".join(sorted({part.label for part in (pruner, *pruner.stages) if isinstance(part, Labelled)}))


def _load(path: str | Path, model: PreTrainedModel, name: str, seed: int, options: Mapping[str, Any]) -> Pruner:
    return load_pruner(path, model, name, {**({"seed": seed} if name in _SEEDED else {}), **options})


def every_pruner(model: str | Path) -> tuple[str, ...]:
    """Names of all pruners that can run on this folder: a learned one needs weights, which the folder has for one."""
    settings = pruner_settings(model)
    trained = settings["pruner"] if settings else None
    names = [name for name in PRUNERS if name != "none"]
    return tuple(name for name in names if name == trained or kind_of(make_pruner(name, HOST)) != "learned")


def kind_of(pruner: Pruner) -> Kind:
    """How the table and the figure group this method."""
    if any(isinstance(stage, nn.Module) for stage in pruner.stages):
        return "learned"
    kinds = {stage.site.kind for stage in pruner.stages}
    return "inside the LLM" if "llm" in kinds else "before the LLM" if "pre_llm" in kinds else "in the ViT"


def make_baseline(path: str | Path, like: PreTrainedModel, processor: ProcessorMixin) -> Runner:
    """Dense on the checkpoint before fine-tuning. ValueError when it cannot read the batches made for `like`."""
    return Runner(Cell(BEFORE), Pruning(load_alike(path, like, processor, "--baseline_model"), "none"))


def load_alike(path: str | Path, like: PreTrainedModel, processor: ProcessorMixin, option: str) -> PreTrainedModel:
    """The same model before or after fine-tuning, on the device of `like`. ValueError, with the name of the option,
    when it cannot read the batches made for `like`."""
    model, own = load_vlm(path, dtype=like.dtype)
    same_words = own.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    if host_info(model) != host_info(like) or not same_words:
        raise ValueError(
            f"{option} {path} has another architecture or vocabulary than --model; it must be the same model, before "
            "or after fine-tuning"
        )
    return model.to(like.device)


def _tokens(report: Report, video: int, shape: VlmShape) -> list[int]:
    """Visual tokens in every LLM layer."""
    entry, *after = report.llm_counts[video]
    return tokens_per_layer(entry, report.llm_cuts, after, shape.llm.layers)


def _lengths(new_BL: Tensor, model: PreTrainedModel) -> list[int]:
    """Tokens of each row up to and with its first end token."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [-1 if ends is None else ends]
    is_end_BL = torch.isin(new_BL, torch.tensor(ends, device=new_BL.device))
    after_BL = is_end_BL.cumsum(1) - is_end_BL.long()
    return (after_BL == 0).sum(1).tolist()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """What the times and the answers may depend on."""
    cuda = model.device.type == "cuda"
    return {
        "stts": stts.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(model.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
    }
