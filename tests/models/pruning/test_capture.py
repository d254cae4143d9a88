"""What attention modules show of their queries and keys, and which SigLIP is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import SiglipModel

from stts.models.families.attention import capture, switch_off, switch_on
from stts.models.families.base import make_adapter
from stts.models.pruning.siglip import SiglipSource, load_siglip
from stts.models.pruning.signals import Collector
from stts.packing.segments import Segments
from tests.conftest import make_inputs
from tests.models.pruning.test_signals import ROWS, Pass, close, of, write_siglip
from tests.models.pruning.test_signals import siglip as siglip
from tests.models.pruning.test_signals import siglip_folder as siglip_folder

# --- capture ---------------------------------------------------------------------------------------------------------


def test_captured_q_and_k_of_an_llm_layer_give_its_attention(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS[:1])
    llm = model.model.language_model
    seen: list[tuple[Tensor, Tensor]] = []
    llm.set_attn_implementation("eager")
    original = switch_on(llm.config)
    with torch.no_grad(), capture(llm.layers[1].self_attn, lambda q, k: seen.append((q, k))):
        weights = model(**inputs, output_attentions=True).attentions[1]
    switch_off(llm.config, original)
    [(q_BHSE, k_BJSE)] = seen
    assert (q_BHSE.shape[1], k_BJSE.shape[1]) == (4, 2), "grouped queries: key heads come unrepeated"
    logits = q_BHSE @ k_BJSE.repeat_interleave(2, 1).mT / q_BHSE.shape[-1] ** 0.5
    close(logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(-1), weights)


def test_capture_sees_packed_rows_of_its_module_only_and_ends_with_its_context(tiny: Any) -> None:
    attention: Any = make_adapter(tiny[0]).tower_attention()
    other = tiny[0].model.vision_tower.encoder.layers[0].self_attn
    x_1SD = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0))
    packed = Segments.from_lengths(torch.tensor([4, 6]), 6)
    seen: list[tuple[Tensor, Tensor]] = []
    with pytest.raises(ValueError, match="switch_on"), capture(attention, lambda q, k: None):
        pass
    original = switch_on(attention.config)
    try:
        with capture(attention, lambda q, k: seen.append((q, k))):
            attention(x_1SD, packed)
            other(x_1SD, packed)
            with pytest.raises(ValueError, match="captured already"), capture(attention, lambda q, k: None):
                pass
        with pytest.raises(RuntimeError, match="boom"), capture(attention, lambda q, k: None):
            raise RuntimeError("boom")
        attention(x_1SD, packed)
        with capture(attention, lambda q, k: None):
            pass
    finally:
        switch_off(attention.config, original)
    [(q_1HSE, k_1HSE)] = seen
    for ours, layer in ((q_1HSE, attention.q_proj), (k_1HSE, attention.k_proj)):
        assert torch.equal(ours.transpose(1, 2).flatten(2), layer(x_1SD))


def test_nothing_is_captured_where_no_signal_needs_it(tiny: Any, siglip: SiglipSource) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    assert Pass(model, inputs, frozenset({"probe", "frame", "text"}), siglip).collector._qk is None
    assert Pass(model, inputs, frozenset({"frame"})).collector._qk is None
    assert Pass(model, inputs, frozenset({"probe"})).collector._qk is not None


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_siglip_that_does_not_fit_is_refused(tiny: Any, tiny_folder: Path, tmp_path: Path) -> None:
    wide = load_siglip(write_siglip(tmp_path / "wide", width=40))
    with pytest.raises(ValueError, match=r"width 40.*one of 32"):
        Collector(make_adapter(tiny[0]), frozenset({"text"}), wide)
    with pytest.raises(ValueError, match="without the parts wanted"):
        load_siglip(write_siglip(tmp_path / "headless", use_head=False))
    with pytest.raises(ValueError, match="llava_onevision"):
        load_siglip(tiny_folder)
    with pytest.raises(ValueError, match="check the path"):
        load_siglip(tmp_path / "nowhere")


def test_a_siglip_with_missing_weights_or_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_siglip(tmp_path / "part")
    model = SiglipModel.from_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if "head.probe" not in name}
    model.save_pretrained(folder, state_dict=weights)
    with pytest.raises(ValueError, match=r"head\.probe"):
        load_siglip(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"tokenizer of .* does not load"):
        load_siglip(folder)


def test_a_patch_alone_is_what_the_head_makes_of_a_frame_of_that_patch(siglip: SiglipSource) -> None:
    x_FND = torch.randn(2, 9, 32)
    aligned_FNC = siglip.align(x_FND)
    for place in range(9):
        frame_FC, _ = siglip.pool(x_FND[:, place : place + 1])
        close(aligned_FNC[:, place], frame_FC)


@pytest.mark.parametrize("loaded", [True, False])
def test_groups_in_the_space_of_the_text(tiny: Any, siglip: SiglipSource, loaded: bool) -> None:
    model, processor = tiny
    now = Pass(model, make_inputs(processor, ROWS), frozenset({"aligned", "text"}), siglip if loaded else None)
    row = now.ask("aligned", "text")
    if not loaded:
        assert all(fields["aligned_GC"] is None for fields in row)
        assert now.collector.sources["aligned"].startswith("none: no aligned tower")
        return
    for aligned_GC, text_C, grid in zip(of(row, "aligned_GC"), of(row, "text_C"), now.visual.grids, strict=True):
        assert aligned_GC.shape == (grid.num_groups, text_C.shape[-1]) and aligned_GC.isfinite().all()
