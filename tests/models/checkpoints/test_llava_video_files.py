"""Folders with LLaVA-Video's layout, and its original files against the stock classes."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

import stts
from stts.data.collate import Collator
from stts.data.datasets import Example
from stts.data.rows import Message, Sample
from stts.models.checkpoints.llava_video import convert_llava_video, module_name
from stts.models.checkpoints.load import load_vlm, save_pruned
from stts.models.families.llava_layout import VideoLayout
from tests.models.checkpoints.test_llava_video import SIDE, VIDEO, rows
from tests.models.checkpoints.test_llava_video import folder as folder
from tests.models.checkpoints.test_llava_video import video_model as video_model


def test_the_layout_comes_back_with_the_folder(folder: Path, video_model: Any, tmp_path: Path) -> None:
    model, processor = video_model
    assert VideoLayout.of(model.config) == VIDEO
    for own in (processor, pickle.loads(pickle.dumps(processor))):  # loader workers get a pickled one
        assert own._get_num_multimodal_tokens(video_sizes=[(4, 56, 56)])["num_video_tokens"] == [4 * 12]
        with pytest.raises(ValueError, match="ask a stock one"):
            own._get_num_multimodal_tokens(image_sizes=[(56, 56)])
    again, its_processor = load_vlm(save_pruned(tmp_path / "again", model, processor, None))
    inputs = rows(processor)
    assert torch.equal(rows(its_processor)["input_ids"], inputs["input_ids"])
    with torch.no_grad(), stts.pruning(model, "novelty"), stts.pruning(again, "novelty"):
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    saved = json.loads((folder / "processor_config.json").read_text())
    assert saved["processor_class"] == "LlavaOnevisionProcessor" and "time_instruction" not in saved
    del processor.__dict__["replace_video_token"]  # as AutoProcessor alone would give it
    with pytest.raises(ValueError, match="load_vlm"), stts.pruning(model, "novelty"):
        model(**rows(processor))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight",
         "model.vision_tower.embeddings.patch_embedding.weight"),
        ("model.vision_tower.vision_tower.vision_model.embeddings.position_embedding.weight",
         "model.vision_tower.embeddings.position_embedding.weight"),
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.25.self_attn.q_proj.bias",
         "model.vision_tower.encoder.layers.25.self_attn.q_proj.bias"),
        ("model.vision_tower.vision_tower.vision_model.encoder.layers.26.self_attn.q_proj.bias", None),
        ("model.vision_tower.vision_tower.vision_model.post_layernorm.weight",
         "model.vision_tower.post_layernorm.weight"),
        ("model.vision_tower.vision_tower.vision_model.head.probe", None),
        ("model.mm_projector.0.weight", "model.multi_modal_projector.linear_1.weight"),
        ("model.mm_projector.2.bias", "model.multi_modal_projector.linear_2.bias"),
        ("model.image_newline", "model.image_newline"),
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
        ("model.layers.26.mlp.up_proj.weight", "model.language_model.layers.26.mlp.up_proj.weight"),
        ("model.norm.weight", "model.language_model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)  # fmt: skip
def test_original_names(name: str, expected: str | None) -> None:
    assert module_name(name, 26) == expected


def test_an_unknown_original_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.vision_resampler\.proj\.weight"):
        module_name("model.vision_resampler.proj.weight", 26)


WORDS = ["<|endoftext|>", "<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "system", "what", "is", "red"]
TOWER = {
    "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_hidden_layers": 3, "image_size": 56, "patch_size": 8, "vision_use_head": False,
}  # fmt: skip


def write_originals(folder: Path, model: Any) -> None:
    """A stock model under the original names, in two files, with what the release leaves in of SigLIP."""
    tower = "model.vision_tower.vision_tower.vision_model."
    old = {
        "model.vision_tower.": tower,
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "model.language_model.": "model.",
    }
    tensors = {}
    for name, tensor in model.state_dict().items():
        prefix = next((prefix for prefix in old if name.startswith(prefix)), "")
        tensors[old.get(prefix, "") + name.removeprefix(prefix)] = tensor.clone()
    tensors[tower + "encoder.layers.3.layer_norm1.weight"] = torch.ones(32)
    tensors[tower + "head.probe"] = torch.ones(1, 1, 32)
    names = sorted(tensors)
    for number, part in enumerate((names[:50], names[50:])):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{number + 1}-of-00002.safetensors")
    text = model.config.text_config
    config = {name: getattr(text, name) for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "rms_norm_eps",
    )}  # fmt: skip
    config |= {"architectures": ["LlavaQwenForCausalLM"], "model_type": "llava_qwen", "rope_theta": 1e6}
    config |= {"rope_scaling": None, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 3}
    (folder / "config.json").write_text(json.dumps(config))
    description: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    description |= {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}}
    description["model"] = {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(WORDS)}, "unk_token": "<unk>"}
    file = folder / "words.json"
    file.write_text(json.dumps(description))
    PreTrainedTokenizerFast(
        tokenizer_file=str(file), unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture
def originals(tmp_path: Path) -> tuple[Path, Any]:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    text = {
        "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 16, "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    config = LlavaOnevisionConfig(text_config=text, vision_config=TOWER, tie_word_embeddings=False)
    model = LlavaOnevisionForConditionalGeneration(config).to(torch.bfloat16)
    folder = tmp_path / "original"
    folder.mkdir()
    write_originals(folder, model)
    return folder, model


def test_original_files_become_a_stock_folder(originals: Any, tmp_path: Path) -> None:
    folder, model = originals
    with pytest.raises(ValueError, match="--from_llava_video"):
        load_vlm(folder)
    out = convert_llava_video(folder, tmp_path / "stock", vision_config=TOWER)
    again, processor = load_vlm(out)
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys() and again.dtype == torch.bfloat16
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
    assert VideoLayout.of(again.config) == VideoLayout(pool="average", newline="grid", time_instruction=True)
    assert again.config.text_config.rope_parameters["rope_theta"] == 1e6
    assert (again.config.image_token_id, again.config.video_token_id) == (len(WORDS), len(WORDS) + 1), (
        "behind the words"
    )
    sample = Sample("a", (Message("user", "<video>\nwhat is red"),))
    frames = np.zeros((3, 56, 56, 3), np.uint8)
    batch = Collator(processor, training=False)([Example(sample, frames, np.arange(3.0), duration_s=3.5)])
    assert batch is not None
    ids = batch.inputs["input_ids"]
    assert int((ids == again.config.video_token_id).sum()) == VIDEO.num_placeholders(3, SIDE)
    with torch.no_grad(), stts.pruning(again, "visionzip", retention_ratio=0.5) as pruned:
        again.generate(**batch.inputs, max_new_tokens=2, do_sample=False)
    assert pruned.last is not None and pruned.last.num_kept == [14]
    with pytest.raises(ValueError, match="not an empty folder"):
        convert_llava_video(folder, out, vision_config=TOWER)


def test_the_prompt_of_a_converted_folder_is_chatml_with_a_system_turn(originals: Any, tmp_path: Path) -> None:
    _, processor = load_vlm(convert_llava_video(originals[0], tmp_path / "stock", vision_config=TOWER))
    sample = Sample("a", (Message("user", "<video>\nwhat is red"),))
    example = Example(sample, np.zeros((2, 56, 56, 3), np.uint8), np.arange(2.0), duration_s=2.0)
    collator = Collator(processor, training=False)
    assert collator.render(example.sample) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<video>\nwhat is red<|im_end|>\n<|im_start|>assistant\n"
    )
    own = Sample("b", (Message("system", "what"), Message("user", "is")))
    assert collator.render(own).startswith("<|im_start|>system\nwhat<|im_end|>\n<|im_start|>user\nis")


def test_original_files_that_do_not_fit_are_refused(originals: Any, folder: Path, tmp_path: Path) -> None:
    source, _ = originals
    with pytest.raises(ValueError, match="need no conversion"):
        convert_llava_video(folder, tmp_path / "out", vision_config=TOWER)
    with pytest.raises(ValueError, match=r"position_embedding.* is \(49, 32\), expected \(36, 32\).*vision_config"):
        convert_llava_video(source, tmp_path / "out", vision_config=TOWER | {"image_size": 48})
    (source / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing .*fetch all files"):
        convert_llava_video(source, tmp_path / "out", vision_config=TOWER)
    assert not (tmp_path / "out").exists()
    for file in source.glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="copy the tokenizer files"):
        convert_llava_video(source, tmp_path / "out", vision_config=TOWER)
