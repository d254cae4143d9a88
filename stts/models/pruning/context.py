"""`with stts.pruning(model, "stts", retention_ratio=0.5): model.generate(...)`: a pruner on a stock model.

Inside the context hooks replace the visual part of a forward pass and shorten the prompt; outside, the model is what it
was, bit for bit. The order of one pass: frames of all videos through the tower (site `vit` decides and drops inside),
connector on survivors, site `pre_llm`, merge into the prompt, shorten the prompt, site `llm` between decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stts.budget import adjust, check_ratio, plan
from stts.models.families.attention import check_device, is_on, switch_off, switch_on
from stts.models.families.base import Adapter, TowerOutput, Visual, make_adapter
from stts.models.pruning import pieces
from stts.models.pruning.llm_layers import Layers, Present
from stts.models.pruning.prompt import Prompt
from stts.models.pruning.report import Report
from stts.models.pruning.siglip import SiglipSource
from stts.models.pruning.signals import Collector
from stts.models.pruning.stages import (
    FROM_FRAMES,
    LLM_SOURCES,
    Names,
    Pass,
    ask,
    cell_times,
    split_sites,
    to_drop,
    view,
)
from stts.models.pruning.tower import Drop, run_tower
from stts.pruners.base import Positions, Pruner
from stts.pruners.registry import make_pruner
from stts.tokens import Budget, Grid, Kept, Signal, VideoTokens

Phase = Literal["vit", "prune", "connect", "prefill", "decode"]
"""Of a pass, see `stts.models.pruning.phases`."""


class Pruning:
    """A pruner attached to one stock model, as a context manager, or with `attach` and `detach` for long use.

    model: a stock model of a supported family; its weights, class and forward code are not touched.
    pruner: registry name, 'module:Class', or an object with `stages`.
    retention_ratio: fraction of visual tokens kept, in (0, 1]; may be reassigned between passes.
    exact: stages return exactly the planned count (False: a release's own count).
    positions: 'compact' renumbers survivors, 'original' keeps their places; None: as the first stage declares. Stages
        inside the LLM never change positions.
    chunk_frames: run tower and connector on so many frames of a video at a time, in evaluation without gradients, so
        that their memory does not grow with the video (`stts.models.pruning.pieces` says what must be held); None: all.
    siglip: a SigLIP checkpoint (`stts.models.pruning.siglip.load_siglip`) whose pooling head and text tower make the
        signals; None: the fallbacks, which `Report.signals` names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        pruner: str | Pruner,
        *,
        retention_ratio: float = 0.5,
        exact: bool = True,
        positions: Positions | None = None,
        chunk_frames: int | None = None,
        siglip: SiglipSource | None = None,
        **options: Any,
    ) -> None:
        self.adapter: Adapter = make_adapter(model)
        self.model = model
        self.name = pruner if isinstance(pruner, str) else None
        self.options: Mapping[str, Any] = options
        self.pruner = make_pruner(pruner, self.adapter.host, **options) if isinstance(pruner, str) else pruner
        self.exact = exact
        self.in_step = False
        """True: run tower, connector and stages in evaluation too when the batch has no video, as training does; needed
        where parameters are sharded, because every rank takes part in gathering them."""
        self.last: Report | None = None
        self.max_tokens: int | None = None
        """At most so many visual tokens of a video, meaned over the LLM's layers: a video that would have more gets a
        lower ratio than `retention_ratio`, by its own length."""
        self.on_phase: Callable[[Phase], None] | None = None
        """Told where work for pruning alone begins and ends in a pass; set by `stts.models.pruning.phases`."""
        if siglip is not None:
            siglip.check(self.adapter.host)
        self.siglip = siglip
        self._vit, self._pre_llm, self._llm = split_sites(self.pruner, self.adapter)
        self.chunk_frames = chunk_frames
        declared: Positions = self.pruner.stages[0].positions if self.pruner.stages else "compact"
        if positions not in (None, "compact", "original"):
            raise ValueError(f"positions={positions!r} must be 'compact', 'original' or None (as the stage declares)")
        if self.adapter.host.mrope and positions == "compact":
            raise ValueError(
                "positions='compact' would lose the time, row and column of every token in a model with mrope "
                "positions; leave it out or write 'original'"
            )
        declared = "original" if self.adapter.host.mrope else declared
        self._prompt = Prompt(
            positions or declared, Layers(self.adapter.language_model, self._llm, self._decide_in_llm)
        )
        self._pass: Pass | None = None
        self._names: Names | None = None
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
    def chunk_frames(self) -> int | None:
        return self._chunk_frames

    @chunk_frames.setter
    def chunk_frames(self, value: int | None) -> None:
        if value is not None:
            if value < 1:
                raise ValueError(f"chunk_frames={value} must be at least 1, or None for all frames at once")
            for stage in self._vit:
                pieces.check_in_pieces(stage)
        self._chunk_frames = value

    @property
    def context(self) -> int:
        """Positions that the LLM was made for."""
        config: Any = self.adapter.language_model.config
        return int(config.max_position_embeddings)

    def llm_tokens(self, grid: Grid) -> int:
        """Visual tokens of a video that the first layer of the LLM will see, as planned."""
        pairs = zip(self._plan([grid]), self.pruner.stages, strict=True)
        return min([grid.num_groups, *(row[0].num_kept for row, stage in pairs if stage.site.kind != "llm")])

    @property
    def module(self) -> nn.Module | None:
        """The learned part, or None for a training-free pruner."""
        if isinstance(self.pruner, nn.Module):
            return self.pruner
        return next((stage for stage in self.pruner.stages if isinstance(stage, nn.Module)), None)

    @property
    def positions(self) -> Positions:
        return self._prompt.positions

    def describe(
        self,
        uids: Sequence[str],
        timestamps_s: Sequence[Tensor | None] | None = None,
        questions: Sequence[str] | None = None,
    ) -> None:
        """Tell about the videos of the next forward pass, in batch order: names (they seed `random`), times of frames
        in seconds (Tango), questions (AdaTP, with a text tower). ValueError unless one of each is given per video."""
        if any(given is not None and len(given) != len(uids) for given in (timestamps_s, questions)):
            counts = [len(given) for given in (timestamps_s, questions) if given is not None]
            raise ValueError(f"describe() got {len(uids)} names, but {counts} times and questions; give one per video")
        self._names = Names(uids, timestamps_s or [None] * len(uids), questions)

    def check_trainable(self) -> None:
        """ValueError when the model cannot be trained under this pruner."""
        if self._llm:
            name = self.name or type(self.pruner).__name__
            raise ValueError(
                f"pruner {name!r} drops tokens inside the LLM, which training does not support: its choice needs the "
                "attention of a prompt without answers; train under a pruner at site vit or pre_llm"
            )

    # --- on and off --------------------------------------------------------------------------------------------------

    def attach(self) -> Pruning:
        """Put the hooks on. ValueError when the model already carries some."""
        if self._handles or any(is_on(config) for config in self.adapter.configs):
            raise ValueError("this model is already inside a pruning context; leave that one first")
        for config in self.adapter.configs:
            check_device(config, self.model.device)
        self._originals = [switch_on(config) for config in self.adapter.configs]
        inner, llm = self.adapter.inner, self.adapter.language_model
        self._handles = [
            inner.register_forward_pre_hook(self._before, with_kwargs=True),
            llm.register_forward_pre_hook(self._before_llm, with_kwargs=True),
            llm.register_forward_hook(self._prompt.after, with_kwargs=True),
        ]
        self._prompt.layers.attach()
        # generate would encode the video before the forward pass, and copy it per beam; both stay with us
        self._stock_expand = self.model._expand_inputs_for_generation
        self.model.__dict__["_supports_mm_encoder_outputs"] = lambda: False
        self.model.__dict__["_expand_inputs_for_generation"] = self._expand_rows
        return self

    def detach(self) -> None:
        """Take the hooks off; the model is bit-identical to before. Harmless when nothing is attached."""
        self._prompt.layers.detach()
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
        everything = learning or self.in_step
        if not given and (not everything or (cache is not None and cache.get_seq_length())):
            return None
        if learning:
            self.check_trainable()
        expand, self._expand = self._expand, 1
        for name in ("input_ids", "inputs_embeds"):
            if expand > 1 and kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][::expand]
        before = dict(kwargs)
        visual = self.adapter.take_visual(kwargs)
        blank = everything and not (visual and visual.grids)
        if visual is None and not blank:
            return None
        seen = self.adapter.with_blank(visual) if blank else visual
        assert seen is not None
        grids = [] if blank else list(seen.grids)
        names = self._take_names(len(grids))
        budgets = self._plan(grids)
        whole = all(b.num_kept == g.num_groups for row in budgets for b, g in zip(row, grids, strict=True))
        in_pieces = self._in_pieces(seen, everything)
        if (
            whole and not everything and not in_pieces and self.adapter.runs_stock(seen)
        ):  # dense is sacred: the stock code runs, untouched
            self.last = self._report(grids, [torch.arange(grid.num_groups) for grid in grids])
            if expand == 1:
                return args, before
        return args, self._visual_pass(kwargs, seen, budgets, names, blank=blank, expand=expand)

    def _in_pieces(self, visual: Visual, everything: bool) -> bool:
        """Whether this pass goes through the videos in pieces. ValueError where it should and cannot."""
        if visual.streamed and self.chunk_frames is None:
            raise ValueError("streamed pixel values are read in pieces; pass chunk_frames, such as chunk_frames=64")
        if self.chunk_frames is None or not visual.grids:
            return False
        if everything or torch.is_grad_enabled():
            raise ValueError(
                f"chunk_frames={self.chunk_frames} is for evaluation without gradients; call the model inside "
                "torch.no_grad() or torch.inference_mode(), or leave chunk_frames out"
            )
        return visual.streamed or max(grid.t for grid in visual.grids) > self.chunk_frames

    def _phase(self, phase: Phase) -> None:
        if self.on_phase is not None:
            self.on_phase(phase)

    def _report(self, grids: list[Grid], index: list[Tensor]) -> Report:
        cuts = sorted(stage.site.layer or 0 for stage in self._llm)
        counts = [[len(one)] * (1 + len(cuts)) for one in index]
        layers = self.adapter.host.llm_layers
        return Report(grids, index, [None] * len(grids), llm_layers=layers, llm_cuts=cuts, llm_counts=counts)

    def _before_llm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prefill = self._prompt.pending
        if prefill:
            self._phase("prune")
        result = self._prompt.before(module, args, kwargs)
        if prefill:
            self._phase("prefill")
        if prefill and self.last is not None:
            self.last.llm_tokens, self.last.llm_padded = self._prompt.num_tokens, self._prompt.num_slots
        return result

    def _visual_pass(
        self,
        kwargs: dict[str, Any],
        seen: Visual,
        budgets: list[list[Budget]],
        names: Names,
        *,
        blank: bool,
        expand: int,
    ) -> dict[str, Any]:
        """Tower, connector and stages once each, whatever the batch holds.

        `blank`: a training pass without video runs one blank frame through everything, with weight zero, so that every
        rank calls the same modules and every parameter has a (zero) gradient."""
        grids, num_videos = list(seen.grids), 0 if blank else len(seen.grids)
        if blank:
            budgets = [[Budget(grids[0].num_groups, 1.0, True)] for _ in self.pruner.stages]
            names = Names([""], [None], None)
        report = self._report(grids, [torch.arange(0)] * len(grids))
        times = [cell_times(time_F, grid) for time_F, grid in zip(names.times, grids, strict=True)]
        now = Pass(grids, budgets, names.uids, times, [{} for _ in grids], [None] * len(grids), report)
        collector = Collector(self.adapter, self._wanted, self.siglip)
        tower = TowerOutput((), None, None)
        if not blank and self._in_pieces(seen, everything=False):
            stage = self._vit[0] if self._vit else None
            connected, report.kept_patches = pieces.encode(
                self.adapter, seen, now, stage, collector, self.chunk_frames or 1
            )
        else:
            with collector.capture():
                tower = self._tower(seen, now)
            if tower.lengths_F is not None:
                frames = tower.lengths_F[seen.num_tiles :].split([grid.t for grid in grids])
                report.kept_patches = [part.tolist() for part in frames]
            connected = self.adapter.connect(tower, seen, now.cells)
        whole = connected.videos
        features = list(whole)
        early = [list(videos) for _, videos in connected.early]

        def collect(signals: frozenset[Signal]) -> list[dict[str, Any]]:
            if blank or not signals:
                return [{} for _ in grids]
            return collector.per_video(tower, seen, whole, grids, questions=names.questions, signals=signals)

        self._phase("prune")
        for stage, row in zip(self._pre_llm, budgets[len(self._vit) :], strict=False):
            videos = [
                view(fields, x_Kd, grid, cell, time, uid)
                for fields, x_Kd, grid, cell, time, uid in zip(
                    collect(stage.signals), features, grids, now.cells, now.times, now.uids, strict=True
                )
            ]
            row = row if stage is self._pre_llm[0] else [*map(adjust, row, [video.num_groups for video in videos])]
            kept_row = ask(stage, videos, row)
            features = [
                x_Kd[kept.index_K] if kept.x_KD is None else kept.x_KD
                for x_Kd, kept in zip(features, kept_row, strict=True)
            ]
            features = [
                x if kept.gate_G is None else x * kept.gate_G[kept.index_K, None].to(x.dtype)
                for x, kept in zip(features, kept_row, strict=True)
            ]
            early = [[x[kept.index_K] for x, kept in zip(layer, kept_row, strict=True)] for layer in early]
            now.note(kept_row)
        if self._llm:
            now.fields = collect(frozenset().union(*(stage.signals for stage in self._llm)) & FROM_FRAMES)
        self._phase("connect")
        report.signals = {**collector.sources, **self._llm_signals()}
        mask_BL = kwargs.get("attention_mask")
        layers = [(x[0], tuple(y[:num_videos])) for x, y in zip(connected.early, early, strict=True)]
        newlines = ([stage.newlines for stage in (*self._vit, *self._pre_llm)] or ["all"])[-1]
        shown = replace(connected, videos=tuple(features[:num_videos]), early=tuple(layers), newlines=newlines)
        real, cells = replace(seen, grids=seen.grids[:num_videos]), now.cells[:num_videos]
        arguments, placed = self.adapter.merge(kwargs, shown, real, cells)
        kwargs = kwargs | arguments
        if blank:
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] + 0 * sum(layer[0].sum() for layer in [features, *early])
        if expand > 1:
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"].repeat_interleave(expand, 0)
            placed = placed.repeat(expand, num_videos)
        self._prompt.expect(placed, mask_BL)
        report.grids, report.scores = grids[:num_videos], report.scores[:num_videos]
        self._pass, self.last = now, report
        self._show_index()
        report.llm_counts = [[n] * (1 + len(report.llm_cuts)) for n in report.num_kept]
        return kwargs

    def _show_index(self) -> None:
        now = self._pass
        assert now is not None
        now.report.index = [
            torch.arange(grid.num_groups) if cell is None else cell.sort().values
            for grid, cell in zip(now.report.grids, now.cells, strict=False)
        ]

    def _decide_in_llm(self, number: int, present: list[Present]) -> list[Kept]:
        """One stage inside the LLM, called between two layers with every video there is (per beam, with beams)."""
        now, stage = self._pass, self._llm[number]
        assert now is not None
        order = len(self._vit) + len(self._pre_llm) + number
        videos, budgets = [], []
        for one in present:
            video = one.video % len(now.grids)
            videos.append(
                VideoTokens(
                    grid=now.grids[video],
                    timestamps_T=now.times[video],
                    uid=now.uids[video],
                    **now.fields[video],
                    **one.fields,
                )
            )
            budgets.append(adjust(now.budgets[order][video], videos[-1].num_groups))
        row = ask(stage, videos, budgets)
        first = {one.video: kept for one, kept in zip(present, row, strict=True) if one.video < len(now.grids)}
        now.note([first[video] for video in range(len(now.grids))])
        self._show_index()
        cut = now.report.stage_kept[-1]
        for counts, kept in zip(now.report.llm_counts, cut, strict=True):
            counts[number + 1 :] = [kept] * (len(counts) - number - 1)
        return row

    @property
    def _wanted(self) -> frozenset[Signal]:
        """Signals that come from the tower."""
        before = frozenset[Signal]().union(*(stage.signals for stage in self._pre_llm))
        inside = frozenset[Signal]().union(*(stage.signals for stage in self._llm))
        return before | (inside & FROM_FRAMES)

    def _llm_signals(self) -> dict[str, str]:
        asked = {signal for stage in self._llm for signal in stage.signals} - FROM_FRAMES
        return {f"llm {signal}" if signal == "keys" else signal: LLM_SOURCES[signal] for signal in sorted(asked)}

    def _tower(self, visual: Visual, now: Pass) -> TowerOutput:
        adapter, given = self.adapter, self.adapter.embed(visual)
        if not self._vit:
            return run_tower(given, adapter.blocks(), adapter.taps())
        [stage] = self._vit
        sizes = [visual.num_tile_patches, *visual.patches_per_video]
        groups = [adapter.groups(visual, video)[0] for video in range(len(now.grids))]

        def decide(x_SD: Tensor) -> Drop | None:
            videos = [
                VideoTokens(
                    x_ND=part,
                    grid=grid,
                    cell_G=torch.arange(grid.num_groups, device=part.device),
                    group_GW=group_GW,
                    timestamps_T=time,
                    uid=uid,
                )
                for part, grid, group_GW, time, uid in zip(
                    x_SD.split(sizes)[1:], now.grids, groups, now.times, now.uids, strict=True
                )
            ]
            row = ask(stage, videos, now.budgets[0])
            now.note(row)
            if all(len(kept.index_K) == grid.num_groups for kept, grid in zip(row, now.grids, strict=True)):
                return None
            return to_drop(row, videos, sizes[0])

        return run_tower(given, adapter.blocks(), adapter.taps(), stage.site, decide)

    def _plan(self, grids: list[Grid]) -> list[list[Budget]]:
        sites, layers = [stage.site for stage in self.pruner.stages], self.adapter.host.llm_layers
        rows = [plan(sites, self._ratio_of(grid), [grid], layers, exact=self.exact) for grid in grids]
        return [[row[number][0] for row in rows] for number in range(len(sites))]

    def _ratio_of(self, grid: Grid) -> float:
        if self.max_tokens is None or self.max_tokens >= grid.num_groups * self.retention_ratio:
            return self.retention_ratio
        return math.floor(1e12 * self.max_tokens / grid.num_groups) / 1e12  # down: the decimal must not keep one more

    def _take_names(self, num_videos: int) -> Names:
        names, self._names = self._names, None
        if names is None or num_videos == 0:
            return Names([""] * num_videos, [None] * num_videos, None)
        if num_videos != len(names.uids):
            raise ValueError(f"describe() named {len(names.uids)} videos, the pass has {num_videos}")
        return names


def pruning(model: PreTrainedModel, pruner: str | Pruner, **settings: Any) -> Pruning:
    """See `Pruning`; reads better in a `with` line."""
    return Pruning(model, pruner, **settings)
