"""The promises of a pruner, tried on small videos: `stts pruners --check NAME` for yours, a test for all of ours.

Shape suffixes beside those of `stts.tokens`: W = patches of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from stts.budget import plan
from stts.pruners.base import HostInfo, Newlines, Positions, Pruner, Stage, soft_in_training
from stts.tokens import Budget, Grid, Kept, PromptTokens, Signal, Site, VideoTokens, Words

Scene = Literal["cuts", "still", "flat"]
"""cuts: scenes in which some places stand still; still: one frame, repeated; flat: all tokens equal."""

HOST = HostInfo(
    family="check", vit_width=8, vit_mlp=12, vit_heads=2, vit_depth=6, lowest_tap=5, llm_width=8, llm_layers=8,
    patches_per_group=4,
)  # fmt: skip
GRIDS = (Grid(1, 1, 1), Grid(1, 2, 3), Grid(2, 1, 4), Grid(4, 2, 3), Grid(5, 3, 2), Grid(9, 3, 3))
RATIOS = (0.01, 0.1, 0.25, 0.5, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Promise:
    name: str
    ok: bool
    found: str
    """The number of trials, or where it was first broken and how."""


def check_pruner(make: Callable[[HostInfo], Pruner]) -> list[Promise]:
    """Try every promise on every stage of the pruner that `make` gives for a small host model."""
    torch.manual_seed(0)  # a learned pruner starts from random weights
    pruner = make(HOST)
    if not isinstance(pruner, Pruner):
        return [Promise("declares itself", False, f"{type(pruner).__name__} has no `stages`; see pruners/base.py")]
    if not pruner.stages:
        return [Promise("declares itself", True, "no stages: the host model runs its stock code")]
    trials: dict[str, list[str]] = {}
    for number, stage in enumerate(pruner.stages):
        for where, name, fault in _try_stage(stage):
            trials.setdefault(name, []).append(fault and f"stage {number}, {where}: {fault}")
    promises = []
    for name, outcomes in trials.items():
        faults = list(filter(None, outcomes))
        outcome = f"{len(outcomes)} trials" if not faults else f"{len(faults)} of {len(outcomes)} trials, {faults[0]}"
        promises.append(Promise(name, not faults, outcome))
    return promises


def _try_stage(stage: Stage) -> Iterator[tuple[str, str, str]]:
    """(where, name of the promise, fault or nothing) of every trial."""
    yield "", "declares itself", _attempt(lambda: _declaration(stage))
    if not isinstance(stage, Stage):
        return  # nothing else can be asked of it
    yield "", "flops: an int that does not shrink", _attempt(lambda: _flops(stage))
    if isinstance(stage, nn.Module) and soft_in_training(stage):
        stage.eval()  # in training it keeps every token, whatever the budget
    videos: list[tuple[str, VideoTokens]] = [
        (f"{grid.t}x{grid.h}x{grid.w} {scene}", example_video(stage, grid, seed=seed, scene=scene))
        for seed, grid in enumerate(GRIDS)
        for scene in get_args(Scene)
    ]
    videos.append(("4x2x3 bfloat16", example_video(stage, GRIDS[3], seed=9, dtype=torch.bfloat16)))
    for label, video in videos:
        for budget in example_budgets(stage, video):
            for name, fault in try_call(stage, video, budget).items():
                rule = "exactly" if budget.exact else "about"
                yield f"{label}, keep {rule} {budget.num_kept} of {video.num_groups}", name, fault
    batch = [video for _, video in videos[3:-1]]
    yield f"{len(batch)} videos", "alone or in a batch: the same", _attempt(lambda: _batch(stage, batch))
    video = example_video(stage, GRIDS[3])
    half = Budget(12 if stage.site.kind == "vit" else video.num_groups // 2, 0.5, exact=True)
    for field in ("x_ND", "salience_G"):
        read = field != "x_ND" or getattr(stage, "reads_features", True)
        if read and (value := getattr(video, field)) is not None:
            bad = replace(video, **{field: value.clone().index_fill_(0, torch.tensor([1]), torch.nan)})
            yield f"NaN in {field}", "NaN is refused", _refusal(stage, bad, half)
    more = replace(half, num_kept=video.num_groups + 1, retention_ratio=1.0)
    yield f"{more.num_kept} of {video.num_groups}", "more than the video has is refused", _refusal(stage, video, more)


def try_call(stage: Stage, video: VideoTokens, budget: Budget) -> dict[str, str]:
    """One video, one budget: name of each promise -> what broke it, or nothing."""
    before = map_tensors(video, Tensor.clone)
    try:
        [kept], [again] = stage([video], [budget]), stage([video], [budget])
    except Exception as error:
        return {"every shape is handled": f"{type(error).__name__}: {error}"}
    promises: dict[str, Callable[[], str]] = {
        "the count: exact, or the plan's where known": lambda: _count(stage, kept, video, budget),
        "index: int64, increasing, inside the grid": lambda: _index(kept, video),
        "features and scores: shape, dtype, finite": lambda: _outputs(kept, video),
        "a second call gives the same": lambda: _difference(kept, again),
        "inputs are not written": lambda: _written(before, video),
    }
    return {"every shape is handled": ""} | {name: _attempt(promise) for name, promise in promises.items()}


# --- examples ------------------------------------------------------------------------------------------------------


def example_video(
    stage: Stage,
    grid: Grid,
    *,
    seed: int = 0,
    scene: Scene = "cuts",
    dtype: torch.dtype = torch.float32,
    width: int = 8,
    key_width: int = 8,
    frame_width: int = 8,
) -> VideoTokens:
    """A video with what the stage asked for; vit: groups of 2x2 patches, llm: about 70 % of the cells are present."""
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    num_frames, num_places = grid.t, grid.per_frame
    cut_T = torch.rand(num_frames, generator=draw) < 0.15
    cut_T[0], cut_T[num_frames // 2] = False, num_frames > 1
    scene_T = cut_T.cumsum(0) if scene == "cuts" else torch.zeros(num_frames, dtype=torch.long)
    motion_P = torch.where(torch.rand(num_places, generator=draw) < 0.6, 0.02, 1.0) * (scene == "cuts")

    def tokens(features: int) -> Tensor:  # (G, D): a still picture per scene, and motion over it
        picture_TPD = randn(num_frames, num_places, features)[scene_T]
        picture_TPD += motion_P[:, None] * randn(num_frames, num_places, features)
        return (torch.ones_like(picture_TPD) if scene == "flat" else picture_TPD).flatten(0, 1).to(dtype)

    cell_G = torch.arange(grid.num_groups)
    group_GW, row_N = None, cell_G
    if stage.site.kind == "vit":
        row_N = cell_G.view(num_frames, grid.h, grid.w).repeat_interleave(2, 1).repeat_interleave(2, 2).flatten()
        patch_TYX = torch.arange(4 * grid.num_groups).view(num_frames, 2 * grid.h, 2 * grid.w)
        group_GW = patch_TYX.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 4)
    if stage.site.kind == "llm":
        present_G = torch.rand(grid.num_groups, generator=draw) < 0.7
        present_G[-1] = True
        row_N = cell_G = cell_G[present_G]
    frame_TC = (randn(num_frames, frame_width)[scene_T] + motion_P.max() * 0.05 * randn(num_frames, frame_width)).to(
        dtype
    )
    # Groups outside are tokens of the prompt that are not video, so a last row does not add up to 1 over the video.
    logit_TP = randn(num_frames, num_places) if scene == "cuts" else randn(num_places).expand(num_frames, -1)
    logit_G = torch.zeros(grid.num_groups) if scene == "flat" else 2 * logit_TP.flatten()
    wants = stage.signals
    return VideoTokens(
        x_ND=tokens(width)[row_N],
        grid=grid,
        cell_G=cell_G,
        group_GW=group_GW,
        timestamps_T=torch.arange(num_frames, dtype=torch.float64) / 2,
        salience_G=logit_G.softmax(0)[cell_G] if wants & {"attn", "probe", "last_row", "asked"} else None,
        keys_GD=tokens(key_width)[cell_G] if "keys" in wants else None,
        frame_TC=frame_TC if "frame" in wants else None,
        aligned_GC=tokens(frame_width)[cell_G] if "aligned" in wants else None,
        text_C=(frame_TC[0].float() + randn(frame_width)).to(dtype) if "text" in wants else None,
        prompt=PromptTokens(randn(5, width).to(dtype), randn(5, key_width).to(dtype), torch.ones(width, dtype=dtype))
        if "prompt" in wants
        else None,
        words=Words(randn(3, width).to(dtype), randn(4, width).to(dtype)) if "words" in wants else None,
        uid=f"example-{seed}",
    )


def example_budgets(stage: Stage, video: VideoTokens) -> list[Budget]:
    """Tiny to whole, exact and as released, and one group less than all; counts are those that `plan` would give."""
    in_vit = stage.site.kind == "vit"
    site = stage.site if in_vit else Site("pre_llm")
    grid = video.grid if in_vit else Grid(1, 1, video.num_groups)
    budgets = [plan([site], ratio, [grid], 2, exact=exact)[0][0] for ratio in RATIOS for exact in (True, False)]
    least = video.grid.per_frame if in_vit else 1
    if (one_less := video.num_groups - 1) >= least:
        budgets.append(Budget(one_less, one_less / video.num_groups, exact=True))
    return budgets


def map_tensors(video: VideoTokens, change: Callable[[Tensor], Tensor]) -> VideoTokens:
    """The same video with every tensor changed, those of the prompt and the words around it too."""

    def changed(part: Any) -> dict[str, Any]:
        values = {f.name: getattr(part, f.name) for f in fields(part)}
        return {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}

    parts = {name: part for name in ("prompt", "words") if (part := getattr(video, name)) is not None}
    return replace(video, **changed(video), **{name: replace(part, **changed(part)) for name, part in parts.items()})


# --- what is looked at: each returns what is wrong, or nothing -----------------------------------------------------


def _attempt(look: Callable[[], str]) -> str:
    """A pruner may return anything, so looking at it may fail: that too is a finding."""
    try:
        return look()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _declaration(stage: Stage) -> str:
    if not isinstance(stage, Stage):
        return f"{type(stage).__name__} lacks a member of Stage; see pruners/base.py"
    if stage.positions not in get_args(Positions) or stage.newlines not in get_args(Newlines):
        return f"positions={stage.positions!r}, newlines={stage.newlines!r}; see pruners/base.py for the known ones"
    unknown = set(stage.signals) - set(get_args(Signal))
    return f"unknown signals {sorted(unknown)}" if unknown else ""


def _flops(stage: Stage) -> str:
    counts = [stage.flops(grid, 8, 12) for grid in (Grid(4, 2, 3), Grid(8, 2, 3), Grid(8, 4, 3), Grid(8, 4, 5))]
    return "" if all(type(n) is int for n in counts) and counts == sorted(counts) and counts[0] >= 0 else f"{counts}"


def _count(stage: Stage, kept: Kept, video: VideoTokens, budget: Budget) -> str:
    count = len(kept.index_K)
    if isinstance(stage, nn.Module) and stage.training and soft_in_training(stage):
        return "" if count == video.num_groups else f"kept {count} in training, which is soft"
    right = count == budget.num_kept if budget.exact or stage.count_known else 1 <= count <= video.num_groups
    return "" if right else f"kept {count}"


def _index(kept: Kept, video: VideoTokens) -> str:
    index_K = kept.index_K
    right = index_K.dtype == torch.int64 and index_K.ndim == 1
    right = right and bool((index_K.diff() > 0).all() and (index_K >= 0).all() and (index_K < video.num_groups).all())
    return "" if right else f"{index_K.dtype} {index_K.tolist()} of {video.num_groups} groups"


def _outputs(kept: Kept, video: VideoTokens) -> str:
    num_rows, width = video.x_ND.shape
    expected = {  # shape, dtype
        "x_KD": ((len(kept.index_K), width), video.x_ND.dtype),
        "x_ND": ((num_rows, width), video.x_ND.dtype),
        "size_N": ((num_rows,), torch.float32),
        "attention_bias_N": ((num_rows,), torch.float32),
        "gate_G": ((video.num_groups,), torch.float32),
        "scores_G": ((video.num_groups,), torch.float32),
    }
    for name, (shape, dtype) in expected.items():
        value = getattr(kept, name)
        if value is not None and (tuple(value.shape), value.dtype) != (shape, dtype):
            return f"{name} is {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}"
        if value is not None and not value.isfinite().all():
            return f"{name} has NaN or infinite values"
    if kept.scores_G is not None and kept.scores_G.requires_grad:
        return "scores_G are for reports and must be detached"
    if kept.gate_G is not None and not (kept.gate_G == 1).all():
        return "gate_G must be 1: a gate carries gradient and changes no value"
    return ""


def _difference(kept: Kept, other: Kept) -> str:
    if not torch.equal(kept.index_K, other.index_K):
        return f"kept {kept.index_K.tolist()}, then {other.index_K.tolist()}"
    absent_of = {"x_KD": torch.nan, "x_ND": torch.nan, "size_N": 1.0, "attention_bias_N": 0.0, "gate_G": 1.0}
    for name, absent in {**absent_of, "scores_G": torch.nan}.items():
        a, b = getattr(kept, name), getattr(other, name)
        if a is None and b is None:
            continue
        a, b = (torch.full_like(b if a is None else a, absent) if value is None else value for value in (a, b))
        if not torch.allclose(a, b, atol=1e-5, equal_nan=True):
            return f"{name} differs"
    return ""


def _batch(stage: Stage, videos: list[VideoTokens]) -> str:
    budgets = [example_budgets(stage, video)[4 + 2 * (i % 3)] for i, video in enumerate(videos)]  # 0.25, 0.5, 0.9
    beside = stage(videos, budgets)
    if len(beside) != len(videos):
        return f"{len(beside)} results for {len(videos)} videos"
    for number, (video, budget, kept) in enumerate(zip(videos, budgets, beside, strict=True)):
        if fault := _difference(stage([video], [budget])[0], kept):
            return f"video {number} alone, then in the batch: {fault}"
    return ""


def _written(before: VideoTokens, after: VideoTokens) -> str:
    changed = []
    for name, part in ((f.name, getattr(after, f.name)) for f in fields(after)):
        old = getattr(before, name)
        pairs = [(old, part)]
        if isinstance(part, PromptTokens | Words):
            pairs = [(getattr(old, f.name), getattr(part, f.name)) for f in fields(part)]
        if any(isinstance(new, Tensor) and not torch.equal(was, new) for was, new in pairs):
            changed.append(name)
    return f"changed {', '.join(changed)}" if changed else ""


def _refusal(stage: Stage, video: VideoTokens, budget: Budget) -> str:
    try:
        stage([video], [budget])
    except ValueError:
        return ""
    except Exception as error:
        return f"expected a ValueError, got {type(error).__name__}: {error}"
    return "expected a ValueError, got a result"
