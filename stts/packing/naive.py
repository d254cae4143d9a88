"""What packed attention means, one sequence and one head at a time. The fast path is tested against this.

    out[i] = sum_j softmax_j(scale * <q[i], k[j]> + bias[j]) v[j],   j in the sequence of i (and j <= i when causal)

Shape suffixes beside those of `stts.tokens`: H = query heads, J = key/value heads, L = tokens of one sequence.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from stts.packing.segments import Segments


def naive_packed_attention(
    q_SHE: Tensor, k_SJE: Tensor, v_SJE: Tensor, segments: Segments, *, scale: float, causal: bool = False
) -> Tensor:
    """Same signature and result as `attention.packed_attention`, as loops to be read; computed in the dtype of q."""
    queries_per_key = q_SHE.shape[1] // k_SJE.shape[1]
    boundaries = segments.cu_seqlens.tolist()
    outs_LHE = []
    for start, end in itertools.pairwise(boundaries):
        heads_LE = []
        for head in range(q_SHE.shape[1]):
            q_LE = q_SHE[start:end, head]
            k_LE = k_SJE[start:end, head // queries_per_key]
            v_LE = v_SJE[start:end, head // queries_per_key]
            logits_LL = scale * (q_LE @ k_LE.T)
            if segments.key_bias is not None:
                logits_LL = logits_LL + segments.key_bias[start:end].to(q_SHE.dtype)
            if causal:
                future_LL = torch.ones_like(logits_LL, dtype=torch.bool).triu(1)
                logits_LL = logits_LL.masked_fill(future_LL, float("-inf"))
            heads_LE.append(logits_LL.softmax(-1) @ v_LE)
        outs_LHE.append(torch.stack(heads_LE, 1))
    return torch.cat(outs_LHE) if outs_LHE else q_SHE
