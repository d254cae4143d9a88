"""One run of the tower for all methods behind it: the same bits as with a run of their own, in every family."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import stts
from stts.data.collate import Batch
from stts.data.rows import Message, Sample
from stts.eval.answering.method import make_runners
from stts.models.families.base import make_adapter
from stts.models.pruning.shared_tower import SharedTower
from stts.models.pruning.tower import Tower, run_tower
from tests.models.test_matrix import FAMILIES

BEHIND = ("visionzip", "tango", "holitom", "fastvid", "adatp", "fastv", "random")
"""Signals of every kind, merging, two stages, a cut inside the LLM."""
INSIDE = ("stts", "tome")


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_is_bit_equal_to_own(family: str, tmp_path: Path) -> None:
    make, build = FAMILIES[family]
    model, processor = make(tmp_path)
    model.eval()
    inputs = build(processor, "left")
    attention = make_adapter(model).tower_attention()
    calls: list[str] = []
    attention.register_forward_hook(lambda *_: calls.append(name))

    def logits(name: str, tower: Tower, inputs: dict[str, Any] = inputs) -> Tensor:
        torch.manual_seed(0)  # the learned one starts from random weights
        pruned = stts.pruning(model, name, retention_ratio=0.5, untrained=True, tower=tower)
        with pruned, torch.inference_mode():
            found: Tensor = model(**inputs).logits
            return found

    own = {}
    for name in (*BEHIND, *INSIDE):
        own[name] = logits(name, run_tower)
    a_run = calls.count(BEHIND[0])  # a stock forward may call the module several times
    calls.clear()
    shared = SharedTower(attention)
    for number, name in enumerate((*BEHIND, *INSIDE, BEHIND[0])):
        before_ms = shared.spared_ms
        assert torch.equal(logits(name, shared), own[name]), name
        is_spared = number > 0 and name not in INSIDE
        assert (shared.spared_ms > before_ms) == is_spared, "the time of the run that it was spared"
    assert {name: calls.count(name) for name in BEHIND} == {**dict.fromkeys(BEHIND, 0), BEHIND[0]: a_run}
    assert all(name in calls for name in INSIDE), "a stage inside the tower runs it"

    other = {key: _negated(value) if key.startswith("pixel_values") else value for key, value in inputs.items()}
    expected = logits("tango", run_tower, other)
    assert torch.equal(logits("tango", shared, other), expected), "other frames, another run"
    assert not torch.equal(expected, own["tango"])


def _negated(pixels: Any) -> Any:
    return -pixels if isinstance(pixels, Tensor) else [-one for one in pixels]


def test_the_time_of_the_one_run_is_in_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower made slow by a pause: each method is told what it would have taken alone, and only the first waited."""
    make, build = FAMILIES["LLaVA-OneVision"]
    model, processor = make(tmp_path)
    inputs = build(processor, "left")
    waited: list[float] = []

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        waited.append(0.2)
        return run_tower(*args)

    monkeypatch.setattr("stts.models.pruning.shared_tower.run_tower", slow)
    runners = make_runners(
        model.eval(), tmp_path, pruners=("visionzip", "fastv"), retention_ratios=(0.6, 0.5), exact=True, positions=None,
        options={}, siglip=None, seed=0,
    )  # fmt: skip
    samples = tuple(Sample(uid, (Message("user", "<video>\nwhat ?"),)) for uid in "ab")
    batch = Batch(inputs, ("a", "b"), ("a", "b"), (None, None), ("", ""), samples)
    for runner in runners[1:]:
        one = runner.timed(batch, lambda: model(**inputs).logits)[1].ms
        parts = one["vit"] + one["prune"] + one["connect"] + one["prefill"]
        assert one["vit"] > 200 and one["ttft"] == pytest.approx(parts) and one["generate"] > one["ttft"]
    assert waited == [0.2], "only the first of them waited"


def test_nothing_is_shared_with_gradients(tmp_path: Path) -> None:
    make, build = FAMILIES["LLaVA-OneVision"]
    model, processor = make(tmp_path)
    shared = SharedTower(make_adapter(model).tower_attention())
    for _ in range(2):
        with stts.pruning(model.eval(), "tango", retention_ratio=0.5, tower=shared):
            model(**build(processor, "left"))
    assert shared.spared_ms == 0
