"""A pass knows itself: what decode steps need lies on their cache, so no other call changes what they give."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import stts
from stts.pruners.dycoke import DyCoke
from tests.models.test_matrix import FAMILIES

Inputs = dict[str, Any]
CASES = [
    ("LLaVA-OneVision", "uniform"),
    ("LLaVA-OneVision", "fastv"),
    ("Qwen3-VL", "uniform"),
    ("Qwen3-VL", "fastv"),
    ("Molmo2", "uniform"),
    ("LLaVA-OneVision", DyCoke(hidden=0.5, layer=1)),
]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    names = dict.fromkeys(family for family, _ in CASES)
    return {name: FAMILIES[name][0](tmp_path_factory.mktemp("family")) for name in names}


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest, made: Any) -> tuple[Any, Inputs, Inputs, Any]:
    """A model, two prompts of other rows and frames, a pruner."""
    family, pruner = request.param
    (model, processor), build = made[family], FAMILIES[family][1]
    first = dict(build(processor, "left"))
    second = {name: value.clone() for name, value in first.items()}
    second["pixel_values_videos"] = 0.5 * second["pixel_values_videos"].flip(0)
    second["input_ids"][:, -1] = first["input_ids"][0, 0]
    return model, first, second, pruner


def step(model: Any, cache: Any, prompt: Inputs, tokens: Tensor, **more: Any) -> Tensor:
    """Logits (B, V) of one more token per row."""
    number = cache.steps = getattr(cache, "steps", 0) + 1
    mask = prompt["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(mask), number)], 1) if len(mask) == len(tokens) else None
    out = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **more)
    logits: Tensor = out.logits[:, -1]
    return logits


def alone(model: Any, prompt: Inputs, tokens: list[Tensor]) -> list[Tensor]:
    """What these tokens give behind the prompt when nothing else happens."""
    cache = model(**prompt, use_cache=True).past_key_values
    return [step(model, cache, prompt, token) for token in tokens]


@pytest.fixture
def tokens(case: tuple[Any, Inputs, Inputs, Any]) -> list[Tensor]:
    rows = len(case[1]["input_ids"])
    return [torch.full((rows, 1), number) for number in (5, 6, 7)]


def test_two_prompts_by_turns(case: tuple[Any, Inputs, Inputs, Any], tokens: list[Tensor]) -> None:
    model, first, second, pruner = case
    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=0.75):
        expected = [alone(model, prompt, tokens) for prompt in (first, second)]
        caches = [model(**prompt, use_cache=True).past_key_values for prompt in (first, second)]
        for number, token in enumerate(tokens):
            for prompt, cache, logits in zip((first, second), caches, expected, strict=True):
                torch.testing.assert_close(step(model, cache, prompt, token), logits[number], **CLOSE)
    assert not torch.allclose(expected[0][0], expected[1][0], atol=1e-3), "the prompts are different ones"


def test_a_deep_copy_of_a_cache_goes_on_alone(case: tuple[Any, Inputs, Inputs, Any], tokens: list[Tensor]) -> None:
    model, first, second, pruner = case
    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=0.75):
        expected = alone(model, first, tokens)
        cache = model(**first, use_cache=True).past_key_values
        twin = copy.deepcopy(cache)
        step(model, cache, first, tokens[2])
        del cache
        model(**second, use_cache=True)
        for token, logits in zip(tokens, expected, strict=True):
            torch.testing.assert_close(step(model, twin, first, token), logits, **CLOSE)


def test_rows_of_a_cache_are_reordered_selected_and_repeated(
    case: tuple[Any, Inputs, Inputs, Any], tokens: list[Tensor]
) -> None:
    model, first, _, pruner = case
    order = torch.tensor([2, 0, 1])
    changes = {
        "reorder_cache": (order, order),
        "batch_select_indices": (order[:2], order[:2]),
        "batch_repeat_interleave": (2, torch.tensor([0, 0, 1, 1, 2, 2])),
    }
    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=0.75):
        [expected] = alone(model, first, tokens[:1])
        for name, (argument, rows) in changes.items():
            cache = model(**first, use_cache=True).past_key_values
            getattr(cache, name)(argument)
            prompt = {"attention_mask": first["attention_mask"][rows]}
            token = tokens[0][:1].expand(len(rows), 1)
            # Qwen's own code would count on from the rows of the last prompt; positions here are the cache's
            found = step(model, cache, prompt, token, position_ids=torch.zeros_like(token))
            torch.testing.assert_close(found, expected[rows], **CLOSE)
        cache = model(**first, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="2 rows were fed to a cache of 3"):
            step(model, cache, first, tokens[0][:2], position_ids=torch.zeros_like(tokens[0][:2]))


def test_a_pruned_cache_is_refused_outside_a_context(
    case: tuple[Any, Inputs, Inputs, Any], tokens: list[Tensor]
) -> None:
    model, first, _, pruner = case
    with torch.no_grad():
        with stts.pruning(model, pruner, retention_ratio=0.75):
            expected = alone(model, first, tokens[:1])
            cache = model(**first, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="only a forward pass inside a pruning context can continue it"):
            step(model, copy.deepcopy(cache), first, tokens[0])
        with stts.pruning(model, "none"):  # another context goes on as well
            torch.testing.assert_close(step(model, cache, first, tokens[0]), expected[0], **CLOSE)


def test_a_failed_call_changes_nothing_for_the_next(case: tuple[Any, Inputs, Inputs, Any]) -> None:
    model, first, second, pruner = case
    broken = {name: value for name, value in second.items() if name != "attention_mask"}
    broken["input_ids"] = second["input_ids"][:, 1:]  # a placeholder or a mark less
    steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=0.75) as pruned:
        expected = model(**first).logits
        ids = model.generate(**first, **steps)
        for module in (model.model, model.model.language_model.layers[1]):
            handle = module.register_forward_pre_hook(fail, prepend=True)
            with pytest.raises(RuntimeError, match="in the middle"):
                model.generate(**second, **steps, num_beams=3)
            handle.remove()
            assert torch.equal(model(**first).logits, expected)
            assert torch.equal(model.generate(**first, **steps), ids)
        assert pruned.last is not None


def test_beams_without_a_cache(case: tuple[Any, Inputs, Inputs, Any]) -> None:
    """Every step encodes the prompt anew, for every beam."""
    model, first, _, pruner = case
    names = [name for name in ("image_token_id", "video_token_id") if hasattr(model.config, name)]
    steps = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "num_beams": 2}
    steps |= {"suppress_tokens": [getattr(model.config, name) for name in names]}
    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=0.75):
        expected = model.generate(**first, **steps)
        if model.config.model_type == "molmo2":  # its ids of kinds do not grow without a cache, in the stock code too
            return
        assert torch.equal(model.generate(**first, **steps, use_cache=False), expected)


def test_threads_do_not_feel_each_other(case: tuple[Any, Inputs, Inputs, Any]) -> None:
    model, first, second, pruner = case
    steps = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    found: dict[int, Tensor] = {}

    def run(number: int, prompt: Inputs) -> None:
        with torch.no_grad():
            for _ in range(3):
                found[number] = model.generate(**prompt, **steps)

    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=0.75):
        expected = [model.generate(**prompt, **steps) for prompt in (first, second)]
        threads = [threading.Thread(target=run, args=pair) for pair in enumerate((first, second))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[number], ids) for number, ids in enumerate(expected))


def test_describe_speaks_of_the_callers_own_pass(made: Any) -> None:
    model, processor = made["LLaVA-OneVision"]
    inputs = FAMILIES["LLaVA-OneVision"][1](processor, "left")
    pruned = stts.Pruning(model, "random", retention_ratio=0.5)
    with pruned, torch.no_grad():
        pruned.describe(["a", "b"])
        expected = model(**inputs).logits
        pruned.describe(["a", "b"])
        other = threading.Thread(target=lambda: pruned.describe(["c", "d"]))
        other.start()
        other.join()
        assert torch.equal(model(**inputs).logits, expected)


def test_a_model_inside_a_context_is_not_copied(made: Any) -> None:
    model, processor = made["LLaVA-OneVision"]
    inputs = FAMILIES["LLaVA-OneVision"][1](processor, "left")
    pruned = stts.Pruning(model, "uniform", retention_ratio=0.5)
    with pruned, pytest.raises(ValueError, match="cannot be deep-copied"):
        copy.deepcopy(model)
    twin = copy.deepcopy(pruned)
    with torch.no_grad():
        with pruned:
            expected = model(**inputs).logits
        with twin:
            assert torch.equal(twin.model(**inputs).logits, expected)
            with pruned:
                assert torch.equal(model(**inputs).logits, expected)
