"""What runs on a GPU, without one: every pruner in bf16 on tensors that say they are on cuda:0 (see pretend_cuda.py).

No tensor of the host meets one of the device, the packed attention kernel gets what it takes, and the host waits for
the device exactly as often as `host_waits.json` says. After a change that is meant write it anew:
`python -m tests.models.test_gpu_paths`.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

import stts
from stts.pruners.registry import PRUNERS
from tests.models.test_matrix import FAMILIES
from tests.pretend_cuda import OnCuda, move, pretend

FILE = Path(__file__).with_name("host_waits.json")
FIRST = "LLaVA-OneVision"
SITES = ("none", "stts", "tango", "fastv", "tome")
"""One pruner a site, for the other families."""
CELLS = [(FIRST, name) for name in PRUNERS] + [
    (family, name) for family in FAMILIES if family != FIRST for name in SITES
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, dict[str, Any]]]:
    return {family: build(family, tmp_path_factory.mktemp("family")) for family in FAMILIES}


def build(family: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    make, inputs_of = FAMILIES[family]
    model, processor = make(folder)
    model.generation_config.eos_token_id = None
    return model.to(torch.bfloat16).eval(), dict(inputs_of(processor, "left"))


def to_device(inputs: dict[str, Any]) -> dict[str, Any]:
    def on_device(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.to("cuda", torch.bfloat16) if x.is_floating_point() else x.to("cuda")

    on_gpu: dict[str, Any] = tree_map(on_device, inputs)
    return on_gpu


def measure(model: Any, inputs: dict[str, Any], name: str) -> dict[str, int]:
    """Host waits of ours in a prefill, per decoded token, and in a training pass; and packed attention calls."""
    model = copy.deepcopy(model)
    with pretend() as (waits, kernel):
        move(model)
        inputs = to_device(inputs)
        torch.manual_seed(0)  # a learned pruner starts from random weights
        with stts.pruning(model, name, retention_ratio=0.5) as pruned:
            counts = []
            for num_tokens in (1, 3):
                waits.places.clear()
                ids = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
                counts.append(len(waits.ours))
            assert isinstance(ids, OnCuda)
            result = {"prefill": counts[0], "decode": counts[1] - counts[0]}
            if all(stage.site.kind != "llm" for stage in pruned.pruner.stages):  # those are refused in training
                waits.places.clear()
                model.train()
                logits = model(**inputs, use_cache=False).logits
                assert isinstance(logits, OnCuda) and logits.as_subclass(torch.Tensor).isfinite().all()
                result["training"] = len(waits.ours)
    return result | {"packed attention": kernel.calls}


@pytest.mark.parametrize(("family", "name"), CELLS)
def test_on_a_device_as_frozen(models: Any, family: str, name: str) -> None:
    frozen = json.loads(FILE.read_text())[family][name]
    measured = measure(*models[family], name)
    assert measured["decode"] == 0, "a decoded token waits for nothing of ours"
    assert measured == frozen, f"write {FILE.name} anew if this is meant: python -m tests.models.test_gpu_paths"


def test_what_would_fail_on_a_gpu_fails() -> None:
    with pretend() as (waits, _):
        x, host = torch.arange(4.0, device="cuda"), torch.arange(4.0)
        assert x.device.type == (x + 1).device.type == torch.zeros_like(x).device.type == "cuda"
        with pytest.raises(RuntimeError, match="all tensors on one device"):
            x + host
        with pytest.raises(RuntimeError, match="all tensors on one device"):
            torch.cat([x, host])
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        x + torch.tensor(1.0), x[torch.tensor([0])], x.masked_fill(x > 1, 0)
        assert not waits.places
        reads = (
            x.tolist, x.nonzero, x.cpu, x.unique, lambda: float(x.sum()), lambda: x[x > 1],
            lambda: x.repeat_interleave(x.long()), lambda: bool((x > 1).any()),
        )  # fmt: skip
        for read in reads:
            waits.places.clear()
            read()
            assert len(waits.places) >= 1, read


def _as_lines(table: dict[str, dict[str, dict[str, int]]]) -> str:
    """One line a cell."""
    families = []
    for family, cells in table.items():
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(counts)}" for name, counts in cells.items())
        families.append(f"{json.dumps(family)}: {{\n{lines}\n}}")
    return "{\n" + ",\n".join(families) + "\n}\n"


def _write() -> None:
    table: dict[str, dict[str, dict[str, int]]] = {}
    built: Iterator[Any] = ((family, build(family, Path(tempfile.mkdtemp()))) for family in FAMILIES)
    for family, (model, inputs) in built:
        table[family] = {name: measure(model, inputs, name) for of, name in CELLS if of == family}
    FILE.write_text(_as_lines(table))


if __name__ == "__main__":
    from tests import conftest  # noqa: F401  (scorers may be random)

    _write()
