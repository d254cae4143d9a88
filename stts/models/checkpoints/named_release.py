"""Learned parts of other releases, whose tensors have the names of our modules behind a prefix of their own.

VisionSelector (arXiv 2510.16598) stores `visual.importance_scorer.*` in a whole VLM checkpoint, CaCoVID (arXiv
2602.01649) `compression_policy.*`. Other tensors of the files are not loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_named(path: str | Path, names: Iterable[str]) -> dict[str, Tensor]:
    """The tensors that end in `names`, under these names, from a safetensors file or a folder of shards.

    ValueError: no such files, one that cannot be read, or a name that is missing or there twice."""
    path = Path(path)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.suffix == ".safetensors" else []
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{path} holds no safetensors; expected one such file of the release, or its folder")
    wanted, found, twice = set(names), {}, []
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    parts = name.split(".")
                    ours = next((tail for n in range(len(parts)) if (tail := ".".join(parts[n:])) in wanted), None)
                    if ours is None:
                        continue
                    if ours in found:
                        twice.append(name)
                    found[ours] = tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read as safetensors ({error}); fetch it again") from error
    if missing := sorted(wanted - set(found)):
        raise ValueError(f"{path} lacks {missing} of the release's learned part; is it the checkpoint of this method?")
    if twice:
        raise ValueError(f"{path} has {twice} under two prefixes; keep one of them")
    return found
