"""The answer loss, in pieces: the head's logits are held once, and never the fp32 numbers of all of them.

Plain cross-entropy holds for every answer token and word an fp32 copy of the logit and its log-softmax until the
backward pass, and makes fp32 gradients of both there: 14 to 18 bytes where this takes 4 (bf16).

Shape suffixes beside those of `stts.tokens`: B = rows, A = places where some row has an answer, V = vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stts.data.collate import IGNORED
from stts.metrics.memory import HEAD_CHUNK
from stts.tokens import Objective


def answer_loss(
    logits_BAV: Tensor, labels_BA: Tensor, chunk: int = HEAD_CHUNK, *, objective: Objective = "log_prob"
) -> Tensor:
    """Mean cross-entropy over the answer tokens, in fp32: value and gradients are those of `F.cross_entropy` on fp32
    logits, up to the order of the sum. `chunk` answer tokens at a time are computed, and again in the backward pass.

    objective: "log_odds" for minus the mean of log p - log(1 - p) in place of minus the mean of log p.
    logits (B, A, V) in any float dtype, labels (B, A) int64; NaN without an answer token, as there."""
    logits_NV, labels_N = logits_BAV.flatten(0, 1), labels_BA.flatten()
    if len(logits_BAV) > 1:  # a place counts when any row has an answer there
        answer_N = (labels_N != IGNORED).nonzero().squeeze(1)
        logits_NV, labels_N = logits_NV[answer_N], labels_N[answer_N]
    parts = zip(logits_NV.split(chunk), labels_N.split(chunk), strict=True)
    summed = {"log_prob": _log_prob, "log_odds": _log_odds}[objective]
    sums = [checkpoint(summed, logits, labels, use_reentrant=False) for logits, labels in parts]
    return torch.stack(sums).sum() / (labels_N != IGNORED).sum()


def _log_prob(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), labels_N, ignore_index=IGNORED, reduction="sum")


def _log_odds(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """log p - log(1 - p) is the logit of the label minus the logsumexp of all others: exact where p rounds to 1."""
    asked_N = labels_N != IGNORED
    place_N1 = labels_N.where(asked_N, 0)[:, None]
    logits_NV = logits_NV.float()
    others_N = logits_NV.scatter(1, place_N1, -torch.inf).logsumexp(1)
    return torch.where(asked_N, others_N - logits_NV.gather(1, place_N1).squeeze(1), 0.0).sum()
