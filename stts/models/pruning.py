"""`with stts.pruning(model, "stts", retention_ratio=0.5): model.generate(...)`: a pruner on a stock model.

Inside the context hooks replace the visual part of a forward pass and shorten the prompt; outside, the model is what it
was, bit for bit. The order of one pass: frames of all videos through the tower (site `vit` decides and drops inside),
connector on survivors, site `pre_llm`, merge into the prompt, shorten the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stts.budget import check_ratio, plan
from stts.models.attention import is_on, switch_off, switch_on
from stts.models.base import Adapter, Visual, make_adapter
from stts.models.prompt import Prompt
from stts.models.vit import Drop, TowerOutput, run_tower
from stts.pruners.base import Positions, Pruner, Stage
from stts.pruners.registry import make_pruner
from stts.tokens import Budget, Grid, Kept, VideoTokens


@dataclass
class Report:
    """What one forward pass with visual input did, per video in batch order."""

    grids: list[Grid]
    index: list[Tensor]
    """int64 kept cells of each video's grid, increasing."""
    scores: list[Tensor | None]
    """Per present group, from the last stage that scored; None where it gave none."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Unweighted, by name."""
    kept_patches: list[list[int]] | None = None
    """Survivors per frame in the tower; None: the tower ran on everything."""
    stage_kept: list[list[int]] = field(default_factory=list)
    """Groups each stage returned, [stage][video]."""
    llm_tokens: int = 0
    """Tokens the language model saw at prefill, text included."""
    llm_padded: int = 0
    """Slots it computed; pad waste = 1 - llm_tokens / llm_padded."""

    @property
    def num_groups(self) -> list[int]:
        return [grid.num_groups for grid in self.grids]

    @property
    def num_kept(self) -> list[int]:
        return [len(index) for index in self.index]

    @property
    def retention_measured(self) -> float:
        """Kept share of all groups of the batch; 1.0 without video."""
        return sum(self.num_kept) / max(1, sum(self.num_groups)) if self.grids else 1.0


class Pruning:
    """A pruner attached to one stock model, as a context manager, or with `attach` and `detach` for long use.

    model: a stock model of a supported family; its weights, class and forward code are not touched.
    pruner: registry name, 'module:Class', or an object with `stages`.
    retention_ratio: fraction of visual tokens kept, in (0, 1]; may be reassigned between passes.
    exact: stages return exactly the planned count (False: a release's own count).
    positions: 'compact' renumbers survivors, 'original' keeps their places; None: as the stage declares.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pruner: str | Pruner,
        *,
        retention_ratio: float = 0.5,
        exact: bool = True,
        positions: Positions | None = None,
        **options: Any,
    ) -> None:
        self.adapter: Adapter = make_adapter(model)
        self.model = model
        self.name = pruner if isinstance(pruner, str) else None
        self.options: Mapping[str, Any] = options
        self.pruner = make_pruner(pruner, self.adapter.host, **options) if isinstance(pruner, str) else pruner
        self.exact = exact
        self.last: Report | None = None
        self._vit, self._pre_llm = _sites(self.pruner, self.adapter)
        declared: Positions = self.pruner.stages[0].positions if self.pruner.stages else "compact"
        if positions not in (None, "compact", "original"):
            raise ValueError(f"positions={positions!r} must be 'compact', 'original' or None (as the stage declares)")
        self._prompt = Prompt(positions or declared)
        self._names: tuple[Sequence[str], Sequence[Tensor | None] | None] | None = None
        self._expand = 1
        self._handles: list[Any] = []
        self._stock_expand: Any = None
        self._originals: list[str] = []
        self.retention_ratio = retention_ratio
        if self.module is not None:
            parameter = next(model.parameters())
            self.module.to(parameter.device)
        self._plan([self.adapter.grid(2)])  # an unreachable ratio fails here, not in the first forward pass

    @property
    def retention_ratio(self) -> float:
        return self._ratio

    @retention_ratio.setter
    def retention_ratio(self, value: float) -> None:
        check_ratio(value)
        self._ratio = value

    @property
    def module(self) -> nn.Module | None:
        """The learned part, or None for a training-free pruner."""
        return self.pruner if isinstance(self.pruner, nn.Module) else None

    @property
    def positions(self) -> Positions:
        return self._prompt.positions

    def describe(self, uids: Sequence[str], timestamps_s: Sequence[Tensor | None] | None = None) -> None:
        """Name the videos of the next forward pass, in batch order (`random` is seeded by the name)."""
        self._names = (uids, timestamps_s)

    # --- on and off --------------------------------------------------------------------------------------------------

    def attach(self) -> Pruning:
        """Put the hooks on. ValueError when the model already carries some."""
        if self._handles or any(is_on(config) for config in self.adapter.configs):
            raise ValueError("this model is already inside a pruning context; leave that one first")
        self._originals = [switch_on(config) for config in self.adapter.configs]
        inner, llm = self.adapter.inner, self.adapter.language_model
        self._handles = [
            inner.register_forward_pre_hook(self._before, with_kwargs=True),
            llm.register_forward_pre_hook(self._before_llm, with_kwargs=True),
            llm.register_forward_hook(self._prompt.after, with_kwargs=True),
        ]
        # generate would encode the video before the forward pass, and copy it per beam; both stay with us
        self._stock_expand = self.model._expand_inputs_for_generation
        self.model.__dict__["_supports_mm_encoder_outputs"] = lambda: False
        self.model.__dict__["_expand_inputs_for_generation"] = self._expand_rows
        return self

    def detach(self) -> None:
        """Take the hooks off; the model is bit-identical to before. Harmless when nothing is attached."""
        for handle in self._handles:
            handle.remove()
        for config, original in zip(self.adapter.configs, self._originals, strict=False):
            switch_off(config, original)
        for name in ("_supports_mm_encoder_outputs", "_expand_inputs_for_generation"):
            self.model.__dict__.pop(name, None)
        self._handles, self._originals = [], []

    def _expand_rows(self, expand_size: int = 1, **kwargs: Any) -> Any:
        """Repeat text rows for beams and samples; the visual input is encoded once, its features are repeated."""
        visual = {name: kwargs.pop(name) for name in self.adapter.visual_args if name in kwargs}
        self._expand = expand_size
        input_ids, rest = self._stock_expand(expand_size=expand_size, **kwargs)
        return input_ids, rest | visual

    def __enter__(self) -> Pruning:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    # --- one forward pass --------------------------------------------------------------------------------------------

    def _before(self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            raise ValueError("pass model inputs by keyword while pruning")
        learning = torch.is_grad_enabled() and self.model.training
        cache = kwargs.get("past_key_values")
        given = kwargs.get("pixel_values") is not None or kwargs.get("pixel_values_videos") is not None
        if not given and (not learning or (cache is not None and cache.get_seq_length())):
            return None
        expand, self._expand = self._expand, 1
        for name in ("input_ids", "inputs_embeds"):
            if expand > 1 and kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][::expand]
        before = dict(kwargs)
        visual = self.adapter.take_visual(kwargs) or Visual(self.adapter.blank_frame()[:0], 0, (), {})
        grids = [self.adapter.grid(frames) for frames in visual.frames_per_video]
        budgets = self._plan(grids)
        uids, times = self._take_names(len(grids))
        whole = all(b.num_kept == g.num_groups for row in budgets for b, g in zip(row, grids, strict=True))
        stackable = len(set(visual.frames_per_video)) <= 1  # the stock code takes videos of one length only
        if whole and stackable and not learning:  # dense is sacred: the stock code runs, untouched
            everything = [torch.arange(grid.num_groups) for grid in grids]
            self.last = Report(grids, everything, [None] * len(grids))
            if expand == 1:
                return args, before
        return args, self._visual_pass(
            kwargs, visual, grids, budgets, uids, times, blank=learning and not grids, expand=expand
        )

    def _before_llm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prefill = self._prompt.pending
        result = self._prompt.before(module, args, kwargs)
        if prefill and self.last is not None:
            self.last.llm_tokens, self.last.llm_padded = self._prompt.num_tokens, self._prompt.num_slots
        return result

    def _visual_pass(
        self,
        kwargs: dict[str, Any],
        visual: Visual,
        grids: list[Grid],
        budgets: list[list[Budget]],
        uids: Sequence[str],
        times: Sequence[Tensor | None],
        *,
        blank: bool,
        expand: int,
    ) -> dict[str, Any]:
        """Tower, connector and stages once each, whatever the batch holds.

        `blank`: a training pass without video runs one blank frame through everything, with weight zero, so that every
        rank calls the same modules and every parameter has a (zero) gradient."""
        seen, num_videos = visual, len(grids)
        if blank:
            pixels = torch.cat([visual.pixels_FCHW, self.adapter.blank_frame().to(visual.pixels_FCHW)])
            seen = replace(visual, pixels_FCHW=pixels, frames_per_video=(1,))
            grids = [self.adapter.grid(1)]
            budgets = [[Budget(grids[0].num_groups, 1.0, True)] for _ in self.pruner.stages]
            uids, times = [""], [None]
        report = Report(grids, [torch.arange(0)] * len(grids), [None] * len(grids))
        cells: list[Tensor | None] = [None] * len(grids)

        def note(row: list[Kept]) -> None:
            for video, kept in enumerate(row):
                before = cells[video]
                cells[video] = kept.index_K if before is None else before[kept.index_K]
                report.scores[video] = kept.scores_G if kept.scores_G is not None else report.scores[video]
                for name, loss in kept.losses.items():
                    report.losses[name] = report.losses[name] + loss if name in report.losses else loss
            report.stage_kept.append([len(kept.index_K) for kept in row])

        tower = self._tower(seen, grids, budgets, uids, times, note)
        if tower.lengths_F is not None:
            frames = tower.lengths_F[seen.num_tiles :].split(list(seen.frames_per_video))
            report.kept_patches = [part.tolist() for part in frames]
        connected = self.adapter.connect(tower, seen, cells)
        features = list(connected.videos)
        for stage, row in zip(self._pre_llm, budgets[len(self._vit) :], strict=True):
            videos = [
                VideoTokens(
                    x_ND=x_Kd,
                    grid=grid,
                    cell_G=torch.arange(grid.num_groups, device=x_Kd.device) if cell is None else cell,
                    timestamps_T=time,
                    uid=uid,
                )
                for x_Kd, grid, cell, time, uid in zip(features, grids, cells, times, uids, strict=True)
            ]
            kept_row = _skip_whole(stage, videos, row)
            features = [
                x_Kd[kept.index_K] if kept.x_KD is None else kept.x_KD
                for x_Kd, kept in zip(features, kept_row, strict=True)
            ]
            features = [
                x if kept.gate_G is None else x * kept.gate_G[kept.index_K, None].to(x.dtype)
                for x, kept in zip(features, kept_row, strict=True)
            ]
            note(kept_row)
        shown = replace(connected, videos=tuple(features[:num_videos]))
        keep_BL = self.adapter.merge(kwargs, shown, visual, cells[:num_videos])
        if blank:
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] + 0 * features[0].sum()
        if expand > 1:
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"].repeat_interleave(expand, 0)
            keep_BL = keep_BL.repeat_interleave(expand, 0)
        self._prompt.expect(keep_BL)
        report.grids = grids[:num_videos]
        report.scores = report.scores[:num_videos]
        report.index = [
            torch.arange(grid.num_groups, device=keep_BL.device) if cell is None else cell
            for grid, cell in zip(report.grids, cells, strict=False)
        ]
        self.last = report
        return kwargs

    def _tower(
        self,
        visual: Visual,
        grids: list[Grid],
        budgets: list[list[Budget]],
        uids: Sequence[str],
        times: Sequence[Tensor | None],
        note: Any,
    ) -> TowerOutput:
        adapter = self.adapter
        x_FND = adapter.embed_patches(visual.pixels_FCHW)
        if not self._vit:
            return run_tower(x_FND, adapter.blocks(), adapter.taps())
        [stage] = self._vit
        group_PW = adapter.groups()
        num_patches = x_FND.shape[1]

        def decide(x_FND: Tensor) -> Drop | None:
            frames = x_FND[visual.num_tiles :].split(list(visual.frames_per_video))
            videos = [
                VideoTokens(
                    x_ND=part.flatten(0, 1),
                    grid=grid,
                    cell_G=torch.arange(grid.num_groups, device=part.device),
                    group_GW=_windows(group_PW, grid.t, num_patches),
                    timestamps_T=time,
                    uid=uid,
                )
                for part, grid, time, uid in zip(frames, grids, times, uids, strict=True)
            ]
            row = _skip_whole(stage, videos, budgets[0])
            note(row)
            if all(len(kept.index_K) == grid.num_groups for kept, grid in zip(row, grids, strict=True)):
                return None
            return _to_drop(row, videos, visual.num_tiles * num_patches)

        return run_tower(x_FND, adapter.blocks(), adapter.taps(), stage.site, decide)

    def _plan(self, grids: list[Grid]) -> list[list[Budget]]:
        sites = [stage.site for stage in self.pruner.stages]
        return plan(sites, self.retention_ratio, grids, self.adapter.host.llm_layers, exact=self.exact)

    def _take_names(self, num_videos: int) -> tuple[Sequence[str], Sequence[Tensor | None]]:
        uids, times = self._names or ([""] * num_videos, None)
        times = [None] * len(uids) if times is None else times
        self._names = None
        if num_videos == 0:
            return [], []
        if num_videos != len(uids) or len(times) != len(uids):
            raise ValueError(f"describe() named {len(uids)} videos ({len(times)} times), the pass has {num_videos}")
        return uids, times


def pruning(model: PreTrainedModel, pruner: str | Pruner, **settings: Any) -> Pruning:
    """See `Pruning`; reads better in a `with` line."""
    return Pruning(model, pruner, **settings)


def _sites(pruner: Pruner, adapter: Adapter) -> tuple[list[Stage], list[Stage]]:
    """Stages inside the tower and before the LLM, checked against this host."""
    vit = [stage for stage in pruner.stages if stage.site.kind == "vit"]
    pre_llm = [stage for stage in pruner.stages if stage.site.kind == "pre_llm"]
    if [*vit, *pre_llm] != list(pruner.stages) or len(vit) > 1:
        kinds = [stage.site.kind for stage in pruner.stages]
        raise ValueError(f"stages at {kinds} are not supported; expected at most one 'vit', then 'pre_llm' stages")
    for stage in pruner.stages:
        if stage.signals:
            raise ValueError(
                f"{type(stage).__name__} asks for {sorted(stage.signals)}, which this family cannot collect"
            )
    for stage in vit:
        last, tap = stage.site.drop_after or 0, adapter.host.lowest_tap
        if last > tap:
            raise ValueError(
                f"the drop after block {last} comes behind block {tap}, the lowest whose output is used; "
                f"the largest prune_block for this tower is {tap - 2}"
            )
    return vit, pre_llm


def _skip_whole(stage: Stage, videos: list[VideoTokens], budgets: Sequence[Budget]) -> list[Kept]:
    """Call the stage once; where nothing is to be dropped, a training-free stage is not even asked."""
    whole = [budget.num_kept == video.num_groups for video, budget in zip(videos, budgets, strict=True)]
    everything = [Kept(index_K=torch.arange(video.num_groups, device=video.cell_G.device)) for video in videos]
    if isinstance(stage, nn.Module):  # a learned stage sees every batch: its parameters are gathered on every rank
        row = stage(videos, budgets)
        return [replace(k, index_K=e.index_K) if w else k for k, e, w in zip(row, everything, whole, strict=True)]
    asked = [number for number, skip in enumerate(whole) if not skip]
    if asked:
        for number, kept in zip(asked, stage([videos[i] for i in asked], [budgets[i] for i in asked]), strict=True):
            everything[number] = kept
    return everything


def _windows(group_PW: Tensor, num_frames: int, num_patches: int) -> Tensor:
    """(T * P, W) patch rows of a video's groups, from those of one frame; -1 stays -1."""
    offset_T = torch.arange(num_frames, device=group_PW.device) * num_patches
    shifted = group_PW + offset_T[:, None, None]
    return torch.where(group_PW >= 0, shifted, -1).flatten(0, 1)


def _to_drop(row: Sequence[Kept], videos: Sequence[VideoTokens], num_tile_patches: int) -> Drop:
    """A stage's groups as a decision about patches: a patch lives as long as any kept group needs it."""
    keep, bias, gate = [], [], []
    for kept, video in zip(row, videos, strict=True):
        assert video.group_GW is not None
        num_patches = video.x_ND.shape[0]
        rows_KW = video.group_GW[kept.index_K]
        alive = torch.zeros(num_patches + 1, dtype=torch.bool, device=rows_KW.device)
        alive[rows_KW.flatten()] = True  # -1 falls into the spare last place
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
    return Drop(torch.cat([tiles, *keep]), bias_S, gate_S)
