"""Distillation: the pruned model learns to answer as the same model does when it sees every token.

Shape suffixes beside those of `stts.tokens`: B = rows, A = places where some row has an answer, V = vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stts.data.collate import IGNORED
from stts.metrics.memory import HEAD_CHUNK

from .step_losses import StepLoss, TrainingPass


class Distillation(StepLoss):
    """Kullback-Leibler divergence of the pruned model's answers from the dense model's (arXiv 1503.02531, section 2).

        loss = T^2 mean_n KL(softmax(dense_n / T) || softmax(pruned_n / T)),   n = answer tokens

    T^2 keeps the size of the gradient when T changes. The dense model is the model in training itself, with its weights
    of this step and without gradient: one more forward pass, which takes about a third of a dense step's time and adds
    no weights to memory.

    Args:
        weight: of this loss in the total.
        temperature: T, above 0; larger values teach more of the unlikely words.

    **Differs** from the paper, whose teacher is another, larger model, trained before."""

    name = "distillation"

    def __init__(self, weight: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(weight)
        if not temperature > 0:
            raise ValueError(
                f"Distillation: temperature={temperature} must be above 0; 1 leaves the logits as they are"
            )
        self.temperature = temperature

    def __call__(self, now: TrainingPass) -> Tensor:
        # After the pruned pass, never before: autocast would keep the 16-bit weights of a pass without gradient, and
        # the pruned pass would then reuse them and get no gradient.
        with torch.no_grad():
            dense = now.module.run_model(now.batch, retention_ratio=1.0)
        return divergence(now.logits_BAV, dense.logits_BAV, now.labels_BA, self.temperature)


def divergence(
    logits_BAV: Tensor, teacher_BAV: Tensor, labels_BA: Tensor, temperature: float, chunk: int = HEAD_CHUNK
) -> Tensor:
    """The loss above in fp32, `chunk` answer tokens at a time, computed again in the backward pass: a whole batch of
    fp32 log-probabilities would not fit beside the logits. `teacher_BAV` gets no gradient."""
    answer_N = (labels_BA.flatten() != IGNORED).nonzero().squeeze(1)
    logits_NV, teacher_NV = (x.flatten(0, 1)[answer_N] for x in (logits_BAV, teacher_BAV.detach()))
    pieces = zip(logits_NV.split(chunk), teacher_NV.split(chunk), strict=True)
    sums = [checkpoint(_summed, student, teacher, temperature, use_reentrant=False) for student, teacher in pieces]
    return temperature**2 * torch.stack(sums).sum() / len(answer_N)


def _summed(logits_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    student, teacher = (F.log_softmax(x.float() / temperature, dim=-1) for x in (logits_NV, teacher_NV))
    return F.kl_div(student, teacher, reduction="sum", log_target=True)
