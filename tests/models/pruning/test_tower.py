"""Merging inside the tower: sizes as key bias, rewritten features, signals of the block where a stage decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import stts
from stts.models.families.attention import switch_off, switch_on
from stts.models.families.base import make_adapter
from stts.models.pruning.tower import Drop, run_tower
from stts.tokens import Site
from tests.conftest import make_inputs


def test_a_patch_of_size_two_is_two_equal_patches(tiny: Any) -> None:
    """Proportional attention: half of the patches repeat the other half, so merging them changes no survivor."""
    model, processor = tiny
    adapter = make_adapter(model)
    visual = adapter.take_visual(dict(make_inputs(processor, ["v what ?"])))
    assert visual is not None
    original = switch_on(adapter.configs[0])
    try:
        with torch.no_grad():
            given = adapter.embed(visual)
            frames = len(given.frames)
            x_FND = given.x_SD.unflatten(0, (frames, -1))
            half = x_FND.shape[1] // 2
            x_FND = torch.cat([x_FND[:, :half]] * 2 + [x_FND[:, 2 * half :]], 1)
            doubled = replace(given, x_SD=x_FND.flatten(0, 1))
            dense = run_tower(doubled, adapter.blocks(), adapter.taps())

            def merge(x_SD: Tensor) -> Drop:
                keep_FN = torch.ones(x_FND.shape[:2], dtype=torch.bool)
                keep_FN[:, half : 2 * half] = False
                size_FN = torch.ones(x_FND.shape[:2])
                size_FN[:, :half] = 2
                return Drop(keep_FN.flatten(), merged_ND=x_SD, size_S=size_FN.flatten())

            merged = run_tower(doubled, adapter.blocks(), adapter.taps(), Site("vit", layer=1, drop_after=1), merge)
            without = run_tower(
                doubled, adapter.blocks(), adapter.taps(), Site("vit", layer=1, drop_after=1),
                lambda x_SD: replace(merge(x_SD), size_S=None),
            )  # fmt: skip
    finally:
        switch_off(adapter.configs[0], original)
    assert merged.row_S is not None
    expected = dense.taps[0][merged.row_S]
    torch.testing.assert_close(merged.taps[0], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(without.taps[0], expected, atol=1e-3), "without sizes the attention is another"


@pytest.mark.parametrize(("name", "signal"), [("tome", "keys"), ("earlytom", "attn")])
def test_signals_come_from_the_block_where_the_stage_decides(tiny: Any, name: str, signal: str) -> None:
    model, processor = tiny
    with torch.no_grad(), stts.pruning(model, name, retention_ratio=0.5, prune_block=1) as pruned:
        model(**make_inputs(processor, ["v what ?"]), use_cache=False)
        assert pruned.last is not None and "tower block 2" in pruned.last.signals[signal]
        assert pruned.last.retention_measured == pytest.approx(0.5, abs=0.02)


def test_merging_trains_through_the_means(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ["v what ?"])
    model.train()
    try:
        with stts.pruning(model, "tome", retention_ratio=0.5):
            model(**inputs, use_cache=False).logits.sum().backward()
        first = make_adapter(model).timed_modules()[0]
        assert all(p.grad is not None and p.grad.isfinite().all() for p in first.parameters() if p.requires_grad)
    finally:
        model.eval().zero_grad()


def test_words_are_those_around_the_video_without_padding_and_other_videos(tiny: Any) -> None:
    from stts.pruners.base import PerVideo, keep_top
    from stts.tokens import Budget, Kept, Signal, VideoTokens, Words

    seen: list[Words] = []

    class Reader(PerVideo):
        signals = frozenset[Signal]({"words"})

        def prune(self, video: VideoTokens, budget: Budget) -> Kept:
            assert video.words is not None
            seen.append(video.words)
            return keep_top(video, torch.zeros(video.num_groups), budget.num_kept)

    model, processor = tiny
    inputs = make_inputs(processor, ["v what colour is it ?", "v is there a cross ?"], padding_side="left")
    with torch.no_grad(), stts.pruning(model, Reader(), retention_ratio=0.5):
        model(**inputs, use_cache=False)
    embed, token = model.get_input_embeddings(), model.config.video_token_id
    for words, ids_L, mask_L in zip(seen, inputs["input_ids"], inputs["attention_mask"], strict=True):
        ids_L = ids_L[mask_L.bool()]
        places = (ids_L == token).nonzero()[:, 0]
        before_L, behind_L = ids_L[: places[0]], ids_L[places[-1] + 1 :]
        torch.testing.assert_close(words.before_LD, embed(before_L))
        # The newline token that ends a video is a word behind it, with features of its own.
        torch.testing.assert_close(words.behind_LD[-len(behind_L) :], embed(behind_L))
        assert 0 <= len(words.behind_LD) - len(behind_L) <= 1
