"""Every parameter is read inside its module's forward, and every kind of batch calls the same modules in one order,
forward and backward.

Sharding (ZeRO-3, FSDP2) gathers parameters module by module in hooks around their forward. A rank whose batch holds
other things than its neighbour's would otherwise gather another tensor, or wait for ever.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stts
from stts.data.collate import Collator
from stts.data.datasets import Example
from stts.data.processors import traits_of
from stts.data.rows import Message, Sample
from stts.models.families.base import ADAPTERS
from stts.models.families.llava_layout import VideoLayout
from stts.models.families.published import PUBLISHED, config_of
from stts.models.families.tiny import make_tiny
from tests.conftest import answer_labels

STTS = str(Path(stts.__file__).parent)
TORCH = str(Path(torch.__file__).parent)
ONE_EACH = {parts["model_type"]: name for name, parts in PUBLISHED.items()}
KINDS = {"video": "v", "two videos": "vv", "image": "i", "text": "t", "mixed": "vti", "text first": "tv"}


class Watched(dict[str, Any]):
    """Parameters of one module: tells who asks for one, as DeepSpeed's own dictionary does to gather it."""

    def __init__(self, given: dict[str, Any], name: str, events: list[str], running: set[str]) -> None:
        super().__init__(given)
        self.name, self.events, self.running = name, events, running

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if value is not None and self.name not in self.running:
            frame = sys._getframe(1)
            while frame.f_back is not None and frame.f_code.co_filename.startswith(TORCH):
                frame = frame.f_back
            ours = frame.f_code.co_filename.startswith(STTS)
            self.events.append(f"{'OUTSIDE ' if ours else 'stock '}{self.name}.{key}")
        return value


@contextmanager
def watch(root: nn.Module) -> Iterator[list[str]]:
    """Names, in order, of the modules with parameters of their own that run, of those that gradients come back to, and
    of parameters read elsewhere."""
    events: list[str] = []
    running: set[str] = set()
    handles, before = [], {}
    for name, module in root.named_modules():
        if not any(parameter is not None for parameter in module._parameters.values()):
            continue
        before[module] = module._parameters
        module.__dict__["_parameters"] = Watched(module._parameters, name, events, running)

        def enter(*_: Any, name: str = name) -> None:
            events.append(name)
            running.add(name)

        def leave(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
            running.discard(name)
            outputs = out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else [out]
            for tensor in outputs:
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: events.append(f"back {name}"))

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()
        for module, parameters in before.items():
            module.__dict__["_parameters"] = parameters


def batch(processor: Any, letters: str) -> dict[str, Any]:
    """Rows with a video, an image or text alone, with labels."""
    rng = np.random.default_rng(0)
    examples = []
    for number, letter in enumerate(letters):
        marker = {"v": "<video>\n", "i": "<image>\n", "t": ""}[letter]
        sample = Sample(f"u{number}", (Message("user", f"{marker}is there a circle ?"), Message("assistant", "no")))
        media: dict[str, Any] = {}
        if letter == "v":
            frames = rng.integers(0, 255, (4, 56, 56, 3), dtype=np.uint8)
            media = {"frames": frames, "timestamps_s": np.arange(4) / 2, "duration_s": 2.0}
        elif letter == "i":
            media = {"images": (rng.integers(0, 255, (56, 84, 3), dtype=np.uint8),)}
        examples.append(Example(sample, **media))
    made = Collator(processor, training=True)(examples)
    assert made is not None
    return made.inputs


@pytest.fixture(scope="module", params=[*ADAPTERS, "llava_video"])
def tiny(request: pytest.FixtureRequest) -> Any:
    family = "llava_onevision" if request.param == "llava_video" else request.param
    config = config_of(ONE_EACH[family])
    if request.param == "llava_video":
        VideoLayout(pool="average", newline="grid").write(config)
    return make_tiny(config)


@pytest.mark.parametrize("name", ["none", "uniform", "stts", "visionselector"])
def test_every_kind_of_batch_calls_the_same_modules_in_one_order(tiny: Any, name: str) -> None:
    model, processor = copy.deepcopy(tiny[0]).train(), tiny[1]
    kinds = {kind: letters for kind, letters in KINDS.items() if not traits_of(processor).one_kind_per_call}
    kinds = kinds or {kind: letters for kind, letters in KINDS.items() if not {"v", "i"} <= set(letters)}
    sequences: dict[str, list[str]] = {}
    with stts.pruning(model, name, retention_ratio=0.5) as pruned:
        root = nn.ModuleDict({"model": model} | ({"scorer": pruned.module} if pruned.module is not None else {}))
        for kind, letters in kinds.items():
            inputs = batch(processor, letters)
            inputs.pop("labels")
            with watch(root) as events:
                model(**inputs, labels=answer_labels(inputs), use_cache=False)
            sequences[kind] = list(events)
    assert len(kinds) >= 5
    for kind, sequence in sequences.items():
        assert not [event for event in sequence if event.startswith("OUTSIDE")], kind
        assert sequence == sequences["video"], kind
    assert (name in ("stts", "visionselector")) == any(event.startswith("scorer") for event in sequences["video"])


@pytest.mark.parametrize("name", ["none", "visionzip", "dart", "stts", "visionselector"])
def test_offloaded_weights_give_the_same_logits(tiny: Any, name: str) -> None:
    """accelerate keeps every weight on the meta device but while its module runs."""
    accelerate = pytest.importorskip("accelerate")
    model, processor = tiny
    inputs = batch(processor, "vv")
    inputs.pop("labels")
    logits = []
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in offloaded.parameters()} == {"meta"}
    for one in (model, offloaded):
        torch.manual_seed(0)  # of the scorer
        with torch.no_grad(), stts.pruning(one, name, retention_ratio=0.5) as pruned:
            logits.append(one(**inputs).logits)
            if pruned.module is not None:
                tensors = [*pruned.module.parameters(), *pruned.module.buffers()]
                assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        *(("stts", parts) for parts in (("scorer",), ("llm", "scorer"), ("llm",), ("vit", "connector"), ())),
        *(("visionselector", parts) for parts in (("scorer",), ())),
    ],
    ids=lambda given: given if isinstance(given, str) else "+".join(given),
)
def test_gradients_come_back_by_one_way_whatever_is_frozen(tiny: Any, name: str, parts: tuple[str, ...]) -> None:
    """Without parts, everything learns."""
    model, processor = copy.deepcopy(tiny[0]).train(), tiny[1]
    sequences: dict[str, list[str]] = {}
    with stts.pruning(model, name, retention_ratio=0.5) as pruned:
        root = nn.ModuleDict({"model": model, "scorer": pruned.module})
        for key, parameter in root.named_parameters():
            part = "scorer" if key.startswith("scorer.") else pruned.adapter.part_of(key)
            parameter.requires_grad_(part in parts or not parts)
        for kind, letter in {"video": "v", "image": "i", "text": "t"}.items():
            inputs = batch(processor, letter)
            inputs.pop("labels")
            with watch(root) as events:
                loss = model(**inputs, labels=answer_labels(inputs), use_cache=False).loss
                assert pruned.last is not None
                (loss + sum(pruned.last.losses.values())).backward()
            sequences[kind] = [event for event in events if event.startswith("back")]
    assert sequences["video"] and sequences["video"] == sequences["image"] == sequences["text"]


def test_a_parameter_read_elsewhere_is_noticed() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x) * self.scale + self.inside.bias

    module = Two()
    with watch(module) as events:
        module(torch.ones(1, 2))
        _ = module.scale
    assert events == ["", "inside", "stock inside.bias", "stock .scale"]
