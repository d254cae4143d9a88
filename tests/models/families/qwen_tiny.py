"""What the tests of both Qwen-VL families share: tiny random models of the stock classes, prompts, and the laws."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.image_utils import SizeDict
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import stts
from stts.models.families.attention import switch_off, switch_on
from stts.models.families.base import TinySizes, make_adapter
from stts.models.families.tiny import make_tiny
from stts.models.pruning.signals import Collector
from stts.models.pruning.tower import run_tower
from tests.models.families import family_laws as laws
from tests.models.pruning.test_llm_layers import Cut, Cuts, masked_dense

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = [
    "what",
    "colour",
    "is",
    "the",
    "circle",
    "how",
    "many",
    "there",
    "<",
    ">",
    ".",
    "seconds",
    *map(str, range(10)),
]
MEDIA = {"v": (5, 24, 40), "w": (6, 16, 32), "x": (4, 24, 40), "i": (1, 32, 24)}
"""Frames and pixels per side, 8 pixels to a merge unit: v is odd, w another size, x as large as v, i an image."""
CELLS = {"v": (3, 3, 5), "w": (3, 2, 4), "x": (2, 3, 5), "i": (1, 4, 3)}
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %} {{ part['text'] }}{% endif %}{% endfor %} <|im_end|>{% endfor %}"
)


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    vocab = {word: number for number, word in enumerate(["<pad>", "<unk>", *SPECIAL, *WORDS])}
    description: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    description |= {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    description["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    file = folder / "words.json"
    file.write_text(json.dumps(description))
    special: Any = {"additional_special_tokens": SPECIAL, "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|im_end|>", **special)


def make(
    family: str,
    folder: Path,
    tokenizer: Any = None,
    template: str = TEMPLATE,
    text: Mapping[str, Any] | None = None,
    **vision: Any,
) -> tuple[Any, Any]:
    """A model in eval mode with its processor: patches of 4 pixels, 8 tower blocks, 4 LLM layers unless `text` says."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    config = AutoConfig.for_model(
        family,
        vision_config={"depth": 8, "patch_size": 4} | vision,
        text_config={"max_position_embeddings": 4096, "rope_parameters": rope, **(text or {})},
    )
    sizes = TinySizes(llm_layers=(text or {}).get("num_hidden_layers", TinySizes().llm_layers))
    model, processor = make_tiny(config, sizes=sizes, tokenizer=tokenizer or _tokenizer(folder), template=template)
    for part in (processor.image_processor, processor.video_processor):
        part.size = SizeDict(shortest_edge=64, longest_edge=10**6)
    return laws.stir(model), processor


def make_inputs(processor: Any, rows: Sequence[str], *, padding_side: str = "right") -> Any:
    """Processor outputs for rows such as "vi what colour ?", the first letters saying which media; - is none."""
    texts, videos, images = [], [], []
    for row in rows:
        media, _, question = row.partition(" ")
        content: list[dict[str, Any]] = []
        for place, letter in enumerate(media.replace("-", "")):
            content.append({"type": "image" if letter == "i" else "video"})
            rng = np.random.default_rng([place, *row.encode()])  # the same row, the same pixels
            frames, height, width = MEDIA[letter]
            pixels = rng.integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
            images += [pixels[0]] if letter == "i" else []
            videos += [] if letter == "i" else [pixels]
        content.append({"type": "text", "text": question})
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}]))
    options: dict[str, Any] = {"videos": videos} if videos else {}
    options |= {"images": images} if images else {}
    return processor(text=texts, padding=True, padding_side=padding_side, return_tensors="pt", **options)


def counts(rows: Sequence[str]) -> list[int]:
    """Groups of every video."""
    return [int(np.prod(CELLS[letter])) for row in rows for letter in row.partition(" ")[0] if letter in "vwx"]


@contextmanager
def tower_attention(model: Any, attention: Callable[[int, slice, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """The stock tower, untouched but for its attention weights: `attention(block, rows, q, k)` gives the logits of one
    chunk. Rows count images first, then videos: the order of the stock calls, and of the tower's own rows."""
    tower = model.model.visual
    number = {block.attn: place for place, block in enumerate(tower.blocks)}
    start = dict.fromkeys(number, 0)

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, **_: Any) -> Any:
        rows = slice(start[module], start[module] + q.shape[2])
        start[module] = rows.stop
        return (attention(number[module], rows, q * scaling, k).softmax(-1) @ v).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("reference", attend)
    original = tower.config._attn_implementation
    tower.config._attn_implementation = "reference"
    try:
        yield
    finally:
        tower.config._attn_implementation = original


ROWS = ["v what colour is the circle ?", "- how many squares ?", "iw is there ?", "xiv which is red ?"]
"""An odd video, no video, an image beside a video of another size, two videos around an image."""
ONE_EACH = ["v what colour is the circle ?", "w how many squares ?", "x is there ?"]
CUT = Cuts((Cut(1, share=0.5),))


class QwenLaws:
    """Tests of one family; a subclass says how its model is made and how its tower orders merge units."""

    blocks_of_stts: tuple[int, ...]
    """Values of prune_block to try."""
    reference: ClassVar[Any] = staticmethod(masked_dense)
    """The stock model without the dropped tokens."""
    cut: ClassVar[Any] = CUT
    """Inside the LLM."""
    cut_ratio: ClassVar[float] = 0.625

    @pytest.fixture
    @abstractmethod
    def tiny(self, tmp_path: Path) -> tuple[Any, Any]: ...

    @abstractmethod
    def order(self, model: Any, grid_thw: Tensor) -> Tensor:
        """int64: raster number of the merge unit at each place of the tower, by stock means."""

    @pytest.mark.parametrize("rows", [ROWS, ROWS[1:2], ROWS[:1]], ids=["mixed", "text", "video"])
    def test_training_path_equals_stock_logits_loss_and_gradients(self, tiny: Any, rows: list[str]) -> None:
        model, processor = tiny
        laws.training_path_equals_stock(model, make_inputs(processor, rows))

    @pytest.mark.parametrize("name", ["none", "uniform", "stts"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_dense_is_sacred_and_detaching_restores_every_bit(self, tiny: Any, name: str, side: str) -> None:
        model, processor = tiny
        laws.dense_is_sacred(model, make_inputs(processor, ROWS[:3], padding_side=side), name)

    @pytest.mark.parametrize("use_cache", [True, False])
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("layer", [None, 1, 3])
    def test_survivors_equal_the_masked_dense_model(
        self, tiny: Any, layer: int | None, side: str, use_cache: bool
    ) -> None:
        model, processor = tiny
        inputs = make_inputs(processor, ROWS, padding_side=side)
        laws.survivors_equal_the_masked_dense_model(model, inputs, counts(ROWS), layer, use_cache, self.reference)

    def test_in_vit_pruning_equals_the_stock_tower_with_masked_keys(self, tiny: Any) -> None:
        model, processor = tiny
        inputs = make_inputs(processor, ROWS)
        grid_thw = torch.cat([inputs["image_grid_thw"], inputs["video_grid_thw"]])
        order_U = self.order(model, grid_thw)
        tiles = int(inputs["image_grid_thw"].prod(1).sum()) // 4
        settings: list[tuple[str, dict[str, int]]] = [("stts", {"prune_block": k}) for k in self.blocks_of_stts]
        for name, options in [*settings, ("random-vit", {})]:
            decided: list[Any] = []
            with torch.no_grad(), stts.pruning(model, name, retention_ratio=0.4, **options) as pruned:
                if pruned.module is not None:
                    pruned.module.register_forward_hook(lambda module, args, out, to=decided: to.extend(out))
                ours = model(**inputs).logits
            report, site = pruned.last, pruned.pruner.stages[0].site
            assert report is not None and site.layer is not None and site.drop_after is not None
            keep_U, gone = [torch.ones(tiles, dtype=torch.bool)], torch.zeros_like(inputs["input_ids"]).bool()
            places = laws.video_places(model, inputs, counts(ROWS))
            for index, place in zip(report.index, places, strict=True):
                keep_U.append(torch.zeros(len(place), dtype=torch.bool).index_fill(0, index, True))
                gone.view(-1)[[place[cell] for cell in (~keep_U[-1]).nonzero().flatten().tolist()]] = True
            keep_S = torch.cat(keep_U)[order_U].repeat_interleave(4)
            bias_S = torch.cat([torch.zeros(tiles * 4), *(kept.attention_bias_N for kept in decided)])
            assert not decided or (bias_S < -0.1).any()

            def attention(
                block: int,
                rows: slice,
                q: Tensor,
                k: Tensor,
                site: Any = site,
                keep_S: Any = keep_S,
                bias_S: Any = bias_S,
            ) -> Tensor:
                logits = q @ k.mT
                if site.layer < block <= site.drop_after and len(bias_S) == len(keep_S):
                    logits = logits + bias_S[rows]
                alone = torch.eye(q.shape[2], dtype=torch.bool)  # so that lost rows divide by something
                return logits.masked_fill(~keep_S[rows] & ~alone & (block > site.drop_after), float("-inf"))

            dense = self.reference(model, {0: gone}, inputs["attention_mask"])
            with torch.no_grad(), tower_attention(model, attention), dense:
                stock = model(**inputs, use_cache=False).logits
            compare = inputs["attention_mask"].bool() & ~gone
            torch.testing.assert_close(ours[compare], stock[compare], **laws.CLOSE)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_positions_of_survivors_and_new_tokens_are_the_stock_ones(self, tiny: Any, side: str) -> None:
        model, processor = tiny
        rows = ROWS if side == "left" else ROWS[:1]  # generate wants padding on the left
        inputs = make_inputs(processor, rows, padding_side=side)
        laws.positions_are_the_stock_ones(model, inputs, counts(rows))

    @pytest.mark.parametrize(("pruner", "ratio"), [("stts", 0.4), ("novelty", 0.4), ("llm", 0.625)])
    def test_generate_equals_recomputation_without_cache(self, tiny: Any, pruner: str, ratio: float) -> None:
        model, processor = tiny
        inputs = make_inputs(processor, ROWS, padding_side="left")
        laws.generate_equals_recomputation(model, inputs, *self.named(pruner, ratio))

    def named(self, pruner: str, ratio: float) -> tuple[Any, float]:
        return (self.cut, self.cut_ratio) if pruner == "llm" else (pruner, ratio)

    @pytest.mark.parametrize(("pruner", "ratio"), [("stts", 0.4), ("uniform", 1.0), ("llm", 0.625)])
    def test_beams_and_rows_do_not_feel_each_other(self, tiny: Any, pruner: Any, ratio: float) -> None:
        model, processor = tiny
        pruner, ratio = self.named(pruner, ratio)
        batch, alone = make_inputs(processor, ROWS, padding_side="left"), [make_inputs(processor, [r]) for r in ROWS]
        laws.beams_do_not_feel_other_rows(model, batch, alone, pruner, ratio)
        laws.rows_do_not_feel_each_other(model, batch, alone, pruner, ratio)

    def test_embedding_callers_get_what_the_stock_model_gives_them(self, tiny: Any) -> None:
        """With positions, the same as with ids; without, the positions that the stock code can guess."""
        model, processor = tiny
        inputs = make_inputs(processor, ROWS)
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        rest["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
        with torch.no_grad():
            position_3BL, _ = model.model.get_rope_index(**inputs)
            for more in ({}, {"position_ids": position_3BL}):
                stock = model(**rest, **more).logits
                model.train()
                with torch.enable_grad(), stts.pruning(model, "none", retention_ratio=1.0):  # our own path
                    ours = model(**rest, **more).logits
                model.eval()
                real = inputs["attention_mask"].bool()
                torch.testing.assert_close(ours[real], stock[real], **laws.CLOSE)
            with stts.pruning(model, "uniform", retention_ratio=0.4):
                ours = model(**rest, position_ids=position_3BL).logits
                torch.testing.assert_close(ours, model(**inputs).logits, **laws.CLOSE)

    def test_only_groups_are_dropped(self, tiny: Any) -> None:
        """Times and starts and ends of frames without survivors stay in the prompt."""
        model, processor = tiny
        inputs = make_inputs(processor, ROWS[:1])
        seen: list[Tensor] = []
        hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        with torch.no_grad(), stts.pruning(model, "uniform", retention_ratio=0.03) as pruned:
            model(**inputs)
        hook.remove()
        assert pruned.last is not None and pruned.last.num_kept == [1], "one group of 45, in one frame of three"
        text = inputs["input_ids"][0][inputs["input_ids"][0] != model.config.video_token_id]
        assert seen[0].shape[1] == len(text) + 1
        for embedding in model.get_input_embeddings()(text):
            assert (seen[0][0] == embedding).all(-1).any()

    @pytest.mark.parametrize("name", ["uniform", "novelty", "stts", "random-vit"])
    def test_packed_training_equals_one_by_one(self, tiny: Any, name: str) -> None:
        model, processor = tiny
        alone = [make_inputs(processor, [row]) for row in ONE_EACH]
        laws.packed_training_equals_one_by_one(model, make_inputs(processor, ONE_EACH), alone, name)

    @pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:2], ["i is ?"]], ids=["mixed", "video", "text", "image"])
    def test_tower_connector_and_scorer_run_once(self, tiny: Any, rows: list[str]) -> None:
        model, processor = tiny
        tower = model.model.visual
        mergers = {f"merger {n}": m for n, m in enumerate(make_adapter(model).mergers())}  # type: ignore[attr-defined]
        watched = {"embed": tower.patch_embed, "first": tower.blocks[0], "last": tower.blocks[-1], **mergers}
        laws.everything_runs_once(model, make_inputs(processor, rows), watched)

    def test_gradient_checkpointing_changes_nothing(self, tiny: Any) -> None:
        model, processor = tiny
        laws.checkpointing_changes_nothing(model, make_inputs(processor, ROWS), model.model.visual.blocks[5].attn.qkv)

    def test_groups_are_the_patches_of_merge_units_in_raster_order(self, tiny: Any) -> None:
        model, processor = tiny
        inputs = make_inputs(processor, ROWS)
        adapter = make_adapter(model)
        visual = adapter.take_visual(dict(inputs))
        assert visual is not None
        assert [(g.t, g.h, g.w) for g in visual.grids] == [CELLS[letter] for letter in "vwxv"]
        given = adapter.embed(visual)
        x_SD, cos = given.x_SD, given.aux[0]
        expected_SD, rows = model.model.visual.patch_embed(inputs["pixel_values_videos"]), visual.num_tile_patches
        table_SD = self.position_table(model, inputs["video_grid_thw"])
        start = 0
        for video, (patches, grid) in enumerate(zip(visual.patches_per_video, visual.grids, strict=True)):
            rows_GW, weight_GW = adapter.groups(visual, video)
            assert rows_GW.shape == (grid.num_groups, 4) and torch.equal(weight_GW, torch.full((len(rows_GW), 4), 0.25))
            assert torch.equal(rows_GW.flatten().sort().values, torch.arange(patches))
            mine = x_SD[rows : rows + patches][rows_GW.flatten()]
            here = slice(start, start + patches)
            torch.testing.assert_close(mine, expected_SD[here] + table_SD[here])
            rotary = cos[rows : rows + patches][rows_GW.flatten()].view(grid.t, grid.h, grid.w, 4, -1)
            assert torch.equal(rotary[0], rotary[-1]) and not torch.equal(rotary[:, 0], rotary[:, 1])
            rows, start = rows + patches, start + patches

    def position_table(self, model: Any, grid_thw: Tensor) -> Tensor:
        """(S, D) position embeddings of patches as the processor orders them; zeros where the tower has none."""
        return torch.zeros(int(grid_thw.prod(1).sum()), model.config.vision_config.hidden_size)

    def test_signals_are_those_of_the_stock_tower(self, tiny: Any) -> None:
        model, processor = tiny
        inputs = make_inputs(processor, ROWS)
        adapter = make_adapter(model)
        wanted: Any = frozenset({"attn", "probe", "keys"})
        visual = adapter.take_visual(dict(inputs))
        assert visual is not None
        collector = Collector(adapter, wanted)
        original = switch_on(adapter.configs[0])
        with torch.no_grad(), collector.capture():
            tower = run_tower(adapter.embed(visual), adapter.blocks(), adapter.taps())
        switch_off(adapter.configs[0], original)
        chunks: list[tuple[Tensor, Tensor]] = []

        def attention(block: int, rows: slice, q: Tensor, k: Tensor) -> Tensor:
            if block == len(model.model.visual.blocks) - 1:
                chunks.append((q[0], k[0]))
            return q @ k.mT

        with torch.no_grad(), tower_attention(model, attention):
            model(**inputs)
        frames = iter(chunks[len(inputs["image_grid_thw"]) :])
        features = [torch.zeros(grid.num_groups, 3) for grid in visual.grids]

        def ask(name: Any, field: str) -> list[Any]:
            row = collector.per_video(
                tower, visual, features, list(visual.grids), questions=None, signals=frozenset({name})
            )
            return [fields[field] for fields in row]

        attn, probe, keys = ask("attn", "salience_G"), ask("probe", "salience_G"), ask("keys", "keys_GD")
        for video, grid in enumerate(visual.grids):
            order_U = self.order(model, inputs["video_grid_thw"][video : video + 1]).argsort()
            q_HTNE, k_HTNE = (torch.stack(x, 1) for x in zip(*(next(frames) for _ in range(grid.t)), strict=True))

            def units(x_TNx: Tensor, order_U: Tensor = order_U) -> Tensor:
                return x_TNx.flatten(0, 1).unflatten(0, (-1, 4)).mean(1)[order_U]

            weights_HTNN = (q_HTNE @ k_HTNE.mT).softmax(-1)
            torch.testing.assert_close(attn[video], units(weights_HTNN.mean((0, 2))), **laws.CLOSE)
            torch.testing.assert_close(keys[video], units(k_HTNE.mean(0)), **laws.CLOSE)
            k_HTPE = torch.stack([units(k_TNE).unflatten(0, (grid.t, -1)) for k_TNE in k_HTNE])
            mean = (q_HTNE.mean(2, keepdim=True) @ k_HTPE.mT).softmax(-1).mean((0, 2))
            torch.testing.assert_close(probe[video], mean.flatten(), **laws.CLOSE)

    def test_inputs_that_do_not_fit_are_refused(self, tiny: Any) -> None:
        model, processor = tiny
        inputs = make_inputs(processor, ROWS[:1])
        laws.a_cut_prompt_is_refused(model, inputs)
        with stts.pruning(model, "uniform"), torch.no_grad():
            with pytest.raises(ValueError, match="came without video_grid_thw"):
                model(**{name: value for name, value in inputs.items() if name != "video_grid_thw"})
            with pytest.raises(ValueError, match="do not fit 180 patches"):
                model(**{**inputs, "video_grid_thw": inputs["video_grid_thw"] - torch.tensor([1, 0, 0])})
            with pytest.raises(ValueError, match="mm_encoder_outputs"):
                model(**inputs, mm_encoder_outputs={"video": 1})
        with pytest.raises(ValueError, match="mrope"):
            stts.pruning(model, "uniform", positions="compact")
        assert "packed" not in model.config.vision_config._attn_implementation
