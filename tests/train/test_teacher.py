"""A gradient teacher in a whole training step: dense steps teach the scorer, pruned steps do not know of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stts.data.collate import Collator, Step
from stts.data.shapes.clips import ShapesConfig, ShapesFrames
from stts.pruners.teacher import Teacher, gradient_importance, highest
from stts.tokens import Watched
from stts_train.loss import answer_loss
from stts_train.module import VideoFinetune
from stts_train.parts import PARTS
from stts_train.retention import Sampled, holds_vlm, make_retention
from tests.conftest import make_inputs
from tests.train.test_module import FAST, batch_for, fit

WEIGHTS: Any = {"answer": 1.0, "temporal": 0.5, "teacher": 1.0}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def taught(folder: Path, **settings: Any) -> VideoFinetune:
    options = {"teacher": {"share": 0.2}} | settings.pop("pruner_options", {})
    schedule = settings.pop("retention_ratio", {"target": 0.5, "dense_first": 1, "dense_every": 2})
    weights = settings.pop("loss_weights", WEIGHTS)
    return VideoFinetune(
        str(folder), "stts", schedule, pruner_options=options, loss_weights=weights, **{**FAST, **settings}
    )


def scorer_grads(module: VideoFinetune) -> list[Tensor]:
    assert module.scorer is not None
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in module.scorer.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_backward_pass_gives_the_gradient_of_the_explicit_loss(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    module = taught(tiny_folder, gradient_checkpointing=checkpointing).train()
    module.pruning.retention_ratio = 1.0
    if checkpointing:
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = batch_for(module)
    seen: list[tuple[Tensor, Tensor, Tensor, int]] = []
    stock = Teacher.watch

    def look(self: Teacher, scores_G: Tensor, change_G: Tensor, per_frame: int) -> Any:
        watch = stock(self, scores_G, change_G, per_frame)

        def watching(x_Gd: Tensor) -> Watched:
            watched = watch(x_Gd)
            watched.x_Kd.retain_grad()
            seen.append((watched.x_Kd, scores_G, change_G, per_frame))
            return watched

        return watching

    monkeypatch.setattr(Teacher, "watch", look)
    with module.pruning:
        losses = module._forward(batch)
        assert set(losses) == {"answer", "temporal", "teacher"} and losses["temporal"] == 0
        (losses["answer"] + losses["teacher"]).backward()
    ours = [grad.clone() for grad in scorer_grads(module)]
    assert module.pruning.last is not None and len(seen) == 3
    values = module.pruning.last.late_values["teacher"]

    module.zero_grad()
    targets = [
        highest(gradient_importance(x, x.grad) * change, first, 0.2)
        for x, _, change, first in seen
        if x.grad is not None
    ]
    seen.clear()
    with module.pruning:
        module._forward(batch)
        explicit = []
        for (_, scores_G, _, first), target_G in zip(seen, targets, strict=True):
            bce_G = F.binary_cross_entropy(scores_G, target_G, reduction="none")
            explicit.append(bce_G[first:].sum() / len(bce_G))
        torch.stack(explicit).mean().backward()
    assert any(grad.any() for grad in ours)
    torch.testing.assert_close(ours, scorer_grads(module), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.stack(values), torch.stack(explicit).detach(), rtol=1e-5, atol=1e-6)


def test_dense_steps_alternate_with_pruned_ones_and_are_logged(tiny_folder: Path) -> None:
    class Look(pl.Callback):
        def __init__(self) -> None:
            self.rows: list[tuple[float, bool]] = []

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            report = pl_module.pruning.last
            self.rows.append((report.retention_measured, "teacher" in report.losses))

    module, look = taught(tiny_folder), Look()
    dense = VideoFinetune(str(tiny_folder), "none", **FAST)
    assert module.tokens_per_video(8) == dense.tokens_per_video(8), "rows are planned for dense steps"
    trainer = fit(module, [batch_for(module)] * 5, callbacks=[look])
    assert look.rows == [(1.0, True), (0.5, False)] * 2 + [(1.0, True)]
    assert trainer.callback_metrics["train/teacher_loss"] > 0.05, "the value of the backward pass, not of the forward"
    assert 0 <= trainer.callback_metrics["train/teacher_agreement"] <= 1
    assert trainer.callback_metrics["scorer_grad_norm"] > 0


def test_dense_steps_may_leave_the_vlm_alone(tiny_folder: Path) -> None:
    """Step 0 trains the scorer, by the same gradient as with the VLM learning beside it; step 1 everything."""
    grads: dict[str, list[Tensor]] = {}
    weights: list[dict[str, Tensor]] = []
    towers: list[bool] = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})
            towers.append(all(p.grad is None for p in pl_module.parts()["vit"]))
            if trainer.global_step == 0:
                grads[trains] = [grad.clone() for grad in scorer_grads(pl_module)]

        def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    for trains in ("everything", "scorer"):
        torch.manual_seed(0)
        schedule = {"target": 0.5, "dense_first": 1, "dense_trains": trains}
        module = taught(tiny_folder, retention_ratio=schedule, gradient_checkpointing=True)
        weights.clear(), towers.clear()
        trainer = fit(module, [batch_for(module)] * 2, callbacks=[Look()], log_every_n_steps=1)
    assert any(grad.any() for grad in grads["scorer"])
    torch.testing.assert_close(grads["scorer"], grads["everything"], rtol=1e-4, atol=1e-7)
    assert towers == [True, False], "no gradient of the tower is computed in the dense step"
    first, second = ({n for n in old if not torch.equal(old[n], new[n])} for old, new in pairwise(weights))
    assert first and all(name.startswith("scorer.") for name in first)
    assert any(name.startswith("model.") for name in second)
    assert trainer.callback_metrics["vit_grad_norm"] > 0
    assert all(p.requires_grad for part in module.parts().values() for p in part) and set(module.parts()) == set(PARTS)


@pytest.mark.parametrize(
    "options",
    [
        {"teacher": {"signal": "attention", "layer": 1}},
        {"teacher": {"signal": "noise_gate", "share": 0.5}},
        {"teacher": {"signal": "scale_gate", "share": 0.5}},
        {"teacher": None, "gumbel": 1.0, "straight_through": True},
    ],
    ids=["attention", "noise_gate", "scale_gate", "gumbel"],
)
def test_rival_signals_reach_the_scorer(tiny_folder: Path, options: dict[str, Any]) -> None:
    """In a whole step, where the temporal loss has weight 0."""
    schedule = {"target": 0.5, "dense_first": 1} if options["teacher"] else 0.5
    weights = {**WEIGHTS, "temporal": 0.0}
    module = taught(tiny_folder, pruner_options=options, retention_ratio=schedule, loss_weights=weights)
    trainer = fit(module, [batch_for(module)])
    assert trainer.callback_metrics["scorer_grad_norm"] > 0
    has_loss = bool(options["teacher"]) and options["teacher"]["signal"] == "attention"
    assert ("train/teacher_loss" in trainer.callback_metrics) == has_loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_attention_that_teaches_is_that_of_the_stock_model(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """Two videos in a row, and an image before one."""
    module = taught(tiny_folder, pruner_options={"teacher": {"signal": "attention", "layer": 2}}).train()
    module.pruning.retention_ratio = 1.0
    if checkpointing:
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    heard: list[Tensor] = []
    stock_watch = Teacher.watch

    def listen(self: Teacher, *given: Any) -> Any:
        def watching(x_Gd: Tensor) -> Watched:
            watched = stock_watch(self, *given)(x_Gd)
            assert watched.attention is not None
            layer, tell = watched.attention
            return replace(watched, attention=(layer, lambda told: (heard.append(told), tell(told))))

        return watching

    monkeypatch.setattr(Teacher, "watch", listen)
    inputs = make_inputs(module.processor, ["vv is there a cross ?", "iv what is it ?", "- how many ?"])
    with module.pruning:
        logits = module.model(**inputs, use_cache=False).logits
        assert len(heard) == 3, "one per video"
        assert module.pruning.last is not None
        (logits.sum() + module.pruning.last.losses["teacher"]).backward()
    assert any(grad.any() for grad in scorer_grads(module))
    module.model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        maps = module.model(**inputs, output_attentions=True, use_cache=False).attentions[2]
    is_video = inputs["input_ids"] == module.model.config.video_token_id
    size = len(heard[0])
    places = [is_video[row].nonzero().flatten().split(size + 1) for row in (0, 1)]  # each ends with a newline
    for told, row, place in zip(heard, (0, 0, 1), (*places[0], *places[1]), strict=False):
        last = int(inputs["attention_mask"][row].nonzero()[-1])
        torch.testing.assert_close(told, maps[row, :, last, place[:size]].mean(0), rtol=1e-4, atol=1e-6)


def test_what_a_step_draws_does_not_depend_on_what_was_drawn_before(tiny_folder: Path) -> None:
    """So a resumed run chooses, under Gumbel noise, what it would have chosen."""

    class Draw(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            torch.rand(7)

    kept: list[list[Tensor]] = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            kept[-1] += pl_module.pruning.last.index

    for more in ([], [Draw()]):
        torch.manual_seed(0)
        kept.append([])
        module = taught(tiny_folder, retention_ratio=0.5, pruner_options={"teacher": None, "gumbel": 5.0})
        fit(module, [batch_for(module)] * 2, callbacks=[Look(), *more])
    assert all(torch.equal(one, other) for one, other in zip(*kept, strict=True))
    assert not torch.equal(kept[0][0], kept[0][3]), "another step, another draw"


def test_an_attention_layer_that_the_llm_lacks_is_named(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"layer=9 is outside \[0, "):
        taught(tiny_folder, pruner_options={"teacher": {"signal": "attention", "layer": 9}})


def test_without_a_scorer_there_is_nothing_to_train_alone(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="trains the scorer alone"):
        taught(tiny_folder, retention_ratio={"target": 0.5, "dense_every": 2, "dense_trains": "scorer"}, scorer_lr=0)


def first_gradient(module: VideoFinetune, groups: list[list[int]]) -> list[Tensor]:
    """Of the scorer after one optimizer step, over these clips in so many batches."""
    grads: list[list[Tensor]] = []

    class Keep(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            grads.append([grad.clone() for grad in scorer_grads(pl_module)])

    clips = ShapesFrames("train", 3, 0, ShapesConfig(num_sampled=8))
    collator = Collator(module.processor, training=True)
    batches = [batch for group in groups if (batch := collator([clips[i] for i in group])) is not None]
    parts = [replace(batch, step=step) for batch, step in zip(batches, Step.of(batches), strict=True)]
    fit(module, parts, callbacks=[Keep()], accumulate_grad_batches=len(parts))
    return grads[0]


def test_accumulated_batches_teach_like_one(tiny_folder: Path) -> None:
    whole = first_gradient(taught(tiny_folder), [[0, 1, 2]])
    torch.manual_seed(0)
    apart = first_gradient(taught(tiny_folder), [[0], [1], [2]])
    assert any(grad.any() for grad in whole)
    torch.testing.assert_close(whole, apart, rtol=1e-4, atol=1e-7)


def test_log_odds_do_not_saturate() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0]], [[60.0, 0.0, 0.0]]], requires_grad=True)
    labels = torch.tensor([[0], [0]])
    p = logits[0, 0].detach().softmax(0)[0]
    value = answer_loss(logits[:1], labels[:1], objective="log_odds").item()
    assert value == pytest.approx(float((1 - p).log() - p.log()))
    answer_loss(logits[1:], labels[1:], objective="log_odds").backward()
    assert logits.grad is not None and logits.grad[1, 0, 0].item() == pytest.approx(-1.0), "sure answers still pull"


def test_the_schedule_by_hand() -> None:
    rule = make_retention({"target": 0.25, "dense_first": 2, "dense_every": 3})
    assert [rule.at(step) for step in range(8)] == [1.0, 1.0, 0.25, 1.0, 0.25, 0.25, 1.0, 0.25]
    assert rule.target == 0.25 and rule.highest == 1.0
    assert rule.record == {"target": 0.25, "dense_first": 2, "dense_every": 3, "dense_trains": "everything"}
    assert not any(holds_vlm(rule, step) for step in (None, 0, 2))
    held = make_retention({"target": 0.25, "dense_every": 3, "dense_trains": "scorer"})
    assert [holds_vlm(held, step) for step in (None, 0, 1, 3)] == [True, True, False, True]
    elastic = make_retention({"target": {"low": 0.1, "high": 0.5}, "dense_every": 2})
    assert elastic.at(0) == 1.0 and elastic.at(1) == Sampled(low=0.1, high=0.5).at(1)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"target": 0.25}, "both 0"),
        ({"target": 0.25, "dense_every": -1}, "dense_every=-1"),
        ({"target": 0.25, "every": 2}, r"\['every'\] unknown"),
        ({"target": 0.25, "dense_every": 2, "dense_trains": "nothing"}, "dense_trains='nothing'"),
        ({"target": 1.5, "dense_every": 2}, "1.5"),
    ],
)
def test_wrong_schedules_are_named(setting: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_retention(setting)
