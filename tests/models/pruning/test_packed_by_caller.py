"""Rows that the caller packed (positions start anew, no mask): samples do not see each other under a context either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import stts
from stts.models.pruning.prompt import packed_samples, renumber
from tests.conftest import make_inputs as llava_inputs
from tests.models.families import molmo2_tiny, qwen_tiny
from tests.models.test_matrix import FAMILIES

Inputs = dict[str, Any]
SAMPLES: dict[str, Callable[[Any], list[Inputs]]] = {
    "LLaVA-OneVision": lambda processor: [dict(llava_inputs(processor, [text])) for text in ("v what ?", "v is it ?")],
    "Qwen3-VL": lambda processor: [dict(qwen_tiny.make_inputs(processor, [text])) for text in ("v what ?", "w is ?")],
    "Molmo2": lambda processor: [dict(molmo2_tiny.make_inputs(processor, [text])) for text in ("3 what ?", "5 is ?")],
}


@pytest.fixture(scope="module", params=SAMPLES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Inputs]]:
    make, _ = FAMILIES[request.param]
    model, processor = make(tmp_path_factory.mktemp("family"))
    samples = SAMPLES[request.param](processor)
    for sample in samples:
        sample.pop("attention_mask")
    return model, samples


def positions_of(model: Any, sample: Inputs) -> Tensor:
    """(B, L), or the four rows of a family with mrope, text first; as the stock model counts."""
    seen: list[Any] = []
    llm = model.model.language_model
    handle = llm.register_forward_pre_hook(lambda *given: seen.append(given[2].get("position_ids")), with_kwargs=True)
    with torch.no_grad():
        model(**sample, use_cache=False)
    handle.remove()
    text_BL = torch.arange(sample["input_ids"].shape[1])[None]
    return text_BL if seen[0] is None or seen[0].dim() == 2 else torch.cat([text_BL[None], seen[0]])


def pack(model: Any, samples: Sequence[Inputs]) -> Inputs:
    """One row of all samples."""
    by_row = ("input_ids", "mm_token_type_ids", "token_type_ids")
    packed = {name: torch.cat([one[name] for one in samples], int(name in by_row)) for name in samples[0]}
    if "video_token_pooling" in packed:  # windows number the patches of all videos
        patches = samples[0]["pixel_values_videos"].shape[:-1].numel()
        second = samples[1]["video_token_pooling"]
        packed["video_token_pooling"] = torch.cat(
            [samples[0]["video_token_pooling"], torch.where(second >= 0, second + patches, -1)]
        )
    return packed | {"position_ids": torch.cat([positions_of(model, one) for one in samples], -1)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["none", "uniform"])
def test_packed_samples_do_not_see_each_other(case: tuple[Any, list[Inputs]], name: str, training: bool) -> None:
    model, samples = case
    packed = pack(model, samples)
    model.train(training)
    try:
        with (
            torch.set_grad_enabled(training),
            stts.pruning(model, name, retention_ratio=1.0 if name == "none" else 0.5) as pruned,
        ):
            if name == "none":
                pruned.run_all_modules()
            alone = [model(**one, use_cache=False).logits for one in samples]
            together = model(**packed, use_cache=False).logits
    finally:
        model.eval()
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-4)


def test_packed_rows_with_a_cache_or_three_rows_of_positions_are_refused(case: tuple[Any, list[Inputs]]) -> None:
    model, samples = case
    packed = pack(model, samples)
    with stts.pruning(model, "uniform", retention_ratio=0.5), torch.no_grad():
        with pytest.raises(ValueError, match="packs several samples, but a cache"):
            model(**packed, use_cache=True)
        if packed["position_ids"].dim() == 3:
            with pytest.raises(ValueError, match="pass four, with the text positions first"):
                model(**packed | {"position_ids": packed["position_ids"][1:]}, use_cache=False)


def test_samples_are_found_where_positions_do_not_go_on() -> None:
    position_BL = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    x_BLD = torch.zeros(2, 5, 1)
    sequence_BL = packed_samples(position_BL, x_BLD)
    assert sequence_BL is not None and sequence_BL.tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]]
    assert packed_samples(position_BL[1:], x_BLD) is None and packed_samples(None, x_BLD) is None
    keep_BL = torch.tensor([[1, 0, 1, 0, 1], [1, 1, 0, 1, 1]]).bool()
    assert renumber(keep_BL, sequence_BL).tolist() == [[0, 0, 1, 0, 0], [0, 1, 1, 2, 3]]
    assert renumber(keep_BL, None).tolist() == [[0, 0, 1, 1, 2], [0, 1, 1, 2, 3]]
