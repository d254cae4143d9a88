"""A pruner on weights that are not plain: adapters of peft, compiled layers, 8 and 4 bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig, TorchAoConfig

import stts
from stts.data.collate import Collator
from stts.data.shapes.clips import ShapesConfig, ShapesFrames
from stts.models.families.published import config_of
from stts.models.families.tiny import TinySizes, make_tiny
from tests.models.families import family_laws as laws
from tests.models.families import qwen_tiny
from tests.models.families.qwen_tiny import CUT
from tests.models.test_matrix import FAMILIES

ROWS = ["v what ?", "x is it ?"]


@pytest.mark.parametrize("family", ["LLaVA-OneVision", "Qwen3.5"])
def test_adapters_of_peft_are_pruned_as_their_merged_model(family: str, tmp_path: Path) -> None:
    """Loaded by peft around the stock model, or by transformers into it."""
    peft = pytest.importorskip("peft")
    model, processor = FAMILIES[family][0](tmp_path)
    model, inputs = model.eval(), FAMILIES[family][1](processor, "left")
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(model), lora).save_pretrained(tmp_path / "adapter")
    around = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter"))
    inside = copy.deepcopy(model)
    inside.load_adapter(str(tmp_path / "adapter"))
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")).merge_and_unload()
    real = inputs["attention_mask"].bool()
    for pruner in ("uniform", "fastv"):
        outputs = []
        for one in (merged, around, inside, model):
            with torch.no_grad(), stts.pruning(one, pruner, retention_ratio=0.6) as pruned:
                outputs.append(one(**inputs).logits[real])
                if one is around:
                    ids = one.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
                    assert ids.shape[1] == inputs["input_ids"].shape[1] + 2
            assert pruned.last is not None and pruned.last.retention_measured == pytest.approx(0.6, abs=0.06)
        expected, *same, without = outputs
        for found in same:
            torch.testing.assert_close(found, expected, **laws.CLOSE)
        assert not torch.allclose(without, expected, atol=1e-2), "the adapter counts"


def test_adapters_that_lengthen_the_prompt_are_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _ = FAMILIES["LLaVA-OneVision"][0](tmp_path)
    tuned = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="'default' is PROMPT_TUNING, which puts tokens of its own in front"):
        stts.pruning(tuned, "uniform")


def test_a_compiled_layer_of_the_llm_gives_the_same_and_compiled_models_are_refused(tmp_path: Path) -> None:
    model, processor = FAMILIES["Qwen3-VL"][0](tmp_path)
    model, inputs = model.eval(), qwen_tiny.make_inputs(processor, ROWS[:1])
    pruning = stts.pruning(model, CUT, retention_ratio=0.625)
    options = {"max_new_tokens": 2, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    logits = []
    for backend in (None, "eager"):
        if backend:
            model.model.language_model.layers[1].compile(backend=backend)  # the cut is before this one
        with torch.no_grad(), pruning:
            logits.append(torch.cat(model.generate(**inputs, **options).logits))
    torch.testing.assert_close(*logits, **laws.CLOSE)
    with pytest.raises(ValueError, match="prune the model itself, and compile layers"):
        stts.pruning(torch.compile(model), "uniform")
    for module in (model, model.model):
        module.compile()
        with pytest.raises(ValueError, match=rf"{type(module).__name__}.compile\(\) would trace the pruner"):
            pruning.attach()
        module._compiled_call_impl = None
    with pruning:
        assert pruning.is_attached, "nothing was left behind"


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("torchao.quantization", lambda of: TorchAoConfig(of.Int8WeightOnlyConfig())),
        ("bitsandbytes", lambda _: BitsAndBytesConfig(load_in_8bit=True)),
        ("bitsandbytes", lambda _: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)),
    ],
    ids=["torchao-8", "bitsandbytes-8", "bitsandbytes-4"],
)
def test_weights_of_few_bits_are_pruned_as_they_are(package: str, make: Callable[[Any], Any], tmp_path: Path) -> None:
    """Everything kept is the quantized stock model; with torchao what is left is it with the dropped keys masked."""
    config = make(pytest.importorskip(package))
    sizes = TinySizes(width=128, heads=2, mlp=128)  # blocks of 64 weights
    whole, processor = make_tiny(config_of("Qwen/Qwen3-VL-8B-Instruct"), sizes=sizes)
    whole.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=config).eval()
    clips = ShapesFrames("test", 2, 0, ShapesConfig(num_sampled=8))
    batch = Collator(processor, training=False)([clips[0], clips[1]])
    assert batch is not None and any("8bit" in str(m) or "4bit" in str(m) or "Int8" in str(m) for m in model.modules())
    inputs = batch.inputs
    with torch.no_grad():
        stock = model(**inputs).logits
        with stts.pruning(model, "uniform", retention_ratio=1.0):
            assert torch.equal(model(**inputs).logits, stock)
        counts = [int(grid.prod()) // 4 for grid in inputs["video_grid_thw"]]
        if not isinstance(config, BitsAndBytesConfig):  # kernels of those round by shape
            laws.survivors_equal_the_masked_dense_model(model, inputs, counts, None, use_cache=False)
        with stts.pruning(model, "fastv", retention_ratio=0.7):
            assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
        assert torch.equal(model(**inputs).logits, stock)
