"""One pruned forward pass on a stock model: hooks (`context`), tower, stages, prompt, layers of the LLM, report."""

from __future__ import annotations

from stts.models.pruning.context import Phase, Pruning, pruning

__all__ = ["Phase", "Pruning", "pruning"]
