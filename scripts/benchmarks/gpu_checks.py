"""Checks of `benchmarks/gpu.py`: correctness of the kernel, host syncs, and what choosing costs.

Shape suffixes beside those of `stts.tokens`: H = query heads, J = key/value heads.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import stts
from stts.packing.attention import kernel_name, packed_attention
from stts.packing.naive import naive_packed_attention
from stts.packing.segments import Segments

# --- time inside a pass ----------------------------------------------------------------------------------------------


class Marks:
    """Moments on the device, and the milliseconds between them once everything has ended."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {}
        self._open: dict[str, Any] = {}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, name: str) -> None:
        self._open[name] = self._now()

    def end(self, name: str) -> None:
        if name in self._open:
            self._spans.setdefault(name, []).append((self._open.pop(name), self._now()))

    def ms(self, name: str) -> float:
        """Of all spans of this name together; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        spans = self._spans.get(name, [])
        return sum(a.elapsed_time(b) if self._cuda else 1e3 * (b - a) for a, b in spans)


class Calls(TorchDispatchMode):
    """Counts operators that reach a kernel: about one launch each. Views and sizes are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and torch.Tag.inplace_view not in func.tags:
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class StageWatch:
    """For `Pruning(around_stage=...)`: a context around every call of a stage, which changes from pass to pass."""

    def __init__(self) -> None:
        self._around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __call__(self) -> AbstractContextManager[Any]:
        return self._around()

    @contextmanager
    def timed(self, marks: Marks) -> Iterator[None]:
        """Stages under the name `choice`."""

        @contextmanager
        def around() -> Iterator[None]:
            marks.begin("choice")
            try:
                yield
            finally:
                marks.end("choice")

        with self._set(around):
            yield

    @contextmanager
    def counted(self, calls: Calls) -> Iterator[None]:
        """Operators of stages, and of nothing else."""
        with self._set(lambda: calls):
            yield

    @contextmanager
    def _set(self, around: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        self._around = around
        try:
            yield
        finally:
            self._around = nullcontext


@contextmanager
def around_blocks(pruned: stts.Pruning, before: Callable[[int], None], after: Callable[[int], None]) -> Iterator[None]:
    """Call these around every block of the tower."""
    adapter: Any = pruned.adapter
    stock = adapter.blocks

    def watched(number: int, block: Any) -> Any:
        def run(*args: Any) -> Tensor:
            before(number)
            x: Tensor = block(*args)
            after(number)
            return x

        return run

    adapter.blocks = lambda: [watched(number, block) for number, block in enumerate(stock())]
    try:
        yield
    finally:
        del adapter.blocks


@contextmanager
def overhead_timed(pruned: stts.Pruning, marks: Marks) -> Iterator[None]:
    """`decide`: between the block a stage reads and the next one; `drop`: the gather behind `drop_after`; `shorten`: of
    the prompt (inside `Phases`, which listens instead, its `prune`); `backward`: the scorer's backward pass."""
    [stage] = [stage for stage in pruned.pruner.stages if stage.site.kind == "vit"]
    names = {stage.site.layer: "decide", stage.site.drop_after: "drop"}

    def before(number: int) -> None:
        if number - 1 in names:
            marks.end(names[number - 1])

    def after(number: int) -> None:
        if number in names:
            marks.begin(names[number])

    def on_phase(phase: str) -> None:
        (marks.begin if phase == "prune" else marks.end)("shorten")

    handles = []
    scorer = getattr(pruned.module, "scorer", None)
    if isinstance(scorer, torch.nn.Module):
        handles = [
            scorer.register_full_backward_pre_hook(lambda *_: marks.begin("backward")),
            scorer.register_full_backward_hook(lambda *_: marks.end("backward")),
        ]
    pruned.listen(on_phase)
    try:
        with around_blocks(pruned, before, after):
            yield
    finally:
        pruned.listen(None)
        for handle in handles:
            handle.remove()


# --- host syncs ------------------------------------------------------------------------------------------------------

WAITS = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "equal",
    "bincount",
}
"""Operators whose result the host needs before it can go on."""


class NoWaiting(TorchDispatchMode):
    """RuntimeError at an operator that would make the host wait for a GPU: the CPU's twin of CUDA's sync debug mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        places = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in WAITS or any(place is not None and place.dtype == torch.bool for place in places):
            raise RuntimeError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_syncs(pruned: stts.Pruning) -> Iterator[None]:
    """RuntimeError when the host waits for the device in the tower's loop, from block 0 to the last.

    Allowed behind two blocks: where the stage decides (it refuses features that are not finite) and at the drop (the
    number of survivors)."""
    device = pruned.model.device
    open_behind = {behind for stage in pruned.pruner.stages for behind in (stage.site.layer, stage.site.drop_after)}
    last = len(pruned.adapter.blocks()) - 1
    stack = ExitStack()

    def forbid() -> None:
        if device.type == "cuda":
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
            torch.cuda.set_sync_debug_mode("error")
        else:
            stack.enter_context(NoWaiting())

    def before(number: int) -> None:
        if number == 0 or number - 1 in open_behind:
            forbid()

    def after(number: int) -> None:
        if number == last or number in open_behind:
            stack.close()

    with stack, around_blocks(pruned, before, after):
        yield


# --- the kernel ------------------------------------------------------------------------------------------------------

CASES = (  # lengths, query heads, key heads, head width, bias, causal
    ([729] * 4, 16, 16, 72, True, False),
    ([360, 0, 369, 729, 1, 270], 16, 16, 72, False, False),
    ([364, 5, 729, 91], 16, 16, 72, True, False),
    ([1301, 17, 640], 32, 8, 128, False, True),
    ([196] * 3, 28, 4, 128, False, True),
)
TINY_CASES = (([7, 0, 5, 1], 4, 4, 8, True, False), ([9, 3], 4, 2, 8, False, True))
TENSORS = ("out", "q", "k", "v", "bias")
ROUNDING = 1e-5  # as flash-attn adds: where plain torch happens to be exact, twice nothing would be nothing


def check_kernel(device: torch.device, *, tiny: bool = False) -> list[dict[str, Any]]:
    """Errors of `packed_attention` here, of its fallback on a CPU, and of plain loops, all in bf16, against the plain
    loops in fp32: output and every gradient (of the bias, RMS; of the others, largest).

    `ok`: at most twice the error of the plain loops in bf16, as in Dao-AILab/flash-attention `test_flash_attn.py`."""
    rows = []
    for lengths, heads, kv_heads, width, bias, causal in TINY_CASES if tiny else CASES:
        generator = torch.Generator().manual_seed(sum(lengths))
        shapes = [(sum(lengths), heads, width), *[(sum(lengths), kv_heads, width)] * 2]
        leaves = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
        leaves += [-2 * torch.rand(sum(lengths), generator=generator)] if bias else []
        upstream = torch.randn(shapes[0], generator=generator).bfloat16()

        def run(
            attend: Any,
            where: torch.device,
            dtype: torch.dtype,
            *,
            given: list[Tensor] = leaves,
            up: Tensor = upstream,
            lengths: list[int] = lengths,
            causal: bool = causal,
        ) -> list[Tensor]:
            qkv = [x.to(where, dtype).requires_grad_() for x in given[:3]]
            bias = [x.to(where).requires_grad_() for x in given[3:]]
            segments = Segments.from_lengths(torch.tensor(lengths), max(lengths), where)
            segments = segments.with_bias(bias[0]) if bias else segments
            out = attend(*qkv, segments, scale=qkv[0].shape[-1] ** -0.5, causal=causal)
            return [out, *torch.autograd.grad(out, [*qkv, *bias], up.to(where, dtype))]

        cpu = torch.device("cpu")
        exact = run(naive_packed_attention, device, torch.float32)
        ways = {
            kernel_name(device, torch.bfloat16): run(packed_attention, device, torch.bfloat16),
            "CPU fallback": run(packed_attention, cpu, torch.bfloat16),
        }
        plain = run(naive_packed_attention, device, torch.bfloat16)
        for way, got in ways.items():
            row: dict[str, Any] = {"lengths": lengths, "heads": [heads, kv_heads, width], "causal": causal, "way": way}
            pairs = zip(TENSORS, got, plain, exact, strict=False)
            row["errors"] = {name: (_error(name, a, t), _error(name, b, t)) for name, a, b, t in pairs}
            row["ok"] = all(own <= 2 * other + ROUNDING for own, other in row["errors"].values())
            rows.append(row)
    return rows


def _error(name: str, x: Tensor, truth: Tensor) -> float:
    difference = (x.float() - truth.to(x.device).float()).abs()
    return (difference.square().mean().sqrt() if name == "bias" else difference.max()).item()
