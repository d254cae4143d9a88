"""ShapesQA: a deterministic generator of clips and questions whose answers need small, short-lived evidence."""

from __future__ import annotations

from stts.data.shapes.clips import ShapesConfig, make_clip, vocabulary

__all__ = ["ShapesConfig", "make_clip", "vocabulary"]
