"""What a pruner is: stages, each with one site, called once per forward pass with all videos of the batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from stts.pruners import ops
from stts.tokens import Budget, Grid, Kept, Signal, Site, VideoTokens

Positions = Literal["original", "compact"]
Newlines = Literal["all", "kept_rows", "every_row", "after_frame", "none"]


@runtime_checkable
class Stage(Protocol):
    """One decision at one site. Members are read-only properties, so frozen dataclasses and nn.Modules both fit."""

    @property
    def site(self) -> Site: ...
    @property
    def signals(self) -> frozenset[Signal]:
        """What the adapter must collect first; attention maps are dear, so ask only for what is used."""
        ...

    @property
    def count_known(self) -> bool:
        """True: the count is the planned one, known before the forward pass, so rows can be packed by length."""
        ...

    @property
    def positions(self) -> Positions: ...
    @property
    def newlines(self) -> Newlines: ...
    def __call__(self, videos: Sequence[VideoTokens], budgets: Sequence[Budget]) -> list[Kept]: ...
    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """The method's own cost for one video (1 multiply-add = 2), 0 for sorting."""
        ...


@runtime_checkable
class Pruner(Protocol):
    """One or more stages in the order they act. Most methods: `stages = (self,)`; `none` has none."""

    @property
    def stages(self) -> tuple[Stage, ...]: ...


class Shown(NamedTuple):
    """What a decode step let deeper layers read of a prompt in the cache; B = rows, M = slots of the prompt."""

    visible_BM: Tensor
    """bool; False at keys of a video that were hidden."""
    attention_BM: Tensor
    """fp32, 0 outside the videos: what the next step is compared with."""


@runtime_checkable
class HidesKeys(Protocol):
    """A stage that acts while decoding too: from a layer on, each step reads a part of every video's keys.

    They stay in the cache, so that hidden ones can come back: this saves reading, not memory."""

    @property
    def hides_from(self) -> int | None:
        """The first LLM layer that reads a part; None: all layers read everything."""
        ...

    def num_visible(self, num_keys: int) -> int:
        """Keys that stay of a video with so many in the cache."""
        ...

    def show(self, attention_BM: Tensor, inside_BM: Tensor, num_keys: int, last: Shown | None) -> Tensor:
        """bool (B, M), inside one video: the keys that this step reads. No host synchronisation.

        attention_BM: fp32, of the new token in the layer before, mean over heads; inside_BM: bool, the `num_keys` slots
        of the video in each row that has it; last: what the step before showed, None at the first one of an answer."""
        ...


@runtime_checkable
class InPieces(Stage, Protocol):
    """A stage inside the tower that can take a long video in pieces: it scores frame by frame, then settles once."""

    def score(self, videos: Sequence[VideoTokens]) -> list[Tensor]:
        """(G,) per video; a group's score may depend on its own frame and the one before only."""
        ...

    def settle(
        self, scores: Sequence[Tensor], grids: Sequence[Grid], budgets: Sequence[Budget]
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Kept groups of every whole video and, where the stage has a key bias, the weights it is the logarithm of."""
        ...


@runtime_checkable
class SoftInTraining(Stage, Protocol):
    """A stage that may weigh every token and drop none while it learns: such a step costs what a dense one costs."""

    @property
    def soft(self) -> bool: ...


def soft_in_training(stage: Stage) -> bool:
    """True: whatever the budget, the LLM sees every token in training."""
    return isinstance(stage, SoftInTraining) and stage.soft


@dataclass(frozen=True, kw_only=True)
class HostInfo:
    """What the host model offers; read from its config by the family's adapter, never hard-coded."""

    family: str
    vit_width: int
    vit_mlp: int
    vit_heads: int
    vit_depth: int
    """Blocks actually executed."""
    lowest_tap: int
    """Lowest ViT block whose output is used downstream (feature layers, deepstack)."""
    llm_width: int
    llm_layers: int
    patches_per_group: int
    patches_per_frame: int = 729
    """0 where it differs from video to video."""
    llm_heads: int = 2
    """Of one layer of the LLM, as are the next four."""
    llm_kv_heads: int = 1
    llm_mlp: int = 8
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    newline_per_row: bool = False
    """A newline token follows every row of every frame (LLaVA-Video); False: one after the whole video, or none."""
    llm_linear: frozenset[int] = frozenset()
    """Layers of the LLM with a recurrent state instead of attention."""
    class_token: bool = False
    """The tower has one, whose attention is the salience of patches."""
    mrope: bool = False
    probe_head: bool = False
    text_tower: bool = False

    @property
    def cut_layers(self) -> tuple[int, ...]:
        """LLM layers before which tokens may be dropped, increasing: all but the first; beside linear layers those with
        attention, behind another whose attention says what may go."""
        attention = [layer for layer in range(self.llm_layers) if layer not in self.llm_linear]
        return tuple(attention[1:])

    def llm_layer(self, published: int) -> int:
        """A layer number as published for deep LLMs (24 layers or more), scaled from 28 layers for shallower ones, and
        the next one before which tokens may be dropped."""
        layer = published if self.llm_layers >= 24 else max(1, round(published * self.llm_layers / 28))
        return next((cut for cut in self.cut_layers if cut >= layer), layer)


class PerVideo:
    """A frozen method that treats every video on its own: implement `prune`, declare `site`, done."""

    site: ClassVar[Site] = Site("pre_llm")
    signals: ClassVar[frozenset[Signal]] = frozenset()
    count_known: ClassVar[bool] = True
    positions: ClassVar[Positions] = "compact"
    newlines: ClassVar[Newlines] = "all"
    reads_features: ClassVar[bool] = True
    """False: NaN is looked for in the salience only, as nothing else is read."""
    needs_time: ClassVar[str] = ""
    """Why an image, a video of one frame, is nothing for it; empty: it chooses inside one frame too."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (self,)

    @abstractmethod
    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        """Decide for one video; must not write to its tensors."""

    def __call__(self, videos: Sequence[VideoTokens], budgets: Sequence[Budget]) -> list[Kept]:
        norms = check_finite(videos, features=self.reads_features)
        check_counts(videos, budgets)
        if self.reads_features:
            videos = [replace(video, norm_N=norm_N) for video, norm_N in zip(videos, norms, strict=True)]
        return [self.prune(video, budget) for video, budget in zip(videos, budgets, strict=True)]

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class ByHost(PerVideo):
    """A method whose survivors keep their positions where these have a time of their own, else new ones."""

    positions: Positions = "compact"  # type: ignore[misc]  # the host decides, so it is a field

    @classmethod
    def for_host(cls, host: HostInfo, **options: Any) -> Self:
        """The published values, with the positions of this host."""
        return cls(**{"positions": "original" if host.mrope else "compact", **options})


def check_counts(videos: Sequence[VideoTokens], budgets: Sequence[Budget]) -> None:
    """ValueError where a budget asks for nothing, or for more groups than a video has."""
    for video, budget in zip(videos, budgets, strict=True):
        if not 1 <= budget.num_kept <= video.num_groups:
            raise ValueError(f"num_kept={budget.num_kept} is outside [1, {video.num_groups}]; see budget.plan")


def check_finite(videos: Sequence[VideoTokens], *, features: bool = True) -> list[Tensor | None]:
    """`VideoTokens.norm_N` of each video; ValueError naming one whose features or salience hold NaN or infinity.

    One host synchronisation in all. features: False: only the salience is looked at, for a stage that reads nothing
    else, and there are no lengths."""
    norms = [ops.lengths(video.x_ND) if features else None for video in videos]
    # One value that is not finite makes a length or a sum so, and these are read twice as fast as two extremes.
    found = [x for x in (*norms, *(video.salience_G for video in videos)) if x is not None]
    sums = [torch.sum(x, dtype=torch.float32) for x in found]
    if not sums or torch.stack(sums).isfinite().all().item():
        return norms
    bad = [
        video.uid or f"number {i}"
        for i, video in enumerate(videos)
        # Huge values may only have a length or a sum that overflows.
        if not all(x.isfinite().all() for x in (video.x_ND if features else None, video.salience_G) if x is not None)
    ]
    if bad:
        raise ValueError(
            f"video {', '.join(bad)} has NaN or infinite features; expected finite ones: check the checkpoint, or load "
            "the model in float32 or bfloat16 if it overflows in float16"
        )
    return norms


def with_newlines(index_K: Tensor, grid: Grid, rule: Newlines) -> Tensor:
    """Places of survivors and newlines in a layout where each row of each frame ends with a newline token.

    index_K: int64 kept cells of `grid`, in the order of the stage. Returns int64 places in the (t, h, w + 1) layout:

    * `all`, `every_row`: raster order, every newline stays, also behind an empty row (VisionZip).
    * `kept_rows`: a newline stays where its row keeps a token (FastVID, HoliTom, Tango).
    * `after_frame`: all newlines of a frame follow its kept tokens (VidCom2's release).
    * `none`: no newline stays.
    """
    row_K, width = index_K // grid.w, grid.w + 1
    place_K = row_K * width + index_K % grid.w
    if rule == "none":
        return place_K
    rows = torch.arange(grid.t * grid.h, device=index_K.device)
    if rule == "kept_rows":
        rows = rows[torch.isin(rows, row_K)]
    newline_R = rows * width + grid.w
    places = torch.cat([place_K, newline_R])
    if rule != "after_frame":
        return places.sort().values
    frame = torch.cat([index_K // grid.per_frame, rows // grid.h])
    return places[torch.sort(frame, stable=True).indices]


def keep_top(video: VideoTokens, scores_G: Tensor, num_kept: int) -> Kept:
    """Keep the `num_kept` highest-scoring groups, in their original order.

    scores_G: any floating dtype; reported in fp32. Order matters: positions are gathered with `index_K`, so an unsorted
    index would hand the LLM a shuffled video. Ties go to the earlier group, on every device."""
    num_groups = video.num_groups
    if scores_G.shape != (num_groups,):
        raise ValueError(
            f"expected one score per group, shape ({num_groups},) for {video.grid}, got {tuple(scores_G.shape)}; "
            "reduce over heads and queries before scoring"
        )
    if not 1 <= num_kept <= num_groups:
        raise ValueError(f"num_kept={num_kept} is outside [1, {num_groups}]; see budget.plan")
    return Kept(index_K=ops.highest(scores_G.detach(), num_kept), scores_G=scores_G.float())


def most_alike(video: VideoTokens, index_K: Tensor) -> tuple[Tensor, Tensor]:
    """(R, D) fp32 copy of the groups that are not in `index_K`, and for each the number of the kept group most like it.

    Cosine, the first on ties; int64 (R,). No host synchronisation."""
    dropped_G = torch.ones_like(video.cell_G, dtype=torch.bool).index_fill_(0, index_K, False)
    x_RD = video.x_ND[dropped_G.nonzero_static(size=video.num_groups - len(index_K))[:, 0]].float()
    x_KD = video.x_ND.detach()[index_K].float()
    norm_K = ops.lengths(x_KD) if video.norm_N is None else video.norm_N[index_K]
    return x_RD, ops.nearest(x_RD.detach()[None], x_KD[None], norm_BC=norm_K[None])[0]
