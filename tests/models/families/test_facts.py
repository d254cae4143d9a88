"""Every registered adapter has every member of the protocol, and its facts agree with each other."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from stts.metrics.memory import Widths
from stts.models.families.base import ADAPTERS, Adapter, adapter_class, make_adapter
from stts.models.families.published import PUBLISHED, config_of
from stts.models.families.tiny import make_tokenizer

MEMBERS = [name for name in [*vars(Adapter), *Adapter.__annotations__] if not name.startswith("_")]
ONE_EACH = {parts["model_type"]: name for name, parts in PUBLISHED.items()}


@pytest.mark.parametrize("family", ADAPTERS)
def test_an_adapter_has_every_member_with_the_parameters_of_the_protocol(family: str) -> None:
    adapter = adapter_class(family)
    attributes = {"host", "inner", "language_model", "configs"}  # some are set when a model is there
    assert len(MEMBERS) > 25
    for name in MEMBERS:
        if name in attributes:
            continue
        member, wanted = inspect.getattr_static(adapter, name), inspect.getattr_static(Adapter, name, None)
        if isinstance(wanted, classmethod):
            assert isinstance(member, classmethod), name
            parameters = [list(inspect.signature(x.__func__).parameters) for x in (member, wanted)]
            assert parameters[0] == parameters[1], name
        elif inspect.isfunction(wanted):
            assert list(inspect.signature(member).parameters) == list(inspect.signature(wanted).parameters), name


@pytest.mark.parametrize("family", ADAPTERS)
def test_facts_from_a_config_agree_with_the_model(family: str) -> None:
    config = config_of(ONE_EACH[family])
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(config)
    adapter, host = adapter_class(family), make_adapter(model).host
    assert host.family == family
    shape = adapter.vlm_shape(config)
    vit, llm = adapter.block_shapes(config)
    assert (shape.vit.width, shape.vit.blocks, shape.vit.mlp) == (host.vit_width, host.vit_depth, host.vit_mlp)
    assert (shape.llm.width, shape.llm.layers) == (host.llm_width, host.llm_layers)
    assert (vit.width, vit.heads, vit.mlp) == (host.vit_width, host.vit_heads, host.vit_mlp)
    assert (llm.width, llm.mlp, llm.heads) == (shape.llm.width, shape.llm.mlp, shape.llm.heads)
    assert (vit.gated, llm.gated) == (shape.vit.gated, shape.llm.gated)
    size, per_item = adapter.connector_bytes(config, Widths(compute=2, stream=2))
    assert size > 0 and per_item == (shape.merge_side**2 or 1)
    free = shape.vit.patches == 0
    assert free == (host.patches_per_frame == 0)
    grid = adapter.plan_grid(config, 8, (448, 448), {"shortest_edge": 8 * 448**2, "longest_edge": 8 * 448**2})
    assert make_adapter(model).grid(8).t == grid.t
    assert free or (make_adapter(model).grid(8) == grid and shape.vit.patches == host.patches_per_frame)
    if free:
        with pytest.raises(ValueError, match="video_size"):
            adapter.plan_grid(config, 8, (448, 448), None)
    parts = {adapter.part_of(f"model.{name}") for name, _ in model.named_parameters()}
    assert parts == {"vit", "connector", "llm"}
    names = [name for name, _ in model.named_parameters()]
    assert all(any(piece in f"model.{name}" for name in names) or "head" in piece for piece in adapter.unused)


@pytest.mark.parametrize("family", ADAPTERS)
def test_a_tiny_tokenizer_has_the_visual_tokens_behind_all_others(family: str) -> None:
    adapter = adapter_class(family)
    tokenizer = make_tokenizer(adapter)
    visual = [tokenizer.convert_tokens_to_ids(token) for token in adapter.token_ids.values()]
    assert tokenizer.unk_token_id not in visual
    for text in adapter.media_text:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        visual += ids
    assert sorted(set(visual)) == list(range(len(tokenizer) - len(set(visual)), len(tokenizer)))


def test_the_page_explains_every_member() -> None:
    page = (Path(__file__).parents[3] / "docs" / "add_a_family.md").read_text()
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    named = {part.partition("(")[0] for row in rows for part in row.replace("`", "").replace(" ", "").split("),")}
    named |= {part.partition("(")[0] for row in rows for part in row.replace("`", " ").split()}
    assert not [member for member in MEMBERS if member not in named]


def test_an_unknown_family_is_told_which_there_are() -> None:
    with pytest.raises(ValueError, match=r"family 'gpt2' has no adapter; supported: .*llava_onevision, .*add_a_family"):
        adapter_class("gpt2")
