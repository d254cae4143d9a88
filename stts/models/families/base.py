"""What a family adapter must offer, and which families there are.

An adapter knows one Hugging Face family: where its tower, connector and language model are, which patches form a group,
and how features reach the prompt. What is the same everywhere (when stages run, how the prompt is shortened, reports)
is in `stts.models.pruning`.
"""

from __future__ import annotations

import functools
import importlib
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

from stts.metrics.cost import VlmShape
from stts.metrics.memory import BlockShape, Widths
from stts.models.families.visual import Block, Connected, Placed, TowerInput, TowerOutput, Visual
from stts.pruners.base import HostInfo
from stts.tokens import Grid

Part = Literal["vit", "connector", "llm"]

ADAPTERS = {
    "llava_onevision": "stts.models.families.llava_onevision:LlavaOnevision",
    "qwen2_5_vl": "stts.models.families.qwen2_5_vl:Qwen2_5VL",
    "qwen3_vl": "stts.models.families.qwen3_vl:Qwen3VL",
    "qwen3_5": "stts.models.families.qwen3_5:Qwen3_5",
    "molmo2": "stts.models.families.molmo2:Molmo2",
    "internvl": "stts.models.families.internvl:InternVL",
}
TESTED_TRANSFORMERS = ((5, 17), (6, 0))


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Sizes of a tiny random model; depth of the tower and its patch size stay those of the config."""

    width: int = 32
    """Of tower and LLM."""
    heads: int = 2
    """Of the tower, and key heads of the LLM, which has twice as many query heads."""
    mlp: int = 48
    llm_layers: int = 4
    """At most; the default is more than the three that deepstack writes to."""
    side: int = 7
    """Patches per side of a frame, where the resolution is fixed: odd, so that windows overlap or have holes, as those
    of 27 patches do."""


class Adapter(Protocol):
    """One Hugging Face family. The first members are facts that need no model; `config` is the whole model's config."""

    marks_per_frame: ClassVar[int]
    """Tokens of the prompt beside visual ones, per frame (per temporal patch): marks, and a time of usual length."""
    token_ids: ClassVar[Mapping[str, str]]
    """Field of the config -> token whose id it holds."""
    media_text: ClassVar[tuple[str, str]]
    """What a chat template writes for a video and for an image."""
    unused: ClassVar[tuple[str, ...]]
    """Pieces of names of parameters that nothing reads, so that they get no gradient."""

    @classmethod
    def vlm_shape(cls, config: Any) -> VlmShape:
        """What FLOPs are counted from."""
        ...

    @classmethod
    def block_shapes(cls, config: Any) -> tuple[BlockShape, BlockShape]:
        """A block of the tower and one of the LLM, from which the memory of training is counted."""
        ...

    @classmethod
    def connector_bytes(cls, config: Any, widths: Widths) -> tuple[int, int]:
        """Bytes that the connector keeps for the backward pass per item, and patches per item (1: it runs on patches,
        more: on groups)."""
        ...

    @classmethod
    def plan_grid(
        cls, config: Any, num_frames: int, frame_size: tuple[int, int], limits: Mapping[str, int] | None
    ) -> Grid:
        """Groups of a video of this many frames of `frame_size` (height, width) pixels. Where resolution is free,
        frames are resized as the processor does, `limits` being its `size` (`shortest_edge` and `longest_edge`, both
        counts of pixels); ValueError if it is None there."""
        ...

    @classmethod
    def frames_of(cls, inputs: Mapping[str, Any], video_processor: Any) -> Tensor:
        """Frames (T, 3, H, W) of the first video as the tower saw them, normalised, from the processor's outputs."""
        ...

    @classmethod
    def part_of(cls, name: str) -> Part:
        """Which part the parameter of this name belongs to."""
        ...

    @classmethod
    def prepare_processor(cls, processor: ProcessorMixin, config: Any) -> None:
        """Make a stock processor, just loaded, write the placeholders that a model of this config reads."""
        ...

    @classmethod
    def tiny_config(cls, config: Any, sizes: TinySizes) -> None:
        """Make tower and connector of this config small, in place; the sizes of `text_config` are small already, its
        vocabulary that of a tokenizer whose visual tokens come last."""
        ...

    @classmethod
    def tiny_processor(cls, config: Any, tokenizer: PreTrainedTokenizerFast) -> ProcessorMixin:
        """A processor of the family's own class for a tiny model; its chat template is set afterwards."""
        ...

    def __init__(self, model: PreTrainedModel) -> None: ...
    @property
    def host(self) -> HostInfo: ...
    @property
    def inner(self) -> nn.Module:
        """The module that merges features into the prompt; our hook on it does the visual part instead."""
        ...

    @property
    def language_model(self) -> nn.Module: ...
    @property
    def configs(self) -> tuple[Any, ...]:
        """Sub-configs whose attention implementation carries `Segments` (tower and language model)."""
        ...

    @property
    def visual_args(self) -> tuple[str, ...]:
        """Names of the visual arguments of a forward call."""
        ...

    @property
    def pools_keys(self) -> bool:
        """Whether the mean-query attention of a frame runs over keys averaged per group (True) or over patches, pooled
        afterwards."""
        ...

    def take_visual(self, kwargs: dict[str, Any]) -> Visual | None:
        """Remove the visual arguments from a forward call; None when there are none."""
        ...

    def images_as_videos(self, visual: Visual) -> Visual:
        """The same with every image as a video of one frame (`Visual.with_images`). ValueError where tokens of an image
        are no plain grid."""
        ...

    def with_blank(self, visual: Visual | None) -> Visual:
        """The same and one blank video of one frame, for a training pass without video: every rank runs the same
        modules. Reads no parameter: under ZeRO-3 that would gather it on this rank alone."""
        ...

    def runs_stock(self, visual: Visual) -> bool:
        """Whether the stock code takes this batch of videos as it is (some families want equal lengths)."""
        ...

    def grid(self, num_frames: int) -> Grid:
        """Groups of a video of this many frames; where resolution is free, of the smallest one."""
        ...

    def groups(self, visual: Visual, video: int) -> tuple[Tensor, Tensor]:
        """Patches of each group of a video, int64 (G, W) rows counted from its first patch, -1 = outside, and their
        weights (G, W) fp32 when values of patches are pooled to groups as features are, 0 outside."""
        ...

    def part(self, visual: Visual, video: int | None, first: int = 0, last: int = 0) -> Visual:
        """Frames first to last - 1 of one video alone, or (None) the images alone."""
        ...

    def embed(self, visual: Visual) -> TowerInput:
        """Input of block 0."""
        ...

    def blocks(self) -> Sequence[Block]: ...
    def taps(self) -> tuple[int, ...]:
        """Blocks whose outputs the connector reads, in its order."""
        ...

    def timed_modules(self) -> tuple[nn.Module, nn.Module]:
        """The two modules that timers hook: the first of the tower, and the connector's that makes the features of the
        prompt."""
        ...

    def tower_attention(self, block: int | None = None) -> nn.Module:
        """The attention module of a block, whose q and k signals come from; None: of the last the connector reads."""
        ...

    def connect(self, tower: TowerOutput, visual: Visual, cells: Sequence[Tensor | None]) -> Connected:
        """One connector call: features of images, and of the kept cells of each video (None: all)."""
        ...

    def merge(
        self, kwargs: dict[str, Any], connected: Connected, visual: Visual, kept: Sequence[Tensor | None]
    ) -> tuple[dict[str, Any], Placed]:
        """Put features into the prompt, and say what lies where.

        kwargs: arguments of the forward call, left as they are. kept: cells kept of each video, None: all. Features
        lie in the order they come in, on the kept cells in increasing order.

        Returns the arguments that replace those of the call: full-length `inputs_embeds` (B, L, d), zeros where a group
        was dropped, `input_ids=None`, and what the stock code would have computed from the ids."""
        ...

    def finish(self, x_RMd: Tensor, late_RM: Tensor) -> Tensor:
        """Fill the places of the shortened prompt that hold parameters of `inner` itself (a newline), `late_RM` saying
        which. Called inside the forward of `inner`: sharding (ZeRO-3, FSDP2) and offload have a module's parameters
        there only, and `merge` runs before it."""
        ...


def embeds_of(kwargs: Mapping[str, Any], inner: Any) -> Tensor:
    """Embeddings (B, L, d) of a forward call's prompt. ValueError unless it got `input_ids` or `inputs_embeds`, one."""
    input_ids, x_BLd = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if (input_ids is None) == (x_BLd is None):
        raise ValueError("pass exactly one of input_ids and inputs_embeds")
    embeds: Tensor = inner.get_input_embeddings()(input_ids) if x_BLd is None else x_BLd
    return embeds


def linear_layers(text: Any) -> frozenset[int]:
    """Layers that have linear attention, a recurrent state, from the config of an LLM."""
    kinds = getattr(text, "layer_types", None) or []
    return frozenset(number for number, kind in enumerate(kinds) if kind == "linear_attention")


def layer_sizes(text: Any) -> dict[str, Any]:
    """Fields of `HostInfo` for one layer of the LLM, from its config."""
    rope = getattr(text, "rope_parameters", None) or {}
    return {
        "llm_heads": text.num_attention_heads,
        "llm_kv_heads": text.num_key_value_heads,
        "llm_mlp": text.intermediate_size,
        "rope_theta": float(rope.get("rope_theta", 1e6)),
        "norm_eps": float(getattr(text, "rms_norm_eps", 1e-6)),
    }


def run_device(model: nn.Module) -> torch.device:
    """Where a model computes. accelerate's offload keeps its weights elsewhere (on the meta device) between calls."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            device = getattr(one, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(model.parameters()).device


_INSIDE = threading.RLock()


def run_inside(module: nn.Module, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """`function(*args)` as the forward of `module`, so that the module's own parameters are there.

    Sharding and offload gather them in hooks around a module's forward; accelerate replaces `forward` and keeps the
    original as `_old_forward`. One thread at a time: the module is shared."""
    with _INSIDE:
        own = vars(module)
        name = "_old_forward" if "_old_forward" in own else "forward"
        before = own.get(name)
        own[name] = function
        try:
            result: Tensor = nn.Module.__call__(module, *args)  # a class may repeat its calls in the backward pass
        finally:
            if before is None:
                del own[name]
            else:
                own[name] = before
    return result


def as_block(layer: nn.Module) -> Block:
    """A SigLIP-like layer, which hands its `attention_mask` on untouched, as a `Block`."""

    def block(x: Tensor, mask: Any) -> Tensor:
        y: Tensor = layer(x, None) if mask is None else layer(x[None], mask)[0]
        return y

    return block


@functools.cache
def check_transformers(version: str = transformers.__version__) -> None:
    """ValueError below the range this library was tested with; above it a warning, once.

    Hooks rely on how the stock code calls its parts, which versions may change."""
    lowest, above = TESTED_TRANSFORMERS
    tested = f"transformers >= {lowest[0]}.{lowest[1]}, < {above[0]}.{above[1]}"
    installed = tuple(int(part) for part in version.split(".")[:2])
    if installed < lowest:
        raise ValueError(f"transformers {version} is too old; install {tested}")
    if installed >= above:
        warnings.warn(
            f"transformers {version} was not tested; if a pruned model misbehaves, use {tested}", stacklevel=2
        )


def check_family(model_type: str) -> None:
    """ValueError, naming the families there are, for a model type without an adapter."""
    if model_type not in ADAPTERS:
        raise ValueError(
            f"family {model_type!r} has no adapter; supported: {', '.join(sorted(ADAPTERS))}. docs/add_a_family.md "
            "says how to add one"
        )


def adapter_class(model_type: str) -> type[Adapter]:
    """The adapter of a family, for the facts that need no model. ValueError for a family without one."""
    check_family(model_type)
    module, _, name = ADAPTERS[model_type].partition(":")
    adapter: type[Adapter] = getattr(importlib.import_module(module), name)
    return adapter


def make_adapter(model: PreTrainedModel) -> Adapter:
    """The adapter of this model. ValueError for a family without one."""
    check_transformers()
    return adapter_class(model.config.model_type)(model)


def host_info(model: PreTrainedModel) -> HostInfo:
    """Widths and depths that pruners need, read from the model's own config."""
    return make_adapter(model).host


def vlm_shape(config: PretrainedConfig) -> VlmShape:
    """What FLOPs of a model with this config are counted from."""
    return adapter_class(config.model_type).vlm_shape(config)
