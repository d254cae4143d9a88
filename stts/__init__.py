"""STTS: learned and training-free video-token pruning on stock Hugging Face video VLMs."""

from __future__ import annotations

import stts._compat  # noqa: F401  (must run before the first transformers import)

__version__ = "0.1.0"
