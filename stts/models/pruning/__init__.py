"""A pruner on a stock model: settings and hooks (`context`), one pass (`visual_pass`), its tower, stages, prompt,
layers of the LLM and report, and what decode steps need of it (`continuation`)."""

from __future__ import annotations

from stts.models.pruning.context import Pruning, pruning
from stts.models.pruning.visual_pass import Phase

__all__ = ["Phase", "Pruning", "pruning"]
