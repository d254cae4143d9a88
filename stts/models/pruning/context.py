"""`with stts.pruning(model, "stts", retention_ratio=0.5): model.generate(...)`: a pruner on a stock model.

Inside the context hooks replace the visual part of a forward pass and shorten the prompt; outside, the model is what it
was, bit for bit. The order of one pass: frames of all videos through the tower (site `vit` decides and drops inside),
connector on survivors, site `pre_llm`, merge into the prompt, shorten the prompt, site `llm` between decoder layers.
`Settings` has what holds for all passes, `Pruning` the hooks; what one pass holds is in `visual_pass.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from stts.models.families.attention import PASS_ARGUMENT, check_device, is_on, switch_off, switch_on
from stts.models.pruning import pieces
from stts.models.pruning.checks import check_checkpointing, check_one_device, check_uncompiled
from stts.models.pruning.continuation import DecodeStep, continuation_of, decode
from stts.models.pruning.llm_layers import attach_layers
from stts.models.pruning.pass_videos import make_report
from stts.models.pruning.prompt import Prompt
from stts.models.pruning.settings import Settings
from stts.models.pruning.visual_pass import VisualPass
from stts.tokens import Budget

_EXPAND = "rows_per_prompt"
"""Keyword under which `generate` hands a forward call the number of its beams or samples."""


class Pruning(Settings):
    """A pruner attached to one stock model, as a context manager, or with `attach` and `detach` for long use.

    model: a stock model of a supported family; its weights, class and forward code are not touched.
    pruner: registry name, 'module:Class' or 'file.py:Class', or an object with `stages`.
    retention_ratio: fraction of visual tokens kept, in (0, 1]; may be reassigned between passes.
    exact: stages return exactly the planned count (False: a release's own count).
    positions: 'compact' renumbers survivors, 'original' keeps their places; None: as the first stage declares. Stages
        inside the LLM never change positions.
    chunk_frames: run tower and connector on so many frames of a video at a time, in evaluation without gradients, so
        that their memory does not grow with the video (`stts.models.pruning.pieces` says what must be held); None: all.
    siglip: a SigLIP checkpoint (`stts.models.pruning.siglip.load_siglip`) whose pooling head and text tower make the
        signals; None: the fallbacks, which `Report.signals` names.
    weights: folder or hub id with what a pruner that learns has learned; None: where the model was loaded from. What is
        recorded there counts for options and positions that are left out.
    untrained: let a pruner that learns run in evaluation although no weights were found for it and no training pass
        came before; else that is a ValueError.
    images: prune images too, each as a video of one frame with a budget of its own; `Report` has them in front of the
        videos. ValueError for a method that needs time, or an image whose tokens are no plain grid.
    tower, around_stage: for measuring: what runs the tower's blocks, and a context around every call of a stage.

    Several threads may call the model inside one context; `describe` then speaks of the caller's own next pass, and
    `last` is the pass that ended last. A model inside a context cannot be deep-copied; leave it first.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.description}; {'on' if self.is_attached else 'off'} the model)"

    # --- on and off --------------------------------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> Pruning:
        """Put the hooks on. ValueError when the model already carries some."""
        if self._handles or any(is_on(config) for config in self.adapter.configs):
            raise ValueError(
                "this model is already inside a pruning context, or shares its config object with one that is; leave "
                "that one first, or give each model a config of its own"
            )
        if not self.model.training:
            self._check_trained()
        check_one_device(self.model)
        check_uncompiled(self.model, self.adapter.inner)
        for config in self.adapter.configs:
            check_device(config, self.model.device)
        self._originals = [switch_on(config) for config in self.adapter.configs]
        inner, llm = self.adapter.inner, self.adapter.language_model
        self._handles = [
            inner.register_forward_pre_hook(self._before, with_kwargs=True),
            inner.register_forward_hook(self._after, with_kwargs=True),
            llm.register_forward_pre_hook(self._before_llm, with_kwargs=True),
            llm.register_forward_hook(self._after_llm, with_kwargs=True),
            llm.register_forward_hook(self._close_cache, with_kwargs=True, always_call=True),
            *attach_layers(llm),
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
        input_ids, rest = self._stock_expand(expand_size=expand_size, **kwargs)
        return input_ids, rest | visual | ({_EXPAND: expand_size} if expand_size > 1 else {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Pruning:
        if self._handles:
            raise ValueError(
                "a model inside a pruning context cannot be deep-copied: the copy would keep hooks that nothing can "
                "take off; leave the context (or call `detach()`), copy, and enter it again"
            )
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def __enter__(self) -> Pruning:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    # --- one forward pass --------------------------------------------------------------------------------------------

    def _before(self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the module that merges features into the prompt: do the visual part of the pass in its place."""
        if args:
            raise ValueError("pass model inputs by keyword while pruning")
        if not all(is_on(config) for config in self.adapter.configs):
            raise ValueError("the attention implementation was changed inside the context; change it before entering")
        kwargs = dict(kwargs)
        expand = kwargs.pop(_EXPAND, 1)
        stock = args, dict(kwargs)
        learning = torch.is_grad_enabled() and self.model.training
        cache = kwargs.get("past_key_values")
        has_pixels = kwargs.get("pixel_values") is not None or kwargs.get("pixel_values_videos") is not None
        runs_all = learning or self._runs_all
        if not has_pixels and (not runs_all or (cache is not None and cache.get_seq_length())):
            return stock
        if learning:
            self.check_trainable()
            check_checkpointing(self.model)
            self._is_random = False
        elif not self.model.training:
            self._check_trained()
        if self.module is not None and self.module.training != self.model.training:
            self.module.train(self.model.training)
        for name in ("input_ids", "inputs_embeds"):
            if expand > 1 and kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][::expand]
        visual = self.adapter.take_visual(kwargs)
        if self.images and visual is not None:
            visual = self.adapter.images_as_videos(visual)
        blank = runs_all and not (visual and visual.grids)
        if visual is None and not blank:
            return stock
        visual = self.adapter.with_blank(visual) if blank else visual
        assert visual is not None
        grids = [] if blank else list(visual.grids)
        num_images = 0 if blank else visual.num_images
        names = self._take_names(len(grids) - num_images, num_images)
        budgets = self._plan(grids)
        is_whole = all(b.num_kept == g.num_groups for row in budgets for b, g in zip(row, grids, strict=True))
        if blank:  # nothing of it is dropped; the ratio tells stages whether the passes of other ranks are dense
            whole = Budget(visual.grids[0].num_groups, self.retention_ratio, True)
            budgets = [[whole] for _ in self._setup.sites.all]
        in_pieces = pieces.needs_pieces(visual, self.chunk_frames, runs_all=runs_all)
        if is_whole and not runs_all and not in_pieces and self.adapter.runs_stock(visual):
            # dense is sacred: the stock code runs, untouched
            self._last = make_report(grids, [torch.arange(grid.num_groups) for grid in grids], self._setup)
            if expand == 1:
                return stock
        visual_pass = VisualPass(
            self._setup,
            visual,
            budgets,
            names,
            blank=blank,
            expand=expand,
            row_ids=stock[1].get("input_ids") if expand > 1 else None,
            chunk_frames=self.chunk_frames if in_pieces else None,
            notify=self._listener,
        )
        kwargs = visual_pass.run(kwargs)
        self._last = visual_pass.report
        return args, kwargs | {PASS_ARGUMENT: visual_pass}

    def _after(self, inner: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        visual_pass: VisualPass | None = kwargs.get(PASS_ARGUMENT)
        if visual_pass is not None and (visual_pass.prompt is None or not visual_pass.prompt.is_shortened):
            raise ValueError(f"the language model got no pass from {type(inner).__name__}; {_UNTESTED}")

    def _before_llm(self, llm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the language model: shorten the prompt, or go on behind one that was shortened."""
        if args or "inputs_embeds" not in kwargs:
            raise ValueError(f"the language model was not called with inputs_embeds by keyword; {_UNTESTED}")
        visual_pass: VisualPass | None = kwargs.get(PASS_ARGUMENT)
        cache = kwargs.get("past_key_values")
        seen = cache.get_seq_length() if cache is not None else 0
        continuation = continuation_of(cache)
        if visual_pass is not None:
            kwargs = visual_pass.shorten(llm, kwargs, seen)
            continuation = continuation_of(kwargs.get("past_key_values"))
        elif continuation is not None and seen:
            kwargs = decode(continuation, llm, kwargs, seen)
        if continuation is not None:
            continuation.open = True
        return args, kwargs

    def _after_llm(self, llm: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Behind the language model: its output at full length."""
        carried = kwargs.get(PASS_ARGUMENT)
        if isinstance(carried, DecodeStep):
            carried.finish()
        return carried.restore(output) if isinstance(carried, Prompt) else output

    def _close_cache(self, llm: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        continuation = continuation_of(kwargs.get("past_key_values"))
        if continuation is not None:
            continuation.open = False


_UNTESTED = "this transformers version is outside the tested range (>= 5.17, < 6)"


pruning = Pruning
"""The same class, under the name that reads better in a `with` line."""
