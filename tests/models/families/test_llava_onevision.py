"""The laws of an adapter, on a tiny random model of the real class, with overlapping pooling windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stts
from stts.models.families.llava_onevision import pooling_cells
from stts.models.pruning import stages
from tests.conftest import answer_labels, make_inputs
from tests.models.families import family_laws as laws
from tests.models.families.family_laws import grads

ROWS = ["v what colour is the circle ?", "- how many squares are there ?", "i which colour ?", "v is there a cross ?"]
NAMES = ["uniform", "random", "novelty"]


def test_pooling_cells_are_the_stock_bilinear_resize() -> None:
    for side, overlapping in ((6, False), (7, True), (27, True)):
        patch_PW, weight_PW = pooling_cells(side)
        cells = -(-side // 2)
        x = torch.randn(side * side, 5, generator=torch.Generator().manual_seed(0))
        ours = (x[patch_PW.clamp_min(0)] * weight_PW[..., None]).sum(1)
        image = x.T.reshape(1, 5, side, side)
        stock = torch.nn.functional.interpolate(image, size=(cells, cells), mode="bilinear")
        torch.testing.assert_close(ours, stock.flatten(2)[0].T, atol=1e-6, rtol=0)
        uses = torch.bincount(patch_PW[patch_PW >= 0], minlength=side * side)
        assert (uses >= 1).all() and (uses.max() > 1) == overlapping
    assert set(pooling_cells(27)[0][6 * 14].tolist()) & set(pooling_cells(27)[0][7 * 14].tolist()), "row 13 is shared"


def test_dense_training_path_matches_stock_logits_and_gradients(tiny: Any) -> None:
    model, processor = tiny
    laws.training_path_equals_stock(model, make_inputs(processor, ROWS))


@pytest.mark.parametrize("name", ["none", *NAMES, "stts", "random-vit"])
def test_dense_is_sacred_and_detaching_restores_every_bit(tiny: Any, name: str) -> None:
    model, processor = tiny
    laws.dense_is_sacred(model, make_inputs(processor, ROWS, padding_side="left"), name)


def test_entering_twice_and_errors_inside_leave_the_model_clean(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS[:1])
    with stts.pruning(model, "uniform"), pytest.raises(ValueError, match="already inside"):
        stts.pruning(model, "random").attach()
    with pytest.raises(RuntimeError, match="boom"), stts.pruning(model, "uniform"):
        raise RuntimeError("boom")
    with stts.pruning(model, "uniform"), pytest.raises(ValueError, match="placeholders"):
        model(**{**inputs, "input_ids": inputs["input_ids"][:, :-20], "attention_mask": None})
    assert model.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize("name", ["uniform", "novelty", "stts", "random-vit"])
def test_generate_equals_recomputation_without_cache(tiny: Any, name: str, positions: str) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS, padding_side="left")
    steps, never = 4, [model.config.image_token_id, model.config.video_token_id]  # what a random model may say
    with stts.pruning(model, name, retention_ratio=0.4, positions=positions), torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, output_logits=True,
            return_dict_in_generate=True, suppress_tokens=never,
        )  # fmt: skip
        length = inputs["input_ids"].shape[1]
        for step in range(steps):
            ids = out.sequences[:, : length + step]
            mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), step, dtype=torch.long)], 1)
            again = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, use_cache=False)
            torch.testing.assert_close(again.logits[:, -1], out.logits[step], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "ratio"), [("random", 0.4), ("stts", 0.4), ("uniform", 1.0), ("none", 1.0)])
def test_beams_and_samples_encode_once_and_equal_rows_by_hand(tiny: Any, name: str, ratio: float) -> None:
    model, processor = tiny
    rows = ["vv which is red ?", *ROWS[1:3]]
    inputs = make_inputs(processor, rows, padding_side="left")
    steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        stock = model.generate(**inputs, num_beams=3, **steps)
        frames: list[int] = []
        model.model.vision_tower.embeddings.register_forward_hook(lambda m, args, out: frames.append(len(out)))
        with stts.pruning(model, name, retention_ratio=ratio) as pruned:
            pruned.describe(["a", "b"])
            beams = model.generate(**inputs, num_beams=3, **steps)
            assert frames == [2 * 4 + 3], "two videos of four frames and three tiles, once, not per beam"
            pruned.describe(["a", "b"])
            model.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2)
            for number, (row, uids) in enumerate(zip(rows[:1], (["a", "b"],), strict=True)):
                pruned.describe(uids)
                alone = model.generate(**make_inputs(processor, [row]), num_beams=3, **steps)
                assert torch.equal(alone[0, -3:], beams[number, -3:]), "beams of one row do not feel the others"
        assert ratio < 1 or torch.equal(beams, stock)


def test_embedding_callers(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    with stts.pruning(model, "uniform", retention_ratio=0.4), torch.no_grad():
        by_ids = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        rest = {key: value for key, value in inputs.items() if key != "input_ids"}
        torch.testing.assert_close(model(inputs_embeds=embeds, **rest).logits, by_ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "static caches are not supported"),
        ({"prompt_lookup_num_tokens": 3}, "nor are assisted decoding"),
    ],
)
def test_what_generate_cannot_do_on_a_pruned_prompt_is_refused(tiny: Any, options: Any, message: str) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS[:1], padding_side="left")
    with stts.pruning(model, "uniform"), torch.no_grad(), pytest.raises(ValueError, match=message):
        model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, **options)


def test_a_pruned_cache_is_not_continued(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS[:1])
    with stts.pruning(model, "uniform"), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="new turn"):
            model(input_ids=inputs["input_ids"][:, :5], past_key_values=cache)
        with pytest.raises(ValueError, match="start a new cache"):
            model(**inputs, past_key_values=cache)


@pytest.mark.parametrize("name", [*NAMES, "stts", "random-vit", "easy", "heuristic"])
def test_packed_equals_one_by_one_outputs_and_gradients(tiny: Any, name: str) -> None:
    model, processor = tiny
    model.train()
    rows = [ROWS[0], ROWS[3], "v which colour appeared first ?"]
    inputs = make_inputs(processor, rows)
    labels = answer_labels(inputs)
    with stts.pruning(model, name, retention_ratio=0.4) as pruned:
        pruned.describe(["a", "b", "c"])
        together = model(**inputs, use_cache=False)
        assert pruned.last is not None
        assert pruned.last.num_kept == [round(0.4 * 64)] * 3 or name in ("stts", "random-vit", "easy", "heuristic")
        assert pruned.last.llm_tokens == pruned.last.llm_padded, "a packed row has no padding"
        total = sum_losses(together.logits, labels)
        total.backward()
        expected = grads(model)
        model.zero_grad()
        for number in range(3):
            alone = {key: value[number : number + 1] for key, value in inputs.items()}
            pruned.describe(["abc"[number]])
            logits = model(**alone, use_cache=False).logits
            real = inputs["attention_mask"][number].bool()
            torch.testing.assert_close(logits[0][real], together.logits[number][real], atol=1e-5, rtol=1e-5)
            sum_losses(logits, labels[number : number + 1]).backward()
    for key, gradient in grads(model).items():
        torch.testing.assert_close(gradient, expected[key], atol=2e-5, rtol=1e-3, msg=key)


def sum_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize(("name", "ratio"), [("none", 1.0), ("uniform", 0.3), ("stts", 0.3)])
def test_videos_of_unequal_length_share_a_batch(tiny: Any, name: str, ratio: float) -> None:
    model, processor = tiny
    short, long = (make_inputs(processor, ROWS[:1], num_frames=frames) for frames in (3, 5))
    gap = long["input_ids"].shape[1] - short["input_ids"].shape[1]
    both = {
        "input_ids": torch.cat([torch.nn.functional.pad(short["input_ids"], (gap, 0)), long["input_ids"]]),
        "attention_mask": torch.cat(
            [torch.nn.functional.pad(short["attention_mask"], (gap, 0)), long["attention_mask"]]
        ),
        "pixel_values_videos": [short["pixel_values_videos"][0], long["pixel_values_videos"][0]],
    }
    with stts.pruning(model, name, retention_ratio=ratio) as pruned, torch.no_grad():
        together = model(**both).logits
        assert pruned.last is not None and [grid.t for grid in pruned.last.grids] == [3, 5]
        for row, inputs in enumerate((short, long)):
            alone = model(**inputs).logits[0]
            torch.testing.assert_close(together[row, -len(alone) :], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_side_and_batch_do_not_matter(tiny: Any, padding_side: str) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS, padding_side=padding_side)
    alone = make_inputs(processor, ROWS[:1])
    with stts.pruning(model, "novelty", retention_ratio=0.3), torch.no_grad():
        for use_cache in (True, False):
            batch = model(**inputs, use_cache=use_cache).logits[0][inputs["attention_mask"][0].bool()]
            torch.testing.assert_close(batch, model(**alone).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_step_with_original_positions_equals_the_masked_dense_run(tiny: Any, use_cache: bool) -> None:
    """Logits of the survivors, and every gradient of one training step."""
    model, processor = tiny
    inputs = make_inputs(processor, ROWS[:1])
    labels = answer_labels(inputs)
    with stts.pruning(model, "uniform", retention_ratio=0.4, positions="original") as pruned:
        ours = model(**inputs, labels=labels, use_cache=use_cache)
        ours.loss.backward()
        assert pruned.last is not None
        [kept] = pruned.last.index
    got = grads(model)
    model.zero_grad()
    video = (inputs["input_ids"][0] == model.config.video_token_id).nonzero().squeeze(1)
    keep = torch.ones(ours.logits.shape[1], dtype=torch.bool)
    keep[video[:-1]] = False
    keep[video[kept]] = True
    blocked = ~torch.ones(len(keep), len(keep), dtype=torch.bool).tril() | ~keep
    mask = torch.zeros(blocked.shape).masked_fill(blocked, torch.finfo(torch.float32).min)[None, None]
    dense = model(**{**inputs, "attention_mask": mask}, labels=labels)
    dense.loss.backward()
    torch.testing.assert_close(ours.logits[0][keep], dense.logits[0][keep], atol=1e-5, rtol=1e-5)
    for name, gradient in grads(model).items():
        torch.testing.assert_close(got[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["stts", "random-vit"])
def test_in_vit_pruning_equals_the_masked_dense_tower(tiny: Any, name: str) -> None:
    """Same tower, keys of dropped patches masked behind the drop, pooled by the stock operator."""
    model, processor = tiny
    inputs = make_inputs(processor, ROWS[:1])
    with stts.pruning(model, name, retention_ratio=0.4) as pruned, torch.no_grad():
        if pruned.module is not None:
            pruned.module.eval()
        seen: list[torch.Tensor] = []
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(**inputs, use_cache=False)
        hook.remove()
        stage, report = pruned.pruner.stages[0], pruned.last
        assert report is not None and report.kept_patches is not None
        [kept] = report.index
        layers, drop_after = model.model.vision_tower.encoder.layers, stage.site.drop_after
        assert drop_after is not None
        frames, cells = 4, 16
        patch_PW, _ = pooling_cells(7)
        needed = torch.zeros(frames, 49, dtype=torch.bool)
        for cell in kept.tolist():
            needed[cell // cells, patch_PW[cell % cells][patch_PW[cell % cells] >= 0]] = True
        assert report.kept_patches == [needed.sum(1).tolist()]
        block_bias = None
        x = model.model.vision_tower.embeddings(inputs["pixel_values_videos"][0])
        for number, layer in enumerate(layers):
            if number > drop_after:
                block_bias = torch.zeros(needed.shape).masked_fill(~needed, float("-inf"))[:, None, None]
                block_bias = block_bias.masked_fill(~needed.any(1)[:, None, None, None], 0)  # an emptied frame
            x = layer(x, block_bias)
            if number == stage.site.layer and name == "stts":
                from stts.tokens import Budget, Grid, VideoTokens

                grid = Grid(frames, 4, 4)
                rows_GW = torch.stack([torch.where(patch_PW < 0, -1, patch_PW + 49 * t) for t in range(frames)])
                video = VideoTokens(x.flatten(0, 1), grid, torch.arange(64), rows_GW.flatten(0, 1))
                [decided] = stage([video], [Budget(len(kept), 0.4, True)])
                assert torch.equal(decided.index_K, kept) and decided.attention_bias_N is not None
                block_bias = decided.attention_bias_N.view(frames, 1, 1, 49)
        pooled = model.model.apply_pooling(model.model.multi_modal_projector(x)).flatten(0, 1)[kept]
    video_rows = seen[-1][0]
    first = int((inputs["input_ids"][0] == model.config.video_token_id).nonzero()[0])
    torch.testing.assert_close(video_rows[first : first + len(kept)], pooled, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2], ROWS[2:3]], ids=["mixed", "video", "text", "image"])
def test_tower_connector_and_scorer_run_once_whatever_the_batch_holds(tiny: Any, rows: list[str]) -> None:
    model, processor = tiny
    model.train()
    inputs = make_inputs(processor, rows)
    with stts.pruning(model, "stts", retention_ratio=0.4) as pruned:
        assert pruned.module is not None
        calls: dict[str, int] = {}
        watched = {
            "embeddings": model.model.vision_tower.embeddings,
            "block": model.model.vision_tower.encoder.layers[0],
            "connector": model.model.multi_modal_projector,
            "scorer": pruned.module,
        }
        for label, module in watched.items():
            module.register_forward_hook(lambda *_, label=label: calls.update({label: calls.get(label, 0) + 1}))
        out = model(**inputs, labels=answer_labels(inputs), use_cache=False)
        assert calls == dict.fromkeys(watched, 1)
        assert pruned.last is not None
        (out.loss + sum(pruned.last.losses.values())).backward()
        for module in (pruned.module, model.model.vision_tower.encoder, model.model.multi_modal_projector):
            for key, parameter in module.named_parameters():
                assert parameter.grad is not None, f"{key}: missing, not zero: collectives would hang"
        if "v" not in rows[0] and len(rows) == 1:
            assert all(p.grad is not None and not p.grad.any() for p in pruned.module.parameters())


def test_the_answer_loss_alone_reaches_the_scorer_through_the_bias(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny
    model.train()
    inputs = make_inputs(processor, ROWS[:1])

    def scorer_gradient(**options: Any) -> float:
        torch.manual_seed(0)
        with stts.pruning(model, "stts", retention_ratio=0.4, **options) as pruned:
            assert pruned.module is not None
            model(**inputs, labels=answer_labels(inputs), use_cache=False).loss.backward()
            return sum(float(p.grad.abs().sum()) for p in pruned.module.parameters() if p.grad is not None)

    assert scorer_gradient() > 0
    drop = stages.Drop
    # cut the one path and the gradient is gone
    monkeypatch.setattr(
        stages, "Drop", lambda keep, bias, *rest: drop(keep, None if bias is None else bias.detach(), *rest)
    )
    assert scorer_gradient() == 0
    assert scorer_gradient(straight_through=True) > 0, "the option opens a second path"


def test_soft_only_keeps_the_tower_whole_to_its_last_block(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS[:1])
    model.train()
    with stts.pruning(model, "stts", retention_ratio=0.4, soft_only=True) as pruned:
        assert pruned.module is not None
        model(**inputs, labels=answer_labels(inputs), use_cache=False).loss.backward()
        assert pruned.last is not None and pruned.last.num_kept == [64 - int(64 * 0.6)]
        assert any(p.grad.any() for p in pruned.module.parameters() if p.grad is not None)


def test_bad_settings_name_the_fix(tiny: Any) -> None:
    model, _ = tiny
    for ratio in (0, -1, 1.5):
        with pytest.raises(ValueError, match="fraction kept"):
            stts.pruning(model, "uniform", retention_ratio=ratio)
    with pytest.raises(ValueError, match="known: none"):
        stts.pruning(model, "unifrom")
    with pytest.raises(ValueError, match="compact"):
        stts.pruning(model, "uniform", positions="orignal")
    with pytest.raises(ValueError, match="prune_block=3 or lower"):
        stts.pruning(model, "stts", prune_block=5)


def test_pixels_of_videos_alone_are_not_copied(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ["v what ?", "v what ?"])
    pixels = inputs["pixel_values_videos"]
    visual = stts.pruning(model, "none").adapter.take_visual(dict(inputs))
    assert visual.pixels.data_ptr() == pixels.data_ptr() and torch.equal(visual.pixels, pixels.flatten(0, 1))
