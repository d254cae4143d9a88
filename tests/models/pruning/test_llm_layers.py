"""Stages inside the language model: masks, caches, positions and counts, against the dense model with masked keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import stts
from stts.models.checkpoints.load import load_vlm
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.pruners.base import PerVideo, keep_top
from stts.tokens import Budget, Kept, Signal, Site, VideoTokens
from tests.conftest import TINY, make_inputs

ROWS = ["v what colour is the circle ?", "- how many squares ?", "vv is there a cross ?", "iv what is it ?"]
LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    path = tmp_path_factory.mktemp("vlm") / "deep"
    return write_small_vlm(path, None, image_size=56, **{**TINY, "llm_layers": LAYERS})


@pytest.fixture
def deep(folder: Any) -> Any:
    return load_vlm(folder)


@dataclass(frozen=True)
class Cut(PerVideo):
    """Keeps the hidden states of largest norm: causal, so later tokens do not change the choice."""

    layer: int
    share: float | None = None
    asks: frozenset[Signal] = frozenset()
    merge: bool = False
    seen: list[VideoTokens] = field(default_factory=list)
    positions = "original"

    @property
    def site(self) -> Site:  # type: ignore[override]
        return Site("llm", layer=self.layer, share=self.share)

    @property
    def signals(self) -> frozenset[Signal]:  # type: ignore[override]
        return self.asks

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        self.seen.append(video)
        kept = keep_top(video, video.x_ND.float().norm(dim=-1), budget.num_kept)
        return Kept(kept.index_K, x_KD=video.x_ND[kept.index_K] * 0.5) if self.merge else kept


@dataclass(frozen=True)
class Cuts:
    stages: tuple[Any, ...]


@contextmanager
def masked_dense(model: Any, lost: dict[int, Tensor], valid_BL: Tensor) -> Iterator[None]:
    """The stock model in which layers from `layer` on do not see the keys that are lost (bool B, L) there."""
    length = valid_BL.shape[1]
    causal = torch.ones(length, length).tril().bool()
    handles = []
    for number, layer in enumerate(model.model.language_model.layers):
        gone = [lost[k] for k in lost if k <= number]
        see = valid_BL.bool() if not gone else valid_BL.bool() & ~torch.stack(gone).any(0)
        mask = (see[:, None, None] & causal) | torch.eye(length).bool()
        handles.append(
            layer.register_forward_pre_hook(
                lambda m, args, kwargs, mask=mask: (args, kwargs | {"attention_mask": mask}), with_kwargs=True
            )
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def video_places(model: Any, inputs: Any) -> list[list[int]]:
    """Per video, the flat prompt places of its groups, in order."""
    grid = 4 * 16  # four frames of 4 x 4 groups
    found = (inputs["input_ids"] == model.config.video_token_id).flatten().nonzero().squeeze(1)
    return [part[:grid].tolist() for part in found.split(grid + 1)]


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("layers", [(2,), (1, 3, 5)])
def test_cut_layers_equal_the_dense_model_with_masked_keys(deep: Any, layers: Any, side: str, use_cache: bool) -> None:
    model, processor = deep
    inputs = make_inputs(processor, ROWS, padding_side=side)
    pruner = Cuts(tuple(Cut(layer, share=0.5) for layer in layers))
    present = [4 * 16 // 2**cut for cut in range(len(layers) + 1)]
    ends = [*layers, LAYERS]
    ratio = sum(n * (end - start) for n, start, end in zip(present, [0, *layers], ends, strict=True)) / (64 * LAYERS)
    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=ratio) as pruned:
        ours = model(**inputs, use_cache=use_cache).logits
    report = pruned.last
    assert report is not None and report.llm_cuts == list(layers) and report.llm_counts == [present] * 4
    assert report.retention_measured == pytest.approx(ratio) and report.retention_per_video == pytest.approx(
        [ratio] * 4
    )
    assert report.num_kept == [present[-1]] * 4
    places = video_places(model, inputs)
    lost, left = {}, [torch.arange(64)] * 4
    for number, stage in enumerate(pruner.stages):
        gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        for video in range(4):
            assert torch.equal(stage.seen[video].cell_G, left[video]), "cells of the grid, whatever was dropped before"
            kept = keep_top(stage.seen[video], stage.seen[video].x_ND.norm(dim=-1), present[number + 1]).index_K
            dropped = set(left[video].tolist()) - set(left[video][kept].tolist())
            left[video] = left[video][kept]
            gone.view(-1)[[places[video][cell] for cell in dropped]] = True
        lost[layers[number]] = gone
    assert [index.tolist() for index in report.index] == [cells.tolist() for cells in left]
    with torch.no_grad(), masked_dense(model, lost, inputs["attention_mask"]):
        stock = model(**inputs, use_cache=False).logits
    compare = inputs["attention_mask"].bool() & ~torch.stack([*lost.values()]).any(0)
    torch.testing.assert_close(ours[compare], stock[compare], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_equals_recomputation_without_cache(deep: Any, attention: str) -> None:
    model, processor = deep
    model.set_attn_implementation(attention)
    inputs = make_inputs(processor, ROWS, padding_side="left")
    steps = 4
    pruner = Cuts((Cut(1), Cut(3), Cut(4, merge=True)))
    with stts.pruning(model, pruner, retention_ratio=0.45), torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
        assert lengths[0] > lengths[1] == lengths[2] > lengths[3] > lengths[4] == lengths[5], "caches of own length"
        length = inputs["input_ids"].shape[1]
        for step in range(steps):
            ids = out.sequences[:, : length + step]
            mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), step, dtype=torch.long)], 1)
            again = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, use_cache=False)
            torch.testing.assert_close(again.logits[:, -1], out.logits[step], atol=1e-5, rtol=1e-5)


def test_rows_do_not_feel_each_other_and_beams_equal_beams_alone(deep: Any) -> None:
    model, processor = deep
    steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    pruner = Cuts((Cut(2, asks=frozenset({"last_row"})),))
    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=0.5) as pruned:
        together = model.generate(**make_inputs(processor, ROWS[:2], padding_side="left"), num_beams=3, **steps)
        assert pruned.last is not None and pruned.last.num_kept == [16], "one video, whatever the beams"
        alone = model.generate(**make_inputs(processor, ROWS[:1]), num_beams=3, **steps)
        assert torch.equal(together[0, -3:], alone[0, -3:])


def test_signals_are_those_of_the_stock_model(deep: Any) -> None:
    model, processor = deep
    inputs = make_inputs(processor, ROWS, padding_side="right")
    stage = Cut(3, asks=frozenset({"last_row", "keys", "prompt"}))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        stock = model(**inputs, output_attentions=True, output_hidden_states=True, use_cache=True)
        for use_cache in (True, False):
            stage.seen.clear()
            with stts.pruning(model, Cuts((stage,)), retention_ratio=0.75) as pruned:
                model(**inputs, use_cache=use_cache)
            assert pruned.last is not None and set(pruned.last.signals) == {"last_row", "llm keys", "prompt"}
            length = inputs["input_ids"].shape[1]
            real = inputs["attention_mask"].bool().flatten()
            keys_ND = stock.past_key_values.layers[2].keys.transpose(1, 2).flatten(2).flatten(0, 1)
            x_ND = stock.hidden_states[3].flatten(0, 1)
            visual = {place for places in video_places(model, inputs) for place in places}
            for video, places in zip(stage.seen, video_places(model, inputs), strict=True):
                row = places[0] // length
                last = int(inputs["attention_mask"][row].sum()) - 1
                attention_L = stock.attentions[2][row, :, last].mean(0)
                torch.testing.assert_close(video.salience_G, attention_L[[p - row * length for p in places]])
                torch.testing.assert_close(video.keys_GD, keys_ND[places])
                torch.testing.assert_close(video.x_ND, x_ND[places])
                end = (row + 1) * length
                after = [p for p in range(places[-1] + 1, end) if real[p] and p not in visual]
                assert video.prompt is not None
                torch.testing.assert_close(video.prompt.x_LD, x_ND[after])
                torch.testing.assert_close(video.prompt.keys_LD, keys_ND[after])
                assert torch.equal(video.prompt.norm_D, model.model.language_model.norm.weight)


def test_what_the_words_look_at_is_that_of_the_stock_model(deep: Any) -> None:
    """The most that any head of any word behind a video gives, other videos in the row or not, packed or padded."""
    model, processor = deep
    inputs, stage = make_inputs(processor, ROWS, padding_side="right"), Cut(3, asks=frozenset({"asked"}))
    length = inputs["input_ids"].shape[1]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention_RHLL = model(**inputs, output_attentions=True).attentions[2]
        for use_cache in (True, False):
            stage.seen.clear()
            with stts.pruning(model, Cuts((stage,)), retention_ratio=0.75):
                model(**inputs, use_cache=use_cache)
            visual = {place for places in video_places(model, inputs) for place in places}
            for video, places in zip(stage.seen, video_places(model, inputs), strict=True):
                row, first = places[0] // length, places[0] // length * length
                behind = range(places[-1] + 1, first + int(inputs["attention_mask"][row].sum()))
                words = [p - first for p in behind if p not in visual]
                expected_K = attention_RHLL[row][:, words][..., [p - first for p in places]].amax((0, 1))
                torch.testing.assert_close(video.salience_G, expected_K)


def test_what_cannot_work_is_refused(deep: Any) -> None:
    model, processor = deep
    inputs = make_inputs(processor, ROWS[:1])
    with stts.pruning(model, Cuts((Cut(2),))):
        with pytest.raises(ValueError, match="output_hidden_states is not supported"):
            model(**inputs, output_hidden_states=True)
        with pytest.raises(ValueError, match="training does not support"):
            model.train()
            model(**inputs)
    model.eval()
    with pytest.raises(ValueError, match="lowest reachable"):
        stts.pruning(model, Cuts((Cut(3),)), retention_ratio=0.4)
    with pytest.raises(ValueError, match="increasing layers"):
        stts.pruning(model, Cuts((Cut(3), Cut(2))))


def test_a_text_turn_between_and_the_end_of_the_context_leave_the_stock_model(deep: Any) -> None:
    model, processor = deep
    inputs, text = make_inputs(processor, ROWS[:1]), make_inputs(processor, ["- how many squares ?"])
    with torch.no_grad():
        stock, stock_text = model(**inputs).logits, model(**text).logits
        with stts.pruning(model, Cuts((Cut(2, asks=frozenset({"last_row"})),)), retention_ratio=0.5):
            cut = model(**inputs).logits
            assert torch.equal(model(**text).logits, stock_text)
            assert torch.equal(model(**inputs).logits, cut)
        assert torch.equal(model(**inputs).logits, stock) and not torch.equal(cut, stock)


def test_stages_that_close_meet_the_ratio_whatever_those_before_them_left(deep: Any) -> None:
    model, processor = deep
    torch.manual_seed(0)
    inputs = make_inputs(processor, ROWS)
    options = {"threshold": 0.8, "layers": (1, 2, 3), "least": 0.05}
    with torch.no_grad(), stts.pruning(model, "framefusion+inner", retention_ratio=0.5, **options) as pruned:
        together = model(**inputs).logits
        assert pruned.last is not None
        counts, grids = pruned.last.llm_counts, pruned.last.grids
        assert len({tuple(row) for row in counts}) > 1, "every video has counts of its own"
        assert any(row == sorted(set(row), reverse=True) for row in counts), "and one of them merged at every call"
        for retention, grid in zip(pruned.last.retention_per_video, grids, strict=True):
            assert abs(retention - 0.5) <= 0.5 / grid.num_groups
        alone = model(**make_inputs(processor, ROWS[:1])).logits
        assert pruned.last.llm_counts == counts[:1]
        torch.testing.assert_close(alone[0], together[0][inputs["attention_mask"][0].bool()], atol=1e-5, rtol=1e-5)
        steps = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
        model.generate(**make_inputs(processor, ROWS[:2], padding_side="left"), num_beams=3, **steps)
        assert pruned.last.llm_counts == counts[:1], "beams of a row are one video"
