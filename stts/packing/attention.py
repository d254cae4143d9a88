"""The one attention function for packed rows; the kernel is chosen here and nowhere else.

flash-attn varlen where installed, else torch's own varlen kernel (both CUDA, fp16/bf16), else SDPA: sequences of equal
length as a plain batch, others one by one, or padded where they are so small that the calls would cost more.

Shape suffixes beside those of `stts.tokens`: H = query heads, J = key/value heads, B = sequences, M = longest.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from stts.packing.segments import Segments

_log = logging.getLogger(__name__)
_AMPERE = (8, 0)

# Multiply-adds of q k' that take as long as one more SDPA call. Measured on a CPU, forward and backward, heads of 16 to
# 64: the two ways break even between 1e5 and 2e5.
_WORTH_A_CALL = 2**17


def packed_attention(
    q_SHE: Tensor, k_SJE: Tensor, v_SJE: Tensor, segments: Segments, *, scale: float, causal: bool = False
) -> Tensor:
    """Softmax attention inside each sequence of a packed row, with an optional bias per key.

    q (S, H, E), k and v (S, J, E) with H a multiple of J; returns (S, H, E). Gradients flow to q, k, v and
    `segments.key_bias`. Raises ValueError when the row and the boundaries do not fit together."""
    if q_SHE.dim() != 3 or q_SHE.shape[0] != k_SJE.shape[0] or k_SJE.shape != v_SJE.shape:
        raise ValueError(
            f"expected q (S, H, E) and k, v (S, J, E), got {tuple(q_SHE.shape)}, {tuple(k_SJE.shape)}, "
            f"{tuple(v_SJE.shape)}"
        )
    if q_SHE.shape[1] % k_SJE.shape[1]:
        raise ValueError(f"{q_SHE.shape[1]} query heads cannot share {k_SJE.shape[1]} key heads evenly")
    if segments.key_bias is not None and segments.key_bias.shape != q_SHE.shape[:1]:
        raise ValueError(f"key_bias has shape {tuple(segments.key_bias.shape)}, expected ({q_SHE.shape[0]},)")
    if q_SHE.shape[0] == 0:
        return q_SHE
    kind = q_SHE.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # not on the meta device
        # rotary tables and residuals are fp32 there, so q and k come wider than v: no flash kernel would take them
        dtype = torch.get_autocast_dtype(kind)
        q_SHE, k_SJE, v_SJE = (x.to(dtype) for x in (q_SHE, k_SJE, v_SJE))
    kernel = _kernel(q_SHE.device, q_SHE.dtype)
    if kernel is not None:
        return _on_flash(kernel, q_SHE, k_SJE, v_SJE, segments, scale, causal)
    return _on_sdpa(q_SHE, k_SJE, v_SJE, segments, scale, causal)


def kernel_name(device: torch.device, dtype: torch.dtype) -> str:
    """What `packed_attention` runs there, in words."""
    kernel = _kernel(device, dtype)
    return "SDPA" if kernel is None else {"flash": "flash-attn varlen", "varlen": "torch varlen"}[kernel.__name__]


# --- CUDA ------------------------------------------------------------------------------------------------------------

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, int, float, bool], Tensor]


def _kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    return _cuda_kernel(torch.cuda.get_device_capability(device))


@functools.cache
def _cuda_kernel(capability: tuple[int, int]) -> Kernel | None:
    """The fastest variable-length kernel that is installed and runs on a GPU of this capability, or None.

    What stands in the way is said once: SDPA, which runs instead, reads the lengths on the host in every layer."""
    if capability < _AMPERE:
        _log.warning("GPU of compute capability %d.%d: no variable-length kernel runs before 8.0; SDPA", *capability)
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError) as error:  # missing, built for another torch, or of another layout (flash-attn 4)
        if importlib.util.find_spec("flash_attn") is not None:
            _log.warning("flash-attn is installed, but cannot be used: %s; torch's own kernel runs instead", error)
    else:

        def flash(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, causal: bool) -> Tensor:
            out: Tensor = flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, softmax_scale=scale, causal=causal)
            return out

        return flash
    return _torch_varlen()


def _torch_varlen() -> Kernel | None:
    """torch's own flash kernel, or None where torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        _log.warning("torch %s has no variable-length kernel: %s; SDPA", torch.__version__, error)
        return None

    names = inspect.signature(varlen_attn).parameters  # causality was renamed between torch 2.11 and 2.13
    shares_heads = "enable_gqa" in names

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, longest: int, scale: float, causal: bool) -> Tensor:
        options: dict[str, Any] = {"scale": scale}
        if shares_heads and q.shape[1] != k.shape[1]:
            options["enable_gqa"] = True
        options |= {"window_size": (-1, 0 if causal else -1)} if "window_size" in names else {"is_causal": causal}
        if not shares_heads and q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return cast(Tensor, varlen_attn(q, k, v, cu, cu, longest, longest, **options))  # a pair only with return_aux

    return varlen


def _on_flash(
    kernel: Kernel, q_SHE: Tensor, k_SJE: Tensor, v_SJE: Tensor, segments: Segments, scale: float, causal: bool
) -> Tensor:
    width = q_SHE.shape[-1]
    if segments.key_bias is not None:
        q_SHE, k_SJE, v_SJE = with_bias_channels(q_SHE, k_SJE, v_SJE, segments.key_bias, scale)
    elif width % 8:  # torch's varlen kernel leaves this padding to its caller
        q_SHE, k_SJE, v_SJE = (F.pad(x, (0, -width % 8)) for x in (q_SHE, k_SJE, v_SJE))
    out = kernel(
        q_SHE.contiguous(),
        k_SJE.contiguous(),
        v_SJE.contiguous(),
        segments.cu_seqlens,
        segments.max_seqlen,
        scale,
        causal,
    )
    return out[..., :width]


def with_bias_channels(
    q_SHE: Tensor, k_SJE: Tensor, v_SJE: Tensor, bias_S: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fold a per-key bias b into extra channels, so that a kernel without masks adds it to every logit.

        q' = [q, 1, 1, 0..],  k' = [k, hi(b / scale), lo(b / scale), 0..]   =>   scale * <q', k'> = scale * <q, k> + b

    The value is split in a high and a low half of the working dtype, since 8 bits of mantissa (bf16) would round b in
    [-2, 0] by up to 0.4 %. Width is padded to a multiple of 8; v gets zeros, so the extra outputs are zero."""
    wanted = bias_S.float() / scale
    high = wanted.to(k_SJE.dtype)
    low = (wanted - high.float()).to(k_SJE.dtype)
    width = q_SHE.shape[-1]
    extra = (width + 2 + 7) // 8 * 8 - width
    ones_E = q_SHE.new_zeros(extra)
    ones_E[:2] = 1
    bias_SE = torch.stack([high, low], -1)[:, None]
    q = torch.cat([q_SHE, ones_E.expand(*q_SHE.shape[:2], extra)], -1)
    k = torch.cat([k_SJE, F.pad(bias_SE, (0, extra - 2)).expand(*k_SJE.shape[:2], extra)], -1)
    return q, k, F.pad(v_SJE, (0, extra))


# --- SDPA ------------------------------------------------------------------------------------------------------------


def _on_sdpa(q_SHE: Tensor, k_SJE: Tensor, v_SJE: Tensor, segments: Segments, scale: float, causal: bool) -> Tensor:
    lengths = segments.lengths.tolist()
    present = [length for length in lengths if length]
    if sum(present) != q_SHE.shape[0]:
        raise ValueError(f"segments end at {sum(present)}, but the row has {q_SHE.shape[0]} tokens")
    shares_heads = q_SHE.shape[1] != k_SJE.shape[1]
    attend = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=shares_heads)
    bias_S = None if segments.key_bias is None else segments.key_bias.to(q_SHE.dtype)
    longest = max(present)

    if min(present) == longest:  # a plain batch: no mask, no copies beyond the views
        q, k, v = (torch.unflatten(x, 0, (len(present), longest)).transpose(1, 2) for x in (q_SHE, k_SJE, v_SJE))
        mask = None if bias_S is None else _biased(bias_S.view(len(present), 1, 1, longest), longest, causal)
        return attend(q, k, v, attn_mask=mask, is_causal=causal and mask is None).transpose(1, 2).flatten(0, 1)

    wasted = len(present) * longest**2 - sum(length**2 for length in present)
    if wasted * q_SHE.shape[1] * q_SHE.shape[2] > _WORTH_A_CALL * len(present):
        parts = [torch.split(x, present) for x in (q_SHE, k_SJE, v_SJE)]
        biases = [None] * len(present) if bias_S is None else list(torch.split(bias_S, present))

        def alone(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
            mask = None if bias is None else _biased(bias[None, None, None], len(bias), causal)
            return attend(q, k, v, attn_mask=mask, is_causal=causal and mask is None)[0].transpose(0, 1)

        outs = (alone(*one) for one in zip(*parts, biases, strict=True))
        if torch.is_grad_enabled():  # autograd would copy all of the gradient for every write
            return torch.cat(list(outs))
        out_SHE = torch.empty_like(q_SHE)  # one after another, so that their outputs are never held twice
        for place_LHE, out in zip(torch.split(out_SHE, present), outs, strict=True):
            place_LHE.copy_(out)
        return out_SHE

    length_B = torch.tensor(present, device=q_SHE.device)
    valid_BM = torch.arange(longest, device=q_SHE.device) < length_B[:, None]
    rows = valid_BM.flatten().nonzero().squeeze(1)

    def padded(x_S: Tensor) -> Tensor:
        full = x_S.new_zeros(len(present) * longest, *x_S.shape[1:]).index_copy(0, rows, x_S)
        return torch.unflatten(full, 0, (len(present), longest))

    q, k, v = (padded(x).transpose(1, 2) for x in (q_SHE, k_SJE, v_SJE))
    if causal and bias_S is None:  # padding lies behind every real query, so causality alone hides it
        out = attend(q, k, v, is_causal=True)
    else:
        mask = torch.zeros_like(valid_BM, dtype=q_SHE.dtype).masked_fill(~valid_BM, float("-inf"))[:, None, None]
        if bias_S is not None:
            mask = mask + padded(bias_S)[:, None, None]
        out = attend(q, k, v, attn_mask=_biased(mask, longest, causal))
    return out.transpose(1, 2).flatten(0, 1)[rows]


def _biased(bias_B11M: Tensor, length: int, causal: bool) -> Tensor:
    """The key bias as an SDPA mask; SDPA refuses a mask beside `is_causal`, so causality is written into it."""
    if not causal:
        return bias_B11M
    future = torch.ones(length, length, dtype=torch.bool, device=bias_B11M.device).triu(1)
    return bias_B11M.masked_fill(future, float("-inf"))
