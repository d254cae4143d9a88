"""CUDA without a GPU: tensors that compute on the CPU and say that they lie on cuda:0.

`pretend()` is a context. In it tensors made with `device="cuda"`, or moved there, are `OnCuda`; what is computed from
them is too. An operation on such a tensor and an ordinary one fails, as on a GPU, and every wait of the host for the
device is noted with the line of ours, or of transformers, that caused it. Forward passes only: autograd sees a CPU."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import stts.packing.attention

CUDA = torch.device("cuda", 0)
# Operators whose result, or its shape, the host must know.
_WAITS = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "bincount", "is_nonzero", "nonzero_numpy",
}  # fmt: skip
_FACTORIES = {
    torch.tensor, torch.as_tensor, torch.asarray, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange,
    torch.linspace, torch.rand, torch.randn, torch.randint, torch.randperm, torch.eye, torch.tril_indices,
    torch.triu_indices,
}  # fmt: skip
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_}
_READS = {Tensor.tolist, Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
_GETS, _SETS = Tensor.__getitem__, Tensor.__setitem__


class OnCuda(Tensor):
    """A CPU tensor that says it is on cuda:0; made with `as_subclass`."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")


@dataclass
class Waits:
    """What made the host wait."""

    places: list[str] = field(default_factory=list)
    """`operator at file:function`, the innermost place in this project or transformers."""

    @property
    def ours(self) -> list[str]:
        return [place for place in self.places if " stts/" in place]

    def note(self, what: str) -> None:
        self.places.append(f"{what} at {_place()}")


def _place() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_qualname
        for root in ("/stts/", "/transformers/"):
            if root in path:
                return f"{root[1:]}{path.rpartition(root)[2]}:{name}".replace(".<locals>", "")
        frame = frame.f_back
    return "test"


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._has_compatible_shallow_copy_type:  # `Module.to` asks whether it may keep the parameter
            return isinstance(args[0], OnCuda) == isinstance(args[1], OnCuda)
        if func in _MOVES:
            return self._move(func, args, kwargs)
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == "cuda":
            kwargs["device"] = "cpu"
            if func in (torch.tensor, torch.as_tensor, torch.asarray) and not isinstance(args[0], OnCuda):
                self._check_list(args[0])
            return tree_map(_on_cuda, self._call(func, args, kwargs, True))
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        tensors += _of_slices(args)
        on_cuda = any(isinstance(x, OnCuda) for x in tensors)
        if on_cuda:
            self._check_devices(func, args, tensors)
            self._note(func, args, kwargs)
        out = self._call(func, args, kwargs, on_cuda)
        return tree_map(_on_cuda, out) if on_cuda and target is None and func not in _READS else out

    def _call(self, func: Any, args: Any, kwargs: Any, on_cuda: bool) -> Any:
        with torch._C.DisableTorchFunctionSubclass(), _Operators(self.waits if on_cuda else None):
            return func(*args, **kwargs)

    def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`to`, `cpu`, `cuda`, `copy_`: the only ways from one device to the other."""
        x = args[0]
        if func is Tensor.copy_:
            if isinstance(x, OnCuda) != isinstance(args[1], OnCuda) and isinstance(args[1], OnCuda):
                self.waits.note("copy_")
            return self._call(func, args, kwargs, False)
        given = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, (str, torch.device, int, Tensor))]
        given = [a for a in given if not isinstance(a, bool)]
        target = {Tensor.cpu: "cpu", Tensor.cuda: "cuda"}.get(func)
        if func is Tensor.to and given:
            target = (given[0].device if isinstance(given[0], Tensor) else torch.device(given[0])).type
        here = "cuda" if isinstance(x, OnCuda) else "cpu"
        target = target or here
        dtypes = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)]
        dtypes += [a.dtype for a in given if isinstance(a, Tensor)]
        plain = x.as_subclass(Tensor)
        out = plain.to(dtypes[0]) if dtypes else plain
        if target == here:
            return x if out is plain else (_on_cuda(out) if here == "cuda" else out)
        if here == "cuda" and x.numel():
            self.waits.note("copy to the host")
        out = out.clone() if out is plain else out
        return _on_cuda(out) if target == "cuda" else out

    def _check_list(self, data: Any) -> None:
        if any(isinstance(x, OnCuda) for x in tree_flatten(data)[0]):
            self.waits.note("tensor of tensors")

    @staticmethod
    def _check_devices(func: Any, args: Any, tensors: list[Tensor]) -> None:
        on_host = [x for x in tensors if not isinstance(x, OnCuda)]
        if func in (_GETS, _SETS) and isinstance(args[0], OnCuda):
            return  # an index on the host is copied
        if any(x.dim() for x in on_host) or (on_host and func in (torch.cat, torch.stack)):
            shapes = [(tuple(x.shape), "cuda" if isinstance(x, OnCuda) else "cpu") for x in tensors]
            raise RuntimeError(f"expected all tensors on one device: {getattr(func, '__name__', func)} got {shapes}")

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        """What the operators below a call do not show."""
        if func is Tensor.tolist:
            self.waits.note("tolist")
        if func in (torch.repeat_interleave, Tensor.repeat_interleave):
            counts = args[1] if len(args) > 1 else kwargs.get("repeats", args[0])
            if isinstance(counts, Tensor) and kwargs.get("output_size") is None:
                self.waits.note("repeat_interleave")
        if func in (_GETS, _SETS):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [i for i in index if isinstance(i, Tensor) and i.dtype == torch.bool and i.dim()]
            fills = func is _SETS and not (isinstance(args[2], Tensor) and args[2].dim())
            if masks and not fills:
                self.waits.note("boolean index")


class _Operators(TorchDispatchMode):
    """Notes operators that wait, also those inside composite functions."""

    def __init__(self, waits: Waits | None) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self.waits is not None and name in _WAITS:
            self.waits.note(name)
        return func(*args, **(kwargs or {}))


def _of_slices(args: Any) -> list[Tensor]:
    index = args[1] if len(args) > 1 and isinstance(args[1], tuple) else args[1:2]
    ends = [end for part in index if isinstance(part, slice) for end in (part.start, part.stop)]
    return [end for end in ends if isinstance(end, Tensor)]


def _on_cuda(x: Any) -> Any:
    return x.as_subclass(OnCuda) if isinstance(x, Tensor) and not isinstance(x, OnCuda) else x


def move(module: nn.Module) -> nn.Module:
    """Parameters and buffers to the device, in place; tied ones stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                new = moved.setdefault(id(parameter), nn.Parameter(_on_cuda(parameter.data), parameter.requires_grad))
                part._parameters[name] = new
        for name, buffer in part._buffers.items():
            part._buffers[name] = _on_cuda(buffer)
    return module


@dataclass
class Kernel:
    """The variable-length kernel: refuses what flash-attn 2.8 and torch's own would refuse."""

    calls: int = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, causal: bool) -> Tensor:
        assert all(isinstance(x, OnCuda) for x in (q, k, v, cu)), "a tensor on the host reached the kernel"
        assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16), (q.dtype, k.dtype, v.dtype)
        assert cu.dtype == torch.int32 and cu.is_contiguous()
        assert (type(longest), type(scale), type(causal)) == (int, float, bool), "the host must know these"
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256 and q.shape[-1] % 8 == 0, q.shape
        self.calls += 1
        ends = cu.as_subclass(Tensor).tolist()
        assert ends[-1] == len(q) and max(b - a for a, b in itertools.pairwise(ends)) <= longest
        plain = [x.as_subclass(Tensor).float().transpose(0, 1) for x in (q, k, v)]
        pieces = [
            nn.functional.scaled_dot_product_attention(
                *(x[:, a:b][None] for x in plain), scale=scale, is_causal=causal, enable_gqa=True
            )[0].transpose(0, 1)
            for a, b in itertools.pairwise(ends)
            if b > a
        ]
        return _on_cuda(torch.cat(pieces).to(q.dtype))

    @property
    def __name__(self) -> str:
        return "varlen"


@contextmanager
def pretend() -> Iterator[tuple[Waits, Kernel]]:
    """The waits of the block, and the packed attention kernel that ran in it."""
    waits, kernel = Waits(), Kernel()
    choose: Callable[..., Kernel] = lambda capability: kernel  # noqa: E731
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        stack.enter_context(mock.patch.object(stts.packing.attention, "_cuda_kernel", choose))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_Functions(waits))
        yield waits, kernel
