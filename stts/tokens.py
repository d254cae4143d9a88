"""What passes between rooms: one video's tokens at one site, the budget, and what survives.

Shape suffixes, which mean the same in the whole library:

    N  units in one list: patches in the ViT, tokens after it, of one video or of all one behind the other
    G  groups of a video that are present: what the LLM counts as one token (outside the ViT G = N)
    K  kept groups
    T  temporal cells of a video, or the frames that were chosen of it
    F  frames of a file, or of all videos of a batch
    P  places of a frame: its groups
    U  units of one frame: its patches
    S  units of everything in one row: patches of all frames, tokens of a packed row
    D  width of the features, E of an attention head, d of the LLM where D is the tower's

Other letters are explained in the files that use them; here W = units per group, C = width of a frame feature, L =
prompt tokens after the video.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

SiteKind = Literal["vit", "pre_llm", "llm"]
Signal = Literal["attn", "probe", "frame", "keys", "text", "last_row", "asked", "prompt", "words", "aligned"]
"""What a stage may ask the adapter to collect: `attn` mean-query attention per group, `probe` attention of the tower's
pooling head, `frame` one global feature per frame, `keys` attention keys per group, `text` the question in the space of
the frame features, `last_row` the LLM attention of the last prompt token, `asked` the most LLM attention that any head
of any word after the video gives, `prompt` the LLM tokens after the video, `words` the embeddings of the text around
the video, `aligned` every group in the space of `text`."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells of one video, frame-major: cell (t, y, x) has number (t * h + y) * w + x."""

    t: int
    h: int
    w: int

    def __post_init__(self) -> None:
        if min(self.t, self.h, self.w) < 1:
            raise ValueError(f"grid {(self.t, self.h, self.w)} must be at least 1 in every direction (t, h, w)")

    @property
    def per_frame(self) -> int:
        """Cells of one frame, h * w."""
        return self.h * self.w

    @property
    def num_groups(self) -> int:
        """Cells of the whole video, t * h * w."""
        return self.t * self.h * self.w


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """What follows the video in the prompt, as the LLM sees it before the layer of the site."""

    x_LD: Tensor
    """(L, D) hidden states."""
    keys_LD: Tensor
    """(L, kv_heads * head_dim) keys of the layer before, rotary embedding applied."""
    norm_D: Tensor
    """(D,) weight of the LLM's final RMS norm."""


@dataclass(frozen=True, slots=True)
class Words:
    """The text of the prompt around the video, as it enters layer 0 of the LLM; without images and other videos."""

    before_LD: Tensor
    """(L, D) embeddings before the video."""
    behind_LD: Tensor
    """(L, D) embeddings behind it: the question, and in training the answer."""


@dataclass(frozen=True, slots=True)
class SinkPenalty:
    """How strongly each place acts as an attention sink (SToP, arXiv:2604.20937); read only inside `pruners/ops.py`."""

    penalty_P: Tensor
    """(S,) fp32 in [0, 1], per place of a frame and equal in all frames; 0 = no sink."""
    salience: float = 0.0
    """Taken off the salience (mu_s), times the penalty."""
    temporal: float = 0.0
    """Added to the similarity of neighbouring frames (mu_t)."""
    density: float = 0.0
    """Taken off the density score of cluster centres."""
    num_slots: int = 0
    """This many worst places are no targets of merging."""
    official: bool = False
    """Move slots as the release does, which compares places of the frame with numbers in the rest list."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where a stage sees tokens, and when its drop takes effect."""

    kind: SiteKind
    layer: int | None = None
    """vit: decide on the output of this block (-1: patch embeddings); llm: before this layer; pre_llm: unused."""
    drop_after: int | None = None
    """vit only: the last block that still runs on everything."""
    share: float | None = None
    """llm: fraction kept of what is present (HoliTom, Tango: 0.5); None: `budget.plan` solves one common share."""
    floor: float = 0.0
    """llm, share None: sites fall away from the deepest on until this much is left at the end (AdaTP: 0.03)."""
    closes: bool = False
    """llm, share 1: stages before this one keep as many as the data say, and this one may keep what then makes the
    whole pruner cost the ratio (FrameFusion)."""

    def __post_init__(self) -> None:
        if self.kind not in ("vit", "pre_llm", "llm"):
            raise ValueError(f"site kind {self.kind!r} is unknown; expected 'vit', 'pre_llm' or 'llm'")
        if self.kind == "vit":
            if self.layer is None or self.drop_after is None:
                raise ValueError("a vit site needs `layer` (decide on its output) and `drop_after` (last full block)")
            if self.drop_after < max(self.layer, 0):
                raise ValueError(f"drop_after={self.drop_after} comes before the decision at block {self.layer}")
        if self.kind == "llm" and self.layer is None:
            raise ValueError("an llm site needs `layer`: tokens are dropped before this layer")
        if self.closes and (self.kind != "llm" or self.share != 1):
            raise ValueError(
                f"closes=True at site {self.kind} with share={self.share}: expected kind 'llm' and share=1, as its "
                "count follows from what earlier stages leave"
            )
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be in (0, 1]: the fraction kept of what is present")


@dataclass(frozen=True, slots=True)
class Budget:
    """What one stage may keep of one video; made by `budget.plan` only."""

    num_kept: int
    """Groups this stage should return."""
    retention_ratio: float
    """The stage's own ratio, unrounded: methods that round per frame or segment need it."""
    exact: bool = False
    """True: `ops.fit_count` trims or fills to `num_kept`; False: the release's own count, which is then measured."""


@dataclass(frozen=True, slots=True)
class VideoTokens:
    """One video at one site. A stage reads only what it declared in `signals`."""

    x_ND: Tensor
    """vit: patches; pre_llm: connector outputs; llm: hidden states."""
    grid: Grid
    """(t, h, w) of groups."""
    cell_G: Tensor
    """int64 grid cell of each group still present, increasing."""
    group_GW: Tensor | None = None
    """int64 rows of `x_ND` that form each group, -1 = outside the grid."""
    timestamps_T: Tensor | None = None
    """float64 seconds."""
    salience_G: Tensor | None = None
    """fp32: mean-query, probe, last-row or the words' attention, as the stage asks."""
    keys_GD: Tensor | None = None
    """pre_llm: keys of the last tower block, mean over heads; llm: keys of the layer before, all heads side by side."""
    frame_TC: Tensor | None = None
    """One global feature per frame."""
    text_C: Tensor | None = None
    """The question in the space of `frame_TC`; None where no aligned text tower is at hand."""
    aligned_GC: Tensor | None = None
    """Every group in the space of `text_C`; None where no aligned tower is at hand."""
    prompt: PromptTokens | None = None
    words: Words | None = None
    uid: str = ""
    """Seeds `random`; equal uids share one question."""
    sink: SinkPenalty | None = None
    """Set by SToP, read only inside ops."""
    num_before: int | None = None
    """Groups that were present before the stage in front of this one; None at the first stage."""
    norm_N: Tensor | None = None
    """fp32 lengths of the rows of `x_ND`, at least 1e-12; set by `PerVideo`, which looks at them for NaN."""

    @property
    def num_groups(self) -> int:
        """Groups present (fewer than `grid.num_groups` after an earlier stage)."""
        return len(self.cell_G)


Objective = Literal["log_prob", "log_odds"]
"""Form of the answer loss: minus the mean over answer tokens of log p, or of log p - log(1 - p)."""


@dataclass(frozen=True, slots=True)
class Watched:
    """What became of features on their way into the prompt."""

    x_Kd: Tensor
    """The same values, or what a gate left of them."""
    losses: Mapping[str, Tensor]
    """0 in value; their gradients are made in the backward pass."""
    values: Mapping[str, Tensor]
    """Scalars that hold their values once the backward pass is through: of each loss under its name, and what else
    is to be logged."""
    objective: Objective
    """Form of the answer loss that the gradients should be of."""
    attention: tuple[int, Callable[[Tensor], None]] | None = None
    """A layer of the LLM, and who is told what its last row attends to before the backward pass: fp32 (K,), the softmax
    weights of the row's last token, mean over heads."""


Watch = Callable[[Tensor], Watched]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a stage decided for one video."""

    index_K: Tensor
    """int64 rows of the G axis, unique, increasing (compat="official" may keep the release's order)."""
    x_KD: Tensor | None = None
    """Rewritten (merged) features; None: the adapter gathers at the drop."""
    attention_bias_N: Tensor | None = None
    """Key bias for blocks layer + 1 .. drop_after: a gradient path to the scores."""
    gate_G: Tensor | None = None
    """Straight-through factor, multiplied in where the drop happens."""
    scores_G: Tensor | None = None
    """For reports; higher = kept."""
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    """Empty unless the stage learns. A loss of the whole call rides on the first video only, so summing is safe."""
    watch: Watch | None = None
    """Called with the connector's output of the kept groups, (K, d), on its way into the prompt, in training: a stage
    inside the tower sees what the answer makes of them in the backward pass."""
    x_ND: Tensor | None = None
    """vit, where the drop follows the decision at once: the patches after merging; those that leave are not read."""
    size_N: Tensor | None = None
    """vit, with `x_ND`: fp32, how many patches each one stands for; its logarithm is the key bias of all blocks behind
    the drop."""
