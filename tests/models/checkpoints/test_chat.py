"""Questions in pieces get the answers that `stts compare` gets, and the VLMEvalKit wrapper of the docs works."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import stts
from stts.data.collate import Collator
from stts.data.datasets import VideoJsonl
from stts.data.shapes.files import write_shapes
from stts.eval.answering.method import Runner
from stts.eval.results.table import Cell
from stts.models.checkpoints.chat import Chat, Piece, asked_of
from stts.models.checkpoints.hub import PrunedVLM, load_chat
from stts.models.checkpoints.load import load_vlm
from stts.models.pruning.context import Pruning

ROOT = Path(__file__).parents[3]
VLM = ROOT / "stts" / "assets" / "shapes_vlm"
FRAMES = 8


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes"), sizes={"test": 3}, progress=False)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return load_chat(VLM, "tango", 0.25, num_frames=FRAMES)


@pytest.fixture(scope="module")
def asked(clips: Path) -> list[tuple[Path, str]]:
    """Video and question of every row."""
    return [(sample.video, asked_of(sample)) for sample in VideoJsonl(clips / "test.jsonl").samples if sample.video]


@pytest.fixture(scope="module")
def expected(clips: Path) -> list[str]:
    """What `stts compare` makes of these rows, all in one batch."""
    model, processor = load_vlm(VLM)
    data = VideoJsonl(clips / "test.jsonl", num_frames=FRAMES)
    batch = Collator(processor, training=False)([data[place] for place in range(len(data))])
    assert batch is not None
    runner = Runner(Cell("tango", 0.25), Pruning(model, "tango", retention_ratio=0.25))
    texts = [text for text, _, _ in runner.generate(batch, processor, max_new_tokens=6)[0]]
    assert len(set(texts)) > 2, "a model that always says the same would show nothing"
    return texts


def test_the_answers_are_those_of_compare_alone_and_in_a_batch(
    chat: Chat, asked: list[tuple[Path, str]], expected: list[str]
) -> None:
    examples = [
        chat.example(f"q{number}", [("user", [Piece("video", str(video)), Piece("text", question)])])
        for number, (video, question) in enumerate(asked)
    ]
    answers = chat.answer(examples, max_new_tokens=6)
    assert [answer.text for answer in answers] == expected
    assert [answer.retention for answer in answers] == [0.25] * len(asked)
    assert all(1 <= answer.num_tokens <= 6 for answer in answers)
    assert [chat.answer([example], max_new_tokens=6)[0].text for example in examples[:2]] == expected[:2]


def test_media_stand_where_their_pieces_or_the_markers_of_the_text_are(chat: Chat, clips: Path) -> None:
    video = Piece("video", clips / "test" / "test-000000.mp4", clip=(0.0, 1.0))

    def written(*pieces: Piece) -> list[str]:
        return [
            turn.text
            for turn in chat.example("a", [("system", [Piece("text", "s")]), ("user", pieces)]).sample.messages
        ]

    assert written(Piece("text", "before"), video, Piece("text", "after")) == ["s", "before\n<video>\nafter"]
    assert written(video, Piece("text", "look: <video> what?")) == ["s", "look: <video> what?"]
    example = chat.example("a", [("user", [video, Piece("text", "?")])])
    assert example.timestamps_s is not None and example.timestamps_s.max() <= 1.0, "the clip bounds the frames"


def test_images_and_text_alone_are_answered_and_measure_no_retention(chat: Chat, tmp_path: Path) -> None:
    picture = Image.fromarray(np.full((48, 48, 3), 90, np.uint8))
    picture.save(tmp_path / "a.png")
    pieces = [Piece("image", picture), Piece("image", tmp_path / "a.png"), Piece("text", "what colour ?")]
    for said in (pieces, pieces[2:]):
        example = chat.example("a", [("user", said)])
        assert len(example.images) == len(said) - 1
        [answer] = chat.answer([example], max_new_tokens=3)
        assert answer.retention is None and isinstance(answer.text, str)


def test_two_videos_and_a_stock_folder_without_a_pruner_are_refused(chat: Chat) -> None:
    with pytest.raises(ValueError, match="shows 2 videos"):
        chat.example("a", [("user", [Piece("video", "a.mp4"), Piece("video", "b.mp4")])])
    with pytest.raises(ValueError, match="name a pruner"):
        load_chat(VLM)


def test_the_vlmevalkit_wrapper_answers_its_message_lists(
    asked: list[tuple[Path, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "other_frameworks.md").read_text(encoding="utf-8")
    package = tmp_path / "vlmeval" / "vlm"
    package.mkdir(parents=True)
    (package / "base.py").write_text("class BaseModel:\n    INTERLEAVE, allowed_types = False, ['text', 'image']\n")
    (package / "stts.py").write_text(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0])
    monkeypatch.syspath_prepend(tmp_path)
    try:
        model = importlib.import_module("vlmeval.vlm.stts").STTS(
            str(VLM), "tango", 0.25, max_new_tokens=6, device="cpu", sampler="uniform_inclusive"
        )
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "vlmeval"]:
            del sys.modules[name]
    assert model.VIDEO_LLM and "video" in model.allowed_types and model.nframe == 32
    own = load_chat(VLM, "tango", 0.25, num_frames=FRAMES)
    model.nframe = FRAMES  # as VLMEvalKit does for --nframe
    for video, question in asked[:3]:
        message = [{"type": "video", "value": str(video)}, {"type": "text", "value": question}]
        example = own.example("a", [("user", [Piece("video", video), Piece("text", question)])])
        assert (
            model.generate_inner(message, dataset="MVBench") == own.answer([example], max_new_tokens=6)[0].text.strip()
        )


def test_ask_gives_the_answers_of_both_sides_and_what_was_saved(asked: list[tuple[Path, str]], chat: Chat) -> None:
    vlm = PrunedVLM.from_pretrained(VLM, "tango", 0.25)
    video, question = asked[0]
    result = vlm.ask(video, question, num_frames=FRAMES, max_new_tokens=6)
    example = chat.example("a", [("user", [Piece("video", video), Piece("text", question)])])
    assert result.pruned.text == chat.answer([example], max_new_tokens=6)[0].text
    vlm.detach()
    stock = Chat(Pruning(vlm.model, "none").attach(), vlm.processor, num_frames=FRAMES)
    assert result.dense.text == stock.answer([example], max_new_tokens=6)[0].text
    stock.pruning.detach()
    assert result.num_tokens == (9 * FRAMES, 9 * FRAMES // 4) and min(result.ms) > 0
    assert result.report.num_kept == [18] and len(result.example.frames) == FRAMES
    lines = str(result).splitlines()
    assert lines[0] == f"dense       {result.dense.text.strip()}" and lines[1].startswith("tango 0.25  ")
    assert lines[-1].split()[:2] == ["saved", "75%"] and max(map(len, lines)) <= 100
    with pytest.raises(ValueError, match="taken off the model; put it on again"):
        vlm.ask(video, question)


def test_ask_leaves_the_mode_of_the_model_and_refuses_a_pruner_that_drops_nothing(
    asked: list[tuple[Path, str]],
) -> None:
    vlm = PrunedVLM.from_pretrained(VLM, "none").train()
    with pytest.raises(ValueError, match="'none' keeps everything"):
        vlm.ask(*asked[0])
    assert vlm.training and vlm.model.training


def test_what_is_printed_is_what_a_person_wants_to_know(asked: list[tuple[Path, str]]) -> None:
    vlm = PrunedVLM.from_pretrained(VLM, "tango", 0.25)
    assert str(vlm).startswith(f"PrunedVLM(LlavaOnevisionForConditionalGeneration from {VLM}, 0.90 million parameters")
    assert "float32 on cpu; tango keeps 0.25 of the visual tokens, before the LLM, positions compact" in str(vlm)
    assert str(vlm.pruning).endswith("; on the model)") and "tensor" not in str(vlm.pruning)
    vlm.ask(*asked[0], num_frames=FRAMES, max_new_tokens=1)
    shown = str(vlm.last)
    assert shown.startswith("Report(18 of 72 tokens kept (8 x 3 x 3), retention 0.250; ") and "tensor(" not in shown
    assert "LLM saw " in shown
    vlm.detach()
    inner = str(PrunedVLM.from_pretrained(VLM, "holitom+inner", 0.5))
    assert "before the LLM and inside the LLM" in inner
    assert "none keeps every token" in str(PrunedVLM.from_pretrained(VLM, "none"))


def test_arguments_can_be_seen() -> None:
    names = set(inspect.signature(stts.pruning).parameters)
    assert {"model", "pruner", "retention_ratio", "exact", "positions", "siglip"} <= names
    assert {"pruning", "PrunedVLM"} <= set(dir(stts))
    assert "retention_ratio: fraction of visual tokens kept" in (stts.pruning.__doc__ or "")
