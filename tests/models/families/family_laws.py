"""Laws every family keeps, whatever its tower and prompt look like: each takes a model, inputs and what differs.

Inputs are what the family's own processor returns for right- or left-padded rows; `places` are, per video of the batch,
the flat prompt places of its groups, in the order of the cells.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stts
from stts.models.families.base import linear_layers
from stts.pruners.base import keep_top
from tests.conftest import answer_labels
from tests.models.pruning.test_llm_layers import Cut, Cuts, masked_dense

Inputs = Mapping[str, Any]
CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


def stir(model: Any, seed: int = 0) -> Any:
    """The model with weights that let every part matter: activations near 1, norms and biases off their start."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
            else:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def video_places(model: Any, inputs: Inputs, counts: Sequence[int]) -> list[list[int]]:
    """Places of the video placeholders, split into videos of so many groups."""
    found = placeholders(model, inputs).flatten().nonzero().squeeze(1)
    return [part.tolist() for part in found.split(list(counts))]


def placeholders(model: Any, inputs: Inputs) -> Tensor:
    """bool (B, L): placeholders of videos."""
    ids, config = inputs["input_ids"], model.config
    if "image_sizes" not in inputs or hasattr(config, "video_token_id"):
        video_BL: Tensor = ids == config.video_token_id
        return video_BL
    place_BL = ids == config.image_token_id  # one token for images and videos
    tiles_M, is_video_M = inputs["image_sizes"].T
    return place_BL.masked_scatter(place_BL, is_video_M.bool().repeat_interleave(tiles_M * config.image_seq_length))


@contextmanager
def shortened(model: Any, lost: dict[int, Tensor], valid_BL: Tensor) -> Iterator[None]:
    """The stock language model on every row alone, without padding and without the tokens lost (bool B, L) from a layer
    on: for layers with a recurrent state, which masked keys would still have entered."""
    llm = model.model.language_model
    stock = llm.forward

    def forward(inputs_embeds: Tensor, position_ids: Tensor, **_: Any) -> Any:
        whole = torch.zeros_like(inputs_embeds)
        for row, valid_L in enumerate(valid_BL.bool()):
            keep_L = valid_L & ~lost[0][row] if 0 in lost else valid_L
            place = keep_L.nonzero().squeeze(1)
            handles, state = [], {"place": place}
            for cut in (cut for cut in lost if cut):

                def drop(m: Any, args: Any, kwargs: Any, row: int = row, cut: int = cut, state: Any = state) -> Any:
                    stay = ~lost[cut][row][state["place"]]
                    if "cos" not in state:
                        state["cos"] = tuple(x[:, stay] for x in kwargs["position_embeddings"])
                        state["place"] = state["place"][stay]
                        args = (args[0][:, stay],)
                    return args, kwargs | {"position_embeddings": state["cos"]}

                def later(m: Any, args: Any, kwargs: Any, state: Any = state) -> Any:
                    return args, kwargs | {"position_embeddings": state["cos"]}

                handles.append(llm.layers[cut].register_forward_pre_hook(drop, with_kwargs=True))
                handles += [x.register_forward_pre_hook(later, with_kwargs=True) for x in llm.layers[cut + 1 :]]
            own = position_ids[..., row : row + 1, :][..., place]
            out = stock(inputs_embeds=inputs_embeds[row : row + 1, place], position_ids=own, use_cache=False)
            whole[row, state["place"]] = out.last_hidden_state[0]
            for handle in handles:
                handle.remove()
        out.last_hidden_state = whole
        return out

    llm.__dict__["forward"] = forward
    try:
        yield
    finally:
        del llm.__dict__["forward"]


# --- dense -----------------------------------------------------------------------------------------------------------


def training_path_equals_stock(model: Any, inputs: Inputs) -> None:
    """Logits, loss and every gradient of right-padded rows."""
    labels = answer_labels(inputs)
    stock = model(**inputs, labels=labels)
    stock.loss.backward()
    expected = grads(model)
    model.zero_grad()
    model.train()  # no dropout in these configs; training mode takes our own path even for `none`
    with stts.pruning(model, "none", retention_ratio=1.0):
        ours = model(**inputs, labels=labels, use_cache=False)
        ours.loss.backward()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours.logits[real], stock.logits[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.loss, stock.loss, atol=1e-5, rtol=1e-5)
    got = grads(model)
    assert expected.keys() <= got.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, **CLOSE, msg=name)


def dense_is_sacred(model: Any, inputs: Inputs, name: str) -> None:
    """At retention 1.0 and after the context: the same bits, no hooks, the same config."""
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    steps = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        stock, generated = model(**inputs).logits, model.generate(**inputs, **steps)
        with stts.pruning(model, name, retention_ratio=1.0) as pruned:
            assert torch.equal(model(**inputs).logits, stock), "at retention 1.0 the stock code runs"
            assert pruned.last is not None and pruned.last.retention_measured == 1.0
            assert torch.equal(model.generate(**inputs, **steps), generated)
        with stts.pruning(model, name, retention_ratio=0.5):
            changed = model(**inputs).logits
        assert torch.equal(changed, stock) == (name == "none")
        assert torch.equal(model(**inputs).logits, stock)
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not [hook for hook in hooks if getattr(hook, "__module__", "").startswith("stts")]


# --- pruned ----------------------------------------------------------------------------------------------------------


def survivors_equal_the_masked_dense_model(
    model: Any, inputs: Inputs, counts: Sequence[int], layer: int | None, use_cache: bool, reference: Any = masked_dense
) -> None:
    """Dropped before the LLM (layer None) or inside it: the stock model with these keys masked, or `reference`."""
    pruner: Any = "uniform" if layer is None else Cuts((Cut(layer, share=0.5),))
    depth = len(model.model.language_model.layers)
    ratio = 0.4 if layer is None else (layer + 0.5 * (depth - layer)) / depth
    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=ratio, positions="original") as pruned:
        ours = model(**inputs, use_cache=use_cache).logits
    assert pruned.last is not None and [grid.num_groups for grid in pruned.last.grids] == list(counts)
    gone = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for number, (places, index) in enumerate(zip(video_places(model, inputs, counts), pruned.last.index, strict=True)):
        assert 0 < len(index) < len(places)
        if layer is not None:
            video = pruner.stages[0].seen[number]
            assert torch.equal(keep_top(video, video.x_ND.norm(dim=-1), len(index)).index_K, index)
        gone.view(-1)[sorted(set(places) - {places[cell] for cell in index.tolist()})] = True
    with torch.no_grad(), reference(model, {layer or 0: gone}, inputs["attention_mask"]):
        stock = model(**inputs, use_cache=False).logits
    compare = inputs["attention_mask"].bool() & ~gone
    torch.testing.assert_close(ours[compare], stock[compare], **CLOSE)


def positions_are_the_stock_ones(model: Any, inputs: Inputs, counts: Sequence[int]) -> None:
    """Rotary positions of survivors in the packed row and in generate, and of the tokens generated."""
    seen: list[Any] = []
    hook = model.model.language_model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args[1:], *kwargs.values())[0]), with_kwargs=True
    )
    steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    real_BL = inputs["attention_mask"].bool()
    with torch.no_grad():
        model(**inputs, use_cache=False)
        [stock_3BL] = seen
        seen.clear()
        model.generate(**inputs, **steps)
        stock_steps = seen[1:]
        seen.clear()
        with stts.pruning(model, "uniform", retention_ratio=0.4) as pruned:
            model(**inputs, use_cache=False)
            assert pruned.last is not None
            keep_BL = real_BL.clone()
            for places, index in zip(video_places(model, inputs, counts), pruned.last.index, strict=True):
                keep_BL.view(-1)[sorted(set(places) - {places[cell] for cell in index.tolist()})] = False
            [ours_3RM] = seen
            if len(real_BL) > 1 and ours_3RM.shape[1] == len(real_BL):  # padded on the left
                keep = keep_BL.sum(1, keepdim=True) + torch.arange(-ours_3RM.shape[2], 0) >= 0
                assert torch.equal(ours_3RM[:, keep], stock_3BL[:, keep_BL])
            else:
                assert torch.equal(ours_3RM[:, 0], stock_3BL[:, keep_BL])
            seen.clear()
            model.generate(**inputs, **steps)
    hook.remove()
    left = bool(real_BL[:, -1].all())
    for row, keep_L in enumerate(keep_BL):
        count = int(keep_L.sum())
        ours = seen[0][:, row, -count:] if left else seen[0][:, row, :count]
        assert torch.equal(ours, stock_3BL[:, row, keep_L])
    for ours, stock in zip(seen[1:], stock_steps, strict=True):
        assert torch.equal(ours.expand_as(stock), stock)


def generate_equals_recomputation(
    model: Any, inputs: Inputs, pruner: Any, ratio: float, steps: int = 3, **options: Any
) -> None:
    """Left-padded rows: every step equals the pass over everything so far, without a cache."""
    names = ("image_token_id", "video_token_id")  # a random model may answer with a placeholder
    never = [number for name in names if (number := getattr(model.config, name, None)) is not None]
    with stts.pruning(model, pruner, retention_ratio=ratio, **options), torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, suppress_tokens=never,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        length = inputs["input_ids"].shape[1]
        for step in range(steps):
            grown = dict(inputs) | {"input_ids": out.sequences[:, : length + step]}
            for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
                if name in inputs:
                    more = inputs[name].new_full((len(inputs[name]), step), value)
                    grown[name] = torch.cat([inputs[name], more], 1)
            again = model(**grown, use_cache=False)
            torch.testing.assert_close(again.logits[:, -1], out.logits[step], **CLOSE)


def beams_do_not_feel_other_rows(model: Any, batch: Inputs, alone: Sequence[Inputs], pruner: Any, ratio: float) -> None:
    """`alone`: the rows of the batch one by one."""
    steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 3}
    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=ratio):
        together = model.generate(**batch, **steps)
        for row, inputs in enumerate(alone):
            assert torch.equal(model.generate(**inputs, **steps)[0, -3:], together[row, -3:])


def rows_do_not_feel_each_other(model: Any, batch: Inputs, alone: Sequence[Inputs], pruner: Any, ratio: float) -> None:
    """Logits with and without a cache; `alone`: the rows of the batch one by one."""
    with torch.no_grad(), stts.pruning(model, pruner, retention_ratio=ratio):
        for use_cache in (True, False):
            together = model(**batch, use_cache=use_cache).logits
            for row, inputs in enumerate(alone):
                real = batch["attention_mask"][row].bool()
                torch.testing.assert_close(model(**inputs).logits[0], together[row][real], **CLOSE)


# --- training --------------------------------------------------------------------------------------------------------


def sum_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def packed_training_equals_one_by_one(model: Any, batch: Inputs, alone: Sequence[Inputs], name: str) -> None:
    """Right-padded rows, each with one video: outputs and every gradient, those of the pruner included."""
    model.train()
    labels = answer_labels(batch)
    with stts.pruning(model, name, retention_ratio=0.4) as pruned:
        whole = nn.ModuleList([model, *([pruned.module] if pruned.module is not None else [])])
        pruned.describe([str(row) for row in range(len(alone))])
        together = model(**batch, use_cache=False)
        packs = not linear_layers(model.config.text_config)
        assert pruned.last is not None
        assert packs == (pruned.last.llm_tokens == pruned.last.llm_padded), "no padding"
        sum_losses(together.logits, labels).backward()
        expected = grads(whole)
        whole.zero_grad()
        for row, inputs in enumerate(alone):
            pruned.describe([str(row)])
            logits = model(**inputs, use_cache=False).logits
            real = batch["attention_mask"][row].bool()
            torch.testing.assert_close(logits[0], together.logits[row][real], **CLOSE)
            sum_losses(logits, labels[row : row + 1][:, real]).backward()
        got = grads(whole)
        if pruned.module is not None:
            assert any(p.grad is not None and p.grad.any() for p in pruned.module.parameters()), "no gradient to learn"
    assert got.keys() == expected.keys()
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, expected[key], atol=2e-5, rtol=1e-3, msg=key)


def everything_runs_once(model: Any, inputs: Inputs, watched: Mapping[str, nn.Module]) -> None:
    """One training pass calls each watched module and the scorer once and leaves no gradient missing."""
    model.train()
    with stts.pruning(model, "stts", retention_ratio=0.4) as pruned:
        assert pruned.module is not None
        calls: dict[str, int] = {}
        handles = [
            module.register_forward_hook(lambda *_, label=label: calls.update({label: calls.get(label, 0) + 1}))
            for label, module in {**watched, "scorer": pruned.module}.items()
        ]
        out = model(**inputs, labels=answer_labels(inputs), use_cache=False)
        assert calls == {**dict.fromkeys(watched, 1), "scorer": 1}
        assert pruned.last is not None
        (out.loss + sum(pruned.last.losses.values())).backward()
        for label, module in {**watched, "scorer": pruned.module}.items():
            for key, parameter in module.named_parameters():
                assert parameter.grad is not None, f"{label} {key}: missing, not zero: collectives would hang"
        for handle in handles:
            handle.remove()


def checkpointing_changes_nothing(model: Any, inputs: Inputs, inside: nn.Module) -> None:
    """Gradients with activations recomputed are those without; `inside`: a part of a tower block, called once more."""
    model.train()
    found: list[dict[str, Tensor]] = []
    calls: list[int] = []
    # before the call, not behind it: recomputing stops inside the last part that it needs
    inside.register_forward_pre_hook(lambda *_: calls.append(len(found)))
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        with stts.pruning(model, "stts", retention_ratio=0.4) as pruned:
            assert pruned.module is not None
            model(**inputs, labels=answer_labels(inputs), use_cache=False).loss.backward()
            found.append(grads(nn.ModuleList([model, pruned.module])))
        model.zero_grad()
    assert calls == [0, 1, 1], "called once, and once more to recompute"
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][key], **CLOSE, msg=key)


# --- what is wrong ---------------------------------------------------------------------------------------------------


def a_cut_prompt_is_refused(model: Any, inputs: Inputs) -> None:
    """One row whose last placeholders are cut away."""
    last = int(placeholders(model, inputs)[0].nonzero()[-1])
    cut = {
        name: value[:, :last] if isinstance(value, Tensor) and value.shape == inputs["input_ids"].shape else value
        for name, value in inputs.items()
    }
    with stts.pruning(model, "uniform"), torch.no_grad(), pytest.raises(ValueError, match="placeholders"):
        model(**cut)
