"""The parts of a generate call add up to it, answers stay what they are, and nothing is left behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import stts
from stts.models.pruning.phases import Phases, PhaseTimes
from tests.models.test_matrix import FAMILIES


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    make, build = FAMILIES[request.param]
    model, processor = make(tmp_path_factory.mktemp("family"))
    return model.eval(), build(processor, "left")


def generate(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.inference_mode():
        return model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)


def num_hooks(model: Any) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def check(times: PhaseTimes, elapsed_ms: float) -> None:
    parts = times.vit_ms, times.prune_ms, times.connect_ms, times.prefill_ms, times.decode_ms
    assert min(parts) >= 0 and min(times.vit_ms, times.connect_ms, times.prefill_ms, times.decode_ms) > 0
    assert sum(parts) <= elapsed_ms, "phases lie inside the call and do not overlap"
    assert times.ttft_ms == pytest.approx(sum(parts) - times.decode_ms)
    assert times.num_new_tokens == 4 and times.device == "cpu" and times.peak_alloc_gib is None
    assert times.decode_tokens_per_s == pytest.approx(3000 / times.decode_ms)


@pytest.mark.parametrize("pruner", ["visionzip", "stts", "fastv"])
def test_phases_of_a_pruned_call(case: tuple[Any, dict[str, Any]], pruner: str) -> None:
    model, inputs = case
    torch.manual_seed(0)
    pruning = stts.pruning(model, pruner, retention_ratio=0.5)
    with pruning:
        expected, hooks = generate(model, inputs), num_hooks(model)
        begin = time.perf_counter()
        with Phases(pruning) as phases:
            found = generate(model, inputs)
        elapsed_ms = 1000 * (time.perf_counter() - begin)
        assert num_hooks(model) == hooks
    assert torch.equal(found, expected)
    check(phases.times, elapsed_ms)
    assert phases.times.prune_ms > 0, "signals, stages and shortening the prompt"


def test_phases_of_the_stock_model(tmp_path: Path) -> None:
    make, build = FAMILIES["LLaVA-OneVision"]
    model, processor = make(tmp_path)
    inputs = build(processor, "left")
    expected, hooks = generate(model, inputs), num_hooks(model)
    for given in (model, stts.pruning(model, "none")):
        begin = time.perf_counter()
        with Phases(given) as phases:
            found = generate(model, inputs)
        check(phases.times, 1000 * (time.perf_counter() - begin))
        assert torch.equal(found, expected) and num_hooks(model) == hooks
        assert phases.times.prune_ms == 0, "nothing is pruned"


def test_time_goes_to_the_phase_it_was_spent_in(case: tuple[Any, dict[str, Any]]) -> None:
    """Each phase made slow in turn by a pause inside it, before or after the Pruning is attached."""
    model, inputs = case
    pruning = stts.pruning(model, "visionzip", retention_ratio=0.5)
    tower, connector = pruning.adapter.timed_modules()
    stage = type(pruning.pruner.stages[0])
    places = {"vit": tower, "connect": connector, "prefill": pruning.adapter.language_model.layers[0]}
    for name, module in places.items():
        with Phases(pruning) as phases, pruning:
            handle = module.register_forward_hook(lambda *_: time.sleep(0.2))
            with torch.inference_mode():
                model(**inputs)
            handle.remove()
        spent = {part: getattr(phases.times, f"{part}_ms") for part in ("vit", "prune", "connect", "prefill")}
        assert spent[name] >= 200 and max(spent, key=spent.__getitem__) == name
    with pytest.MonkeyPatch.context() as patch, Phases(pruning) as phases, pruning, torch.inference_mode():
        honest = stage.__call__
        patch.setattr(stage, "__call__", lambda *given: time.sleep(0.2) or honest(*given))
        model(**inputs)
    assert phases.times.prune_ms >= 200


def test_a_context_without_a_prompt_is_refused(tmp_path: Path) -> None:
    make, build = FAMILIES["LLaVA-OneVision"]
    model, processor = make(tmp_path)
    inputs = build(processor, "left")
    with Phases(model) as phases:
        pass
    with pytest.raises(ValueError, match="call generate in it"):
        _ = phases.times
    with Phases(model) as phases:
        generate(model, inputs)
    with pytest.raises(ValueError, match="make a new one"), phases:
        pass
