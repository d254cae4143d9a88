"""The worked integers of the accounting rules: LLaVA-OneVision-7B (32 frames of 196 tokens) and Molmo2-4B."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stts.budget import plan
from stts.metrics.cost import (
    DecodeCost,
    LlmShape,
    VitShape,
    VlmShape,
    decode_cost,
    llm_block_flops,
    llm_prefill_flops,
    mlp_flops,
    tokens_per_layer,
    video_cost,
    vit_block_flops,
    vit_embed_flops,
    vit_flops,
)
from stts.models.checkpoints.load import load_vlm
from stts.models.families.base import host_info, vlm_shape
from stts.models.families.published import config_of
from stts.pruners.stts import STTS
from stts.tokens import Grid, Site
from tests.families import FAMILIES, write_family

QWEN2_7B = LlmShape(width=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp=18944)
QWEN3_4B = LlmShape(width=2560, layers=36, heads=32, kv_heads=8, head_dim=128, mlp=9728)  # 32 * 128 != 2560
SIGLIP = VitShape(width=1152, blocks=26, mlp=4304, patches=729, patch_size=14)
SIGLIP_25 = VitShape(width=1152, blocks=25, mlp=4304, patches=729, patch_size=14)
DENSE = 6272


@pytest.mark.parametrize(
    ("num_tokens", "exact", "fastv", "pdrop_t"),
    [
        (6272, 97_643_799_773_184, 40_765_480_763_392, 52.6890),
        (3136, 44_874_254_516_224, 18_408_917_696_512, 24.3707),
        (1568, 21_450_215_915_520, 8_711_003_176_960, 11.6919),
        (1254, 16_996_643_930_112, 6_887_551_942_656, 9.2715),
        (940, 12_622_226_391_040, 5_103_677_931_520, 6.8907),
        (627, 8_340_516_839_424, 3_364_873_408_512, 4.5568),
    ],
)
def test_prefill_in_every_convention(num_tokens: int, exact: int, fastv: int, pdrop_t: float) -> None:
    assert llm_prefill_flops(QWEN2_7B, num_tokens) == exact
    assert llm_prefill_flops(QWEN2_7B, num_tokens, "macs") * 2 == exact
    assert llm_prefill_flops(QWEN2_7B, num_tokens, "fastv") == fastv
    assert round(llm_prefill_flops(QWEN2_7B, num_tokens, "pdrop") / 1e12, 4) == pdrop_t


def test_published_numbers_come_out() -> None:
    assert llm_block_flops(QWEN2_7B, DENSE) == 3_487_278_563_328
    assert llm_prefill_flops(QWEN2_7B, DENSE, "macs") == 48_821_899_886_592  # FastVID prints 48.82 T
    assert llm_prefill_flops(QWEN2_7B, 608, "macs") == 4_041_568_419_840  # and 4.04 T for 19 tokens a frame
    holitom = [627] * 18 + [313] * 10
    assert llm_prefill_flops(QWEN2_7B, holitom, "fastv") == 2_755_999_977_472  # HoliTom prints 2.8 T
    assert llm_prefill_flops(QWEN2_7B, DENSE + 128) == 99_965_363_814_400  # with 128 text tokens
    assert llm_prefill_flops(QWEN2_7B, 627 + 128) == 10_081_998_151_680


@pytest.mark.parametrize(
    ("layer", "kept", "flops", "retention"),
    [
        (2, 3136, 48_643_507_748_864, 0.535714),
        (2, 1568, 26_892_614_762_496, 0.303571),
        (3, 1568, 29_613_814_185_984, 0.330357),
    ],
)
def test_a_cut_inside_the_llm(layer: int, kept: int, flops: int, retention: float) -> None:
    counts = tokens_per_layer(DENSE, [layer], [kept], 28)
    assert llm_prefill_flops(QWEN2_7B, counts) == flops
    assert round(sum(counts) / (28 * DENSE), 6) == retention


def test_two_stages() -> None:
    counts = [763] * 18 + [381] * 10
    assert llm_prefill_flops(QWEN2_7B, counts) == 8_348_156_436_480
    assert round(sum(counts) / (28 * DENSE), 4) == 0.0999


def test_shares_of_dense() -> None:
    dense = llm_prefill_flops(QWEN2_7B, DENSE)
    shares = {3136: 45.9571, 1568: 21.9678, 1254: 17.4068, 940: 12.9268, 627: 8.5418}
    assert {n: round(100 * llm_prefill_flops(QWEN2_7B, n) / dense, 4) for n in shares} == shares
    assert round(100 * llm_prefill_flops(QWEN2_7B, [763] * 18 + [381] * 10) / dense, 4) == 8.5496
    assert round(100 * 10_081_998_151_680 / 99_965_363_814_400, 4) == 10.0855, "text moves 8.54 % to 10.09 %"
    tower = vit_flops(SIGLIP, 32)
    assert round(100 * tower / (tower + llm_prefill_flops(QWEN2_7B, 627))) == 71


def test_two_stages_are_solved_for_equivalent_retention() -> None:
    """Tango: r_pre = min(1, L r / (K + (L - K) rho)) = 1.217391 r with L = 28, K = 18, rho = 0.5."""
    sites = [Site("pre_llm"), Site("llm", 18, share=0.5)]
    for ratio, before in ((0.1, 0.121739), (0.15, 0.182609), (0.2, 0.243478), (0.9, 1.0)):
        [first], [inner] = plan(sites, ratio, [Grid(32, 14, 14)], 28)
        assert round(first.retention_ratio, 6) == before and inner.retention_ratio == 0.5
        assert first.num_kept == round(before * DENSE)


def test_the_scorer() -> None:
    with torch.device("meta"):
        stage = STTS(dim=1152, mlp_dim=4304, num_heads=16, patches_per_group=9)
    assert stage.flops(Grid(1, 1, 1), 1152, 1) == 110_015_904
    assert stage.flops(Grid(1, 9, 9), 1152, 81) == 8_911_288_224
    assert stage.flops(Grid(128, 9, 9), 1152, 5_184) == 1_140_644_892_672


def test_tokens_per_layer() -> None:
    assert tokens_per_layer(763, [18], [381], 28) == [763] * 18 + [381] * 10  # Tango and HoliTom: two places
    assert tokens_per_layer(100, [2, 5], [60, 7], 8) == [100, 100, 60, 60, 60, 7, 7, 7]
    assert tokens_per_layer(100, [1, 1, 3], [80, 50, 9], 4) == [100, 50, 50, 9], "two cuts before one layer"
    assert tokens_per_layer(100, [], [], 3) == [100, 100, 100]


@pytest.mark.parametrize(
    ("frames", "vit", "llm"),
    [
        (64, 39_434_696_294_400, 53_521_063_870_464),
        (128, 78_869_392_588_800, 138_743_818_223_616),
        (256, 157_738_785_177_600, 404_294_398_377_984),
        (384, 236_608_177_766_400, 796_651_740_463_104),
    ],
)
def test_molmo2_dense(frames: int, vit: int, llm: int) -> None:
    assert vit_flops(SIGLIP_25, frames) == vit
    assert llm_prefill_flops(QWEN3_4B, 81 * frames) == llm


@pytest.mark.parametrize(
    ("frames", "groups", "vit"),
    [  # first frame whole, then as even as possible; nine patches a group
        (64, [81] + [40] * 54 + [39] * 9, 22_889_672_478_720),
        (128, [81] + [41] * 23 + [40] * 104, 45_766_833_684_480),
        (256, [81] + [41] * 87 + [40] * 168, 91_521_424_834_560),
    ],
)
def test_half_removed_inside_the_tower(frames: int, groups: list[int], vit: int) -> None:
    kept = [9 * count for count in groups]
    assert vit_flops(SIGLIP_25, frames, kept, drop_after=4) == vit
    uneven = sorted(kept)
    uneven[1], uneven[-2] = uneven[1] - 90, uneven[-2] + 90
    assert vit_flops(SIGLIP_25, frames, uneven, drop_after=4) > vit, "uneven survivors cost more attention"
    assert vit_flops(SIGLIP_25, frames, [729] * frames, drop_after=4) == vit_flops(SIGLIP_25, frames)


def test_tower_and_connector() -> None:
    assert vit_block_flops(SIGLIP, 729) == 24_646_685_184
    assert vit_flops(SIGLIP, 32) == 20_506_042_073_088
    assert vit_embed_flops(SIGLIP, 1) == 2 * 729 * 588 * 1152
    assert mlp_flops((1152, 3584, 3584), 1) == 33_947_648
    assert mlp_flops((1152, 3584, 3584), 32 * 729) == 791_930_732_544


def test_causal_halves_only_the_quadratic_part() -> None:
    quadratic = 4 * 100**2 * 28 * 128
    assert llm_block_flops(QWEN2_7B, 100) - llm_block_flops(QWEN2_7B, 100, causal=True) == quadratic // 2


def test_a_video_is_the_sum_of_its_parts() -> None:
    shape = VlmShape(QWEN2_7B, SIGLIP, 33_947_648)
    cost = video_cost(shape, num_frames=2, llm_tokens=100, kept_patches=[729, 80], drop_after=4, pruner_flops=7)
    assert cost.vit == vit_flops(SIGLIP, 2, [729, 80], 4) and cost.pruner == 7
    assert cost.connector == 809 * 33_947_648, "the connector runs on survivors"
    assert cost.llm == llm_prefill_flops(QWEN2_7B, 100)
    cut = video_cost(shape, num_frames=2, llm_tokens=[100] * 3 + [25] * 25)
    assert cut.llm == llm_prefill_flops(QWEN2_7B, [100] * 3 + [25] * 25) < cost.llm
    assert cost.total == cost.vit + cost.vit_embed + cost.connector + cost.pruner + cost.llm


def test_shapes_from_configs() -> None:
    text = SimpleNamespace(
        hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944
    )
    vision = SimpleNamespace(
        hidden_size=1152, num_hidden_layers=26, intermediate_size=4304, image_size=384, patch_size=14, num_channels=3
    )
    config = SimpleNamespace(
        model_type="llava_onevision", text_config=text, vision_config=vision, vision_feature_layer=-1
    )
    made = vlm_shape(config)
    assert made == VlmShape(QWEN2_7B, SIGLIP, 33_947_648)
    assert made.at(Grid(32, 14, 14)) == made, "every frame has the same number of patches"
    text.head_dim = 64
    assert LlmShape.from_config(text).head_dim == 64, "a head width of its own wins over width / heads"


def published(name: str) -> VlmShape:
    return vlm_shape(config_of(name))


def test_molmo2_from_its_config() -> None:
    shape = published("allenai/Molmo2-4B")
    assert (shape.llm, shape.vit) == (QWEN3_4B, SIGLIP_25)
    assert (shape.connector, shape.merge_side) == (198_189_568, 3)
    assert shape.at(Grid(128, 9, 9)) == shape, "every frame has the same number of patches"
    dense = video_cost(shape, num_frames=128, llm_tokens=10_368, num_cells=10_368)
    assert dense.connector == 2_054_829_441_024
    kept = [9 * groups for groups in [81] + [41] * 23 + [40] * 104]
    half = video_cost(
        shape, num_frames=128, llm_tokens=5_184, kept_patches=kept, drop_after=4, num_cells=5_184,
        pruner_flops=1_140_644_892_672,
    )  # fmt: skip
    assert half.connector * 2 == dense.connector, "cells dropped before the connector are saved there too"
    assert round((half.vit + half.llm) / (dense.vit + dense.llm), 6) == 0.456259
    with_full_connector = half.vit + half.llm + half.pruner + dense.connector
    assert round(with_full_connector / (dense.total - dense.vit_embed), 6) == 0.466537
    with pytest.raises(ValueError, match="pass num_cells"):
        video_cost(shape, num_frames=1, llm_tokens=81)


@pytest.mark.parametrize(
    ("frames", "groups", "llm", "ratio", "with_scorer"),
    [
        (64, [81] + [40] * 54 + [39] * 9, 22_797_820_624_896, 0.491497, 0.503124),
        (128, [81] + [41] * 23 + [40] * 104, 53_521_063_870_464, 0.456259, 0.466537),
        (256, [81] + [41] * 87 + [40] * 168, 138_743_818_223_616, 0.409700, 0.418015),
    ],
)
def test_molmo2_with_half_of_its_tokens(
    frames: int, groups: list[int], llm: int, ratio: float, with_scorer: float
) -> None:
    shape, cells = published("allenai/Molmo2-4B"), 81 * frames
    dense = video_cost(shape, num_frames=frames, llm_tokens=cells, num_cells=cells)
    half = video_cost(
        shape, num_frames=frames, llm_tokens=cells // 2, kept_patches=[9 * count for count in groups], drop_after=4,
        num_cells=cells // 2, pruner_flops=8_911_288_224 * frames,
    )  # fmt: skip
    assert sum(groups) == cells // 2 and half.llm == llm
    assert round((half.vit + half.llm) / (dense.vit + dense.llm), 6) == ratio
    scored = half.vit + half.llm + half.pruner + dense.connector
    assert round(scored / (dense.total - dense.vit_embed), 6) == with_scorer


def test_qwen_towers_from_their_configs() -> None:
    """A frame of 4 x 6 units, 8 x 12 patches: one 8 x 8 window and one 8 x 4."""
    d, m = 1280, 3420
    shape = published("Qwen/Qwen2.5-VL-7B-Instruct").at(Grid(2, 4, 6))
    assert shape.vit.patches == 96 and shape.vit.windows == (64, 32) and len(shape.vit.windowed) == 28
    linear = 96 * (8 * d * d + 6 * d * m)
    assert vit_block_flops(shape.vit, 96, block=7) == linear + 4 * d * 96**2, "blocks 7, 15, 23, 31 see whole frames"
    assert vit_block_flops(shape.vit, 96, block=8) == linear + 4 * d * (64**2 + 32**2)
    assert vit_flops(shape.vit, 2) == 2 * (32 * linear + 4 * d * (4 * 96**2 + 28 * (64**2 + 32**2)))
    half = vit_flops(shape.vit, 2, [48, 48], drop_after=15)  # two of the four full blocks lie behind
    windows = 14 * (32**2 + 16**2)  # half of the patches, half of every window
    assert half == vit_flops(shape.vit, 2) // 2 + 2 * (8 * linear + 4 * d * (2 * 48**2 + windows))
    assert vit_embed_flops(shape.vit, 1) == 2 * 96 * (3 * 2 * 14 * 14) * d, "a patch spans two video frames"
    assert (shape.connector, shape.merge_side) == (2 * (5120 * 5120 + 5120 * 3584), 2)

    small = published("Qwen/Qwen3-VL-4B-Instruct").at(Grid(2, 4, 6))
    assert vit_block_flops(small.vit, 96) == 96 * (8 * 1024**2 + 4 * 1024 * 4096) + 4 * 1024 * 96**2
    assert small.connector == 4 * 2 * (4096 * 4096 + 4096 * 2560), "the merger and three for deepstack"
    cost = video_cost(small, num_frames=2, llm_tokens=48, num_cells=48)
    assert cost.connector == 48 * small.connector and cost.vit == 24 * 2 * vit_block_flops(small.vit, 96)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_tower_costs_what_a_profiler_counts(family: str, tmp_path: Path) -> None:
    """Tower and connector of the stock model, matrix products alone, on 2 temporal patches or frames."""
    model, _ = load_vlm(write_family(family, tmp_path / family))
    inputs: dict[str, Any] = {}
    if family == "molmo2":
        grid = Grid(2, 3, 3)
        windows = torch.randint(0, 98, (18, 9))
        inputs = {"video_token_pooling": windows, "video_grids": torch.tensor([[2, 3, 3]])}
        pixels = torch.randn(2, 49, 588)
    elif family == "internvl":
        grid, pixels = Grid(2, 4, 4), torch.randn(2, 3, 32, 32)
    else:
        grid = Grid(2, 3, 5)
        inputs = {"video_grid_thw": torch.tensor([[2, 6, 10]])}
        pixels = torch.randn(120, 96)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        if family == "internvl":
            model.get_image_features(pixel_values=pixels)
        else:
            model.get_video_features(pixel_values_videos=pixels, **inputs)
    shape = vlm_shape(model.config).at(grid)
    cost = video_cost(shape, num_frames=2, llm_tokens=0, num_cells=grid.num_groups)
    assert cost.total == counter.get_total_flops() > 0
    assert shape.merge_side**2 == host_info(model).patches_per_group


def test_errors_name_what_came() -> None:
    with pytest.raises(ValueError, match="formula 'flops' is unknown; expected one of exact, macs"):
        llm_block_flops(QWEN2_7B, 1, "flops")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got 2 token counts for 28 layers"):
        llm_prefill_flops(QWEN2_7B, [1, 2])
    with pytest.raises(ValueError, match="got 2 cuts and 1 counts"):
        tokens_per_layer(9, [1, 2], [3], 4)
    for cuts in ([2, 1], [0, 1], [1, 4]):
        with pytest.raises(ValueError, match=r"must be in order and in \[1, 3\]"):
            tokens_per_layer(9, cuts, [3, 2], 4)
    with pytest.raises(ValueError, match="drop_after=26"):
        vit_flops(SIGLIP, 1, [3], drop_after=26)
    with pytest.raises(ValueError, match="expected 1 counts in \\[0, 729\\]"):
        vit_flops(SIGLIP, 1, [730], drop_after=4)


def test_decoding_reads_a_part_of_what_the_cache_holds() -> None:
    shape = LlmShape(width=8, layers=4, heads=2, kv_heads=1, head_dim=4, mlp=16)
    # 100 keys in every layer, 4 x 8 FLOPs each; 2 x 4 values of 2 bytes each.
    assert decode_cost(shape, [100] * 4, 2) == DecodeCost(4 * 100 * 32, 4 * 100 * 16)
    assert decode_cost(shape, [100, 100, 40, 40], 2) == DecodeCost(280 * 32, 280 * 16), "a cut before layer 2"
    # From layer 3 on 30 keys are read; the choice looks at 100 keys once more; nothing leaves the cache.
    assert decode_cost(shape, [100] * 4, 2, first=3, num_visible=30) == DecodeCost(330 * 32 + 100 * 16, 4 * 100 * 16)
