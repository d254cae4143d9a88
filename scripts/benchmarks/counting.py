"""What a call asks of a GPU, counted without one: kernels it would start, and moments at which the host would wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__"}
"""Methods that need a value on the host."""
COUNTS = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive"}
"""Functions whose result has a size that only the device knows."""


class Launches(TorchDispatchMode):
    """Counts operators that compute; those that only see a tensor differently, or reserve memory, start no kernel."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.total += not (func.is_view or func.name().startswith(("aten::empty", "aten::detach")))
        return func(*args, **(kwargs or {}))


class Waits(TorchFunctionMode):
    """Counts calls that read a value of a tensor, or index by a mask."""

    total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self.total += (
            name in READS | COUNTS or self.indexes_by_mask(name, args) or self.has_unknown_size(name, args, kwargs)
        )
        return func(*args, **kwargs)

    @staticmethod
    def indexes_by_mask(name: str, args: Any) -> bool:
        if name not in ("__getitem__", "__setitem__"):
            return False
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool and part.dim() > 0 for part in index)

    @staticmethod
    def has_unknown_size(name: str, args: Any, kwargs: Any) -> bool:
        if name == "where":
            return len(args) + len(kwargs) == 1
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
        return name == "repeat_interleave" and isinstance(repeats, torch.Tensor) and kwargs.get("output_size") is None


def counted(call: Callable[[], object]) -> tuple[int, int]:
    """Kernels and host waits of one call."""
    with Waits() as waits, Launches() as launches:
        call()
    return launches.total, waits.total
