"""Between the layers of the language model: masks of packed rows, features added to early layers, and cuts, before
which a stage drops visual tokens so that deeper layers run on what is left.

Hooks on the decoder layers. At prefill, the hook of a cutting layer asks for a decision, gathers hidden states, and
from then on hands every deeper layer rotary tables, positions and a mask for the shorter rows. At every decode step
each layer gets a mask of its own cache length. Positions of survivors never change here.

Shape suffixes beside those of `stts.tokens`: R = rows of the hidden states (1 when packed), M = slots of a row, B =
rows of the prompt, L = its full length, V = visual tokens, H = query heads, J = key heads, Q = queries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stts.models.families.attention import PASS_ARGUMENT, capture_next
from stts.models.families.base import Placed, linear_layers
from stts.models.pruning.masks import Slots, make_mask, pad_rows
from stts.pruners.base import Stage
from stts.tokens import Kept, PromptTokens


@dataclass(frozen=True)
class Present:
    """One video before a cutting layer; `fields` are those of `VideoTokens` that the language model provides."""

    video: int
    fields: dict[str, Any]


Decide = Callable[[int, list[Present]], list[Kept]]
"""(number of the stage, the videos in prompt order) -> what survives of each."""


Listeners = Mapping[int, tuple[int, Callable[[Tensor], None]]]
"""Video -> (layer, who is told the attention of its row's last token to its groups there, fp32)."""


class Carried(Protocol):
    """What a call of the language model carries down to its layers."""

    def before(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Changed inputs of a layer, or None."""
        ...

    def after(self, layer: int, x_RMD: Tensor) -> Tensor | None:
        """Changed output of a layer, or None."""
        ...


def attach_layers(llm: Any) -> list[RemovableHandle]:
    """Put hooks on the decoder layers. They hold nothing: what they do is said by the pass that the call carries."""
    handles = []
    for number, module in enumerate(llm.layers):
        before, after = _hooks(number)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    return handles


def _hooks(layer: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        carried: Carried | None = kwargs.get(PASS_ARGUMENT)
        return None if carried is None else carried.before(layer, args, kwargs)

    def after(module: nn.Module, args: Any, kwargs: dict[str, Any], x_RMD: Tensor) -> Any:
        carried: Carried | None = kwargs.get(PASS_ARGUMENT)
        return None if carried is None else carried.after(layer, x_RMD)

    return before, after


class Prefill:
    """One prompt on its way through the layers of the language model.

    Activation checkpointing runs a layer again in the backward pass, in older transformers (5.17) its hooks too, when
    other passes may have begun. The call of the layer carries this object, so each finds its own."""

    def __init__(
        self,
        llm: nn.Module,
        stages: Sequence[Stage],
        decide: Decide,
        slots: Slots,
        placed: Placed,
        listeners: Listeners,
    ) -> None:
        self.slots = slots
        """Where the survivors are now."""
        self.valid: dict[int, Tensor] = {}
        """Which slots are real, by the layer from which on it holds."""
        self._llm: Any = llm
        self._stages = stages
        self._decide = decide
        self._listeners = listeners
        self._early, self._place_V = placed.early, placed.early_V
        self._linear = linear_layers(llm.config)
        self._inputs: dict[str, Any] = {}
        if slots.packed or slots.both_RM is not None:
            self._inputs = {"attention_mask": make_mask(slots, llm)}
        self._index_RM: Tensor | None = None
        self._tables: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._counts: list[tuple[int, int]] = []
        if stages:
            video_V = slots.video_RM[slots.valid_RM & (slots.video_RM >= 0)]
            numbers, counts = torch.unique_consecutive(video_V, return_counts=True)
            self._counts = list(zip(numbers.tolist(), counts.tolist(), strict=True))

    def before(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Changed inputs of a layer, or None."""
        x_RMD = args[0]
        for number, stage in enumerate(self._stages):
            if self._layer(number) == layer:
                x_RMD = self._cut(number, x_RMD, kwargs)
            if self._shows(number) == layer and stage.signals & {"last_row", "asked", "keys", "prompt"}:
                capture_next(self._llm.layers[layer].self_attn, partial(self._note, number))
        if any(layer == at for at, _ in self._listeners.values()):
            if layer in self._linear:
                raise ValueError(
                    f"LLM layer {layer} has linear attention, which nobody can look at; name one with keys"
                )
            capture_next(self._llm.layers[layer].self_attn, partial(self._tell, layer))
        if not self._inputs:
            return None
        kwargs = kwargs | self._inputs | self._rotary(kwargs)
        if layer in self._linear:  # it reads which slots are real, and zeros the others
            kwargs["attention_mask"] = self.slots.valid_RM.to(x_RMD.dtype)
        return (x_RMD, *args[1:]), kwargs

    def after(self, layer: int, x_RMD: Tensor) -> Tensor | None:
        """Changed output of a layer, or None."""
        if self._place_V is None or layer >= len(self._early):
            return None
        return self._add(x_RMD, self._early[layer], self.slots, self._place_V)

    def _layer(self, number: int) -> int:
        layer = self._stages[number].site.layer
        assert layer is not None
        return layer

    def _shows(self, number: int) -> int:
        """The last layer with attention before the cut, whose attention the stage sees."""
        return max(layer for layer in range(self._layer(number)) if layer not in self._linear)

    def _note(self, number: int, q_RHME: Tensor, k_RJME: Tensor) -> None:
        self._seen[number] = q_RHME.detach(), k_RJME.detach()

    def _tell(self, layer: int, q_RHME: Tensor, k_RJME: Tensor) -> None:
        attention_N = self._last_row(layer, q_RHME.detach(), k_RJME.detach())
        for video, (at, tell) in self._listeners.items():
            if at == layer:
                tell(attention_N[self.slots.video_RM.flatten() == video])

    def _last_row(self, layer: int, q_RHME: Tensor, k_RJME: Tensor) -> Tensor:
        return last_row_attention(q_RHME, k_RJME, self.slots, self._scale(layer, q_RHME))

    def _scale(self, layer: int, q_RHME: Tensor) -> float:
        return getattr(self._llm.layers[layer].self_attn, "scaling", None) or q_RHME.shape[-1] ** -0.5

    def _add(self, x_RMD: Tensor, feature_VD: Tensor, slots: Slots, place_V: Tensor) -> Tensor:
        """Add features at the places that are still there."""
        num_slots = slots.valid_RM.numel()
        slot_L = torch.full((int(slots.num_rows * slots.length),), num_slots, device=place_V.device)
        number_N = torch.arange(num_slots, device=place_V.device)
        spare_N = torch.where(slots.valid_RM.flatten(), slots.full_RM.flatten(), len(slot_L))
        slot_L = torch.cat([slot_L, slot_L[:1]]).scatter(0, spare_N, number_N)
        x_ND = torch.cat([x_RMD.flatten(0, 1), x_RMD.new_zeros(1, x_RMD.shape[-1])])
        return x_ND.index_add(0, slot_L[place_V], feature_VD.to(x_ND.dtype))[:num_slots].view_as(x_RMD)

    def _cut(self, number: int, x_RMD: Tensor, kwargs: dict[str, Any]) -> Tensor:
        slots = self.slots
        place_V = (slots.valid_RM & (slots.video_RM >= 0)).flatten().nonzero().squeeze(1)
        places = place_V.split([count for _, count in self._counts])
        kept = self._decide(number, self._present(number, x_RMD, places))
        self._seen.pop(number, None)
        if all(len(one.index_K) == count for one, (_, count) in zip(kept, self._counts, strict=True)):
            return x_RMD
        keep_N = (slots.valid_RM & (slots.video_RM < 0)).flatten()
        x_ND = x_RMD.flatten(0, 1)
        for one, place in zip(kept, places, strict=True):
            keep_N[place[one.index_K]] = True
            if one.x_KD is not None:
                x_ND = x_ND.index_copy(0, place[one.index_K], one.x_KD.to(x_ND.dtype))
        self._counts = [(video, len(one.index_K)) for one, (video, _) in zip(kept, self._counts, strict=True)]
        index_RM, valid_RM = pad_rows(keep_N.view_as(slots.valid_RM), left=slots.left)
        self.slots = slots = slots.take(index_RM, valid_RM)
        self.valid[self._layer(number)] = valid_RM
        self._index_RM = index_RM if self._index_RM is None else self._index_RM.gather(1, index_RM)
        self._tables = {}
        self._inputs = self._shorter(kwargs)
        return x_ND.view_as(x_RMD).gather(1, index_RM[..., None].expand(-1, -1, x_RMD.shape[-1]))

    def _shorter(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What depends on the slots among the arguments of a layer and is the same for all deeper ones."""
        assert self._index_RM is not None
        changed: dict[str, Any] = {"attention_mask": make_mask(self.slots, self._llm)}
        if kwargs.get("position_ids") is not None:
            changed["position_ids"] = _take(kwargs["position_ids"][..., None], self._index_RM)[..., 0]
        return changed

    def _rotary(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The layer's own rotary tables behind a cut: layers may differ in them, but most share one pair."""
        if self._index_RM is None:
            return {}
        cos, sin = kwargs["position_embeddings"]
        if cos not in self._tables:
            self._tables[cos] = (_take(cos, self._index_RM), _take(sin, self._index_RM))
        return {"position_embeddings": self._tables[cos]}

    def _present(self, number: int, x_RMD: Tensor, places: Sequence[Tensor]) -> list[Present]:
        slots, signals = self.slots, self._stages[number].signals
        x_ND, cell_N = x_RMD.flatten(0, 1), slots.cell_RM.flatten()
        salience_N = keys_ND = None
        if number in self._seen:
            q_RHME, k_RJME = self._seen[number]
            if "last_row" in signals:
                salience_N = self._last_row(self._shows(number), q_RHME, k_RJME)
            keys_ND = k_RJME.transpose(1, 2).flatten(2).flatten(0, 1)
        norm_D = norm_scale(self._llm.norm, x_ND) if "prompt" in signals else None
        present = []
        for (video, _), place in zip(self._counts, places, strict=True):
            fields: dict[str, Any] = {"x_ND": x_ND[place].detach(), "cell_G": cell_N[place]}
            if salience_N is not None:
                fields["salience_G"] = salience_N[place]
            elif "asked" in signals and number in self._seen:
                scale = self._scale(self._shows(number), self._seen[number][0])
                fields["salience_G"] = asked_attention(*self._seen[number], slots, place, scale)
            if "keys" in signals and keys_ND is not None:
                fields["keys_GD"] = keys_ND[place]
            if norm_D is not None and keys_ND is not None:
                after_N = _text_after(slots, place[-1])
                fields["prompt"] = PromptTokens(x_ND[after_N].detach(), keys_ND[after_N], norm_D)
            present.append(Present(video, fields))
        return present


def norm_scale(norm: nn.Module, x_ND: Tensor) -> Tensor:
    """(D,) factor of an RMS norm for each width: what it makes of ones, for some norms hold it less one.

    By a call, in which sharding and offload have its weight; ones so large that the norm's epsilon vanishes."""
    scale_1D: Tensor = norm(torch.full_like(x_ND[:1], 4096.0)).detach()
    return scale_1D[0]


def _take(x: Tensor, index_RM: Tensor) -> Tensor:
    """Slots of a tensor (..., 1 or R, M, E); leading axes (the three of mrope) stay."""
    rows, slots = index_RM.shape
    x = x.expand(*x.shape[:-3], rows, *x.shape[-2:])
    return x.gather(-2, index_RM[..., None].expand(*x.shape[:-3], rows, slots, x.shape[-1]))


def _text_after(slots: Slots, last: Tensor) -> Tensor:
    """bool (N,): real tokens without a video behind the slot `last`, in its row."""
    row_N = slots.row_RM.flatten()
    number_N = torch.arange(len(row_N), device=row_N.device)
    text_N = slots.valid_RM.flatten() & (slots.video_RM.flatten() < 0)
    return text_N & (row_N == row_N[last]) & (number_N > last)


def asked_attention(q_RHME: Tensor, k_RJME: Tensor, slots: Slots, place_K: Tensor, scale: float) -> Tensor:
    """(K,) fp32: the most attention that any head of any word behind the video gives to each of its slots `place_K`.

    The words of one row only, some at a time, so fused kernels stay in use everywhere (PruneVid, arXiv 2412.16117).
    ValueError where nothing follows the video."""
    word_Q = _text_after(slots, place_K[-1]).nonzero()[:, 0]
    if not len(word_Q):
        raise ValueError("nothing follows the video in its prompt; this stage keeps what the words behind it look at")
    row_N = slots.row_RM.flatten()
    key_M = (slots.valid_RM.flatten() & (row_N == row_N[place_K[-1]])).nonzero()[:, 0]
    k_MJE = k_RJME.transpose(1, 2).flatten(0, 1)[key_M].float()
    q_QJGE = q_RHME.transpose(1, 2).flatten(0, 1)[word_Q].float().unflatten(1, (k_MJE.shape[1], -1))
    column_K, most_K = torch.searchsorted(key_M, place_K), torch.zeros(len(place_K), device=key_M.device)
    block = max(1, 2**26 // (q_RHME.shape[1] * len(key_M)))  # 256 MiB of probabilities
    for q, word in zip(q_QJGE.split(block), word_Q.split(block), strict=True):
        score_JGQM = torch.einsum("qjge,mje->jgqm", q, k_MJE) * scale
        given_JGQM = score_JGQM.masked_fill_(key_M > word[:, None], -torch.inf).softmax(-1)
        most_K = torch.maximum(most_K, given_JGQM[..., column_K].amax((0, 1, 2)))
    return most_K


def last_row_attention(q_RHME: Tensor, k_RJME: Tensor, slots: Slots, scale: float) -> Tensor:
    """(N,) fp32 attention of the last token of each row to every slot of the row, mean over heads; 0 at padding.

    One row of the attention matrix, so fused kernels stay in use everywhere (FastV, arXiv 2403.06764)."""
    real_S = slots.valid_RM.flatten().nonzero().squeeze(1)
    lengths = slots.lengths()
    q_SHE = q_RHME.transpose(1, 2).flatten(0, 1)
    k_SJE = k_RJME.transpose(1, 2).flatten(0, 1)[real_S].float()
    last_B = real_S[torch.tensor(lengths, device=real_S.device).cumsum(0) - 1]
    q_BJGE = q_SHE[last_B].float().unflatten(1, (k_SJE.shape[1], -1))
    rows = [
        (torch.einsum("sje,jge->sjg", k, q) * scale).softmax(0).mean((1, 2))
        for k, q in zip(k_SJE.split(lengths), q_BJGE, strict=True)
    ]
    return torch.zeros(slots.valid_RM.numel(), device=k_SJE.device).index_copy(0, real_S, torch.cat(rows))
