"""Whole models on one GPU: stock, the scheme of the STTS release, and ours; every training-free pruner beside them.

    python scripts/benchmarks/gpu.py --json gpu.json               all; the same command goes on where it stopped
    python scripts/benchmarks/gpu.py --quick --json gpu.json       half of the tokens, a tenth for pruners; no cell
                                                              begins after 7 minutes
    python scripts/benchmarks/gpu.py --check                       kernel against plain loops; host syncs
    python scripts/benchmarks/gpu.py --profile                     what one step is made of
    python scripts/benchmarks/gpu.py --device cpu --tiny           every path on small models, about a minute; no timing

Needs torch and transformers; without an installation, `PYTHONPATH=.` from the repository. Random weights of published
shapes in bf16, drawn on the device; the scorer too is bf16, where `stts.pruning` leaves a new one in fp32. Training:
forward, backward, optimizer, activation checkpointing, logits at the answer only, on every side. Inference: prefill and
64 tokens, greedy, batch 1. Both on Molmo2-4B, or on Qwen3-VL-4B where transformers has no Molmo2. Pruners: 32 frames on
LLaVA-OneVision-7B.

`ratio` is dense / this way, `ceiling` the same of FLOPs (formula `exact`, text counted; recomputation and the
optimizer, equal on both sides, are not), `share` ratio / ceiling: of the whole step in training, of the time to first
token elsewhere. Medians after a warm-up, by CUDA events. The JSON is written whole after every cell.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import gpu_models
import torch
import torch.nn.functional as F
import transformers
from gpu_cells import DENSE, OPTIONS, OURS, PLANS, RELEASE, Cell, Plan, Store, cells_of
from gpu_checks import Calls, Marks, StageWatch, check_kernel, no_syncs, overhead_timed
from gpu_table import BROKEN, OOM, derive, report
from measure import flops_of, machine, parts_of, spread, where, write_json
from rival_tower import Rival
from transformers.utils import logging

import stts
from stts.models.families.base import host_info, vlm_shape
from stts.models.pruning.phases import Phases
from stts.models.pruning.report import planned_cost
from stts.packing.attention import kernel_name
from stts.pruners.registry import make_pruner
from stts.pruners.stts import STTS

TEMPORAL_WEIGHT = 0.5


class Bench:
    """A model on the device; `train` and `generate` run one pass of a cell and say what it took."""

    def __init__(self, name: str, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.dtype: torch.dtype = getattr(torch, plan.dtype)
        self.config = gpu_models.make_config(name, tiny=plan.tiny)
        self.model: Any = gpu_models.make_model(self.config, device, self.dtype, plan.attention)
        torch.manual_seed(0)
        self.scorer = make_pruner(OURS, host_info(self.model))
        assert isinstance(self.scorer, STTS)
        self.scorer.to(device).eval()  # in fp32, as `load_vlm` and `PrunedVLM` leave it beside a 16-bit model
        self.watch = StageWatch()
        self._optimizer: Any = None
        self._inputs: tuple[tuple[int, bool], dict[str, Any]] | None = None

    def inputs(self, frames: int, *, training: bool) -> dict[str, Any]:
        if self._inputs is None or self._inputs[0] != (frames, training):
            self._inputs = None  # before the next is made
            grid = gpu_models.grid_of(self.config, frames, tiny=self.plan.tiny)
            made = gpu_models.make_inputs(self.config, grid, self.device, self.dtype, training=training)
            self._inputs = (frames, training), made
        return dict(self._inputs[1])

    def pruning(self, cell: Cell) -> stts.Pruning | None:
        """None: the stock class, without us."""
        if cell.way == DENSE:
            return None
        settings: dict[str, Any] = {"retention_ratio": cell.retention_ratio, "around_stage": self.watch}
        settings["untrained"] = True
        if cell.way == RELEASE:
            return Rival(self.model, self.scorer, **settings)
        if cell.way == OURS:
            return stts.Pruning(self.model, self.scorer, **settings)
        return stts.Pruning(self.model, cell.way, **settings, **OPTIONS.get(cell.way, {}))

    def flops(self, cell: Cell, pruned: stts.Pruning | None) -> dict[str, int]:
        """Of the pass just run, by part."""
        training = cell.part == "training"
        inputs = self.inputs(cell.frames, training=training)
        grid = gpu_models.grid_of(self.config, cell.frames, tiny=self.plan.tiny)
        num_tokens, causal = inputs["input_ids"].shape[1], self.config.model_type != "molmo2"
        if pruned is not None:
            return flops_of(pruned, pruned.last, num_tokens - grid.num_groups, training, causal=causal)
        dense, shape = stts.Pruning(self.model, "none"), vlm_shape(self.config)
        cost = planned_cost(dense.pruner, shape, dense.adapter.host, grid, 1.0)
        return parts_of(cost, shape, [num_tokens] * shape.llm.layers, training, causal=causal, learned=False)

    # --- training ----------------------------------------------------------------------------------------------------

    def begin_training(self) -> str:
        """Checkpointing on, one optimizer for every way; returns what it is."""
        self.model.train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.scorer.train()
        parameters = [*self.model.parameters(), *self.scorer.parameters()]
        needed = 4 * self.dtype.itemsize * sum(parameter.numel() for parameter in parameters)
        if self.device.type == "cuda" and needed > 0.6 * torch.cuda.get_device_properties(self.device).total_memory:
            self._optimizer = torch.optim.SGD(parameters, lr=1e-6)
            return "SGD without momentum (AdamW's states would not fit)"
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=self.device.type == "cuda")
        return f"AdamW, states in {self.plan.dtype}"

    def train(self, cell: Cell, pruned: stts.Pruning | None) -> dict[str, float]:
        """One step: milliseconds and peak memory."""
        inputs = self.inputs(cell.frames, training=True)
        labels_BL = inputs.pop("labels")[:, 1:]
        place_A = torch.arange(labels_BL.shape[1] - gpu_models.ANSWER, labels_BL.shape[1], device=self.device)
        marks = Marks(self.device)
        self._reset_peak()
        self._optimizer.zero_grad(set_to_none=True)
        with pruned or nullcontext():
            marks.begin("step")
            logits = self.model(**inputs, use_cache=False, logits_to_keep=place_A).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels_BL[:, place_A].flatten())
            if pruned is not None and pruned.last is not None:
                loss = loss + TEMPORAL_WEIGHT * torch.stack(list(pruned.last.losses.values())).sum()
            loss.backward()
            self._optimizer.step()
            marks.end("step")
        found = {"total_ms": marks.ms("step"), "loss": loss.item(), **self._peak()}
        self._optimizer.zero_grad(set_to_none=True)
        return found

    # --- inference ---------------------------------------------------------------------------------------------------

    def generate(self, cell: Cell, pruned: stts.Pruning | None) -> dict[str, float]:
        """Prefill and the tokens behind it: milliseconds by phase, and peak memory."""
        marks = Marks(self.device)
        inputs = self.inputs(cell.frames, training=False)
        phases = Phases(self.model if pruned is None else pruned)
        with pruned or nullcontext(), self.watch.timed(marks), torch.inference_mode(), phases:
            self.model.generate(**inputs, max_new_tokens=self.plan.new_tokens, do_sample=False)
        times = phases.times
        found = {name: value for name, value in asdict(times).items() if name.endswith(("_ms", "_gib"))}
        more = {"decode_tokens_per_s": times.decode_tokens_per_s, "choice_ms": marks.ms("choice")}
        more |= {"ttft_ms": times.ttft_ms, "total_ms": times.ttft_ms + times.decode_ms}
        return {name: value for name, value in (found | more).items() if value is not None}

    def calls(self, cell: Cell, pruned: stts.Pruning) -> dict[str, int]:
        """Operators that the choice calls, the most frequent first."""
        calls = Calls()
        with pruned, self.watch.counted(calls), torch.inference_mode():
            self.model(**self.inputs(cell.frames, training=False), logits_to_keep=1)
        return dict(calls.counts.most_common())

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        return {"peak_alloc_gib": torch.cuda.max_memory_allocated(self.device) / 2**30}


def measured(once: Callable[[], dict[str, float]], plan: Plan) -> dict[str, Any]:
    """Medians of the repeats by name, their spread for the total, and the maximum for memory."""
    for _ in range(plan.warm_up):
        once()
    found = [once() for _ in range(plan.repeats)]
    row: dict[str, Any] = {
        name: (max if name.endswith("_gib") else statistics.median)([one[name] for one in found]) for name in found[0]
    }
    return row | {"spread": spread([one["total_ms"] for one in found]), "repeats": plan.repeats}


def run_cell(bench: Bench, cell: Cell) -> dict[str, Any]:
    """What the cell took and cost; where it cannot run, the reason under `failed`."""
    try:
        pruned = bench.pruning(cell)
        once = bench.train if cell.part == "training" else bench.generate
        row = measured(lambda: once(cell, pruned), bench.plan)
        row["flops"] = bench.flops(cell, pruned)
        if pruned is not None and pruned.last is not None:
            row["retention_measured"] = pruned.last.retention_measured
            if cell.part == "pruners":
                row["calls"] = bench.calls(cell, pruned)
        return row
    except torch.OutOfMemoryError as error:
        return {"failed": OOM, "message": str(error)[:300]}
    except Exception as error:  # one cell must not end the others; the reason stands in JSON and table
        return {"failed": type(error).__name__, "message": str(error)[:600]}


# --- all of them -----------------------------------------------------------------------------------------------------


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def still_computes(device: torch.device) -> bool:
    """False after an illegal access or a failed assert in a kernel: CUDA then answers every call with that error."""
    try:
        return torch.ones(2, device=device).sum().item() == 2
    except RuntimeError:
        return False


def run_part(part: str, bench: Bench, store: Store) -> None:
    for cell in cells_of(bench.plan, part):
        if store.has(cell) or store.late:
            continue
        start = time.perf_counter()
        row = run_cell(bench, cell)
        if row.get("failed", OOM) != OOM and not still_computes(bench.device):
            row["failed"] = BROKEN
        else:
            free()
        store.add(cell, row | {"wall_s": time.perf_counter() - start})
        said = f"{row['total_ms']:.1f} ms" if "total_ms" in row else f"{row['failed']}: {row['message']}"
        print(f"{cell.key}: {said}", file=sys.stderr, flush=True)
        if row.get("failed") == BROKEN:
            raise SystemExit(
                "stopped: after this error no call of this process reaches the GPU, and every further cell would fail. "
                "With --json, the same command goes on behind this cell."
            )


def run_all(parts: Sequence[str], plan: Plan, device: torch.device, store: Store) -> None:
    """Parts in the order inference, training (one model), pruners (another); what is in the store is not run again."""
    if store.late:
        return
    missing = {part for part in parts if not all(map(store.has, cells_of(plan, part)))}
    if missing & {"inference", "training"}:
        bench = Bench(plan.model, plan, device)
        if "inference" in missing:
            run_part("inference", bench, store)
        if "training" in missing and not store.late:
            store.info["optimizer"] = bench.begin_training()
            run_part("training", bench, store)
        del bench
        free()
    if "pruners" in missing and not store.late:
        run_part("pruners", Bench(gpu_models.ONEVISION, plan, device), store)


def check(plan: Plan, device: torch.device) -> tuple[bool, dict[str, Any]]:
    """The kernel's errors, and a pass of every way that may not wait in the tower's loop."""
    kernels = check_kernel(device, tiny=plan.tiny)
    for row in kernels:
        errors = ", ".join(f"{name} {own:.1e} ({other:.1e})" for name, (own, other) in row["errors"].items())
        print(f"{'ok ' if row['ok'] else 'BAD'} {row['way']}, {row['lengths']}, {row['heads']}: {errors}")
    print("errors against fp32, in brackets those of plain loops in bf16; ok: at most twice those\n")
    syncs = "not checked: SDPA, the fallback of this device, reads the lengths on the host"
    if kernel_name(device, torch.bfloat16) != "SDPA":
        bench = Bench(plan.model, plan, device)
        cell = Cell("inference", min(plan.frames), 0.5, OURS)
        pruned = bench.pruning(cell)
        assert pruned is not None
        bench.generate(cell, pruned)  # what is made once may wait
        try:
            with no_syncs(pruned):
                bench.generate(cell, pruned)
            syncs = "none in the tower's loop"
        except RuntimeError as error:
            syncs = f"FOUND: {error}"
    print(f"host syncs: {syncs}")
    ok = all(row["ok"] for row in kernels) and not syncs.startswith("FOUND")
    return ok, {"kernel": kernels, "host_syncs": syncs}


def profile(plan: Plan, device: torch.device) -> dict[str, Any]:
    """Prints what a training step and a prefill are made of; returns the share of what exists only for pruning."""
    bench, shares = Bench(plan.model, plan, device), {}
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    frames = 128 if 128 in plan.frames else plan.frames[0]
    for part, once in (("inference", bench.generate), ("training", bench.train)):
        if part == "training":
            bench.begin_training()
        cell = Cell(part, frames, 0.5, OURS)
        pruned = bench.pruning(cell)
        assert pruned is not None
        once(cell, pruned)
        marks = Marks(device)
        with overhead_timed(pruned, marks):
            found = once(cell, pruned)
        total = found["total_ms" if part == "training" else "ttft_ms"]
        spent = {name: marks.ms(name) for name in ("decide", "drop", "backward")}
        spent["shorten"] = found.get("prune_ms", marks.ms("shorten"))
        shares[part] = {"ms": total, **spent, "share": sum(spent.values()) / total}
        with torch.profiler.profile(activities=activities) as profiled:
            once(cell, pruned)
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(f"\n{part}, {frames} frames, half kept, {where(device)}\n")
        print(profiled.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
        parts = ", ".join(f"{name} {ms:.2f} ms" for name, ms in spent.items())
        print(f"scorer, selection, packing: {parts}; {shares[part]['share']:.1%} of {total:.1f} ms (target < 3 %)")
    return shares


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --tiny")
    parser.add_argument("--quick", action="store_true", help="one ratio each, fewer repeats")
    parser.add_argument("--tiny", action="store_true", help="small models: every path, no timing worth a look")
    parser.add_argument("--parts", nargs="+", default=["inference", "training", "pruners"], metavar="PART",
                        choices=["inference", "training", "pruners"])  # fmt: skip
    models = [gpu_models.MOLMO2, gpu_models.QWEN3]
    parser.add_argument("--model", choices=models, default=gpu_models.main_model(), help="for inference and training")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of the stock classes, on every side")
    parser.add_argument("--check", action="store_true", help="only compare the kernel and look for host syncs")
    parser.add_argument("--profile", action="store_true", help="only profile one step of ours")
    parser.add_argument("--minutes", type=float, help="begin no cell later; default: 7 with --quick, else no limit")
    parser.add_argument("--json", type=Path, help="write cells here after each of them; go on from those there are")
    args = parser.parse_args(argv)
    begin, device = time.monotonic(), torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is available; to try every path on small models: --device cpu --tiny")
    if device.type == "cpu" and not args.tiny:
        parser.error("published shapes need a GPU; add --tiny on a CPU")
    logging.disable_progress_bar()
    plan = PLANS["tiny" if args.tiny else "quick" if args.quick else "full"]
    plan = replace(plan, model=args.model, attention=args.attention)
    setting = {
        "device": where(device),
        "packed_kernel": kernel_name(device, getattr(torch, plan.dtype)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pruners_model": gpu_models.ONEVISION,
        **asdict(plan),
    }
    if args.check or args.profile:
        ok, found = True, {}
        if args.check:
            ok, found["check"] = check(plan, device)
        if args.profile:
            found["profile"] = profile(plan, device)
        write_json(args.json, {**machine(device), "setting": setting, **found})
        return 0 if ok else 1
    limit = args.minutes or (7.0 if args.quick else float("inf"))
    store = Store(args.json, setting, machine(device), begin + 60 * limit)
    run_all(args.parts, plan, device, store)
    print(report(derive(store.cells), setting, store.info.get("optimizer", "")))
    if missing := sum(not store.has(cell) for part in args.parts for cell in cells_of(plan, part)):
        print(f"{missing} cells are missing: they failed, or time ran out; the same command goes on with them.")
    return 1 if any(row.get("failed", OOM) != OOM for row in store.cells.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
