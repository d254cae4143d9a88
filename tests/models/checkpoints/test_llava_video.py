"""LLaVA-Video's layout against a few lines of its own arithmetic, and its original files against the stock classes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import stts
from stts.data.collate import Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts.models.checkpoints.load import load_vlm, save_pruned
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.models.families.llava_layout import VideoLayout, lay_out
from stts.models.families.llava_onevision import pooling_cells
from stts.pruners.base import Newlines, PerVideo, keep_top
from stts.pruners.registry import PRUNERS
from stts.tokens import Budget, Grid, Kept, VideoTokens
from tests.conftest import TINY, make_inputs
from tests.models.families.family_laws import generate_equals_recomputation
from tests.models.pruning.test_llm_layers import masked_dense

VIDEO = VideoLayout(pool="average", newline="grid")
SIDE, CELLS, WIDTH = 7, 9, 3
"""7 x 7 patches: 3 x 3 cells a frame, and a last row and column that belong to none."""
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}
RULES = get_args(Newlines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    path = write_small_vlm(tmp_path_factory.mktemp("vlm") / "stock", None, image_size=56, **TINY | {"llm_layers": 8})
    model, processor = load_vlm(path)
    torch.nn.init.normal_(model.model.image_newline, std=0.5, generator=torch.Generator().manual_seed(0))
    VIDEO.write(model.config)
    return save_pruned(path.parent / "video", model, processor, None)


@pytest.fixture
def video_model(folder: Path) -> tuple[Any, Any]:
    return load_vlm(folder)


def rows(processor: Any, *, training: bool = False, frames: tuple[int, ...] = (2, 0, 4)) -> dict[str, Any]:
    """Rows with a video of so many frames each, 0: text only; padded left, in training right."""
    rng = np.random.default_rng(0)
    examples = []
    for number, count in enumerate(frames):
        text = "<video>\nwhat colour is the circle ?" if count else "how many squares are there ?"
        pixels = rng.integers(0, 255, (count, 56, 56, 3), dtype=np.uint8) if count else None
        sample = Sample(str(number), (Message("user", text), Message("assistant", "red")))
        examples.append(Example(sample, pixels))
    batch = Collator(processor, training=training)(examples)
    assert batch is not None
    return batch.inputs


def features(model: Any, pixels_TCHW: Tensor, pool: str = "average") -> Tensor:
    """The release's arithmetic: project every patch, pool each frame; (T, h, w, d)."""
    x_TND = model.model.vision_tower(pixels_TCHW, output_hidden_states=True).hidden_states[-1]
    y_TdHW = model.model.multi_modal_projector(x_TND).transpose(1, 2).unflatten(2, (SIDE, SIDE))
    pooled = F.avg_pool2d(y_TdHW, 2, 2) if pool == "average" else F.interpolate(y_TdHW, size=(4, 4), mode="bilinear")
    return pooled.permute(0, 2, 3, 1)


def reference(model: Any, inputs: dict[str, Any], pool: str = "average") -> Tensor:
    """The prompt with every row of every frame and the newline behind it, for the stock language model."""
    newline = model.model.image_newline
    parts = []
    for pixels in inputs["pixel_values_videos"]:
        y_Thwd = features(model, pixels, pool)
        parts.append(torch.cat([y_Thwd, newline.expand(*y_Thwd.shape[:2], 1, -1)], 2).flatten(0, 2))
    x_BLd = model.get_input_embeddings()(inputs["input_ids"])
    return x_BLd.masked_scatter((inputs["input_ids"] == model.config.video_token_id)[..., None], torch.cat(parts))


def text_inputs(inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"attention_mask": inputs["attention_mask"], **more}


@dataclass(frozen=True)
class Longest(PerVideo):
    """Keeps the features of largest norm, under any rule for newlines."""

    newlines: Newlines  # type: ignore[misc]

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        return keep_top(video, video.x_ND.norm(dim=-1), budget.num_kept)


def kept_places(index: Tensor, frames: int, rule: str) -> list[int]:
    """Places of what stays, numbered as in the full layout, in the order that the LLM sees; written out in loops."""
    kept, places = set(index.tolist()), []
    for frame in range(frames):
        late = []
        for row in range(WIDTH):
            first = (frame * WIDTH + row) * WIDTH
            cells = [first + column for column in range(WIDTH) if first + column in kept]
            places += [(frame * WIDTH + row) * (WIDTH + 1) + cell - first for cell in cells]
            newline = (frame * WIDTH + row) * (WIDTH + 1) + WIDTH
            if rule == "after_frame":
                late.append(newline)
            elif rule in ("all", "every_row") or (rule == "kept_rows" and cells):
                places.append(newline)
        places += late
    return places


# --- layout ----------------------------------------------------------------------------------------------------------


def test_token_counts_are_those_of_the_checkpoints() -> None:
    assert VIDEO.num_placeholders(64, 27) == 64 * 182
    assert VideoLayout(pool="bilinear", newline="grid").num_placeholders(64, 27) == 64 * 210
    assert VideoLayout().num_placeholders(32, 27) == 32 * 196 + 1


def test_average_groups_are_disjoint_and_leave_out_the_last_row_and_column() -> None:
    for side in (6, 7, 27):
        patch_PW, weight_PW = pooling_cells(side, VIDEO)
        x_ND = torch.randn(side * side, 5, generator=torch.Generator().manual_seed(0))
        stock = F.avg_pool2d(x_ND.T.view(1, 5, side, side), 2)[0].flatten(1).T
        torch.testing.assert_close((x_ND[patch_PW] * weight_PW[..., None]).sum(1), stock)
        assert (weight_PW == 0.25).all()
        uses = torch.bincount(patch_PW.flatten(), minlength=side * side).view(side, side)
        even = side // 2 * 2
        assert (uses[:even, :even] == 1).all() and uses.sum() == even**2


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Two frames of 2 x 2 cells, of which 1, 2, 4 and 5 stay; n is a newline.
        ("all", "1 n 2 n | 4 5 n n"),
        ("every_row", "1 n 2 n | 4 5 n n"),
        ("kept_rows", "1 n 2 n | 4 5 n"),
        ("after_frame", "1 2 n n | 4 5 n n"),
        ("none", "1 2 | 4 5"),
    ],
)
def test_rules_for_newlines_by_hand(rule: Newlines, expected: str) -> None:
    cell_P, keep_P = VIDEO.places(Grid(2, 2, 2), torch.tensor([1, 2, 4, 5]), rule, torch.device("cpu"))
    assert len(cell_P) == 12
    words = ["n" if cell < 0 else str(cell) for cell in cell_P[keep_P].tolist()]
    assert " ".join(words) == expected.replace(" |", "")


def test_a_wrong_layout_names_the_choices(video_model: Any) -> None:
    model, _ = video_model
    for wrong in ({"pool": "max"}, {"newline": "frame"}, {"pooling": "average"}, "grid"):
        model.config.stts_video_layout = wrong
        with pytest.raises(ValueError, match=r"stts_video_layout.*(expected|keys)"):
            stts.pruning(model, "none")


# --- dense -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["average", "bilinear"])
def test_dense_logits_and_gradients_are_those_of_the_release(video_model: Any, pool: Any) -> None:
    model, processor = video_model
    layout = VideoLayout(pool=pool, newline="grid")
    layout.write(model.config)
    lay_out(processor, layout)
    inputs = rows(processor, training=True)
    stock = model(inputs_embeds=reference(model, inputs, pool), **text_inputs(inputs, labels=inputs["labels"]))
    stock.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert expected["model.image_newline"].any()
    model.zero_grad()
    real = inputs["attention_mask"].bool()
    with stts.pruning(model, "none", retention_ratio=1.0) as pruned:
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits[real], stock.logits[real], **CLOSE)
        assert pruned.last is not None and pruned.last.llm_tokens == int(real.sum())
        model.train()
        ours = model(**inputs, use_cache=False)
        ours.loss.backward()
    torch.testing.assert_close(ours.loss, stock.loss, **CLOSE)
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, **CLOSE, msg=name)


@pytest.mark.parametrize("frames", [(2, 0, 4), (3, 3)], ids=["unequal", "equal"])
def test_dense_generation_is_that_of_the_stock_language_model(video_model: Any, frames: tuple[int, ...]) -> None:
    model, processor = video_model
    inputs = rows(processor, frames=frames)
    steps = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        stock = model.generate(inputs_embeds=reference(model, inputs), **text_inputs(inputs), **steps)
        with stts.pruning(model, "novelty", retention_ratio=1.0):
            ours = model.generate(**inputs, **steps)
    assert torch.equal(ours[:, -5:], stock[:, -5:])


def test_images_and_text_are_those_of_the_stock_code(video_model: Any) -> None:
    model, processor = video_model
    with torch.no_grad():
        for row in ("i which colour ?", "- how many squares ?"):
            inputs = make_inputs(processor, [row])
            stock = model(**inputs).logits
            with stts.pruning(model, "novelty", retention_ratio=0.5):
                assert torch.equal(model(**inputs).logits, stock)
                both = make_inputs(processor, [row, "v is there a cross ?"])
                again = model(**both).logits[0, : stock.shape[1]]
            torch.testing.assert_close(again, stock[0], **CLOSE)


# --- pruned ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_shows_the_llm_the_shorter_sequence(video_model: Any, rule: Newlines) -> None:
    """Compact positions: the stock language model on a prompt put together by hand."""
    model, processor = video_model
    inputs = rows(processor)
    with torch.no_grad(), stts.pruning(model, Longest(rule), retention_ratio=0.3) as pruned:
        ours = model(**inputs).logits[:, -1]
        report = pruned.last
    assert report is not None and report.num_kept == [5, 11]
    x_BLd = reference(model, inputs)
    counts, videos = [], iter(zip(report.index, (2, 4), strict=True))
    for row, ids_L in enumerate(inputs["input_ids"]):
        real_L = inputs["attention_mask"][row].bool()
        video = (ids_L == model.config.video_token_id).nonzero().squeeze(1)
        order = real_L.nonzero().squeeze(1).tolist()
        if len(video):
            index, frames = next(videos)
            places = [int(video[0]) + place for place in kept_places(index, frames, rule)]
            order = [p for p in order if p < video[0]] + places + [p for p in order if p > video[-1]]
        counts.append(len(order))
        with torch.no_grad():
            stock = model(inputs_embeds=x_BLd[row, order][None]).logits[0, -1]
        torch.testing.assert_close(ours[row], stock, **CLOSE)
    assert report.llm_tokens == sum(counts)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "after_frame"])
def test_original_positions_equal_the_dense_model_with_masked_keys(
    video_model: Any, rule: Newlines, use_cache: bool
) -> None:
    model, processor = video_model
    inputs = rows(processor)
    with torch.no_grad(), stts.pruning(model, Longest(rule), retention_ratio=0.3, positions="original") as pruned:
        ours = model(**inputs, use_cache=use_cache).logits
    assert pruned.last is not None
    gone = (inputs["input_ids"] == model.config.video_token_id).clone()
    for row, index, frames in zip((0, 2), pruned.last.index, (2, 4), strict=True):
        video = gone[row].nonzero().squeeze(1)
        gone[row, video[kept_places(index, frames, rule)]] = False
    with torch.no_grad(), masked_dense(model, {0: gone}, inputs["attention_mask"]):
        position = torch.arange(gone.shape[1])[None]
        stock = model(inputs_embeds=reference(model, inputs), position_ids=position, use_cache=False).logits
    compare = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(ours[compare], stock[compare], **CLOSE)


def test_a_drop_in_the_tower_takes_the_patches_of_no_group_along(video_model: Any) -> None:
    model, processor = video_model
    inputs = rows(processor, frames=(4,))
    with stts.pruning(model, "random-vit", retention_ratio=0.4) as pruned, torch.no_grad(), seen_by(model) as seen:
        model(**inputs, use_cache=False)
    report, drop_after = pruned.last, pruned.pruner.stages[0].site.drop_after
    assert report is not None and drop_after is not None
    [index] = report.index
    per_frame = torch.bincount(index // CELLS, minlength=4)
    assert report.kept_patches == [(4 * per_frame).tolist()], "four patches a group, none shared"
    needed = torch.zeros(4, SIDE * SIDE, dtype=torch.bool)
    for cell in index.tolist():
        corner = cell % CELLS // WIDTH * 2 * SIDE + cell % WIDTH * 2
        needed[cell // CELLS, [corner, corner + 1, corner + SIDE, corner + SIDE + 1]] = True
    hide = torch.zeros(needed.shape).masked_fill(~needed & needed.any(1, keepdim=True), float("-inf"))[:, None, None]
    with torch.no_grad():
        x = model.model.vision_tower.embeddings(inputs["pixel_values_videos"][0])
        for number, layer in enumerate(model.model.vision_tower.encoder.layers):
            x = layer(x, hide if number > drop_after else None)
        y_TdHW = model.model.multi_modal_projector(x).transpose(1, 2).unflatten(2, (SIDE, SIDE))
    pooled = F.avg_pool2d(y_TdHW, 2).permute(0, 2, 3, 1).flatten(0, 2)[index]
    first = int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[0])
    places = kept_places(index, 4, "all")
    shown = [number for number, place in enumerate(places) if place % (WIDTH + 1) < WIDTH]
    torch.testing.assert_close(seen[0][0, first:][shown], pooled, **CLOSE)
    newlines = sorted(set(range(len(places))) - set(shown))
    assert (seen[0][0, first:][newlines] == model.model.image_newline).all() and len(newlines) == 4 * WIDTH


@contextmanager
def seen_by(model: Any) -> Iterator[list[Tensor]]:
    """What enters the first layer of the language model."""
    seen: list[Tensor] = []
    layer = model.model.language_model.layers[0]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    yield seen
    handle.remove()


@pytest.mark.parametrize("name", [*PRUNERS, "vidcom2 official"])
def test_every_pruner_runs_forward_and_generates(video_model: Any, name: str) -> None:
    model, processor = video_model
    inputs = rows(processor)
    name, _, compat = name.partition(" ")
    options = {"compat": compat} if compat else {}
    with torch.no_grad(), stts.pruning(model, name, retention_ratio=0.4 if name != "none" else 1, **options) as pruned:
        if pruned.module is not None:
            pruned.module.eval()
        logits = model(**inputs).logits
        report = pruned.last
        assert report is not None and logits.isfinite().all() and [grid.t for grid in report.grids] == [2, 4]
        before = [stage for stage in pruned.pruner.stages if stage.site.kind != "llm"]
        if before:
            counted = [counts[0] for counts in report.llm_counts]
            assert all(count < grid.num_groups for count, grid in zip(counted, report.grids, strict=True))
            rule = before[-1].newlines
            rest = int((inputs["input_ids"] != model.config.video_token_id)[inputs["attention_mask"].bool()].sum())
            newlines = report.llm_tokens - rest - sum(counted)
            most = sum(grid.t * grid.h for grid in report.grids)
            assert 0 < newlines <= most if rule == "kept_rows" else newlines == most
            if len(before) == len(pruned.pruner.stages):
                lists = zip(report.index, (2, 4), strict=True)
                assert newlines + sum(counted) == sum(len(kept_places(index, t, rule)) for index, t in lists)
        out = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
        assert out.shape == (3, inputs["input_ids"].shape[1] + 2)


@pytest.mark.parametrize(("name", "ratio"), [("stts", 0.4), ("tango", 0.4), ("vidcom2", 0.4), ("none", 1.0)])
def test_generate_equals_recomputation_without_cache(video_model: Any, name: str, ratio: float) -> None:
    model, processor = video_model
    generate_equals_recomputation(model, rows(processor), name, ratio)


def test_one_training_step_reaches_scorer_and_newline_in_every_batch(video_model: Any) -> None:
    model, processor = video_model
    model.train()
    for frames in ((2, 0, 4), (0,)):
        inputs = rows(processor, training=True, frames=frames)
        with stts.pruning(model, "stts", retention_ratio=0.4) as pruned:
            out = model(**inputs, use_cache=False)
            assert pruned.last is not None and pruned.module is not None
            (out.loss + sum(pruned.last.losses.values())).backward()
            assert all(p.grad is not None for p in pruned.module.parameters())
