"""The laws of an adapter on the Molmo2 of molmo2_tiny.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    Molmo2ForConditionalGeneration,
)
from transformers.models.molmo2.video_processing_molmo2 import arange_for_pooling

import stts
from stts.models.checkpoints.load import load_vlm
from stts.models.families.base import make_adapter
from stts.models.families.molmo2 import pooling_windows
from stts.models.pruning.tower import run_tower
from stts.pruners.base import PerVideo, keep_top
from stts.tokens import Budget, Grid, Kept, VideoTokens
from tests.conftest import answer_labels
from tests.models.families import family_laws as laws
from tests.models.families.molmo2_tiny import (
    CELLS,
    EVEN,
    LLM_LAYERS,
    ROWS,
    SIDE,
    cuts,
    make_inputs,
    masked_dense,
    places_of,
    write_molmo2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_molmo2(tmp_path_factory.mktemp("molmo2"))


@pytest.fixture
def tiny(folder: Path) -> Any:
    """A fresh model in eval mode and its processor."""
    return load_vlm(folder)


def test_windows_of_a_frame_are_the_processors() -> None:
    for height, width in ((8, 8), (9, 9), (27, 27), (7, 11)):
        expected, rows, columns = arange_for_pooling(torch.arange(height * width).view(height, width), 3, 3)
        assert torch.equal(pooling_windows(height, width), expected)
        assert (rows, columns) == (-(-height // 3), -(-width // 3))


def test_groups_are_the_windows_of_the_videos_own_patches(tiny: Any) -> None:
    model, processor = tiny
    adapter = make_adapter(model)
    visual = adapter.take_visual(dict(make_inputs(processor, ROWS)))
    assert visual is not None and visual.grids == (Grid(3, 3, 3), Grid(4, 3, 3)) and visual.num_tiles == 0
    rows_GW, weight_GW = adapter.groups(visual, 1)
    assert rows_GW.shape == weight_GW.shape == (4 * CELLS, 9)
    assert rows_GW[0].tolist() == [-1, -1, -1, -1, 0, 1, -1, 7, 8], "counted from the video's own first patch"
    assert rows_GW[-1].tolist() == [187, 188, -1, 194, 195, -1, -1, -1, -1], "the last corner of the fourth frame"
    assert weight_GW[-1].tolist() == [0.25, 0.25, 0, 0.25, 0.25, 0, 0, 0, 0]
    assert rows_GW[rows_GW >= 0].sort().values.tolist() == list(range(4 * SIDE**2)), "every patch once"
    assert adapter.taps() == (7, 5) and adapter.host.lowest_tap == 5


def test_dense_training_path_matches_stock(tiny: Any) -> None:
    model, processor = tiny
    laws.training_path_equals_stock(model, make_inputs(processor, ROWS))


def test_dense_training_path_matches_stock_on_images(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ["i what colour is the circle ?", ROWS[1], "i is there a cross ?"])
    assert (inputs["image_token_pooling"] < 0).any() and len(inputs["pixel_values"]) == 2 * 3, "two crops and a view"
    model.train()
    stock = model(**inputs, labels=answer_labels(inputs))
    with stts.pruning(model, "stts", retention_ratio=0.4):
        ours = model(**inputs, labels=answer_labels(inputs), use_cache=False)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[real], stock.logits[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["none", "uniform", "stts"])
def test_dense_is_sacred_and_detaching_restores_every_bit(tiny: Any, name: str, side: str) -> None:
    model, processor = tiny
    laws.dense_is_sacred(model, make_inputs(processor, ROWS, padding_side=side), name)


def test_images_are_never_pruned(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ["i which colour ?", ROWS[1]])
    with torch.no_grad(), stts.pruning(model, "stts", retention_ratio=0.2) as pruned:
        ours = model(**inputs).logits
    assert torch.equal(ours, model(**inputs).logits) and pruned.last is not None and pruned.last.grids == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
def test_dropped_groups_equal_the_dense_model_with_masked_keys(
    tiny: Any, side: str, use_cache: bool, attention: str
) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS, padding_side=side)
    places = places_of(model, inputs, [3, 4])
    model.set_attn_implementation(attention)
    with torch.no_grad(), stts.pruning(model, "uniform", retention_ratio=0.4, positions="original") as pruned:
        ours = model(**inputs, use_cache=use_cache).logits
    assert pruned.last is not None and pruned.last.num_kept == [11, 14]
    gone = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
    for kept, place in zip(pruned.last.index, places, strict=True):
        gone.view(-1)[place] = True
        gone.view(-1)[place[kept]] = False
    model.set_attn_implementation("sdpa")
    with torch.no_grad(), masked_dense(model, inputs, {0: gone}):
        stock = model(**inputs, use_cache=False).logits
    compare = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(ours[compare], stock[compare], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("layers", [(2,), (1, 3, 4)])
def test_cut_layers_equal_the_dense_model_with_masked_keys(tiny: Any, layers: Any, use_cache: bool) -> None:
    """Layers 0, 3 and 4 have scaled rotary tables, the others not, so a cut must shorten both kinds."""
    model, processor = tiny
    inputs = make_inputs(processor, EVEN, padding_side="left")
    places = places_of(model, inputs, [4, 4])
    pruner, ratio = cuts(*layers)
    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=ratio):
        ours = model(**inputs, use_cache=use_cache).logits
    lost = {}
    for stage in pruner.stages:
        lost[stage.layer] = torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
        for place, video in zip(places, stage.seen, strict=True):
            kept = keep_top(video, video.x_ND.norm(dim=-1), video.num_groups // 2).index_K
            lost[stage.layer].view(-1)[place[video.cell_G]] = True
            lost[stage.layer].view(-1)[place[video.cell_G[kept]]] = False
    with torch.no_grad(), masked_dense(model, inputs, lost):
        stock = model(**inputs, use_cache=False).logits
    compare = inputs["attention_mask"].bool() & ~torch.stack([*lost.values()]).any(0)
    torch.testing.assert_close(ours[compare], stock[compare], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["stts", "random-vit"])
def test_in_vit_pruning_equals_the_masked_dense_tower(tiny: Any, name: str) -> None:
    """Same tower, keys of dropped patches masked behind the drop, pooled by the stock connector."""
    model, processor = tiny
    inputs = make_inputs(processor, ROWS[:1])
    frames, seen = 3, []
    with stts.pruning(model, name, retention_ratio=0.4) as pruned, torch.no_grad():
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model.eval()
        model(**inputs, use_cache=False)
        hook.remove()
        stage, report = pruned.pruner.stages[0], pruned.last
        assert stage.site.drop_after is not None
        assert report is not None and report.kept_patches is not None
        [kept] = report.index
        window_GW = inputs["video_token_pooling"]
        needed = torch.zeros(frames * SIDE**2, dtype=torch.bool)
        needed[window_GW[kept][window_GW[kept] >= 0]] = True
        needed = needed.view(frames, SIDE**2)
        assert report.kept_patches == [needed.sum(1).tolist()]
        tower, bias, found = model.model.vision_tower, None, {}
        x = tower.patch_embedding(inputs["pixel_values_videos"]) + tower.positional_embedding
        for number, layer in enumerate(tower.layers):
            if number > stage.site.drop_after:
                bias = torch.zeros(needed.shape).masked_fill(~needed, float("-inf"))[:, None, None]
                bias = bias.masked_fill(~needed.any(1)[:, None, None, None], 0)  # an emptied frame
            x = found[number] = layer(x, bias)
            if number == stage.site.layer and name == "stts":
                video = VideoTokens(x.flatten(0, 1), Grid(frames, 3, 3), torch.arange(frames * CELLS), window_GW)
                [decided] = stage([video], [Budget(len(kept), 0.4, True)])
                assert torch.equal(decided.index_K, kept) and decided.attention_bias_N is not None
                bias = decided.attention_bias_N.view(frames, 1, 1, SIDE**2)
        pooled = model.model.multi_modal_projector(torch.cat([found[7], found[5]], -1), window_GW).last_hidden_state
        placeholder = model.get_input_embeddings().weight[model.config.image_patch_id]
    [place] = places_of(model, inputs, [frames])
    gone = sorted(set(place.tolist()) - set(place[kept].tolist()))
    rows = [int(at) - sum(other < int(at) for other in gone) for at in place[kept]]
    torch.testing.assert_close(seen[-1][0, rows], placeholder + pooled[kept], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("name", ["stts", "novelty", "cuts"])
def test_generate_equals_recomputation_without_cache(tiny: Any, name: str, attention: str) -> None:
    model, processor = tiny
    model.set_attn_implementation({"text_config": attention})
    inputs = make_inputs(processor, EVEN, padding_side="left")
    pruner, ratio = cuts(1, 3) if name == "cuts" else (name, 0.4)
    with torch.compiler.set_stance("force_eager"):  # flex attention without its compiler
        laws.generate_equals_recomputation(model, inputs, pruner, ratio)


@pytest.mark.parametrize("name", ["stts", "novelty", "cuts"])
def test_rows_and_beams_do_not_feel_the_others(tiny: Any, name: str) -> None:
    model, processor = tiny
    pruner, ratio = cuts(2) if name == "cuts" else (name, 0.4)
    alone = [make_inputs(processor, [row]) for row in EVEN]
    for side in ("left", "right"):
        laws.rows_do_not_feel_each_other(model, make_inputs(processor, EVEN, padding_side=side), alone, pruner, ratio)
    frames: list[int] = []
    model.model.vision_tower.patch_embedding.register_forward_hook(lambda m, args, out: frames.append(len(out)))
    batch = make_inputs(processor, EVEN, padding_side="left")
    laws.beams_do_not_feel_other_rows(model, batch, alone, pruner, ratio)
    assert frames == [8, 4, 4], "once, not per beam: the batch, then its two videos"


@pytest.mark.parametrize("rows", [ROWS, ["i which colour ?", ROWS[1]]], ids=["videos", "images"])
def test_beams_of_a_whole_prompt_are_the_stock_ones(tiny: Any, rows: list[str]) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, rows, padding_side="left")
    steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 3}
    stock = model.generate(**inputs, **steps)
    with stts.pruning(model, "uniform", retention_ratio=1.0):
        assert torch.equal(model.generate(**inputs, **steps), stock)


@pytest.mark.parametrize("name", ["uniform", "novelty", "stts", "random-vit"])
def test_packed_equals_one_by_one_outputs_and_gradients(tiny: Any, name: str) -> None:
    model, processor = tiny
    rows = [ROWS[0], ROWS[2]]
    alone = [make_inputs(processor, [row]) for row in rows]
    laws.packed_training_equals_one_by_one(model, make_inputs(processor, rows), alone, name)


def test_checkpointing_changes_nothing(tiny: Any) -> None:
    model, processor = tiny
    laws.checkpointing_changes_nothing(model, make_inputs(processor, ROWS), model.model.vision_tower.layers[0].mlp)


@pytest.mark.parametrize(
    "rows", [ROWS, ROWS[:1], ROWS[1:2], ["i which colour ?"], ["i which colour ?", ROWS[1]]],
    ids=["mixed", "video", "text", "image", "image and text"],
)  # fmt: skip
def test_tower_connector_and_scorer_run_once_whatever_the_batch_holds(tiny: Any, rows: list[str]) -> None:
    model, processor = tiny
    tower, connector = model.model.vision_tower, model.model.multi_modal_projector
    watched = {"embedding": tower.patch_embedding, "block": tower.layers[0], "connector": connector}
    laws.everything_runs_once(model, make_inputs(processor, rows), watched)


def test_a_video_behind_images_reads_its_own_patches(tiny: Any) -> None:
    model, processor = tiny
    adapter = make_adapter(model)
    images = make_inputs(processor, ["i which colour ?"])
    visual = adapter.with_blank(adapter.take_visual(dict(images)))
    visual.pixels[-1] = visual.pixels[0]
    assert visual.num_tiles == 3 and visual.grids == (Grid(1, 3, 3),)
    with torch.no_grad():
        found = adapter.connect(run_tower(adapter.embed(visual), adapter.blocks(), adapter.taps()), visual, [None])
        windows = pooling_windows(SIDE, SIDE)
        video = model.get_video_features(visual.pixels[-1:], windows, torch.tensor([[1, 3, 3]])).pooler_output[0]
        rest = {name: images[name] for name in ("pixel_values", "image_token_pooling", "image_grids")}
        picture = model.get_image_features(**rest).pooler_output[0]
    torch.testing.assert_close(found.videos[0], video, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.images[0], picture, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Look(PerVideo):
    """Notes what it is shown and drops the last group."""

    seen: list[VideoTokens] = field(default_factory=list)
    signals = frozenset({"attn", "keys"})

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        self.seen.append(video)
        return Kept(torch.arange(budget.num_kept))


def test_signals_come_from_the_deepest_feature_block_and_are_pooled_over_what_lies_inside(tiny: Any) -> None:
    model, processor = tiny
    inputs, stage = make_inputs(processor, ROWS), Look()
    with torch.no_grad():
        with stts.pruning(model, stage, retention_ratio=0.9):
            model(**inputs)
        tower = model.model.vision_tower
        tower.set_attn_implementation("eager")
        keys: list[Tensor] = []
        tower.layers[7].self_attn.k_proj.register_forward_hook(lambda m, args, out: keys.append(out))
        weights_FHNN = tower(inputs["pixel_values_videos"], output_attentions=True).attentions[7]
    received_N, key_NE = weights_FHNN.mean((1, 2)).flatten(), keys[0].unflatten(-1, (2, 16)).mean(2).flatten(0, 1)
    salience_G, keys_GE = (torch.cat([getattr(v, name) for v in stage.seen]) for name in ("salience_G", "keys_GD"))
    for row, window in enumerate(inputs["video_token_pooling"]):
        inside = window[window >= 0]
        torch.testing.assert_close(salience_G[row], received_N[inside].mean(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(keys_GE[row], key_NE[inside].mean(0), atol=1e-6, rtol=1e-5)


def test_wrong_inputs_name_the_fix(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS[:1])
    picture = make_inputs(processor, ["i which colour ?"])
    laws.a_cut_prompt_is_refused(model, inputs)
    cases = [
        ({**inputs, "video_grids": None}, "video_grids.*processor returned"),
        ({**inputs, "video_token_pooling": inputs["video_token_pooling"][:-1]}, "27 windows.*26 rows"),
        ({**inputs, "pixel_values_videos": inputs["pixel_values_videos"][:2]}, "tell of 3 frames.*has 2 frames"),
        ({**inputs, "pixel_values": picture["pixel_values"]}, "different batches"),
        ({**inputs, "inputs_embeds": torch.zeros(1, 1, 32)}, "exactly one"),
    ]
    with stts.pruning(model, "uniform"), torch.no_grad():
        for wrong, message in cases:
            with pytest.raises(ValueError, match=message):
                model(**wrong)
    model.train()
    with stts.pruning(model, "uniform"), pytest.raises(ValueError, match="`mm_token_type_ids` is required"):
        model(**{**inputs, "mm_token_type_ids": None})


def test_embedding_callers(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    with stts.pruning(model, "uniform", retention_ratio=0.4), torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        rest = {key: value for key, value in inputs.items() if key != "input_ids"}
        torch.testing.assert_close(model(inputs_embeds=embeds, **rest).logits, model(**inputs).logits)


def test_without_token_types_the_llm_is_causal_as_in_the_stock_model(tiny: Any) -> None:
    model, processor = tiny
    inputs = {**make_inputs(processor, ROWS[:1]), "mm_token_type_ids": None}
    pruner, ratio = cuts(LLM_LAYERS - 1)
    with torch.no_grad():
        stock = model(**inputs).logits
        with stts.pruning(model, pruner, retention_ratio=ratio):
            ours = model(**inputs, use_cache=False).logits
    first = int((inputs["input_ids"] == model.config.image_patch_id).nonzero()[0, 1])
    torch.testing.assert_close(ours[:, :first], stock[:, :first], atol=1e-5, rtol=1e-5)


def test_flash_attention_in_the_llm_is_refused_and_allowed_in_the_tower(tiny: Any) -> None:
    model, _ = tiny
    model.config.vision_config._attn_implementation = "flash_attention_2"
    make_adapter(model)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r'attn_implementation=\{"text_config": "sdpa"\}'):
        stts.pruning(model, "uniform")


def test_a_prune_block_behind_the_lowest_feature_block_is_refused(tiny: Any) -> None:
    model, _ = tiny
    stts.pruning(model, "stts", prune_block=3)
    with pytest.raises(ValueError, match="prune_block=3 or lower"):
        stts.pruning(model, "stts", prune_block=4)


@pytest.mark.parametrize(("width", "mlp", "theta"), [(2560, 9728, 5e6), (4096, 12288, 1e6)], ids=["4B", "8B"])
def test_released_shapes(width: int, mlp: int, theta: float) -> None:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 72, "hidden_size": 1152}
    text = {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "additional_vocab_size": 128,
        "max_position_embeddings": 36864, "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }  # fmt: skip
    adapter_config = {"vision_feature_layer": [24, 18], "intermediate_size": mlp, "text_hidden_size": width, **heads}
    vision = {
        "intermediate_size": 4304, "num_hidden_layers": 25, "image_size": [378, 378], "patch_size": 14, **heads,
    }  # fmt: skip
    config = AutoConfig.for_model("molmo2", text_config=text, adapter_config=adapter_config, vision_config=vision)
    with torch.device("meta"):
        model = Molmo2ForConditionalGeneration._from_config(config)
    adapter = make_adapter(model)
    host = adapter.host
    assert adapter.grid(64) == Grid(64, 9, 9) and adapter.grid(1).per_frame == 81
    assert adapter.taps() == (24, 18) and host.lowest_tap == 18 and host.vit_depth == 25
    assert (host.patches_per_frame, host.patches_per_group) == (729, 9)
    assert (host.vit_width, host.vit_mlp, host.vit_heads) == (1152, 4304, 16)
    assert (host.llm_width, host.llm_layers, host.mrope) == (width, 36, False)
    assert len(adapter.blocks()) == 25 and adapter.tower_attention() is model.model.vision_tower.layers[24].self_attn
    with pytest.raises(ValueError, match="prune_block=16 or lower"):
        stts.pruning(model, "stts", prune_block=17)
