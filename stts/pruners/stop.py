"""SToP: a pruner by attention stops keeping sink tokens, which are attended whatever the video shows.

Shape suffixes beside those of `stts.tokens`: B = batch of attention maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from stts.pruners import ops
from stts.pruners.base import HostInfo, Newlines, Positions, Stage
from stts.tokens import Budget, Grid, Kept, Signal, SinkPenalty, Site, VideoTokens

SIGLIP_PATCHES = 729
"""The published strengths are for attention that sums to 1 over this many patches,"""
SIGLIP_PLACES = 196
"""and the published number of slots for frames of this many tokens."""


@dataclass(frozen=True, kw_only=True)
class SToP:
    """Run another pruner with attention sinks counted less: places that every frame attends to, whatever is there.

    The sink score of a place, once per video, from attention A averaged over heads and queries:

        a_p = mean_t A[t, p],   u = a^w,   s_p = (u_p - min u) / (max u - min u + 1e-12)

    It reaches the base through `VideoTokens.sink`, in up to four ways, each off at 0:

        salience    tokens are ranked by A[t, p] - mu_s s_p  (STSP)
        temporal    a place is static if cos + mu_t s_p > tau  (STTP; HoliTom)
        density     cluster centres are ranked by density - h s_p  (FastVID, HoliTom)
        num_slots   this many worst places are no targets of merging  (VisionZip)

    arXiv:2604.20937; `pruning/{visionzip,fastvid,holitom}/llava_arch.py` and `eval/utils/config.py` of rlqja1107/SToP.
    Every base then ranks by mean-query attention, FastVID too. Equal attention everywhere is no sink.

    **Differs:** the release moves a merge slot by comparing its number in the list of left-over tokens with places of
    the frame; here the place that the slot stands for is compared (compat="official": as released). With mu_s = 0 the
    releases of VisionZip and HoliTom still apply `num_slots` and `density`, and so does this; compare with the plain
    base instead. `rescale`, on for towers of other than 729 patches, is ours."""

    paper: ClassVar[str] = "2604.20937"
    needs_time: ClassVar[str] = "a sink is a place that every frame attends to"
    base: Stage
    salience: float = 0.0
    """mu_s, on the scale of the attention."""
    temporal: float = 0.0
    """mu_t, on the scale of a cosine."""
    density: float = 0.0
    num_slots: int = 0
    power: float = 1.1
    rescale: bool = False
    """Ours, not the paper's: mu_s in proportion to the mean attention, num_slots to the tokens of a frame."""
    positions: Positions = "compact"
    without_newlines: bool = False
    """Whatever the base says, no newline of a row stays."""
    compat: Literal["official"] | None = None

    @classmethod
    def for_visionzip(cls, host: HostInfo, base: Stage, **options: Any) -> Self:
        """The published values on VisionZip."""
        return cls._published(host, base, {"salience": 0.03, "num_slots": 20, **options})

    @classmethod
    def for_fastvid(cls, host: HostInfo, base: Stage, **options: Any) -> Self:
        """The published values on FastVID, whose centres are penalised only if attention is.

        Its release renumbers positions, unlike FastVID's own, and forgets the newlines of rows, which is not repeated
        here (compat="official": as released)."""
        salience = options.get("salience", 0.02)
        published = {
            "salience": salience,
            "density": 0.3 if salience else 0.0,
            "positions": "original" if host.mrope else "compact",
            "without_newlines": host.newline_per_row and options.get("compat") == "official",
        }
        return cls._published(host, base, {**published, **options})

    @classmethod
    def for_holitom(cls, host: HostInfo, base: Stage, **options: Any) -> Self:
        """The published values on the outer stage of HoliTom; tuned for a retention ratio of 0.1."""
        return cls._published(host, base, {"salience": 0.04, "temporal": 0.07, "density": 0.3, **options})

    @classmethod
    def for_flashvid(cls, host: HostInfo, base: Stage, **options: Any) -> Self:
        """The values that the release's settings give for FlashVID: attention less 0.02 s, in the selection of tokens.

        There are no vectors of this pair. The release knows no values for PruneVid, which ranks nothing by attention
        before the LLM."""
        return cls._published(host, base, {"salience": 0.02, **options})

    @classmethod
    def _published(cls, host: HostInfo, base: Stage, options: dict[str, Any]) -> Self:
        rescale = host.patches_per_frame != SIGLIP_PATCHES
        return cls(**{"base": base, "rescale": rescale, "positions": base.positions, **options})

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (self,)

    @property
    def site(self) -> Site:
        return self.base.site

    @property
    def signals(self) -> frozenset[Signal]:
        return self.base.signals - {"probe"} | {"attn"}

    @property
    def count_known(self) -> bool:
        return self.base.count_known

    @property
    def newlines(self) -> Newlines:
        return "none" if self.without_newlines else self.base.newlines

    def __call__(self, videos: Sequence[VideoTokens], budgets: Sequence[Budget]) -> list[Kept]:
        return self.base([replace(video, sink=self.penalty(video)) for video in videos], budgets)

    def penalty(self, video: VideoTokens) -> SinkPenalty:
        """What the base sees; one host synchronisation if rescaled."""
        ops.need_full_grid(video)
        salience_G = ops.need(video.salience_G, "attn", video).detach().float()
        salience, num_slots, num_places = self.salience, self.num_slots, video.grid.per_frame
        if self.rescale:
            salience *= float(salience_G.mean()) * SIGLIP_PATCHES
            num_slots = round(num_slots * num_places / SIGLIP_PLACES)
        return SinkPenalty(
            penalty_P=sink_score(salience_G.view(-1, num_places).mean(0), self.power),
            salience=salience,
            temporal=self.temporal,
            density=self.density,
            num_slots=num_slots,
            official=self.compat == "official",
        )

    def flops(self, grid: Grid, width: int, num_kept: int) -> int:
        """The base's, and a mean and a subtraction per token."""
        return self.base.flops(grid, width, num_kept) + 3 * grid.num_groups


def sink_score(attention_BP: Tensor, power: float) -> Tensor:
    """`attention ** power`, brought to [0, 1] along the last axis; all zeros where everything is equal."""
    raised_BP = attention_BP**power
    low_B1 = raised_BP.amin(-1, keepdim=True)
    return (raised_BP - low_B1) / (raised_BP.amax(-1, keepdim=True) - low_B1 + 1e-12)
