"""STTS: learned and training-free video-token pruning on stock Hugging Face video VLMs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import stts._compat  # noqa: F401  (must run before the first transformers import)

if TYPE_CHECKING:
    from stts.models.checkpoints.hub import PrunedVLM
    from stts.models.pruning.context import Pruning, pruning

__version__ = "0.1.0"
__all__ = ["PrunedVLM", "Pruning", "pruning"]


def __getattr__(name: str) -> Any:
    """Import the model side on first use, so that a pruner can be read and tested without transformers."""
    if name == "PrunedVLM":
        from stts.models.checkpoints.hub import PrunedVLM

        return PrunedVLM
    if name in __all__:
        from stts.models import pruning as module

        return getattr(module, name)
    raise AttributeError(f"module 'stts' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
