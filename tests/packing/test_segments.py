from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stts.packing.segments import Segments


def test_from_lengths_with_empty_sequences() -> None:
    segments = Segments.from_lengths(torch.tensor([0, 2, 0, 3, 0]), 3)
    assert segments.cu_seqlens.tolist() == [0, 0, 2, 2, 5, 5]
    assert segments.cu_seqlens.dtype == torch.int32, "what the kernels want"
    assert segments.num_sequences == 5 and segments.max_seqlen == 3 and segments.key_bias is None
    assert segments.lengths.tolist() == [0, 2, 0, 3, 0]
    assert segments.ids(5).tolist() == [1, 1, 3, 3, 3]
    assert segments.ids(5).dtype == torch.int64


def test_no_sequences_at_all() -> None:
    segments = Segments.from_lengths(torch.tensor([], dtype=torch.int64), 0)
    assert segments.cu_seqlens.tolist() == [0] and segments.num_sequences == 0
    assert segments.ids(0).tolist() == [] and segments.lengths.tolist() == []


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_any_integer_type(dtype: torch.dtype) -> None:
    lengths = torch.tensor([4, 1], dtype=dtype)
    assert Segments.from_lengths(lengths, 4, "cpu").cu_seqlens.tolist() == [0, 4, 5]
    assert lengths.tolist() == [4, 1], "the input is left alone"


def test_with_bias_leaves_the_original_without_one() -> None:
    plain = Segments.from_lengths(torch.tensor([2]), 2)
    bias = torch.zeros(2)
    biased = plain.with_bias(bias)
    assert plain.key_bias is None and biased.key_bias is bias
    assert biased.cu_seqlens is plain.cu_seqlens and biased.max_seqlen == 2


@given(st.lists(st.integers(0, 6), max_size=12))
def test_ids_repeat_each_number_by_its_length(lengths: list[int]) -> None:
    segments = Segments.from_lengths(torch.tensor(lengths, dtype=torch.int64), 6)
    wanted = [number for number, length in enumerate(lengths) for _ in range(length)]
    assert segments.ids(sum(lengths)).tolist() == wanted
