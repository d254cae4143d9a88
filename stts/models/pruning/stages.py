"""Which stages a host can run, how one is called, and what its decision means for patches.

Shape suffixes beside those of `stts.tokens`: W = patches per group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from stts.models.families.base import Adapter
from stts.models.pruning.tower import Drop
from stts.pruners.base import HidesKeys, HostInfo, Pruner, Stage
from stts.tokens import Budget, Grid, Kept, Signal, VideoTokens

IN_TOWER: frozenset[Signal] = frozenset({"attn", "keys"})
FROM_FRAMES: frozenset[Signal] = frozenset({"frame", "text"})
LLM_SOURCES: dict[str, str] = {
    "last_row": "attention of the last prompt token in the last LLM attention before the cut, mean over heads",
    "asked": "attention of the words behind the video in the last LLM attention before the cut, the most of any head",
    "keys": "keys of the last LLM attention before the cut, rotary embedding applied",
    "prompt": "hidden states and keys of the prompt behind the video, before the cut",
}


@dataclass(frozen=True)
class Names:
    """What `describe` told about the videos of the next pass."""

    uids: Sequence[str]
    times: Sequence[Tensor | None]
    """Per sampled frame."""
    questions: Sequence[str] | None

    @classmethod
    def of(cls, uids: Sequence[str], times: Sequence[Tensor | None] | None, questions: Sequence[str] | None) -> Names:
        """ValueError unless there is one of each per video."""
        if any(given is not None and len(given) != len(uids) for given in (times, questions)):
            counts = [len(given) for given in (times, questions) if given is not None]
            raise ValueError(f"describe() got {len(uids)} names, but {counts} times and questions; give one per video")
        return cls(uids, times or [None] * len(uids), questions)


def cell_times(time_F: Tensor | None, grid: Grid) -> Tensor | None:
    """Seconds of a video's temporal cells from those of its sampled frames, which may be more: two to a cell.

    Cells are spread evenly over the frames and read their seconds in between, as Tango's release does. ValueError when
    a video has more cells than frames were described."""
    if time_F is None or len(time_F) == grid.t:
        return time_F
    if len(time_F) < grid.t:
        raise ValueError(
            f"describe() got the times of {len(time_F)} frames for a video of {grid.t} temporal cells; give one time "
            "per sampled frame"
        )
    place_T = torch.linspace(0, len(time_F) - 1, grid.t, dtype=torch.float64, device=time_F.device)
    low_T = place_T.long().clamp_max(len(time_F) - 2)
    return torch.lerp(time_F[low_T].double(), time_F[low_T + 1].double(), place_T - low_T)


@dataclass(frozen=True)
class Sites:
    """The stages of a pruner by where they act."""

    vit: Sequence[Stage]
    """At most one."""
    pre_llm: Sequence[Stage]
    llm: Sequence[Stage]
    """At increasing layers."""
    decode: HidesKeys | None = None
    """The stage that also hides keys while decoding."""

    @property
    def all(self) -> list[Stage]:
        """In the order they act."""
        return [*self.vit, *self.pre_llm, *self.llm]

    @property
    def from_tower(self) -> frozenset[Signal]:
        """Signals that must be made while the tower runs."""
        before = frozenset[Signal]().union(*(stage.signals for stage in self.pre_llm))
        return (before | self.for_llm) - {"words"}

    @property
    def for_llm(self) -> frozenset[Signal]:
        """Those of them that stages inside the LLM ask for."""
        return frozenset[Signal]().union(*(stage.signals for stage in self.llm)) & FROM_FRAMES

    @property
    def llm_sources(self) -> dict[str, str]:
        """Signals made inside the LLM, and what from."""
        asked = {signal for stage in self.llm for signal in stage.signals} - FROM_FRAMES
        return {f"llm {signal}" if signal == "keys" else signal: LLM_SOURCES[signal] for signal in sorted(asked)}


def split_sites(pruner: Pruner, adapter: Adapter) -> Sites:
    """The stages of a pruner by site. ValueError for an order, a signal or a block that this host cannot run."""
    vit, pre_llm, llm = ([s for s in pruner.stages if s.site.kind == kind] for kind in ("vit", "pre_llm", "llm"))
    kinds = [stage.site.kind for stage in pruner.stages]
    layers = [stage.site.layer or 0 for stage in llm]
    if [*vit, *pre_llm, *llm] != list(pruner.stages) or len(vit) > 1 or layers != sorted(set(layers)):
        raise ValueError(
            f"stages at {kinds} {layers or ''} are not supported; expected at most one 'vit', 'pre_llm', then 'llm' "
            "at increasing layers"
        )
    asked = {signal for stage in pre_llm for signal in stage.signals}
    asked |= {signal for stage in llm for signal in stage.signals if signal == "frame"}
    if vit and asked - {"text"}:
        raise ValueError(
            f"{sorted(asked - {'text'})} need whole frames from the tower, but {type(vit[0]).__name__} drops patches "
            "inside it; let one of them act alone"
        )
    for stage in vit:
        if unknown := stage.signals - IN_TOWER:
            raise ValueError(
                f"{type(stage).__name__} asks for {sorted(unknown)}, which no tower has yet at site vit; "
                f"there are {sorted(IN_TOWER)}, of the block where it decides"
            )
        last, tap = stage.site.drop_after or 0, adapter.host.lowest_tap
        if last > tap:
            raise ValueError(
                f"the drop after block {last} comes behind block {tap}, the lowest whose output is used; "
                f"the largest prune_block for this tower is {tap - 2}"
            )
    allowed = adapter.host.cut_layers
    if adapter.host.llm_linear and (wrong := [layer for layer in layers if layer not in allowed]):
        raise ValueError(
            f"{type(pruner).__name__} drops tokens before LLM layer {wrong[0]}, but most layers of this LLM have a "
            "recurrent state instead of attention; tokens can be dropped before one with attention that has another "
            f"before it: one of {list(allowed)}"
        )
    for stage in pre_llm:
        if late := stage.signals & set(LLM_SOURCES) - {"keys"}:
            raise ValueError(
                f"{type(stage).__name__} at site pre_llm asks for {sorted(late)}, which only an LLM layer has"
            )
    return Sites(vit, pre_llm, llm, _hides_keys(pruner, llm, adapter.host))


def _hides_keys(pruner: Pruner, llm: Sequence[Stage], host: HostInfo) -> HidesKeys | None:
    """The stage that acts while decoding too. ValueError where this language model or other stages leave no room."""
    hiding = [stage for stage in pruner.stages if isinstance(stage, HidesKeys) and stage.hides_from is not None]
    if not hiding:
        return None
    first: int = hiding[0].hides_from or 0
    if host.llm_linear:
        raise ValueError(
            f"{type(hiding[0]).__name__} hides keys while decoding, but most layers of this LLM have a recurrent state "
            "instead of keys; leave that option out"
        )
    if not 0 < first < host.llm_layers:
        raise ValueError(
            f"keys hidden from layer {first} on: expected 1 to {host.llm_layers - 1} for an LLM of {host.llm_layers} "
            "layers, because the layer before it decides"
        )
    if llm or len(hiding) > 1:
        raise ValueError(
            "keys are hidden by one stage, in caches of equal length; a stage inside the LLM gives layers caches of "
            "their own: take one of the two"
        )
    return hiding[0]


@contextmanager
def numerics(stage: Stage, x_ND: Tensor) -> Iterator[None]:
    """How a stage computes, whatever surrounds the call.

    A training-free stage has autocast off: it promises fp32, and `.float()` does not stop autocast from choosing
    another dtype. A learned one follows autocast; without it, its layers take the dtype of the features beside them."""
    dtype, kind = x_ND.dtype, x_ND.device.type
    if not torch.amp.is_autocast_available(kind):  # the meta device
        yield
    elif not isinstance(stage, nn.Module):
        with torch.autocast(kind, enabled=False):
            yield
    elif dtype in (torch.float16, torch.bfloat16) and not torch.is_autocast_enabled(kind):
        with torch.autocast(kind, dtype=dtype):
            yield
    else:
        yield


def ask(stage: Stage, videos: list[VideoTokens], budgets: Sequence[Budget]) -> list[Kept]:
    """Call the stage once; where nothing is to be dropped, a training-free stage is not even asked."""
    is_whole = [budget.num_kept == video.num_groups for video, budget in zip(videos, budgets, strict=True)]
    everything = [Kept(index_K=torch.arange(video.num_groups, device=video.cell_G.device)) for video in videos]
    if isinstance(stage, nn.Module):  # a learned stage sees every batch: its parameters are gathered on every rank
        row = stage(videos, budgets)
        return [replace(k, index_K=e.index_K) if w else k for k, e, w in zip(row, everything, is_whole, strict=True)]
    asked = [number for number, skip in enumerate(is_whole) if not skip]
    if asked:
        for number, kept in zip(asked, stage([videos[i] for i in asked], [budgets[i] for i in asked]), strict=True):
            everything[number] = kept
    return everything


def to_drop(row: Sequence[Kept], videos: Sequence[VideoTokens], num_tile_patches: int, class_tokens: int = 0) -> Drop:
    """A stage's groups as a decision about patches: a patch lives as long as any kept group needs it, and so many class
    tokens in front of each frame live always."""
    keep, bias, gate = [], [], []
    for kept, video in zip(row, videos, strict=True):
        assert video.group_GW is not None
        num_patches = video.x_ND.shape[0]
        rows_KW = video.group_GW[kept.index_K]
        alive = torch.zeros(num_patches + 1, dtype=torch.bool, device=rows_KW.device)
        alive[rows_KW.flatten()] = True  # -1 falls into the spare last place
        if len(kept.index_K) == len(video.group_GW):
            alive[:] = True  # nothing is dropped: patches that belong to no group stay as context
        alive[:-1].view(video.grid.t, -1)[:, :class_tokens] = True
        keep.append(alive[:-1])
        if kept.attention_bias_N is not None:
            bias.append(kept.attention_bias_N)
        if kept.gate_G is not None:  # value 1; a shared patch passes gradient to every group it belongs to
            spare = kept.gate_G.new_zeros(num_patches + 1)
            width = video.group_GW.shape[1]
            add = (kept.gate_G - 1).repeat_interleave(width)
            places = torch.where(video.group_GW >= 0, video.group_GW, num_patches).flatten()
            gate.append(1 + spare.index_add(0, places, add)[:-1])
    tiles = torch.ones(num_tile_patches, dtype=torch.bool, device=keep[0].device)
    bias_S = torch.cat([torch.zeros_like(tiles, dtype=bias[0].dtype), *bias]) if bias else None
    gate_S = torch.cat([torch.ones_like(tiles, dtype=gate[0].dtype), *gate]) if gate else None
    merged_ND = size_S = None
    if any(kept.x_ND is not None for kept in row):
        pairs = [*zip(row, videos, strict=True)]
        merged_ND = torch.cat([video.x_ND if kept.x_ND is None else kept.x_ND for kept, video in pairs])
        if any(kept.size_N is not None for kept in row):
            ones = [torch.ones(num_tile_patches, device=merged_ND.device)]
            sizes = [merged_ND.new_ones(len(v.x_ND)).float() if k.size_N is None else k.size_N for k, v in pairs]
            size_S = torch.cat([*ones, *sizes])
    return Drop(torch.cat([tiles, *keep]), bias_S, gate_S, merged_ND, size_S)
