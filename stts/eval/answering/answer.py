"""An answer with what was kept for it and what that cost, as it is noted and graded; needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from stts.eval.answering.evidence import Counts
from stts.metrics.cost import DecodeCost, VideoCost

_COSTS: dict[str, type[VideoCost] | type[DecodeCost]] = {
    "cost": VideoCost, "dense_cost": VideoCost, "decode": DecodeCost,
}  # fmt: skip
"""Fields of an answer that are costs."""


@dataclass(frozen=True)
class Answer:
    """What one method said to one question, what it kept, and what that cost."""

    prediction: str
    num_frames: int
    num_groups: int
    """Visual tokens of the video before pruning."""
    num_kept: int
    """Visual tokens that the first layer of the LLM sees."""
    retention: float
    """Equivalent retention: visual tokens present, meaned over the layers of the LLM, / num_groups."""
    cost: VideoCost
    """By the formula `exact`."""
    llm_flops: Mapping[str, int] = field(default_factory=dict)
    """Prefill of the visual tokens by the formulas `fastv` and `pdrop`."""
    dense_cost: VideoCost | None = None
    """Of the same video unpruned; None, like what follows, in files that do not hold it."""
    decode: DecodeCost | None = None
    kept_per_frame: Sequence[int] = ()
    """Tokens left after the last stage."""
    num_input_tokens: int | None = None
    """Of the whole prompt before pruning."""
    num_output_tokens: int | None = None
    """With the end token."""
    option_logprobs: Sequence[float] | None = None
    """Of each option, where options were scored."""
    cells: Counts = field(default_factory=dict)
    """Evidence and distractors kept, of a ShapesQA clip with labels."""

    def to_json(self) -> dict[str, Any]:
        """As JSON; `asdict` would copy every number of every list one by one, thousands of times a run."""
        costs = {name: cost and vars(cost) for name in _COSTS for cost in (getattr(self, name),)}
        return {**vars(self), **costs}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        costs = {name: kind(**content[name]) for name, kind in _COSTS.items() if content.get(name) is not None}
        return cls(**{**content, **costs})
