from __future__ import annotations

from typing import Any

import pytest

from stts.data.rows import Message, Sample
from stts.eval.answering.method import kind_of
from stts.models.checkpoints.chat import question_of
from stts.pruners.base import HostInfo
from stts.pruners.registry import make_pruner

HOST = HostInfo(
    family="-", vit_width=16, vit_mlp=16, vit_heads=2, vit_depth=27, lowest_tap=26, llm_width=8, llm_layers=28,
    patches_per_group=4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "meta", "question"),
    [
        ("<video>\nwhich colour flashed ?", {"options": ["red", "green"]}, "which colour flashed ?"),
        ("Who sings?\n<video>", {}, "Who sings?"),
        ("<video>Who sings?\nA. Ann\nB. Bob\nAnswer with the letter.", {"options": ["Ann", "Bob"]}, "Who sings?"),
        ("<video>\nWho sings,\nand where?\n(A) Ann\n(B) Bob", {}, "Who sings,\nand where?"),
        ("<video>\nWho sings?\nAnn.\nBob.", {"options": ["ann", "bob"]}, "Who sings?"),
        ("<video>\nA. Bell invented what?", {}, "A. Bell invented what?"),
        ("<video>", {}, ""),
    ],
)
def test_a_question_comes_without_its_options(text: str, meta: dict[str, Any], question: str) -> None:
    assert question_of(Sample("s", (Message("user", text), Message("assistant", "A")), meta=meta)) == question


def test_of_several_turns_the_last_question_counts() -> None:
    turns = (Message("user", "<video>\nfirst ?"), Message("assistant", "yes"), Message("user", "second ?"))
    assert question_of(Sample("s", turns)) == "second ?"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("stts", "learned"),
        ("easy", "in the ViT"),
        ("tango", "before the LLM"),
        ("tango+inner", "inside the LLM"),
        ("fastv", "inside the LLM"),
    ],
)
def test_a_method_is_grouped_by_its_deepest_site(name: str, kind: str) -> None:
    assert kind_of(make_pruner(name, HOST)) == kind
