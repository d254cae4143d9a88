"""Scorer weights of the authors' release of STTS (arXiv 2603.18004, allenai/molmo2) under our names.

There the scorer is `temporal_token_scorer` somewhere inside the model; only the tail of a name is read.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

ANCHOR = "temporal_token_scorer"
_POOLING = {"wq": "query", "wk": "key", "wv": "value", "wo": "out"}
_LAYERS = {f"patch_token_pooler.{theirs}": f"scorer.pooling.{ours}" for theirs, ours in _POOLING.items()}
_LAYERS |= {f"mlp.w{number + 1}": f"scorer.mlp.{number}" for number in range(3)}
TO_OURS = {f"{theirs}.{leaf}": f"{ours}.{leaf}" for theirs, ours in _LAYERS.items() for leaf in ("weight", "bias")}


def read_reference(file: str | Path) -> dict[str, Tensor]:
    """The scorer of a release's checkpoint, as a state dict of `STTS`; other tensors of the file are not loaded.

    Safetensors, or a torch file without pickled objects. ValueError: neither, no scorer, or not exactly one."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is not a file; expected one safetensors or torch file of the release")
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                scorer = {name: tensors.get_tensor(name) for name in tensors.keys() if _like_a_scorer(name)}  # noqa: SIM118
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            scorer = {name: value for name, value in _flat(loaded) if _like_a_scorer(name)}
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read as tensors ({error}); expected safetensors, or a torch file that loads with "
            "weights_only=True"
        ) from error
    if not scorer:
        raise ValueError(f"{file} has no tensor of a scorer; expected names with {ANCHOR!r}")
    try:
        return to_ours(scorer)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def to_ours(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the release under the names of `STTS.state_dict()`; names that wrappers put in between are skipped.

    ValueError, with all their names: tensors that are not part of the scorer, that are missing, or there twice."""
    origin: dict[str, str] = {}
    unmatched, twice = [], []
    for name in tensors:
        parts = [part for part in name.split(".") if part != "module" and not part.startswith("_")]
        ours = TO_OURS.get(".".join(parts[parts.index(ANCHOR) + 1 :])) if ANCHOR in parts else None
        if ours is None:
            unmatched.append(name)
        elif ours in origin:
            twice.append(f"{name} and {origin[ours]}")
        else:
            origin[ours] = name
    missing = [f"{ANCHOR}.{theirs}" for theirs, ours in TO_OURS.items() if ours not in origin]
    if unmatched or twice or missing:
        raise ValueError(
            f"expected exactly the {len(TO_OURS)} tensors of one scorer; not understood: {unmatched}, twice: {twice}, "
            f"missing: {missing}; remove, rename or add these"
        )
    return {ours: tensors[name] for ours, name in origin.items()}


def _like_a_scorer(name: str) -> bool:
    return "scorer" in name or "patch_token_pooler" in name


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dicts, such as {"model": {...}}, under names joined by dots."""
    if isinstance(value, Tensor):
        yield prefix, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
