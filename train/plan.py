"""`stts plan --config x.yaml --gpus 64`: will it fit, how many tokens and FLOPs is a step, and what to change.

It reads the YAML of `stts fit` through the same parser and builds the model on the meta device, so parameters are
counted, not guessed; no weights are read and no network is needed for the published checkpoints. How states are
stored (T = parameters that learn, Z = frozen ones; bytes each of weights, gradients, AdamW's two moments):

    bf16-mixed, 32-true            T 4 + 4 + 8     Z as in the checkpoint's files (fsdp2, 32-true: 4)
    bf16-true                      T 2 + 2 + 4     Z 2
    DeepSpeed in bf16              T 2 + 2 + 12    Z 2       (the 12: an fp32 copy of the weights, and the moments)

and what each rank holds of them (ZeRO, arXiv 1910.02054): stage 1 cuts the optimizer's part over the ranks, stage 2
gradients too, stage 3 and fsdp2 everything; offloading moves the cut part to host memory. Activations: see
`stts/metrics/memory.py`; FLOPs: see `stts/metrics/cost.py`. Training keeps no KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

from stts.budget import plan as plan_budget
from stts.models.families.base import vlm_shape
from stts.models.pruning.context import Pruning
from stts.pruners.base import soft_in_training
from stts.tokens import Grid

from .batches import PREFETCH
from .lora import Lora, add_lora
from .parts import PARTS, learns, part_of
from .plan_config import Run, read_strategy
from .plan_work import _Work

GIB = 2**30
SPARE = 0.08  # of a GPU, for CUDA itself, NCCL and fragmentation: a rule of thumb, not a measurement
_BUCKET = 200_000_000  # elements of DeepSpeed's reduce and gather buckets, as Lightning sets them


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Of one model, by part; ties counted once."""

    learning: Mapping[str, int]
    frozen: Mapping[str, int]
    layer: int
    """The largest block or layer."""
    root: int
    """All that is in no block or layer."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Bytes of one GPU, tokens and FLOPs of one optimizer step."""

    parameters: Parameters
    memory: Mapping[str, int]
    """By name, in the order of printing."""
    host: int
    """Bytes of host memory per rank: states that are offloaded."""
    ready: int
    """Bytes of host memory per rank: pixels of the batches that loader workers hold ready."""
    grid: Grid
    tokens: Mapping[str, int]
    flops: Mapping[str, int]
    """By part: forward, backward and recomputation, one optimizer step on all GPUs."""

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def count_parameters(run: Run, holder: nn.Module, pruning: Pruning) -> Parameters:
    """Of what `build` made, by the rule that a run uses. ValueError if nothing learns."""
    family = pruning.adapter
    learning, frozen = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0)
    for name, parameter in holder.named_parameters():
        part = part_of(name, family)
        (learning if learns(name, run.rates, run.lora, family) else frozen)[part] += parameter.numel()
    if not any(learning.values()):
        raise ValueError(f"nothing would learn with the rates {dict(run.rates)}; set one of {', '.join(PARTS)}_lr")
    layers = [
        sum(parameter.numel() for parameter in layer.parameters())
        for layer in holder.modules()
        if isinstance(layer, GradientCheckpointingLayer)
    ]
    total = sum(learning.values()) + sum(frozen.values())
    return Parameters(learning=learning, frozen=frozen, layer=max(layers), root=total - sum(layers))


def build(run: Run) -> tuple[nn.Module, Pruning]:
    """Model and scorer without memory, under the names they have in a run; they depend on its model, pruner and LoRA
    alone. Half a second for a model of 4 B parameters."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(run.config)
        pruning = Pruning(model, run.pruner, retention_ratio=run.retention_ratio, untrained=True, **run.pruner_options)
        pruning.check_trainable()
        if (lora := _adapters(run)) is not None:
            add_lora(pruning.adapter.language_model, lora)
    holder = nn.Module()
    holder.add_module("model", model)
    holder.add_module("scorer", pruning.module)
    return holder, pruning


def _adapters(run: Run) -> Lora | None:
    return run.lora if "llm" in run.rates else None


def make_plan(run: Run, built: tuple[nn.Module, Pruning] | None = None) -> Plan:
    """Memory of one GPU and the work of one optimizer step.

    built: of a run with the same model, pruner and LoRA, so that it need not be built again."""
    holder, pruning = built or build(run)
    parameters = count_parameters(run, holder, pruning)
    grid = pruning.adapter.plan_grid(run.config, run.num_frames, run.frame_size, run.video_size)
    sites = [stage.site for stage in pruning.pruner.stages]
    planned = plan_budget(sites, run.retention_ratio, [grid], pruning.adapter.host.llm_layers)
    soft = any(soft_in_training(stage) for stage in pruning.pruner.stages)
    kept = planned[-1][0].num_kept if planned and not soft else grid.num_groups
    sample = kept + pruning.adapter.marks_per_frame * grid.t + run.text_tokens
    samples = run.batch_size or max(1, run.max_tokens // sample)
    row = max(samples * sample, run.max_tokens)
    states, host = _states(run, parameters)
    work = _Work(run, pruning, grid, kept, sample, samples, row)
    return Plan(
        parameters=parameters,
        memory=states | work.activations(),
        host=host,
        ready=work.pixels * run.num_workers * PREFETCH,
        grid=grid,
        tokens={
            "video, dense": grid.num_groups,
            "video, kept": kept,
            "sample, with text": sample,
            "samples per batch": samples,
            "batch": row,
            "step": row * run.gpus * run.accumulate,
        },
        flops={part: flops * samples * run.gpus * run.accumulate for part, flops in work.flops().items()},
    )


def _states(run: Run, parameters: Parameters) -> tuple[dict[str, int], int]:
    """Bytes of one rank by kind, and those in host memory."""
    strategy, mixed, low = run.strategy, run.precision.endswith("mixed"), "16" in run.precision
    learning, frozen = sum(parameters.learning.values()), sum(parameters.frozen.values())
    weight, gradient, optimizer, still = 4, 4, 8, 4
    if strategy.deepspeed and low:
        weight, gradient, optimizer, still = 2, 2, 12, 2
    elif low and not mixed:
        weight, gradient, optimizer, still = 2, 2, 4, 2
    elif mixed and strategy.name != "fsdp2":
        still = (run.config.dtype or torch.float32).itemsize
    ranks = [run.gpus if cut else 1 for cut in strategy.cuts]
    weights = -(-(weight * learning + still * frozen) // ranks[0])
    gradients, states = (-(-size * learning // n) for size, n in ((gradient, ranks[1]), (optimizer, ranks[2])))
    host = states if strategy.offload_optimizer else 0
    if strategy.offload_parameters:
        host += weights
    compute = 2 if low else 4
    if strategy.cuts[0]:  # blocks one by one with the next one fetched, the rest of the model for the whole pass
        copies = compute * (2 * 2 * parameters.layer + parameters.root)
    elif strategy.deepspeed:
        copies = 2 * compute * min(_BUCKET, learning)
    else:  # autocast's copies of fp32 weights, and DDP's buckets
        fp32 = learning + (frozen if still == 4 else 0)
        copies = (2 * fp32 if mixed else 0) + (gradient * learning if run.gpus > 1 else 0)
    memory = {
        "weights": 0 if strategy.offload_parameters else weights,
        "gradients": gradients,
        "optimizer": 0 if strategy.offload_optimizer else states,
        "copies and buckets": copies,
    }
    return memory, host


def advise(run: Run, room: int) -> list[tuple[str, int]]:
    """What brings a run that does not fit closer, one change at a time, with the bytes it leads to; cheapest first."""
    changes: list[tuple[str, Run]] = []
    built = build(run)
    if not run.checkpointing:
        changes.append(("model.gradient_checkpointing: true", replace(run, checkpointing=True)))
    for name in ("deepspeed_stage_2", "fsdp2", "deepspeed_stage_3_offload"):
        if read_strategy(name) != run.strategy and run.gpus > 1:
            changes.append((f"trainer.strategy: {name}", replace(run, strategy=read_strategy(name))))
    if "llm" in run.rates and run.lora is None:
        changes.append(("model.lora: {rank: 16}", replace(run, lora=Lora())))
    if {"llm", "vit"} & set(run.rates) and run.pruner != "none":
        only = {part: rate for part, rate in run.rates.items() if part == "scorer"}
        if only:
            changes.append(("llm_lr, vit_lr, connector_lr: 0 (train the scorer alone)", replace(run, rates=only)))
    if run.batch_size > 1:
        fewer = replace(run, batch_size=max(1, run.batch_size // 2))
        changes.append((f"data.batch_size: {fewer.batch_size}", fewer))
    if run.num_frames > 8:
        half = run.num_frames // 2
        changes.append((f"data.num_frames: {half}", _shorter(run, built, num_frames=half)))
    if run.pruner != "none" and run.retention_ratio > 0.3:
        changes.append(("model.retention_ratio: 0.3", _shorter(run, built, retention_ratio=0.3)))
    plans = []
    for text, changed in changes:
        try:
            plans.append((text, make_plan(changed, built if _adapters(changed) == _adapters(run) else None).total))
        except ValueError:
            continue
    return sorted(plans, key=lambda change: change[1] > room)


def _shorter(run: Run, built: tuple[nn.Module, Pruning], **change: Any) -> Run:
    """With a row budget, shorter samples only make room for more of them: the budget shrinks along."""
    shorter = replace(run, **change)
    if not run.max_tokens:
        return shorter
    single = (replace(one, batch_size=1, max_tokens=0) for one in (run, shorter))
    before, after = (make_plan(one, built).tokens["batch"] for one in single)
    return replace(shorter, max_tokens=run.max_tokens * after // before)


def describe(run: Run, made: Plan) -> str:
    """The plan as text."""
    room = round(run.gpu_gib * (1 - SPARE) * GIB)
    count = made.parameters
    kept = "every token" if run.pruner == "none" else f"{run.pruner} keeping {run.retention_ratio:g}"
    lines = [f"{run.config.model_type}, {run.num_frames} frames a video, {kept}", ""]
    lines += [f"{'parameters':24}{'learn':>16}{'frozen':>16}"]
    lines += [f"  {part:22}{count.learning[part]:>16,}{count.frozen[part]:>16,}" for part in PARTS]
    lines += ["", f"memory of one GPU ({run.strategy.name} on {run.gpus}, {run.precision})     GiB"]
    lines += [f"  {name:40}{size / GIB:>10.2f}" for name, size in made.memory.items() if size]
    lines += [f"  {'all':40}{made.total / GIB:>10.2f}  of {room / GIB:.1f} ({run.gpu_gib:g} less {SPARE:.0%} to spare)"]
    lines += ["", "host memory, per rank                          GiB"] if made.host or made.ready else []
    lines += [f"  {'offloaded states':40}{made.host / GIB:>10.2f}"] if made.host else []
    if made.ready:
        workers = f"{run.num_workers} workers x {PREFETCH} batches of pixels"
        lines += [f"  {workers:40}{made.ready / GIB:>10.2f}"]
    lines += ["", "tokens"]
    lines += [f"  {name:40}{number:>10,}" for name, number in made.tokens.items()]
    total = sum(made.flops.values())
    lines += ["", "TFLOPs of a step on all GPUs (forward, backward, recomputation; 1 multiply-add = 2)"]
    lines += [f"  {name:40}{flops / 1e12:>10,.1f}  {flops / total:6.1%}" for name, flops in made.flops.items()]
    lines += [f"  {'all':40}{total / 1e12:>10,.1f}  per GPU {total / run.gpus / 1e12:,.1f}"]
    lines += ["", f"assumed: {run.text_tokens} text tokens a sample, {run.answer_tokens} of them answers"]
    if vlm_shape(run.config).vit.patches == 0:
        lines[-1] += f", files of {run.frame_size[0]} x {run.frame_size[1]} pixels"
    lines[-1] += " (options of this command); rows full to the budget"
    if made.total <= room:
        return "\n".join([*lines, "", "it fits"])
    lines += ["", f"it does not fit: {(made.total - room) / GIB:.1f} GiB too much. One change at a time:"]
    for text, size in advise(run, room):
        lines.append(f"  {'fits' if size <= room else 'not enough':12}{size / GIB:>8.1f} GiB  {text}")
    return "\n".join(lines)
