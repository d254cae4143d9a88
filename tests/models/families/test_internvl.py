"""InternVL keeps the laws of an adapter: frames and tiles in one tensor, a class token in every one of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import stts
from stts.data.processors import join_rows
from stts.models.families.attention import switch_off, switch_on
from stts.models.families.base import adapter_class, host_info, make_adapter
from stts.models.families.internvl import shuffled_patches
from stts.models.families.tiny import make_tiny
from stts.models.pruning.signals import Collector
from stts.models.pruning.tower import run_tower
from tests.models.families import family_laws as laws
from tests.models.pruning.test_llm_layers import Cut, Cuts, masked_dense

MEDIA = {"v": (4, 60, 100), "w": (2, 80, 40), "x": (1, 60, 60), "i": (1, 50, 100), "j": (1, 40, 40)}
"""Frames and pixels: v, w and x are videos, i an image of three tiles, j one of a single tile."""
FRAMES = {name: frames for name, (frames, *_) in MEDIA.items() if name in "vwx"}
ROWS = ["v what colour is the circle ?", "- how many squares ?", "iw is there ?", "xjiv which is red ?"]
"""A video, no video, an image of tiles before a shorter video, and one of each around the others."""
ONE_EACH = ["v what colour is the circle ?", "w how many squares ?", "x is there ?"]
CUT = Cuts((Cut(1, share=0.5),))
CELLS = 16


def make(tokenizer: Any = None, template: str | None = None, **vision: Any) -> tuple[Any, Any]:
    """Tiles of 8 x 8 patches, 6 tower blocks, 4 LLM layers."""
    config = AutoConfig.for_model(
        "internvl",
        vision_config={"num_hidden_layers": 6, "patch_size": 4} | vision,
        text_config={"model_type": "qwen3", "max_position_embeddings": 4096},
        tie_word_embeddings=False,
    )
    model, processor = make_tiny(config, tokenizer=tokenizer, template=template)
    return laws.stir(model), processor


@pytest.fixture(scope="module")
def built() -> tuple[Any, Any]:
    return make()


@pytest.fixture
def tiny(built: tuple[Any, Any]) -> tuple[Any, Any]:
    return copy.deepcopy(built[0]), built[1]


def make_inputs(processor: Any, rows: Sequence[str], *, padding_side: str = "right") -> Any:
    """Processor outputs for rows such as "vi what colour ?", the first letters saying which media; - is none."""
    parts = []
    for row in rows:
        letters, _, question = row.partition(" ")
        parts.append(_one_row(processor, row, letters.replace("-", ""), question))
    return join_rows(parts, processor.tokenizer, padding_side)


def _one_row(processor: Any, row: str, letters: str, question: str) -> dict[str, Any]:
    """The stock processor stacks videos, so those of one row are taken one at a time and written side by side."""
    texts, pixels, sizes = [], [], []
    for place, letter in enumerate(letters):
        rng = np.random.default_rng([place, *row.encode()])  # the same row, the same pixels
        frames = rng.integers(0, 255, (*MEDIA[letter], 3), dtype=np.uint8)
        kind = "videos" if letter in FRAMES else "images"
        token = processor.video_token if letter in FRAMES else processor.image_token
        one = processor(
            text=[token], **{kind: [frames if letter in FRAMES else frames[0]]}, return_tensors="pt",
            return_text_replacement_offsets=True,
        )  # fmt: skip
        texts.append(one["text_replacement_offsets"][0][0]["replacement"])
        pixels.append(one["pixel_values"])
        sizes.append(one["image_sizes"])
    text = " ".join(["<|im_start|> user", *texts, question, "<|im_end|> <|im_start|> assistant"])
    row_inputs = dict(processor.tokenizer([text], return_tensors="pt"))
    row_inputs = {name: row_inputs[name] for name in ("input_ids", "attention_mask")}
    return row_inputs | ({"pixel_values": torch.cat(pixels), "image_sizes": torch.cat(sizes)} if pixels else {})


def counts(rows: Sequence[str]) -> list[int]:
    """Groups of every video."""
    return [CELLS * FRAMES[letter] for row in rows for letter in row.partition(" ")[0] if letter in FRAMES]


# --- dense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:2], ROWS[:1], ["i is ?"]], ids=["mixed", "text", "video", "image"])
def test_training_path_equals_stock_logits_loss_and_gradients(tiny: Any, rows: list[str]) -> None:
    model, processor = tiny
    laws.training_path_equals_stock(model, make_inputs(processor, rows))


@pytest.mark.parametrize(("name", "side"), [("none", "left"), ("uniform", "right"), ("stts", "left")])
def test_dense_is_sacred_and_detaching_restores_every_bit(tiny: Any, name: str, side: str) -> None:
    model, processor = tiny
    laws.dense_is_sacred(model, make_inputs(processor, ROWS[:3], padding_side=side), name)


# --- pruned ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "use_cache"), [("left", True), ("right", True), ("right", False)])
@pytest.mark.parametrize("layer", [None, 1, 3])
def test_survivors_equal_the_masked_dense_model(tiny: Any, layer: int | None, side: str, use_cache: bool) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS, padding_side=side)
    laws.survivors_equal_the_masked_dense_model(model, inputs, counts(ROWS), layer, use_cache)


@contextmanager
def tower_attention(model: Any, attention: Any) -> Iterator[None]:
    """The stock tower but for its attention weights: `attention(block, q, k)` gives the logits of all tiles."""
    vision = model.config.vision_config
    number = {layer.attention: place for place, layer in enumerate(model.model.vision_tower.encoder.layer)}

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        return (attention(number[module], q * scaling, k).softmax(-1) @ v).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("reference", attend)
    original, vision._attn_implementation = vision._attn_implementation, "reference"
    try:
        yield
    finally:
        vision._attn_implementation = original


@pytest.mark.parametrize(("name", "options"), [("stts", {"prune_block": 0}), ("stts", {}), ("random-vit", {})])
def test_in_vit_pruning_equals_the_stock_tower_with_masked_keys(tiny: Any, name: str, options: Any) -> None:
    """The class token is seen in every block, and counted nowhere."""
    model, processor = tiny
    inputs, decided = make_inputs(processor, ROWS), []
    with torch.no_grad(), stts.pruning(model, name, retention_ratio=0.4, positions="original", **options) as pruned:
        if pruned.module is not None:
            pruned.module.register_forward_hook(lambda module, args, out: decided.extend(out))
        ours = model(**inputs).logits
    report, site = pruned.last, pruned.pruner.stages[0].site
    assert report is not None and site.layer is not None and site.drop_after is not None
    keep, bias, kept_patches, gone = [], [], [], torch.zeros_like(inputs["input_ids"]).bool()
    places = iter(zip(report.index, laws.video_places(model, inputs, counts(ROWS)), strict=True))
    biases = iter(kept.attention_bias_N for kept in decided)
    for tiles, is_video in inputs["image_sizes"].tolist():
        keep_FN, bias_FN = torch.ones(tiles, 1 + 64, dtype=torch.bool), torch.zeros(tiles, 1 + 64)
        if is_video:
            index, place = next(places)
            alive_G = torch.zeros(len(place), dtype=torch.bool).index_fill(0, index, True)
            gone.view(-1)[[place[cell] for cell in (~alive_G).nonzero().flatten().tolist()]] = True
            keep_FN[:, 1:] = False
            patch_P, alive_FP = shuffled_patches(8).flatten(), alive_G.view(tiles, -1).repeat_interleave(4, 1)
            keep_FN[:, 1:].scatter_(1, patch_P.expand(tiles, -1), alive_FP)
            kept_patches.append((keep_FN.sum(1) - 1).tolist())
            bias_FN = next(biases).view(tiles, -1) if decided else bias_FN
            assert not bias_FN[:, 0].any() and (not decided or tiles == 1 or (bias_FN[:, 1:] < -0.1).any())
        keep.append(keep_FN)
        bias.append(bias_FN)
    assert report.kept_patches == kept_patches and sum(map(sum, kept_patches)) == 4 * sum(report.num_kept)
    keep_FN, bias_FN = torch.cat(keep), torch.cat(bias)

    def attention(block: int, q: Tensor, k: Tensor) -> Tensor:
        logits = q @ k.mT
        if site.layer < block <= site.drop_after:
            logits = logits + bias_FN[:, None, None]
        return logits.masked_fill(~keep_FN[:, None, None] & (block > site.drop_after), float("-inf"))

    dense = masked_dense(model, {0: gone}, inputs["attention_mask"])
    with torch.no_grad(), tower_attention(model, attention), dense:
        stock = model(**inputs, use_cache=False).logits
    compare = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(ours[compare], stock[compare], **laws.CLOSE)


@pytest.mark.parametrize(
    ("pruner", "ratio"), [("stts", 0.4), ("novelty", 0.4), (CUT, 0.625)], ids=["vit", "pre_llm", "llm"]
)
def test_generate_equals_recomputation_without_cache(tiny: Any, pruner: Any, ratio: float) -> None:
    model, processor = tiny
    laws.generate_equals_recomputation(model, make_inputs(processor, ROWS, padding_side="left"), pruner, ratio)


@pytest.mark.parametrize(
    ("pruner", "ratio"), [("stts", 0.4), ("uniform", 1.0), (CUT, 0.625)], ids=["vit", "dense", "llm"]
)
def test_beams_and_rows_do_not_feel_each_other(tiny: Any, pruner: Any, ratio: float) -> None:
    model, processor = tiny
    batch, alone = make_inputs(processor, ROWS, padding_side="left"), [make_inputs(processor, [row]) for row in ROWS]
    laws.beams_do_not_feel_other_rows(model, batch, alone, pruner, ratio)
    laws.rows_do_not_feel_each_other(model, batch, alone, pruner, ratio)


def test_embedding_callers_get_the_same(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    with torch.no_grad(), stts.pruning(model, "uniform", retention_ratio=0.4):
        by_ids = model(**inputs).logits
        assert torch.equal(
            model(**rest, inputs_embeds=model.get_input_embeddings()(inputs["input_ids"])).logits, by_ids
        )


def test_pieces_give_what_the_whole_gives(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    for name in ("stts", "visionzip"):
        torch.manual_seed(0)
        with torch.no_grad(), stts.pruning(model, name, retention_ratio=0.4) as pruned:
            whole, before = model(**inputs).logits, pruned.last
            pruned.chunk_frames = 1
            torch.testing.assert_close(model(**inputs).logits, whole, **laws.CLOSE)
            after = pruned.last
        assert before is not None and after is not None
        assert (before.num_kept, before.kept_patches) == (after.num_kept, after.kept_patches)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uniform", "novelty", "stts", "random-vit"])
def test_packed_training_equals_one_by_one(tiny: Any, name: str) -> None:
    model, processor = tiny
    alone = [make_inputs(processor, [row]) for row in ONE_EACH]
    laws.packed_training_equals_one_by_one(model, make_inputs(processor, ONE_EACH), alone, name)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2], ["i is ?"]], ids=["mixed", "video", "text", "image"])
def test_tower_connector_and_scorer_run_once(tiny: Any, rows: list[str]) -> None:
    model, processor = tiny
    tower = model.model.vision_tower
    layers = {"first": tower.encoder.layer[0], "last": tower.encoder.layer[-1]}
    watched = {"embed": tower.embeddings, **layers, "connector": model.model.multi_modal_projector}
    laws.everything_runs_once(model, make_inputs(processor, rows), watched)


def test_gradient_checkpointing_changes_nothing(tiny: Any) -> None:
    model, processor = tiny
    inside = model.model.vision_tower.encoder.layer[5].attention.q_proj
    laws.checkpointing_changes_nothing(model, make_inputs(processor, ROWS), inside)


# --- parts -----------------------------------------------------------------------------------------------------------


def test_groups_are_what_pixel_shuffle_makes_a_token_of(tiny: Any) -> None:
    x_FHWC = torch.arange(2 * 8 * 8.0).view(2, 8, 8, 1)
    stock = tiny[0].model.pixel_shuffle(x_FHWC, scale_factor=0.5).flatten(1, 2)
    assert torch.equal(x_FHWC.flatten(1)[:, shuffled_patches(8)], stock)


def test_signals_are_the_attention_of_the_class_token(tiny: Any) -> None:
    model, processor = tiny
    inputs, adapter = make_inputs(processor, ROWS), make_adapter(tiny[0])
    visual = adapter.take_visual(dict(inputs))
    assert visual is not None and visual.num_tiles == 3 + 1 + 3 and [grid.t for grid in visual.grids] == [4, 2, 1, 4]
    original = switch_on(adapter.configs[0])
    made: dict[str, Any] = {}
    for name, field in (("attn", "salience_G"), ("probe", "salience_G"), ("keys", "keys_GD")):
        wanted: Any = frozenset({name})
        collector = Collector(adapter, wanted)
        with torch.no_grad(), collector.capture():
            tower = run_tower(adapter.embed(visual), adapter.blocks(), adapter.taps())
        features = [torch.zeros(grid.num_groups, 3) for grid in visual.grids]
        row = collector.per_video(tower, visual, features, visual.grids, questions=None, signals=wanted)
        made[name] = torch.cat([fields[field] for fields in row])
        assert name == "keys" or "class token" in collector.sources[name]
    switch_off(adapter.configs[0], original)
    seen: list[tuple[Tensor, Tensor]] = []

    def attention(block: int, q: Tensor, k: Tensor) -> Tensor:
        seen.append((q, k))
        return q @ k.mT

    with torch.no_grad(), tower_attention(model, attention):
        model(**inputs)
    q_FHNE, k_FHNE = seen[-1]
    frames = [bool(is_video) for tiles, is_video in inputs["image_sizes"].tolist() for _ in range(tiles)]
    weight_FN = (q_FHNE[:, :, :1] @ k_FHNE.mT).softmax(-1).mean((1, 2))[frames][:, 1:]
    expected = weight_FN[:, shuffled_patches(8)].mean(-1).flatten()
    for name in ("attn", "probe"):
        torch.testing.assert_close(made[name], expected, **laws.CLOSE)
    keys = k_FHNE.mean(1)[frames][:, 1:][:, shuffled_patches(8)].mean(2).flatten(0, 1)
    torch.testing.assert_close(made["keys"], keys, **laws.CLOSE)


def test_norms_and_final_norm_of_other_towers_are_the_stock_ones() -> None:
    """Towers of the large models norm queries and keys and use RMS norms; without mean pooling there is one more."""
    model, processor = make(norm_type="rms_norm", use_qk_norm=True, use_mean_pooling=False)
    laws.training_path_equals_stock(model, make_inputs(processor, ROWS))


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit_are_refused(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS[:1])
    laws.a_cut_prompt_is_refused(model, inputs)
    with stts.pruning(model, "uniform"), torch.no_grad():
        with pytest.raises(ValueError, match="prepare_processor"):
            model(**{name: value for name, value in inputs.items() if name != "image_sizes"})
        with pytest.raises(ValueError, match=r"tells of 3 tiles and frames, pixel_values has 4"):
            model(**{**inputs, "image_sizes": torch.tensor([[3, 1]])})
        with pytest.raises(ValueError, match="mm_encoder_outputs"):
            model(**inputs, mm_encoder_outputs={"image": 1})
    with pytest.raises(ValueError, match="prune_block=3 or lower"):
        stts.pruning(model, "stts", prune_block=4)
    odd = copy.deepcopy(model.config)
    odd.downsample_ratio = 0.25
    with pytest.raises(ValueError, match="downsample_ratio"):
        adapter_class("internvl").vlm_shape(odd)
    assert host_info(model).class_token and "packed" not in model.config.vision_config._attn_implementation
