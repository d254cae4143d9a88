"""One forward pass with video: everything it holds, from the frames of its videos to the survivors in the prompt.

`Pruning` makes one per forward pass and puts it into the keyword arguments of the call, so hooks further down find the
pass of their own call and no other. What decode steps need of it stays on the KV cache (`continuation.py`).

Shape suffixes beside those of `stts.tokens`: B = rows, L = prompt length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from stts.budget import adjust, close
from stts.metrics.cost import tokens_per_layer
from stts.models.families.base import Connected, TowerOutput, Visual
from stts.models.pruning.llm_layers import Present
from stts.models.pruning.pass_videos import PassVideos, Setup
from stts.models.pruning.pieces import encode_in_pieces
from stts.models.pruning.prompt import Prompt
from stts.models.pruning.signals import Collector
from stts.models.pruning.stages import Names, to_drop
from stts.models.pruning.tower import Drop
from stts.tokens import Budget, Kept, Signal, Site, Words

Phase = Literal["vit", "prune", "connect", "prefill", "decode"]
"""Of a pass, see `stts.models.pruning.phases`."""


class VisualPass(PassVideos):
    """The videos of one forward pass, their way through tower, connector and stages, and the prompt they end in."""

    def __init__(
        self,
        setup: Setup,
        visual: Visual,
        budgets: list[list[Budget]],
        names: Names,
        *,
        blank: bool = False,
        expand: int = 1,
        row_ids: Tensor | None = None,
        chunk_frames: int | None = None,
        notify: Callable[[Phase], None] = lambda phase: None,
    ) -> None:
        """blank: the only video is one blank frame of a training pass without video. It runs through everything with
        weight zero, so that every rank calls the same modules and every parameter has a (zero) gradient.
        expand: rows per prompt (beams, samples); row_ids: int64 ids of all of them, which without a cache differ behind
        the prompt. chunk_frames: go through the videos in pieces of so many
        frames; None: all at once. notify: told where a phase begins."""
        if blank:
            names = Names([""], [None], None)
        super().__init__(setup, visual, budgets, names)
        self.prompt: Prompt | None = None
        """Once survivors are placed in it."""
        self._late_BL: Tensor | None = None
        self.blank, self.expand, self.chunk_frames, self.notify = blank, expand, chunk_frames, notify
        self._row_ids = row_ids
        self.num_videos = 0 if blank else len(self.grids)
        """Videos that the prompt shows."""
        self._in_tower: dict[str, str] = {}
        """What signals of a stage inside the tower were made from."""
        self._llm_fields: list[dict[str, Any]] = [{} for _ in self.grids]
        """Frame and text features of each video, for stages inside the LLM."""

    def run(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Tower, connector and stages before the LLM once each, whatever the batch holds; then the prompt is ready.

        kwargs: of the call, without its visual arguments. Returns those that go on, with embeddings for ids."""
        setup, sites = self.setup, self.setup.sites
        collector = Collector(setup.adapter, sites.from_tower, setup.siglip)
        tower, connected = self._encode(collector)

        def collect(signals: frozenset[Signal]) -> list[dict[str, Any]]:
            if self.blank or not signals:
                return [{} for _ in self.grids]
            return collector.per_video(
                tower, self.visual, connected.videos, self.grids, questions=self.questions, signals=signals
            )

        self.notify("prune")
        shown = self._prune(connected, collect, kwargs)
        if sites.llm:
            self._llm_fields = collect(sites.for_llm)
        self.notify("connect")
        self.report.signals = {**self._in_tower, **collector.sources, **sites.llm_sources}
        return self._place(kwargs, shown)

    # --- frames ------------------------------------------------------------------------------------------------------

    def _encode(self, collector: Collector) -> tuple[TowerOutput, Connected]:
        """Tower and connector, on all frames at once or in pieces; the tower's output is empty for pieces."""
        adapter, visual = self.setup.adapter, self.visual
        if self.chunk_frames is not None:
            connected, self.report.kept_patches = encode_in_pieces(self, collector, self.chunk_frames)
            return TowerOutput((), None, None), connected
        with collector.capture():
            tower = self._run_tower()
        if tower.lengths_F is not None:
            lengths_F = tower.lengths_F[visual.num_tiles :] - visual.class_tokens
            frames = lengths_F.split([grid.t for grid in self.grids])
            self.report.kept_patches = [part.tolist() for part in frames]
        return tower, adapter.connect(tower, visual, self.cells)

    def _run_tower(self) -> TowerOutput:
        adapter, visual = self.setup.adapter, self.visual
        embedded = adapter.embed(visual)
        if not self.setup.sites.vit:
            return self.setup.tower(embedded, adapter.blocks(), adapter.taps())
        [stage] = self.setup.sites.vit
        sizes = [visual.num_tile_patches, *visual.patches_per_video]
        groups = [adapter.groups(visual, number)[0] for number in range(len(self.grids))]

        collector = Collector(adapter, stage.signals, block=stage.site.layer)
        self._in_tower = collector.sources

        def decide(x_SD: Tensor) -> Drop | None:
            parts = x_SD.split(sizes)[1:]
            fields: list[dict[str, Any]] = collector.per_video(
                TowerOutput((), None, None), visual, (), self.grids, questions=None, signals=stage.signals
            )
            videos = [
                self.video(number, parts[number], group_GW=rows, **fields[number]) for number, rows in enumerate(groups)
            ]
            row = self.ask(stage, videos, self.budgets[0])
            self.note(row)
            is_whole = all(len(kept.index_K) == grid.num_groups for kept, grid in zip(row, self.grids, strict=True))
            if is_whole and all(kept.attention_bias_N is None for kept in row):
                return None
            return to_drop(row, videos, sizes[0], visual.class_tokens)

        with collector.capture():
            return self.setup.tower(embedded, adapter.blocks(), adapter.taps(), stage.site, decide)

    # --- stages ------------------------------------------------------------------------------------------------------

    def _prune(
        self,
        connected: Connected,
        collect: Callable[[frozenset[Signal]], list[dict[str, Any]]],
        kwargs: dict[str, Any],
    ) -> Connected:
        """Stages before the LLM, in order. Returns the features of what is left."""
        sites = self.setup.sites
        features, early = self.watch(connected.videos), [list(videos) for _, videos in connected.early]
        for order, stage in enumerate(sites.pre_llm):
            fields = collect(stage.signals - {"words"})
            if "words" in stage.signals:
                pairs = zip(fields, self._words(kwargs, connected), strict=True)
                fields = [field | {"words": words} for field, words in pairs]
            videos = [
                self.video(number, x_Kd, **_of_cells(fields[number], self.cells[number]))
                for number, x_Kd in enumerate(features)
            ]
            budgets = self.budgets[len(sites.vit) + order]
            if order:
                budgets = [*map(adjust, budgets, [video.num_groups for video in videos])]
            row = self.ask(stage, videos, budgets)
            features = [_kept_features(x_Kd, kept) for x_Kd, kept in zip(features, row, strict=True)]
            early = [[x_Kd[kept.index_K] for x_Kd, kept in zip(layer, row, strict=True)] for layer in early]
            self.note(row)
        newlines = ([stage.newlines for stage in (*sites.vit, *sites.pre_llm)] or ["all"])[-1]
        layers = tuple((images, tuple(videos)) for (images, _), videos in zip(connected.early, early, strict=True))
        return replace(connected, videos=tuple(features), early=layers, newlines=newlines)

    def _words(self, kwargs: dict[str, Any], connected: Connected) -> list[Words]:
        """The text around every video, as it enters the LLM; found by placing the features that there are by now."""
        if self.blank:
            nothing_LD = connected.videos[0][:0].detach()
            return [Words(nothing_LD, nothing_LD)]
        rest, placed = self.setup.adapter.merge(kwargs, connected, self.visual, self.cells)
        x_BLd, mask_BL = rest["inputs_embeds"].detach(), kwargs.get("attention_mask")
        text_BL = placed.video_BL < 0
        text_BL = text_BL if mask_BL is None else text_BL & mask_BL.bool()
        row = []
        for number in range(len(self.grids)):
            [rows, columns] = (placed.video_BL == number).nonzero(as_tuple=True)
            line, first, last = int(rows[0]), int(columns[0]), int(columns[-1])
            before_L, behind_L = text_BL[line, :first], text_BL[line, last + 1 :]
            row.append(Words(x_BLd[line, :first][before_L], x_BLd[line, last + 1 :][behind_L]))
        return row

    def _decide_in_llm(self, order: int, present: list[Present]) -> list[Kept]:
        """One stage inside the LLM, called between two layers with every video there is (per beam, with beams)."""
        sites = self.setup.sites
        stage, planned = sites.llm[order], self.budgets[len(sites.vit) + len(sites.pre_llm) + order]
        numbers = [one.video % len(self.grids) for one in present]
        videos = [
            self.video(number, **one.fields, **self._llm_fields[number])
            for number, one in zip(numbers, present, strict=True)
        ]
        budgets = [
            self._budget_in_llm(stage.site, planned[number], number, video.num_groups)
            for number, video in zip(numbers, videos, strict=True)
        ]
        row = self.ask(stage, videos, budgets)
        first = {one.video: kept for one, kept in zip(present, row, strict=True) if one.video < len(self.grids)}
        self.note([first[number] for number in range(len(self.grids))])
        self._report_cells()
        for counts, kept in zip(self.report.llm_counts, self.report.stage_kept[-1], strict=True):
            counts[order + 1 :] = [kept] * (len(counts) - order - 1)
        return row

    def _budget_in_llm(self, site: Site, planned: Budget, number: int, num_present: int) -> Budget:
        if not site.closes:
            return adjust(planned, num_present)
        report = self.report
        entry, *after = report.llm_counts[number]
        seen = tokens_per_layer(entry, report.llm_cuts, after, report.llm_layers)[: site.layer]
        return close(planned, seen, self.grids[number].num_groups, report.llm_layers, num_present)

    # --- the prompt --------------------------------------------------------------------------------------------------

    def _place(self, kwargs: dict[str, Any], shown: Connected) -> dict[str, Any]:
        """Put features into the prompt."""
        setup, mask_BL, num_videos = self.setup, kwargs.get("attention_mask"), self.num_videos
        everything = [*shown.videos, *(x_Kd for _, videos in shown.early for x_Kd in videos)]
        early = tuple((images, videos[:num_videos]) for images, videos in shown.early)
        shown = replace(shown, videos=shown.videos[:num_videos], early=early)
        visual = replace(self.visual, grids=self.visual.grids[:num_videos])
        arguments, placed = setup.adapter.merge(kwargs, shown, visual, self.cells[:num_videos])
        kwargs = kwargs | arguments
        if self.blank:
            kwargs["inputs_embeds"] = kwargs["inputs_embeds"] + 0 * sum(x_Kd.sum() for x_Kd in everything)
        if self.expand > 1:
            kwargs["inputs_embeds"] = self._expand_rows(kwargs["inputs_embeds"])
            placed = placed.repeat(self.expand, num_videos)
        self._late_BL = placed.late_BL
        self.report.grids, self.report.scores = self.grids[:num_videos], self.report.scores[:num_videos]
        self._report_cells()
        hides, num_keys = setup.sites.decode, self.report.num_kept
        if hides is not None:
            self.report.decode_layer = hides.hides_from
            self.report.decode_keys = [hides.num_visible(number) for number in num_keys]
        stages, repeated = setup.sites.llm, num_keys * self.expand
        self.prompt = Prompt(
            placed, mask_BL, setup.positions, stages, self._decide_in_llm, self.listeners, hides, repeated
        )
        self.report.llm_counts = [[n] * (1 + len(self.report.llm_cuts)) for n in self.report.num_kept]
        return kwargs

    def _expand_rows(self, x_BLd: Tensor) -> Tensor:
        """Each prompt once per beam, with the tokens that this beam has generated."""
        x_BLd = x_BLd.repeat_interleave(self.expand, 0)
        if self._row_ids is None:
            return x_BLd
        first_BL = self._row_ids[:: self.expand].repeat_interleave(self.expand, 0)
        inner: Any = self.setup.adapter.inner
        own_BLd = inner.get_input_embeddings()(self._row_ids)
        return torch.where((self._row_ids != first_BL)[..., None], own_BLd.to(x_BLd), x_BLd)

    def shorten(self, llm: Any, kwargs: dict[str, Any], seen: int) -> dict[str, Any]:
        """Inputs of the language model for the survivors, see `Prompt.shorten`."""
        assert self.prompt is not None
        self.notify("prune")
        changed = self.prompt.shorten(llm, kwargs, seen)
        if self._late_BL is not None:
            late_RM = self.prompt.survivors(self._late_BL)
            changed["inputs_embeds"] = self.setup.adapter.finish(changed["inputs_embeds"], late_RM)
        self.notify("prefill")
        self.report.llm_tokens, self.report.llm_padded = self.prompt.num_tokens, self.prompt.num_slots
        return changed

    def _report_cells(self) -> None:
        self.report.index = [
            torch.arange(grid.num_groups) if cell is None else cell.sort().values
            for grid, cell in zip(self.report.grids, self.cells, strict=False)
        ]


def _of_cells(fields: dict[str, Any], cell: Tensor | None) -> dict[str, Any]:
    """Signals of the whole grid, for the cells that are still there."""
    if cell is None:
        return fields
    per_group = ("salience_G", "keys_GD", "aligned_GC")
    return fields | {name: fields[name][cell] for name in per_group if fields.get(name) is not None}


def _kept_features(x_Kd: Tensor, kept: Kept) -> Tensor:
    """Features after a stage before the LLM: gathered or rewritten, times its gate."""
    x_Kd = x_Kd[kept.index_K] if kept.x_KD is None else kept.x_KD
    return x_Kd if kept.gate_G is None else x_Kd * kept.gate_G[kept.index_K, None].to(x_Kd.dtype)
