"""The settings of a pruner on one stock model, and what follows from them before anything runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from stts.budget import check_ratio, plan
from stts.models.families.base import Adapter, make_adapter, run_device
from stts.models.pruning import pieces
from stts.models.pruning.checks import check_images, choose_positions, without_adapters
from stts.models.pruning.pass_videos import Setup
from stts.models.pruning.report import Report
from stts.models.pruning.siglip import SiglipSource
from stts.models.pruning.stages import Names, split_sites
from stts.models.pruning.tower import Tower, run_tower
from stts.models.pruning.visual_pass import Phase
from stts.models.pruning.weights import load_named
from stts.pruners.base import Positions, Pruner
from stts.tokens import Budget, Grid


class Settings:
    """Model, pruner and how they go together; `Pruning` documents the arguments."""

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
        weights: str | Path | None = None,
        untrained: bool = False,
        images: bool = False,
        tower: Tower = run_tower,
        around_stage: Callable[[], AbstractContextManager[Any]] = nullcontext,
        **options: Any,
    ) -> None:
        model = without_adapters(model)
        self.adapter: Adapter = make_adapter(model)
        self.model = model
        self.name = pruner if isinstance(pruner, str) else None
        self.options: Mapping[str, Any] = options
        self._is_random = False
        """Its pruner learns, and has learned nothing yet."""
        if isinstance(pruner, str):
            trained = load_named(pruner, model, self.adapter.host, options, weights)
            self.pruner, self.options = trained.pruner, trained.options
            self._is_random = trained.is_random and not untrained
            positions = positions or trained.positions
        else:
            self.pruner = pruner
        self.exact = exact
        self.siglip = siglip
        if siglip is not None:
            siglip.check(self.adapter.host)
        chosen = choose_positions(positions, self.pruner, self.adapter.host)
        self._setup = Setup(self.adapter, split_sites(self.pruner, self.adapter), chosen, siglip, tower, around_stage)
        self.images = images
        if images:
            check_images(self.pruner)
        self.chunk_frames = chunk_frames
        self.retention_ratio = retention_ratio
        self._max_tokens: int | None = None
        self._runs_all = False
        self._last: Report | None = None
        self._listener: Callable[[Phase], None] = lambda phase: None
        self._names: dict[int, Names] = {}
        self._handles: list[Any] = []
        self._stock_expand: Any = None
        self._originals: list[str] = []
        if self.module is not None:
            self.module.to(run_device(model))
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
            for stage in self._setup.sites.vit:
                pieces.check_in_pieces(stage)
        self._chunk_frames = value

    @property
    def tower(self) -> Tower:
        """What runs the tower's blocks."""
        return self._setup.tower

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
        return self._setup.positions

    @property
    def description(self) -> str:
        """Pruner, ratio and what follows from them, in words."""
        name = self.name or type(self.pruner).__name__
        if not self.pruner.stages:
            return f"{name} keeps every token"
        places = {"vit": "inside the tower", "pre_llm": "before the LLM", "llm": "inside the LLM"}
        where = " and ".join(dict.fromkeys(places[stage.site.kind] for stage in self.pruner.stages))
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return (
            f"{name} keeps {self.retention_ratio:g} of the visual tokens, {where}, positions {self.positions}{options}"
        )

    @property
    def last(self) -> Report | None:
        """What the last forward pass with visual input did."""
        return self._last

    @contextmanager
    def aside(self, retention_ratio: float) -> Iterator[None]:
        """Passes inside run at this ratio and leave no trace: afterwards ratio and `last` are what they were."""
        before = self.retention_ratio, self._last
        self.retention_ratio, self._last = retention_ratio, None
        try:
            yield
        finally:
            self.retention_ratio, self._last = before

    def limit_tokens(self, max_tokens: int | None) -> None:
        """At most so many visual tokens of a video, meaned over the LLM's layers: a video that would have more gets a
        lower ratio than `retention_ratio`, by its own length. None: no limit."""
        self._max_tokens = max_tokens

    def run_all_modules(self, on: bool = True) -> None:
        """Run tower, connector and stages in every pass of evaluation too, as training does: also where the batch has
        no video or nothing is to be dropped. Needed where parameters are sharded, because every rank takes part in
        gathering them, and where rows must be packed into one."""
        self._runs_all = on

    def listen(self, listener: Callable[[Phase], None] | None) -> None:
        """Tell `listener` where work for pruning alone begins and ends in a pass (`stts.models.pruning.phases`); None:
        nobody."""
        self._listener = listener or (lambda phase: None)

    def describe(
        self,
        uids: Sequence[str],
        timestamps_s: Sequence[Tensor | None] | None = None,
        questions: Sequence[str] | None = None,
    ) -> None:
        """Tell about the videos of this thread's next forward pass, in batch order: names (they seed `random`), times
        of frames in seconds (Tango), questions (AdaTP, with a text tower). ValueError unless each has one per video."""
        self._names[threading.get_ident()] = Names.of(uids, timestamps_s, questions)

    def check_trainable(self) -> None:
        """ValueError when the model cannot be trained under this pruner."""
        if self._setup.sites.llm:
            name = self.name or type(self.pruner).__name__
            raise ValueError(
                f"pruner {name!r} drops tokens inside the LLM, which training does not support: its choice needs the "
                "attention of a prompt without answers; train under a pruner at site vit or pre_llm"
            )

    def _check_trained(self) -> None:
        if self._is_random:
            raise ValueError(
                f"pruner {self.name!r} learns, but {self.model.name_or_path!r} has no weights for it: its scores would "
                "be random. Name a trained folder with weights=, train it (`stts fit`), or pass untrained=True"
            )

    # --- what a pass is given ----------------------------------------------------------------------------------------

    def _plan(self, grids: list[Grid]) -> list[list[Budget]]:
        sites, layers = [stage.site for stage in self.pruner.stages], self.adapter.host.llm_layers
        rows = [plan(sites, self._ratio_of(grid), [grid], layers, exact=self.exact) for grid in grids]
        return [[row[number][0] for row in rows] for number in range(len(sites))]

    def _ratio_of(self, grid: Grid) -> float:
        if self._max_tokens is None or self._max_tokens >= grid.num_groups * self.retention_ratio:
            return self.retention_ratio
        return math.floor(1e12 * self._max_tokens / grid.num_groups) / 1e12  # down: the decimal must not keep one more

    def _take_names(self, num_videos: int, num_images: int) -> Names:
        """Of the images, which nobody describes, and the videos of a pass."""
        names = self._names_of_videos(num_videos)
        questions = None if names.questions is None else [""] * num_images + [*names.questions]
        return Names([""] * num_images + [*names.uids], [None] * num_images + [*names.times], questions)

    def _names_of_videos(self, num_videos: int) -> Names:
        names = self._names.pop(threading.get_ident(), None)
        if names is None or num_videos == 0:
            return Names([""] * num_videos, [None] * num_videos, None)
        if num_videos != len(names.uids):
            raise ValueError(f"describe() named {len(names.uids)} videos, the pass has {num_videos}")
        return names
