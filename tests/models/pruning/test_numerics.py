"""In which dtype stages and attention compute, and which models are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stts
from stts.models.checkpoints.hub import PrunedVLM
from stts.models.checkpoints.load import load_vlm, save_pruned
from stts.models.pruning.stages import ask, numerics
from stts.packing import attention
from stts.pruners.base import PerVideo
from stts.pruners.check import example_video
from stts.pruners.registry import PRUNERS
from stts.tokens import Budget, Grid, Kept, VideoTokens
from tests.conftest import make_inputs
from tests.models.test_matrix import FAMILIES

ROWS = ["v what colour is the circle ?"]


# --- a scorer is never random in silence -----------------------------------------------------------------------------


def test_a_random_scorer_is_refused_in_evaluation(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    with pytest.raises(ValueError, match="its scores would be random"):
        stts.pruning(model, "stts", untrained=False).attach()
    pruned = stts.pruning(model.train(), "stts", untrained=False).attach()
    model.eval()
    with torch.no_grad(), pytest.raises(ValueError, match="its scores would be random"):
        model(**inputs)
    model.train()(**inputs, use_cache=False)  # it learns now
    with torch.no_grad():
        model.eval()(**inputs)
    pruned.detach()


def test_a_trained_folder_loaded_with_the_stock_class_gets_its_scorer(tiny: Any, tmp_path: Path) -> None:
    model, processor = tiny
    torch.manual_seed(1)
    trained = stts.pruning(model, "stts", prune_block=1, positions="original", untrained=True)
    save_pruned(tmp_path / "model", model, processor, trained)
    inputs = make_inputs(processor, ROWS)
    vlm = PrunedVLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = vlm(**inputs).logits
    again, _ = load_vlm(tmp_path / "model")
    with torch.no_grad(), stts.pruning(again, "stts", untrained=False) as pruned:
        assert torch.equal(again(**inputs).logits, expected)
    assert pruned.options == {"prune_block": 1} and pruned.positions == "original"
    with torch.no_grad(), stts.pruning(model, "stts", weights=tmp_path / "model", untrained=False):
        assert torch.equal(model(**inputs).logits, expected)


# --- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "none"])
def test_training_free_stages_choose_alike_under_autocast(name: str, tiny: Any) -> None:
    adapter = stts.pruning(tiny[0], "none").adapter
    for stage in PRUNERS[name](adapter.host).stages:
        if isinstance(stage, nn.Module):
            continue
        video = example_video(stage, Grid(4, 4, 4))
        budget = Budget(video.num_groups // 2, 0.5, exact=True)
        kept = []
        for on in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on), numerics(stage, video.x_ND):
                [one] = ask(stage, [video], [budget])
                kept.append(one)
        assert torch.equal(kept[0].index_K, kept[1].index_K)
        if kept[0].x_KD is not None:
            assert torch.equal(kept[0].x_KD, kept[1].x_KD)


class Autocast(PerVideo):
    """Notes whether autocast reaches a stage."""

    def __init__(self) -> None:
        self.seen: list[bool] = []

    def prune(self, video: VideoTokens, budget: Budget) -> Kept:
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return Kept(torch.arange(budget.num_kept))


def test_a_pass_turns_autocast_off_around_stages(tiny: Any) -> None:
    model, processor = tiny
    stage = Autocast()
    with stts.pruning(model, stage), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**make_inputs(processor, ROWS))
    assert stage.seen == [False]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_gets_16_bit_under_autocast(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v of every packed row, tower and language model: else no flash kernel takes them."""
    make, build = FAMILIES[family]
    model, processor = make(tmp_path)
    seen: list[tuple[torch.dtype, ...]] = []
    stock = attention._on_sdpa

    def spy(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        seen.append((q.dtype, k.dtype, v.dtype))
        return stock(q, k, v, *rest)

    monkeypatch.setattr(attention, "_on_sdpa", spy)
    model.train()
    with stts.pruning(model, "stts", retention_ratio=0.5), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**build(processor, "right"), use_cache=False)
    assert len(seen) > 2 and set(seen) == {(torch.bfloat16,) * 3}


def test_a_scorer_computes_in_the_dtype_of_a_16_bit_model(tiny_folder: Path) -> None:
    model, processor = load_vlm(tiny_folder, dtype=torch.bfloat16)
    pruned = stts.pruning(model, "stts", retention_ratio=0.5, untrained=True)
    assert pruned.module is not None
    scorer: Any = pruned.module
    assert next(scorer.parameters()).dtype == torch.float32, "what was learned is kept as it was"
    seen = []
    handle = scorer.scorer.mlp[0].register_forward_hook(lambda *given: seen.append(given[2].dtype))
    inputs = make_inputs(processor, ROWS)
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    with pruned, torch.no_grad():
        model(**inputs)
    handle.remove()
    assert seen == [torch.bfloat16]


# --- kernels ---------------------------------------------------------------------------------------------------------


def test_kernels_are_chosen_by_capability(caplog: pytest.LogCaptureFixture) -> None:
    attention._cuda_kernel.cache_clear()
    assert attention._cuda_kernel((7, 5)) is None and "before 8.0" in caplog.text
    assert attention._cuda_kernel((9, 0)) is not None


@pytest.mark.parametrize("code", ["raise ImportError('undefined symbol')", "raise OSError('libcudart')", "cute = 1"])
def test_a_flash_attn_that_cannot_be_imported_is_survived(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text(code + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    attention._cuda_kernel.cache_clear()
    kernel = attention._cuda_kernel((8, 0))
    attention._cuda_kernel.cache_clear()
    assert kernel is not None and kernel.__name__ == "varlen" and "flash-attn is installed, but" in caplog.text


# --- models that are refused -----------------------------------------------------------------------------------------


def test_a_model_split_over_devices_is_refused(tiny: Any) -> None:
    model, _ = tiny
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1}
    with pytest.raises(ValueError, match=r"split over \['cuda:0', 'cuda:1'\]"):
        stts.pruning(model, "uniform").attach()
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": "cpu"}
    stts.pruning(model, "uniform").attach().detach()


@pytest.mark.parametrize("reentrant", [True, False])
def test_reentrant_checkpointing_is_refused(tiny: Any, reentrant: bool) -> None:
    model, processor = tiny
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    inputs = make_inputs(processor, ROWS)
    with stts.pruning(model, "stts"):
        if reentrant:
            with pytest.raises(ValueError, match="reentrant activation checkpointing"):
                model(**inputs, use_cache=False)
        else:
            model(**inputs, use_cache=False).logits.sum().backward()


def test_a_scorer_follows_mode_and_dtype_changes_of_the_model(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    with stts.pruning(model, "stts", retention_ratio=0.5) as pruned:
        assert pruned.module is not None
        for training in (True, False):
            model.train(training)
            model(**inputs, use_cache=False)
            assert pruned.module.training == training
            assert pruned.last is not None and ("temporal" in pruned.last.losses) == training
        model.eval()


def test_attention_is_not_changed_inside_a_context(tiny: Any) -> None:
    model, processor = tiny
    with stts.pruning(model, "uniform"), torch.no_grad():
        model.set_attn_implementation("eager")
        with pytest.raises(ValueError, match="changed inside the context"):
            model(**make_inputs(processor, ROWS))
    with stts.pruning(model, "uniform"), torch.no_grad():
        model(**make_inputs(processor, ROWS))


# --- outside `stts fit` ----------------------------------------------------------------------------------------------


def test_a_plain_loop_trains_the_scorer_of_a_pruned_vlm(tiny: Any) -> None:
    model, processor = tiny
    torch.manual_seed(0)
    vlm = PrunedVLM(model, processor, stts.Pruning(model, "stts", retention_ratio=0.5))
    assert not vlm.training and vlm.scorer is not None
    inputs = make_inputs(processor, ROWS)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    vlm.train()
    assert vlm.scorer.training and set(vlm.scorer.parameters()) <= set(vlm.parameters())
    before = [parameter.clone() for parameter in vlm.scorer.parameters()]
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=1e-3)
    out = vlm(**inputs, labels=labels, use_cache=False)
    assert vlm.last is not None
    answer = model(**inputs, labels=labels, use_cache=False).loss
    torch.testing.assert_close(out.loss, answer + 0.5 * vlm.last.losses["temporal"])
    out.loss.backward()
    optimizer.step()
    assert all(not torch.equal(old, new) for old, new in zip(before, vlm.scorer.parameters(), strict=True))
    vlm.double()
    assert next(vlm.scorer.parameters()).dtype == torch.float64 == model.dtype
    vlm.loss_weights = {}
    with pytest.raises(ValueError, match=r"loss_weights={} lacks"):
        vlm.float()(**inputs, labels=labels, use_cache=False)
    vlm.detach()


def test_a_peft_model_is_pruned_and_saved_merged(tiny: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    vlm = PrunedVLM(wrapped, processor, stts.Pruning(wrapped, "uniform", retention_ratio=0.5))
    with torch.no_grad():
        expected = wrapped(**inputs).logits
        assert vlm.last is not None and vlm.last.retention_measured == 0.5
        vlm.save_pretrained(tmp_path / "merged")
        again = PrunedVLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(again(**inputs).logits, expected, atol=1e-5, rtol=1e-4)
