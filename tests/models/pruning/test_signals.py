"""Signals against what stock transformers modules give by themselves."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipModel

from stts.models.families.attention import switch_off, switch_on
from stts.models.families.base import TowerOutput, Visual, make_adapter
from stts.models.pruning import siglip as siglip_room
from stts.models.pruning.siglip import SiglipSource, load_siglip
from stts.models.pruning.signals import Collector
from stts.models.pruning.tower import Drop, run_tower
from stts.tokens import Grid, Signal, Site
from tests.conftest import make_inputs

ROWS = ["v what colour is the circle ?", "i which colour ?", "v is there a cross ?"]
QUESTIONS = ["what colour is the circle", "is there a cross"]
SALIENT: tuple[Signal, ...] = ("attn", "probe")
ALL: frozenset[Signal] = frozenset({"attn", "probe", "keys", "frame", "text"})


def write_siglip(folder: Path, *, width: int = 32, use_head: bool = True) -> Path:
    """A tiny random stock SigLIP with a word-level tokenizer; its text tower reads 6 tokens."""
    common = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"hidden_size": 24, "projection_size": width, "vocab_size": 20, "max_position_embeddings": 6}
    vision = {"hidden_size": width, "image_size": 56, "patch_size": 8, "vision_use_head": use_head}
    config = SiglipConfig(text_config=common | text, vision_config=common | vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SiglipModel(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)  # also norms and biases differ from their start
    model.save_pretrained(folder)
    words = ["<pad>", "<unk>", *" ".join(QUESTIONS).split()]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    description: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    description |= {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}}
    description["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    file = folder / "words.json"
    file.write_text(json.dumps(description))
    PreTrainedTokenizerFast(tokenizer_file=str(file), unk_token="<unk>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def siglip(siglip_folder: Path) -> SiglipSource:
    return load_siglip(siglip_folder)


class Pass:
    """One pass through tower and connector, with everything `per_video` needs."""

    def __init__(
        self, model: Any, inputs: Any, wanted: frozenset[Signal], siglip: SiglipSource | None = None, **tower: Any
    ) -> None:
        self.adapter = make_adapter(model)
        visual = self.adapter.take_visual(dict(inputs))
        assert visual is not None
        self.visual: Visual = visual
        self.collector = Collector(self.adapter, wanted, siglip)
        original = switch_on(self.adapter.configs[0])
        try:
            with self.collector.capture():
                self.tower: TowerOutput = run_tower(
                    self.adapter.embed(visual), self.adapter.blocks(), self.adapter.taps(), **tower
                )
        finally:
            switch_off(self.adapter.configs[0], original)
        self.grids = list(visual.grids)
        self.features: Sequence[Tensor] = ()
        if self.tower.row_S is None:
            self.features = self.adapter.connect(self.tower, visual, [None] * len(self.grids)).videos

    def ask(self, *wanted: Signal, questions: Sequence[str] | None = QUESTIONS) -> list[dict[str, Tensor | None]]:
        return self.collector.per_video(
            self.tower, self.visual, self.features, self.grids, questions=questions, signals=frozenset(wanted)
        )

    @property
    def frames(self) -> Tensor:
        return self.visual.pixels[self.visual.num_tiles :]


def of(row: list[dict[str, Tensor | None]], name: str) -> list[Tensor]:
    found = [fields[name] for fields in row]
    assert all(x is not None and not x.requires_grad and x.dtype == torch.float32 for x in found)
    return [x for x in found if x is not None]


def stock_pool(value_FNC: Tensor) -> Tensor:
    """The resize that pools features, 7 x 7 -> 4 x 4: (F, 49, C) -> (F, 16, C)."""
    image = value_FNC.transpose(1, 2).unflatten(2, (7, 7))
    return F.interpolate(image, size=(4, 4), mode="bilinear").flatten(2).transpose(1, 2)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_attention_is_that_of_the_eager_stock_tower(tiny: Any) -> None:
    model, processor = tiny
    now = Pass(model, make_inputs(processor, ROWS), frozenset({"attn"}))
    ours = of(now.ask("attn"), "salience_G")
    assert now.visual.num_tiles > 0, "an image lies before the videos"
    assert [len(x) for x in ours] == [4 * 16, 4 * 16]
    model.model.vision_tower.set_attn_implementation("eager")
    with torch.no_grad():
        weights_FHNN = model.model.vision_tower(now.frames, output_attentions=True).attentions[-1]
    assert weights_FHNN.shape == (8, 2, 49, 49)
    close(torch.cat(ours), stock_pool(weights_FHNN.mean((1, 2))[..., None]).flatten())
    assert now.collector.sources == {"attn": "attention of the last tower block, mean over heads and queries"}


def test_keys_are_outputs_of_k_proj_meaned_over_heads(tiny: Any) -> None:
    model, processor = tiny
    seen: list[Tensor] = []
    last = model.model.vision_tower.encoder.layers[-1].self_attn
    handle = last.k_proj.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    now = Pass(model, make_inputs(processor, ROWS), frozenset({"keys"}))
    handle.remove()
    [ours] = [torch.cat(of(now.ask("keys"), "keys_GD"))]
    assert ours.shape == (2 * 4 * 16, 16), "two heads of 16"
    k_FNE = seen[0][now.visual.num_tiles :].unflatten(-1, (2, 16)).mean(2)
    close(ours, stock_pool(k_FNE).flatten(0, 1))


def test_probe_without_a_head_is_the_mean_query_of_each_frame(tiny: Any) -> None:
    model, processor = tiny
    outputs: dict[str, Tensor] = {}
    last = model.model.vision_tower.encoder.layers[-1].self_attn
    for name in ("q_proj", "k_proj"):
        getattr(last, name).register_forward_hook(lambda m, args, out, name=name: outputs.update({name: out.detach()}))
    now = Pass(model, make_inputs(processor, ROWS), frozenset({"probe"}))
    ours = of(now.ask("probe"), "salience_G")
    rows = []
    for q_NC, k_NC in zip(*(outputs[n][now.visual.num_tiles :] for n in ("q_proj", "k_proj")), strict=True):
        heads = [  # one frame, one head: 16 channels
            ((k_NC[:, h : h + 16] @ q_NC[:, h : h + 16].mean(0)) / 16**0.5).softmax(0) for h in (0, 16)
        ]
        rows.append((heads[0] + heads[1]) / 2)
    close(torch.cat(ours), stock_pool(torch.stack(rows)[..., None]).flatten())
    assert "no pooling head" in now.collector.sources["probe"]


def test_probe_and_frame_are_what_the_siglip_head_itself_gives(
    tiny: Any, siglip: SiglipSource, siglip_folder: Path
) -> None:
    model, processor = tiny
    now = Pass(model, make_inputs(processor, ROWS), frozenset({"probe", "frame"}), siglip)
    row = now.ask("probe", "frame")
    vision = SiglipModel.from_pretrained(siglip_folder).vision_model.eval()
    weights: list[Tensor] = []
    vision.head.attention.register_forward_hook(lambda module, args, out: weights.append(out[1]))
    with torch.no_grad():
        features = model.model.vision_tower(now.frames, output_hidden_states=True).hidden_states[-1]
        pooled = vision.head(vision.post_layernorm(features))
    close(torch.cat(of(row, "frame_TC")), pooled)
    close(torch.cat(of(row, "salience_G")), stock_pool(weights[0].transpose(1, 2)).flatten())
    assert len(set(pooled[:, 0].tolist())) == 8, "frames differ"
    assert all(str(siglip_folder) in source for source in now.collector.sources.values())


def test_frame_without_a_head_is_the_mean_of_its_projected_tokens(tiny: Any) -> None:
    model, processor = tiny
    now = Pass(model, make_inputs(processor, ROWS), frozenset({"frame"}))
    ours = torch.stack(of(now.ask("frame"), "frame_TC"))
    assert ours.shape == (2, 4, 32)
    for video in range(2):
        for frame in range(4):
            close(ours[video, frame], now.features[video][frame * 16 : frame * 16 + 16].mean(0).detach())


def test_text_is_the_pooled_output_of_the_text_tower_at_full_length(
    tiny: Any, siglip: SiglipSource, siglip_folder: Path
) -> None:
    model, processor = tiny
    now = Pass(model, make_inputs(processor, ROWS), frozenset({"text"}), siglip)
    questions = ["is there a cross", "what colour is the circle what colour is the circle"]
    ours = of(now.ask("text", questions=questions), "text_C")
    # words in order of the file: <pad> <unk> what colour is the circle there a cross
    ids = torch.tensor([[4, 7, 8, 9, 0, 0], [2, 3, 4, 5, 6, 2]])  # padded to 6, cut to 6
    with torch.no_grad():
        expected = SiglipModel.from_pretrained(siglip_folder).text_model.eval()(input_ids=ids).pooler_output
    close(torch.stack(ours), expected)
    assert now.collector.sources["text"] == f"text tower of {siglip_folder}"


@pytest.mark.parametrize("loaded", [False, True])
def test_without_text_tower_or_question_there_is_no_text_and_the_reason_is_told(
    tiny: Any, siglip: SiglipSource, loaded: bool
) -> None:
    model, processor = tiny
    now = Pass(model, make_inputs(processor, ROWS), frozenset({"text"}), siglip if loaded else None)
    assert now.ask("text", questions=None if loaded else QUESTIONS) == [{"text_C": None}] * 2
    reason = "no question was given" if loaded else "no aligned text tower"
    assert now.collector.sources["text"] == f"none: {reason} (global debiasing off)"


@pytest.mark.parametrize("loaded", [False, True])
def test_stages_may_ask_for_different_salience_and_each_signal_is_made_once(
    tiny: Any, siglip: SiglipSource, loaded: bool
) -> None:
    model, processor = tiny
    now = Pass(model, make_inputs(processor, ROWS), ALL, siglip if loaded else None)
    runs: list[int] = []
    handle = siglip.head.attention.register_forward_hook(lambda module, args, out: runs.append(len(args[0])))
    attn, probe = (of(now.ask(signal, "keys", "frame", "text"), "salience_G") for signal in SALIENT)
    assert not torch.allclose(attn[0], probe[0], atol=1e-4)
    again = now.ask("attn", "keys", "frame")
    assert again[0]["salience_G"] is attn[0]
    assert set(again[0]) == {"salience_G", "keys_GD", "frame_TC"}, "only what was asked"
    assert set(now.collector.sources) == ALL
    assert runs == ([4, 4] if loaded else []), "probe and frame share one run of the head per video, on frames alone"
    handle.remove()


@pytest.mark.parametrize("loaded", [False, True])
def test_signals_of_a_video_do_not_depend_on_the_batch_or_on_chunks(
    tiny: Any, siglip: SiglipSource, loaded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    source = siglip if loaded else None
    together = Pass(model, inputs, ALL, source)
    rows = [together.ask(signal, "keys", "frame", "text") for signal in SALIENT]
    alone = {"pixel_values_videos": inputs["pixel_values_videos"][1:]}
    monkeypatch.setattr(siglip_room, "CHUNK_BYTES", 1)  # one frame at a time
    single = Pass(model, alone, ALL, source)
    for row, signal in zip(rows, SALIENT, strict=True):
        [fields] = single.ask(signal, "keys", "frame", "text", questions=QUESTIONS[1:])
        for name, value in fields.items():
            other = row[1][name]
            assert (value is None) == (other is None) == (name == "text_C" and not loaded)
            if value is not None and other is not None:
                close(value, other)


def test_low_precision_and_autocast_compute_in_fp32(tiny: Any, siglip: SiglipSource) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].bfloat16()
    now = Pass(model.bfloat16(), inputs, ALL, siglip)
    q_FHNE, k_FHNE = (x.float()[now.visual.num_tiles :] for x in now.collector._qk or ())
    exact = (q_FHNE.double() @ k_FHNE.double().mT / 16**0.5).softmax(-1).mean((1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        row = now.ask("attn", "keys", "frame", "text")
    close(torch.cat(of(row, "salience_G")), stock_pool(exact[..., None].float()).flatten())
    assert {name: x.dtype for name, x in row[0].items() if x is not None} == dict.fromkeys(row[0], torch.float32)


@pytest.mark.parametrize("side", [6, 7, 27])
def test_pooling_to_groups_is_the_bilinear_resize_of_features(tiny: Any, side: int) -> None:
    adapter = make_adapter(tiny[0])
    adapter.side = side  # type: ignore[attr-defined]
    cells = -(-side // 2)
    x_FNC = torch.randn(3, side * side, 5, generator=torch.Generator().manual_seed(0))
    image = x_FNC.transpose(1, 2).unflatten(2, (side, side))
    expected = F.interpolate(image, size=(cells, cells), mode="bilinear").flatten(2).transpose(1, 2)
    blank = torch.zeros(3, 3, 14, 14)
    visual = Visual(blank, (side * side,) * 3, 0, (Grid(3, cells, cells),), {})
    rows_GW, weight_GW = adapter.groups(visual, 0)
    ours = (x_FNC.flatten(0, 1)[rows_GW.clamp_min(0)] * weight_GW[..., None]).sum(1)
    torch.testing.assert_close(ours, expected.flatten(0, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight_GW.sum(1), torch.ones(len(ours)))  # not renormalised: 49 patches, 16 cells
    assert adapter.host.patches_per_frame == side * side


def test_a_tower_that_dropped_patches_gives_text_only(tiny: Any, siglip: SiglipSource) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS[:1])

    def half(x_SD: Tensor) -> Drop:
        return Drop(torch.arange(len(x_SD)) % 2 == 0)

    now = Pass(model, inputs, ALL, siglip, site=Site("vit", 1, 2), decide=half)
    for signal in sorted(ALL - {"text"}):
        with pytest.raises(ValueError, match=f"{signal}.*act alone"):
            now.ask(signal)
    assert now.ask("text", questions=QUESTIONS[:1])[0]["text_C"] is not None


def test_wrong_requests_are_refused(tiny: Any) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    now = Pass(model, inputs, frozenset({"attn", "probe"}))
    with pytest.raises(ValueError, match="one of them"):
        now.ask("attn", "probe")
    with pytest.raises(ValueError, match=r"keys.*not wanted"):
        now.ask("keys")
    now.collector = Collector(now.adapter, frozenset({"attn"}))
    with pytest.raises(ValueError, match="nothing was captured"):
        now.ask("attn")


def test_images_alone_have_no_signals(tiny: Any) -> None:
    model, processor = tiny
    assert Pass(model, make_inputs(processor, ROWS[1:2]), ALL).ask("attn", "keys", questions=[]) == []


def test_the_model_is_bit_identical_afterwards(tiny: Any, siglip: SiglipSource) -> None:
    model, processor = tiny
    inputs = make_inputs(processor, ROWS)
    weights, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with torch.no_grad():
        before = model(**inputs).logits
    Pass(model, inputs, ALL, siglip).ask("attn", "keys", "frame", "text")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, before)
    assert model.config.to_dict() == config
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    hooks = [h for m in model.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not [hook for hook in hooks if getattr(hook, "__module__", "").startswith("stts")]
