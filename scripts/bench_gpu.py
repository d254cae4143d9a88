"""Dense, the scheme of the STTS release and ours on one GPU: training step, prefill and decoding, memory; real shapes.

    PYTHONPATH=. python scripts/bench_gpu.py --quick --json gpu.json    under 8 minutes on one H100 or H200
    PYTHONPATH=. python scripts/bench_gpu.py --json gpu.json            all frames and ratios
    PYTHONPATH=. python scripts/bench_gpu.py --check                    kernels against plain loops, then stop
    PYTHONPATH=. python scripts/bench_gpu.py --profile                  where a training step goes, then stop
    PYTHONPATH=. python scripts/bench_gpu.py --device cpu --tiny        every path at small widths, about a minute

Needs torch and transformers; flash-attn is used where installed. Nothing is downloaded: weights are random, in bfloat16
(CPU: float32), of the shapes in `stts/models/published.py`. `stts` is measured on Molmo2-4B where the installed
transformers has that family, else on Qwen3-VL-4B (162 tokens per two frames, the same per frame), and every row names
its model. The training-free pruners are measured on LLaVA-OneVision-7B with 32 frames.

Ways: `dense`, the stock class without us; `rows`, the tower of the release (arXiv 2603.18004): frames packed first-fit
into rows of one frame's size, a dense mask, each block scattered back; its prompt is cut as ours is; `stts`, ours.
Training: forward, backward and AdamW on everything, activation checkpointing and the answer-only head on all sides.
Inference: batch 1, greedy, 64 tokens, `Phases` says where the time goes. Times are medians by CUDA events after a
warm-up. `ratio` is dense / way, `ceiling` the same of FLOPs (formula `exact`, text counted, half of the attention where
the LLM is causal), `share` ratio / ceiling; for inference these are of the time to the first token. `choice` is what
stages do, their drop and the boundaries of survivors: scorer, selection and packing.

Each cell is written as soon as it is there. A cell without memory says so and the others go on; a run that was stopped,
or ran out of `--minutes`, goes on with the same command where its file has no number yet.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from bench_packing import rival_layout
from measure import machine, table, where, write_json
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForImageTextToText

import stts
from stts.metrics.cost import VlmShape, llm_prefill_flops, tokens_per_layer, video_cost
from stts.models import attention as attention_room
from stts.models import pruning as pruning_room
from stts.models import vit as vit_room
from stts.models.molmo2 import POOL, pooling_windows
from stts.models.phases import Phases
from stts.models.published import PUBLISHED
from stts.models.vit import Block, Drop, TowerInput, TowerOutput
from stts.packing.attention import kernel_name, packed_attention
from stts.packing.naive import naive_packed_attention
from stts.packing.segments import Segments
from stts.pruners.registry import PRUNERS
from stts.tokens import Grid, Site

MOLMO2, QWEN3, LLAVA = "allenai/Molmo2-4B", "Qwen/Qwen3-VL-4B-Instruct", "llava-hf/llava-onevision-qwen2-7b-ov-hf"
DENSE, ROWS, OURS = "dense", "rows", "stts"
OPTIONS: dict[str, dict[str, Any]] = {"holitom": {"tau": 0.8}, "holitom+inner": {"tau": 0.8}}
NUM_TEXT, NUM_ANSWER = 64, 32  # tokens
_SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")


# --- models and inputs -----------------------------------------------------------------------------------------------


def family_present(name: str) -> bool:
    """Whether the installed transformers has this checkpoint's family."""
    try:
        AutoConfig.for_model(PUBLISHED[name]["model_type"])
    except ValueError:
        return False
    return True


def shrunk(parts: dict[str, Any]) -> dict[str, Any]:
    """Small widths and resolution; depth of the tower, its taps and the vocabulary stay."""
    small = copy.deepcopy(parts)
    text, vision = small["text_config"], small["vision_config"]
    text |= {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"num_hidden_layers": 8, "head_dim": 8}
    if "mrope_section" in text["rope_parameters"]:
        text["rope_parameters"] = text["rope_parameters"] | {"mrope_section": [2, 1, 1]}
    vision |= {"hidden_size": 32, "intermediate_size": 48}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    if small["model_type"] == "molmo2":
        vision |= {"image_size": [98, 98], "num_position_embeddings": 49, **heads}
        small["adapter_config"] |= {"hidden_size": 32, "intermediate_size": 48, "text_hidden_size": 32, **heads}
    elif small["model_type"] == "qwen3_vl":
        vision |= {"num_heads": 2, "out_hidden_size": 32}
    else:
        vision |= {"num_attention_heads": 2, "image_size": 98}
    return small


def build(name: str, device: torch.device, tiny: bool) -> Any:
    """A random model of these shapes, made where it will run."""
    parts = {key: value for key, value in PUBLISHED[name].items() if key != "dtype"}
    parts = shrunk(parts) if tiny else parts
    config = AutoConfig.for_model(parts.pop("model_type"), **parts)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.to_empty(device=device)
    model.init_weights()  # buffers too
    model.generation_config.eos_token_id = None  # as many tokens as asked for
    return model.eval()


def units_of(config: Any, tiny: bool) -> Grid:
    """Tokens of one temporal patch of Qwen3-VL: twice the 81 that Molmo2 has per frame."""
    return Grid(1, 3, 3) if tiny else Grid(1, 9, 18)


def inputs_of(model: Any, frames: int, *, tiny: bool, training: bool) -> dict[str, Any]:
    """One noisy video, and text around it; in training an answer behind it, with `labels`."""
    config, device, dtype = model.config, model.device, model.dtype
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> list[int]:
        return torch.randint(100, 1000, (count,), generator=generator).tolist()

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    adapter, vision = pruning_room.make_adapter(model), config.vision_config
    made: dict[str, Any] = {}
    ids = words(NUM_TEXT // 2)
    kinds: dict[int, int] = {}
    if config.model_type == "llava_onevision":
        made["pixel_values_videos"] = noise(1, frames, 3, vision.image_size, vision.image_size)
        ids += [config.video_token_index] * (adapter.grid(frames).num_groups + 1)
    elif config.model_type == "molmo2":
        grid = adapter.grid(frames)
        height, width = (side // vision.patch_size for side in vision.image_size)
        window_GW = pooling_windows(height, width)
        window_GW = torch.where(window_GW >= 0, window_GW + torch.arange(frames)[:, None, None] * height * width, -1)
        made["pixel_values_videos"] = noise(frames, height * width, 3 * vision.patch_size**2)
        made["video_token_pooling"] = window_GW.view(-1, POOL**2).to(device)
        made["video_grids"] = torch.tensor([[grid.t, grid.h, grid.w]], device=device)
        start, end = config.frame_start_token_id, config.frame_end_token_id
        for _ in range(frames):
            ids += [*words(5), start, *[config.image_patch_id] * (grid.h * grid.w), end]
        kinds = dict.fromkeys((start, end, config.image_patch_id), 1)
    else:
        unit, side = units_of(config, tiny), vision.spatial_merge_size
        pairs, height, width = frames // vision.temporal_patch_size, unit.h * side, unit.w * side
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        made["pixel_values_videos"] = noise(pairs * height * width, values)
        made["video_grid_thw"] = torch.tensor([[pairs, height, width]], device=device)
        for _ in range(pairs):
            pads = [config.video_token_id] * (unit.h * unit.w)
            ids += [*words(6), config.vision_start_token_id, *pads, config.vision_end_token_id]
        kinds = {config.video_token_id: 2}
    ids += words(NUM_TEXT - NUM_TEXT // 2 + (NUM_ANSWER if training else 0))
    made["input_ids"] = torch.tensor([ids], device=device)
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    if kinds:
        made["mm_token_type_ids"] = torch.tensor([[kinds.get(word, 0) for word in ids]], device=device)
    if training:
        made["labels"] = made["input_ids"].clone()
        made["labels"][:, :-NUM_ANSWER] = -100
    return made


# --- the rival: the tower of the release -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DenseRows(Segments):
    """Rows of one length for attention with a dense mask, on the way through stock blocks."""

    num_rows: int = 0
    mask: Tensor | None = None
    """bool (R, 1, N, N), or a bias (R, 1, 1, N); None: everything inside a row."""


def dense_attention(
    q_SHE: Tensor, k_SJE: Tensor, v_SJE: Tensor, segments: Segments, *, scale: float, causal: bool = False
) -> Tensor:
    """`packed_attention`, and the rival's masked rows."""
    if not isinstance(segments, DenseRows):
        return packed_attention(q_SHE, k_SJE, v_SJE, segments, scale=scale, causal=causal)
    q, k, v = (x.unflatten(0, (segments.num_rows, -1)).transpose(1, 2) for x in (q_SHE, k_SJE, v_SJE))
    mask = segments.mask
    mask = mask.to(q.dtype) if mask is not None and mask.is_floating_point() else mask
    shares = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=shares)
    return out.transpose(1, 2).flatten(0, 1)


def rival_tower(
    given: TowerInput,
    blocks: Sequence[Block],
    taps: Sequence[int],
    site: Site | None = None,
    decide: Callable[[Tensor], Drop | None] | None = None,
) -> TowerOutput:
    """Blocks on survivors run in rows of N slots; after each, survivors are scattered into all F * N places."""
    assert site is not None and decide is not None and site.drop_after is not None
    num_frames, num_slots = len(given.frames), given.frames[0]
    if set(given.frames) != {num_slots}:
        raise ValueError(f"rows hold frames of one size, got {sorted(set(given.frames))} patches")

    def rows(count: int, mask: Tensor | None) -> DenseRows:
        ends = torch.arange(count + 1, dtype=torch.int32, device=given.x_SD.device) * num_slots
        return DenseRows(ends, num_slots, None, count, mask)

    x, out = given.x_SD, {}
    drop: Drop | None = None
    for number, block in enumerate(blocks[: site.drop_after + 1]):
        bias = None
        if number == site.drop_after:
            assert drop is not None and drop.bias_S is not None
            bias = drop.bias_S.view(num_frames, 1, 1, num_slots)
        x = block(x, rows(num_frames, bias), *given.aux)
        if number == site.layer:
            drop = decide(x)
            if drop is None:
                raise ValueError("the rival needs a ratio below 1")
    assert drop is not None
    layout = rival_layout(drop.keep_S.view(num_frames, num_slots))
    num_rows = len(layout.mask_R1NN)
    present_S = (layout.row_FN >= 0).flatten()
    slot_S = (layout.row_FN * num_slots + layout.slot_FN).flatten()[present_S]

    def packed(x_SD: Tensor) -> Tensor:
        return x_SD.new_zeros(num_rows * num_slots, *x_SD.shape[1:]).index_copy(0, slot_S, x_SD[present_S])

    row_S = drop.keep_S.nonzero().squeeze(1)
    if site.drop_after in taps:
        out[site.drop_after] = x[row_S]
    x_RD, aux, mask = packed(x), tuple(map(packed, given.aux)), rows(num_rows, layout.mask_R1NN)
    place_S, kept_S = present_S.nonzero().squeeze(1), drop.keep_S[present_S]
    for number, block in enumerate(blocks[site.drop_after + 1 :], site.drop_after + 1):
        x_RD = block(x_RD, mask, *aux)
        state_SD = torch.zeros_like(x).index_copy(0, place_S[kept_S], x_RD[slot_S[kept_S]])
        if number in taps:
            out[number] = state_SD[row_S]
    return TowerOutput(tuple(out[tap] for tap in taps), row_S, drop.keep_S.view(num_frames, num_slots).sum(1))


@contextmanager
def rival_scheme() -> Iterator[None]:
    """Inside, a `Pruning` at site `vit` runs the tower of the release."""
    stock = pruning_room.run_tower
    pruning_room.run_tower, attention_room.packed_attention = rival_tower, dense_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        pruning_room.run_tower, attention_room.packed_attention = stock, packed_attention


# --- clocks and counters ---------------------------------------------------------------------------------------------


class Marks:
    """Moments in the device's stream; `ms` waits for the last one."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def __call__(self) -> None:
        if self._cuda:
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def ms(self) -> list[float]:
        """Between neighbours."""
        pairs = list(zip(self._marks, self._marks[1:], strict=False))
        if not self._cuda:
            return [1e3 * (end - begin) for begin, end in pairs]
        self._marks[-1].synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


class Launches(TorchDispatchMode):
    """Counts what would be kernels (operators that are not views) and what makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        view = any(arg.alias_info and not arg.alias_info.is_write for arg in func._schema.arguments)
        self.launches += not view
        self.syncs += any(word in name for word in _SYNCS) or _waits(name, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _waits(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Copies to the host, and bool masks as an index, whose count the host must know."""
    if name == "aten::_to_copy":
        return args[0].is_cuda and torch.device(kwargs.get("device") or args[0].device).type == "cpu"
    masks = args[1] if name in ("aten::index", "aten::index_put", "aten::index_put_") else []
    return any(index is not None and index.dtype == torch.bool for index in masks)


class Asked:
    """Times, or counts, what exists in a pass only to choose and pack: stages, their drop, boundaries of survivors."""

    PLACES = ((pruning_room, "ask"), (pruning_room, "to_drop"), (vit_room, "_survivors"))

    def __init__(self, device: torch.device, count: bool = False) -> None:
        self._device, self._count = device, count
        self.launches = self.syncs = 0
        self._all: list[Marks] = []

    def _watched(self, stock: Callable[..., Any], *args: Any) -> Any:
        if self._count:
            with Launches() as counted:
                found = stock(*args)
            self.launches, self.syncs = self.launches + counted.launches, self.syncs + counted.syncs
            return found
        marks = Marks(self._device)
        self._all.append(marks)
        marks()
        found = stock(*args)
        marks()
        return found

    @contextmanager
    def on(self) -> Iterator[None]:
        stock = [getattr(room, name) for room, name in self.PLACES]
        for (room, name), function in zip(self.PLACES, stock, strict=True):
            setattr(room, name, functools.partial(self._watched, function))
        try:
            yield
        finally:
            for (room, name), function in zip(self.PLACES, stock, strict=True):
                setattr(room, name, function)

    @property
    def ms(self) -> float:
        return sum(sum(marks.ms()) for marks in self._all)


@contextmanager
def no_waiting(pruned: stts.Pruning | None) -> Iterator[None]:
    """On CUDA, RuntimeError when a block of the tower makes the host wait."""
    if pruned is None or pruned.model.device.type != "cuda":
        yield
        return
    adapter: Any = pruned.adapter
    stock = adapter.blocks

    def guarded(block: Block) -> Block:
        def run(*args: Any) -> Tensor:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return block(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    adapter.blocks = lambda: [guarded(block) for block in stock()]
    try:
        yield
    finally:
        del adapter.blocks


# --- one cell --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    model: str
    work: str
    """"training" or "inference"."""
    frames: int
    way: str
    ratio: float

    @property
    def key(self) -> str:
        return f"{self.model.rpartition('/')[2]} {self.work} {self.frames} {self.way} {self.ratio:g}"


@dataclass(frozen=True)
class Setting:
    device: torch.device
    tiny: bool
    warm_up: int
    repeats: int
    new_tokens: int


def flops_of(pruned: stts.Pruning, num_text: int) -> int:
    """Of the forward pass that `pruned` reports: tower, connector, choice, LLM with its text."""
    report, host, shape = pruned.last, pruned.adapter.host, VlmShape.from_config(pruned.model.config)
    assert report is not None
    [grid], [counts] = report.grids, report.llm_counts
    own, drop_after, present, cells = 0, None, grid.num_groups, grid.num_groups
    for stage, [kept] in zip(pruned.pruner.stages, report.stage_kept, strict=False):
        inside = stage.site.kind == "vit"
        own += stage.flops(grid, host.vit_width if inside else host.llm_width, kept) if kept < present else 0
        present = kept
        drop_after, cells = (stage.site.drop_after, present) if inside else (drop_after, cells)
    entry, *after = counts
    tokens = tokens_per_layer(entry, report.llm_cuts, after, shape.llm.layers)
    cost = video_cost(
        shape.at(grid), num_frames=grid.t, llm_tokens=tokens, drop_after=drop_after, num_cells=cells, pruner_flops=own,
        kept_patches=report.kept_patches[0] if report.kept_patches else None,
    )  # fmt: skip
    causal = host.family != "molmo2"  # there frames see each other both ways
    llm = llm_prefill_flops(shape.llm, [count + num_text for count in tokens], causal=causal)
    return cost.total - cost.llm + llm


def attach(model: Any, cell: Cell) -> tuple[ExitStack, stts.Pruning | None]:
    """The way of this cell put on the model, and what takes it off."""
    exit_ = ExitStack()
    if cell.way == DENSE:
        return exit_, None
    name = "stts" if cell.way == ROWS else cell.way
    torch.manual_seed(0)
    pruned = stts.pruning(model, name, retention_ratio=cell.ratio, **OPTIONS.get(name, {}))
    if pruned.module is not None:
        pruned.module.to(model.dtype)
    if cell.way == ROWS:
        exit_.enter_context(rival_scheme())
    exit_.enter_context(pruned)
    return exit_, pruned


def describe(pruned: stts.Pruning | None, frames: int) -> None:
    if pruned is not None:
        pruned.describe(["bench"], [torch.arange(frames, dtype=torch.float64)])


def inference(model: Any, cell: Cell, setting: Setting) -> dict[str, Any]:
    inputs = inputs_of(model, cell.frames, tiny=setting.tiny, training=False)
    model.eval()
    exit_, pruned = attach(model, cell)
    with exit_, torch.inference_mode():

        def once() -> dict[str, float]:
            describe(pruned, cell.frames)
            asked = Asked(setting.device)
            with asked.on(), Phases(pruned or model) as phases:
                model.generate(**inputs, max_new_tokens=setting.new_tokens, do_sample=False)
            times = phases.times
            every = {name: getattr(times, f"{name}_ms") for name in ("vit", "prune", "connect", "prefill", "decode")}
            every |= {"ttft": times.ttft_ms, "total": times.ttft_ms + times.decode_ms, "pruner": asked.ms}
            return every | {"decode_tokens_per_s": times.decode_tokens_per_s or 0.0, **memory_of(setting.device)}

        for _ in range(setting.warm_up):
            once()
        describe(pruned, cell.frames)
        counted = Asked(setting.device, count=True)
        with no_waiting(pruned), counted.on():
            model(**inputs, use_cache=False, logits_to_keep=1)
        found = [once() for _ in range(setting.repeats)]
        flops = forward_flops(model, pruned, inputs, cell)
    return medians(found) | flops | {"pruner_launches": counted.launches, "pruner_syncs": counted.syncs}


def forward_flops(model: Any, pruned: stts.Pruning | None, inputs: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """FLOPs of a forward pass, tokens kept; dense is reported by pruner `none`."""
    with ExitStack() as exit_, torch.no_grad():
        if pruned is None:
            pruned = exit_.enter_context(stts.pruning(model, "none"))
        if pruned.last is None:
            given = {name: value for name, value in inputs.items() if name != "labels"}
            model(**given, use_cache=False, logits_to_keep=1)
        assert pruned.last is not None
        [groups] = pruned.last.num_groups
        num_text = inputs["input_ids"].shape[1] - groups
        kept = pruned.last.retention_measured
        return {"tokens": groups, "kept": kept, "flops": flops_of(pruned, num_text)}


def training(model: Any, cell: Cell, setting: Setting) -> dict[str, Any]:
    inputs = inputs_of(model, cell.frames, tiny=setting.tiny, training=True)
    labels_A = inputs["labels"][0, -NUM_ANSWER:]
    inputs.pop("labels")
    places_A = torch.arange(-NUM_ANSWER - 1, -1, device=setting.device) + inputs["input_ids"].shape[1]
    model.train()
    switch = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # renamed in 5.2x
    getattr(model, f"{switch}_checkpointing_enable")({"use_reentrant": False})
    exit_, pruned = attach(model, cell)
    parts = [model] if pruned is None or pruned.module is None else [model, pruned.module.train()]
    parameters = [parameter for part in parts for parameter in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=setting.device.type == "cuda")
    try:
        with exit_:

            def once() -> dict[str, float]:
                if setting.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(setting.device)
                marks = Marks(setting.device)
                describe(pruned, cell.frames)
                marks()
                logits_AV = model(**inputs, use_cache=False, logits_to_keep=places_A).logits[0]
                losses = [F.cross_entropy(logits_AV.float(), labels_A)]
                losses += [] if pruned is None or pruned.last is None else list(pruned.last.losses.values())
                loss = torch.stack(losses).sum()
                marks()
                loss.backward()
                marks()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                marks()
                forward, backward, step = marks.ms()
                times = {"forward": forward, "backward": backward, "optimizer": step}
                return times | {"total": forward + backward + step, **memory_of(setting.device)}

            for _ in range(setting.warm_up):
                once()
            found = [once() for _ in range(setting.repeats)]
            flops = forward_flops(model, pruned, inputs, cell)
    finally:
        getattr(model, f"{switch}_checkpointing_disable")()
        model.zero_grad(set_to_none=True)
    return medians(found) | flops


def memory_of(device: torch.device) -> dict[str, float]:
    """GiB since the last reset, weights included."""
    if device.type != "cuda":
        return {}
    alloc, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"peak_alloc_gib": alloc / 2**30, "peak_reserved_gib": reserved / 2**30}


def medians(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    every = {name: [one[name] for one in found] for name in found[0]}
    return {f"{name}_ms" if name not in _NO_TIME else name: statistics.median(v) for name, v in every.items()} | {
        "n": len(found)
    }


_NO_TIME = ("decode_tokens_per_s", "peak_alloc_gib", "peak_reserved_gib")


def run_cell(model: Any, cell: Cell, setting: Setting) -> dict[str, Any]:
    """Its numbers, or in words why there are none."""
    work = training if cell.work == "training" else inference
    try:
        return work(model, cell, setting)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # one cell must not cost the others
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


# --- all cells -------------------------------------------------------------------------------------------------------


def cells_of(quick: bool, tiny: bool, bigs: Sequence[str]) -> list[Cell]:
    """The most telling first: time may run out."""
    frames, ratios, in_llava = [128, 256, 64], [0.5, 0.7, 0.2], [0.1, 0.2]
    if quick:
        frames, ratios, in_llava = [128, 256], [0.5], [0.1]
    if tiny:
        frames, ratios, in_llava = [4], [0.5], [0.2]
    cells = []
    for big, ratio, number in itertools.product(bigs, ratios, frames):
        for work in ("inference", "training"):
            dense = Cell(big, work, number, DENSE, 1.0)
            cells += [dense, *(Cell(big, work, number, way, ratio) for way in (OURS, ROWS))]
    few = 4 if tiny else 32
    for ratio in in_llava:
        names = [name for name in PRUNERS if name != "none"]
        cells += [
            Cell(LLAVA, "inference", few, DENSE, 1.0),
            *(Cell(LLAVA, "inference", few, name, ratio) for name in names),
        ]
    return list(dict.fromkeys(cells))


def compare(found: dict[str, dict[str, Any]], cells: Sequence[Cell]) -> None:
    """Write ratio, ceiling and share into every cell whose rival has numbers."""
    for cell in cells:
        own = found.get(cell.key)
        rival = found.get(Cell(cell.model, cell.work, cell.frames, DENSE, 1.0).key)
        if own is None or rival is None or "error" in own or "error" in rival:
            continue
        whole = "total_ms" if cell.work == "training" else "ttft_ms"
        own["ratio_total"] = rival["total_ms"] / own["total_ms"]
        own["ratio"], own["ceiling"] = rival[whole] / own[whole], rival["flops"] / own["flops"]
        own["share"] = own["ratio"] / own["ceiling"]
        if cell.work == "inference":
            own["pruner_of_ttft"] = own["pruner_ms"] / own["ttft_ms"]
            own["pruner_of_dense_prefill"] = own["pruner_ms"] / rival["prefill_ms"]


def report(found: dict[str, dict[str, Any]], cells: Sequence[Cell]) -> str:
    """Three tables; a cell without numbers says why."""
    tables = []
    for title, names in _COLUMNS.items():
        lines = [["model", "frames", "way", "kept", *(head for head, _, _ in names)]]
        for cell in cells:
            one = found.get(cell.key)
            if one is None or title != (cell.work if cell.model != LLAVA else "pruners"):
                continue
            numbers = [_number(one.get(key), form) for _, key, form in names]
            numbers = numbers if "error" not in one else [one["error"][:40], *["-"] * (len(names) - 1)]
            lines.append([cell.model.rpartition("/")[2], str(cell.frames), cell.way, f"{cell.ratio:g}", *numbers])
        if len(lines) > 1:
            tables.append(f"{title}\n\n{table(lines, 3)}")
    return "\n\n".join(tables)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


_SPEED = [("ratio", "ratio", ".2f"), ("ceiling", "ceiling", ".2f"), ("share", "share", ".2f")]
_PHASES = [(name, f"{name}_ms", ".1f") for name in ("vit", "prune", "connect", "prefill")]
_MEMORY = [("peak GiB", "peak_alloc_gib", ".1f")]
_COLUMNS = {
    "training": [
        ("step ms", "total_ms", ".1f"), *_SPEED, ("forward", "forward_ms", ".1f"), ("backward", "backward_ms", ".1f"),
        ("AdamW", "optimizer_ms", ".1f"), *_MEMORY,
    ],
    "inference": [
        ("total ms", "total_ms", ".1f"), ("ratio", "ratio_total", ".2f"), *_PHASES, ("TTFT ms", "ttft_ms", ".1f"),
        *_SPEED, ("choice / TTFT", "pruner_of_ttft", ".1%"), ("tokens/s", "decode_tokens_per_s", ".1f"), *_MEMORY,
    ],
    "pruners": [
        *_PHASES, ("TTFT ms", "ttft_ms", ".1f"), *_SPEED, ("tokens/s", "decode_tokens_per_s", ".1f"), *_MEMORY,
        ("choice ms", "pruner_ms", ".2f"), ("/ dense prefill", "pruner_of_dense_prefill", ".1%"),
        ("launches", "pruner_launches", "d"), ("syncs", "pruner_syncs", "d"),
    ],
}  # fmt: skip


# --- checks and profile ----------------------------------------------------------------------------------------------


def check(device: torch.device) -> bool:
    """Outputs and gradients in bfloat16 on this device and on the CPU: error against float32 loops at most twice that
    of the same loops in bfloat16 (the rule of flash-attention's own tests; here the largest error of outputs, the root
    mean square of gradients)."""
    lines = [["lengths", "heads", "causal", "bias", "on", "kernel", "what", "error", "allowed", ""]]
    fine = True
    for lengths in ([5], [1, 100, 33], [729, 0, 365, 1]):
        for heads, causal, biased in (((4, 4), False, False), ((4, 4), False, True), ((4, 2), True, False)):
            leaves, segments = _row(lengths, heads, biased)
            exact = _outcome(naive_packed_attention, [x.float() for x in leaves], segments, causal)
            plain = _outcome(naive_packed_attention, leaves, segments, causal)
            for where_ in dict.fromkeys([device.type, "cpu"]):
                here = Segments(segments.cu_seqlens.to(where_), segments.max_seqlen)
                got = _outcome(packed_attention, [x.to(where_) for x in leaves], here, causal)
                kernel = kernel_name(torch.device(where_), torch.bfloat16)
                for name, own, other, truth in zip(("out", "dq", "dk", "dv", "dbias"), got, plain, exact, strict=False):
                    size = _largest if name == "out" else _rms  # of a long sum, the worst single value is luck
                    error, allowed = size(own.cpu().float() - truth), 2 * size(other.float() - truth) + 1e-6
                    fine &= error <= allowed
                    what = [str(lengths), str(heads), str(causal), str(biased), where_, kernel, name]
                    lines.append([*what, f"{error:.1e}", f"{allowed:.1e}", "ok" if error <= allowed else "WRONG"])
    print(table(lines, 7))
    return fine


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _row(lengths: Sequence[int], heads: tuple[int, int], biased: bool) -> tuple[list[Tensor], Segments]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), number, 72) for number in (heads[0], heads[1], heads[1])]
    leaves = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    if biased:
        leaves.append(-2 * torch.rand(sum(lengths), generator=generator))
    return leaves, Segments.from_lengths(torch.tensor(lengths), max(lengths))


def _outcome(attend: Any, leaves: Sequence[Tensor], segments: Segments, causal: bool) -> list[Tensor]:
    q, k, v, *bias = given = [leaf.detach().requires_grad_() for leaf in leaves]
    segments = segments.with_bias(bias[0]) if bias else segments
    out = attend(q, k, v, segments, scale=q.shape[-1] ** -0.5, causal=causal)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, given, upstream)]


def profile(model: Any, cell: Cell, setting: Setting) -> None:
    """One training step of ours by operator, after one to warm up, and the choice's share of a prefill."""
    once = Setting(setting.device, setting.tiny, 0, 1, 1)
    training(model, cell, once)
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if setting.device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profiled:
        training(model, cell, once)
    by = "self_device_time_total" if setting.device.type == "cuda" else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60))
    numbers = inference(model, Cell(cell.model, "inference", cell.frames, cell.way, cell.ratio), setting)
    share = numbers["pruner_ms"] / numbers["ttft_ms"]
    print(f"scorer, selection and packing: {numbers['pruner_ms']:.2f} ms of {numbers['ttft_ms']:.1f} ms to the first "
          f"token, {share:.1%} (target: below 3 %)")  # fmt: skip


# --- the command -----------------------------------------------------------------------------------------------------


def read_earlier(path: Path | None, same: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cells with numbers of an earlier run under the same conditions. ValueError when the file has others."""
    if path is None or not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    other = {name: content.get(name) for name, value in same.items() if content.get(name) != value}
    if other:
        raise ValueError(f"{path} was measured with {other}, this run has {same}; give another --json file")
    return {key: one for key, one in content["cells"].items() if "error" not in one}


def run_cells(
    cells: Sequence[Cell], setting: Setting, found: dict[str, dict[str, Any]], save: Callable[[], None], until: float
) -> int:
    """Measure what `found` lacks, model by model; returns how many cells the time did not allow."""
    missing = [cell for cell in cells if cell.key not in found]
    done = 0
    for name in dict.fromkeys(cell.model for cell in missing):
        model = None
        for cell in (cell for cell in missing if cell.model == name):
            if time.monotonic() > until:
                continue
            model = build(name, setting.device, setting.tiny) if model is None else model
            begin = time.monotonic()
            found[cell.key] = {"way": cell.way, **run_cell(model, cell, setting)}
            done += 1
            save()
            said = found[cell.key].get("error") or f"{found[cell.key]['total_ms']:.1f} ms"
            print(f"{cell.key}: {said} ({time.monotonic() - begin:.0f} s)", file=sys.stderr, flush=True)
        del model
        gc.collect()
    return len(missing) - done


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="128 and 256 frames, half kept; pruners at 0.1; few rounds"
    )
    parser.add_argument("--minutes", type=float, help="start no cell later; default: 7 with --quick, else no limit")
    parser.add_argument("--repeats", type=int, help="rounds per cell; default 5, with --quick 3, with --tiny 1")
    parser.add_argument("--only", help="cells whose key has this word, such as 'training 128' or 'visionzip'")
    parser.add_argument("--check", action="store_true", help="compare kernels with plain loops and stop")
    parser.add_argument("--profile", action="store_true", help="profile one training step of ours and stop")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="small widths, 4 frames: every path, no meaning in the times"
    )
    parser.add_argument("--json", type=Path, help="written after every cell; cells it has already are not run again")
    args = parser.parse_args(argv)
    begin = time.monotonic()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; `--device cpu --tiny` runs every path without one")
    if args.device == "cpu" and not args.tiny and not args.check:
        parser.error("these shapes are for GPUs; add --tiny")
    device = torch.device(args.device)
    if args.check:
        return 0 if check(device) else 1
    present = [name for name in (MOLMO2, QWEN3) if family_present(name)]
    big = present[0]
    repeats = args.repeats or (1 if args.tiny else 3 if args.quick else 5)
    setting = Setting(device, args.tiny, 1 if args.quick or args.tiny else 2, repeats, 4 if args.tiny else 64)
    if args.profile:
        profile(build(big, device, args.tiny), Cell(big, "training", 4 if args.tiny else 128, OURS, 0.5), setting)
        return 0
    cells = [
        cell
        for cell in cells_of(args.quick, args.tiny, present if args.tiny else [big])
        if args.only is None or args.only in cell.key
    ]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    same = {"device": where(device), "torch": torch.__version__, "transformers": transformers.__version__}
    same |= {"dtype": str(dtype).removeprefix("torch."), "kernel": kernel_name(device, dtype), "repeats": repeats}
    same |= {"tiny": args.tiny, "new_tokens": setting.new_tokens}
    found = read_earlier(args.json, same)
    info = machine(device) | same

    def save() -> None:
        compare(found, cells)
        write_json(args.json, {**info, "cells": found})

    minutes = args.minutes or (7.0 if args.quick and not args.tiny else float("inf"))
    left = run_cells(cells, setting, found, save, begin + 60 * minutes)
    save()
    print(f"{same['device']}, {same['dtype']}, {same['kernel']}, torch {torch.__version__}, transformers "
          f"{transformers.__version__}; medians of {repeats}")  # fmt: skip
    if args.tiny:
        print("--tiny: that every path runs, nothing about speed")
    if big != MOLMO2:
        print(f"this transformers has no Molmo2: {QWEN3} stands in, with a lighter tower and mrope positions")
    print(f"\n{report(found, cells)}")
    if left:
        print(f"\n{left} cells not started for want of time; the same command goes on with them")
    failed = [key for key in found if found[key].get("error", "out of memory") != "out of memory"]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
