"""Make `import torchvision` possible beside a CPU-only torch.

The torchvision wheel of the package index is linked against CUDA. Next to a CPU build of torch its C++ library does not
load, the operators `nms` and `qnms` stay undefined, and `import torchvision` fails while registering their shape rules
(torchvision 0.28, torch 2.13) - and with it every transformers class that owns a video processor. Declaring the two
schemas is enough: nothing in this project calls them, and calling one still raises, because it has no kernel.

This happens when torchvision is first imported, by whomever, so that `import stts` need not load torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept_alive: list[Any] = []  # a torch Library that is collected takes its operators with it


class _DeclaringLoader(Loader):
    """Runs torchvision; where its operators are missing, declares them and runs it again."""

    def __init__(self, stock: Loader) -> None:
        self.stock = stock

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.stock.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.stock.exec_module(module)
        except RuntimeError:
            declare_missing_operators()
            self.stock.exec_module(module)


class _TorchvisionFinder(MetaPathFinder):
    """Gives torchvision the loader above; a search without an import (transformers asks what is there) is harmless."""

    _searching = False

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname != "torchvision" or self._searching:
            return None
        self._searching = True  # the search below comes by here again
        try:
            spec = find_spec(fullname)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _DeclaringLoader(spec.loader)
        return spec


def declare_missing_operators() -> None:
    """Declare `torchvision::nms` and `::qnms` when, and only when, torch does not know them. Idempotent."""
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(name + _SCHEMA)
    _kept_alive.append(library)


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _TorchvisionFinder())
