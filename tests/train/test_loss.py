"""The answer loss in pieces is the plain one, and holds less."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stts.data.collate import IGNORED
from stts_train.loss import answer_loss

Loss = Callable[[Tensor, Tensor], Tensor]


def plain(logits_BAV: Tensor, labels_BA: Tensor) -> Tensor:
    return F.cross_entropy(logits_BAV.flatten(0, 1).float(), labels_BA.flatten())


def case(rows: int, dtype: torch.dtype, num_places: int = 11, vocab: int = 37) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, num_places, vocab, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(vocab, (rows, num_places), generator=generator)
    if rows > 1:
        labels[0, 4:], labels[-1, :9] = IGNORED, IGNORED
    return logits, labels


def outcome(loss: Loss, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    value = loss(logits, labels)
    return value.detach(), torch.autograd.grad(3.0 * value, logits)[0]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_cross_entropy(rows: int, chunk: int, dtype: torch.dtype) -> None:
    logits, labels = case(rows, dtype)
    value, grad = outcome(plain, logits, labels)
    ours, ours_grad = outcome(lambda x, y: answer_loss(x, y, chunk), logits, labels)
    torch.testing.assert_close(ours, value)
    torch.testing.assert_close(ours_grad, grad)
    assert ours_grad.dtype == dtype and ours.dtype == torch.float32


def test_a_batch_without_an_answer_is_not_a_number_as_before() -> None:
    logits, labels = case(2, torch.float32)
    assert answer_loss(logits, torch.full_like(labels, IGNORED)).isnan()
    assert answer_loss(logits[:, :0], labels[:, :0]).isnan()


def held(loss: Loss, logits: Tensor, labels: Tensor) -> int:
    """Bytes that autograd holds for the backward pass, beside the logits themselves."""
    own, sizes = logits.untyped_storage().data_ptr(), {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss(logits, labels)
    assert value.isfinite()
    return sum(size for place, size in sizes.items() if place != own)


def test_nothing_as_large_as_the_logits_is_held_beside_them() -> None:
    logits, labels = case(1, torch.bfloat16, num_places=64, vocab=500)
    assert held(plain, logits, labels) >= 2 * logits.nbytes, "fp32 log-softmax of bf16 logits"
    assert held(lambda x, y: answer_loss(x, y, 8), logits, labels) < 0.05 * logits.nbytes
