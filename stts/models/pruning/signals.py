"""What stages before the LLM may ask about frames: attention, keys, frame features, the question.

All of it comes from one block of the tower that runs anyway: q and k are captured on their way into attention, so no
layer leaves its fast kernel, and only the wanted signals are computed, once per pass, in fp32, without gradient. The
head and the text tower that VLM checkpoints lack come from a SigLIP checkpoint where one is given; `Collector.sources`
names what each signal was made from.

Shape suffixes beside those of `stts.tokens`: H = heads, C = width of a frame feature, Q = questions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from stts.models.families.attention import capture
from stts.models.families.base import Adapter, TowerOutput, Visual
from stts.models.pruning.siglip import SiglipSource, _frames_at_once
from stts.tokens import Grid, Signal

_FIELDS: dict[Signal, str] = {
    "attn": "salience_G",
    "probe": "salience_G",
    "keys": "keys_GD",
    "frame": "frame_TC",
    "text": "text_C",
    "aligned": "aligned_GC",
}


def received_attention(q_FUHE: Tensor, k_FUHE: Tensor) -> Tensor:
    """(F, N) fp32: softmax(q k / sqrt(E)) inside each frame, mean over heads and queries (VisionZip, variant B of the
    video port cokeshao/HoliTom `siglip_encoder.py`, arXiv 2412.04467)."""
    _, num_patches, num_heads, width = q_FUHE.shape
    num_frames = _frames_at_once(4 * num_heads * num_patches**2)
    parts = [
        torch.einsum("fqhe,fkhe->fhqk", q.float() * width**-0.5, k.float()).softmax(-1).mean((1, 2))
        for q, k in zip(q_FUHE.split(num_frames), k_FUHE.split(num_frames), strict=True)
    ]
    return torch.cat(parts)


def mean_query_attention(q_FUHE: Tensor, k_FUHE: Tensor) -> Tensor:
    """(F, N) fp32: the mean query of each frame on its keys, mean over heads: what Tango (arXiv 2604.09547) and FastVID
    (arXiv 2503.11187) take where a tower has no pooling head."""
    width = q_FUHE.shape[-1]
    num_frames = _frames_at_once(4 * k_FUHE[0].numel())
    parts = [
        torch.einsum("fhe,fkhe->fhk", q.float().mean(1) * width**-0.5, k.float()).softmax(-1).mean(1)
        for q, k in zip(q_FUHE.split(num_frames), k_FUHE.split(num_frames), strict=True)
    ]
    return torch.cat(parts)


def class_attention(q_FUHE: Tensor, k_FUHE: Tensor) -> Tensor:
    """(F, N) fp32: attention of the class token, which comes first in each frame, mean over heads (VisionZip, arXiv
    2412.04467; FasterVLM, arXiv 2412.01818)."""
    width = q_FUHE.shape[-1]
    q_FHE = q_FUHE[:, 0].float() * width**-0.5
    return torch.einsum("fhe,fkhe->fhk", q_FHE, k_FUHE.float()).softmax(-1).mean(1)


class Collector:
    """Signals of one forward pass.

    wanted: what the stages of the pass ask for together; nothing else is captured or computed.
    siglip: makes `probe`, `frame`, `text` and `aligned`; None: `probe` is the mean query, `frame` the mean of projected
        tokens, `text` and `aligned` are None.
    block: whose q and k `attn` and `keys` come from, for a stage inside the tower; None: the last the connector reads.
    sources: signal -> what it was made from, for reports; filled when a signal is made."""

    def __init__(
        self,
        adapter: Adapter,
        wanted: frozenset[Signal],
        siglip: SiglipSource | None = None,
        block: int | None = None,
    ) -> None:
        if siglip is not None:
            siglip.check(adapter.host)
        self.sources: dict[str, str] = {}
        self._adapter = adapter
        self._wanted = wanted
        self._siglip = siglip
        self._block = block
        self._where = "the last tower block" if block is None else f"tower block {block}"
        self._qk: tuple[Tensor, Tensor] | None = None
        self._pooled: dict[int, tuple[Tensor, Tensor]] = {}
        self._made: dict[Signal, list[Tensor | None]] = {}
        self._parts: dict[Signal, list[Tensor]] = {}

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Around the tower call; does nothing where no wanted signal needs q and k."""
        if not self._wanted & {"attn", "keys"} and not ("probe" in self._wanted and self._siglip is None):
            yield
            return

        def note(q_FHUE: Tensor, k_FHUE: Tensor) -> None:
            self._qk = q_FHUE.detach(), k_FHUE.detach()

        with capture(self._adapter.tower_attention(self._block), note):
            yield

    @contextmanager
    def piece(self) -> Iterator[Callable[[TowerOutput, Visual, Sequence[Tensor]], None]]:
        """Around the tower call on a piece of one video; then give the function what tower and connector made of it.

        Only signals stay of a piece: all of them but `text` are frame by frame."""
        own = self._wanted - {"text"} - ({"aligned"} if self._siglip is None else frozenset())
        part = Collector(self._adapter, own, self._siglip)

        def note(tower: TowerOutput, visual: Visual, features: Sequence[Tensor]) -> None:
            for signal in own:
                [fields] = part.per_video(
                    tower, visual, features, visual.grids, questions=None, signals=frozenset({signal})
                )
                signal_rows = fields[_FIELDS[signal]]
                assert signal_rows is not None
                self._parts.setdefault(signal, []).append(signal_rows)
            self.sources |= part.sources

        with part.capture():
            yield note

    def end_of_video(self) -> None:
        """Behind the last piece of each video."""
        for signal, parts in self._parts.items():
            self._made.setdefault(signal, []).append(torch.cat(parts))
        self._parts = {}

    @torch.no_grad()
    def per_video(
        self,
        tower: TowerOutput,
        visual: Visual,
        features: Sequence[Tensor],
        grids: Sequence[Grid],
        *,
        questions: Sequence[str] | None,
        signals: frozenset[Signal],
    ) -> list[dict[str, Tensor | None]]:
        """Fields of `VideoTokens` on the whole grid, per video, for a stage that asks for `signals`.

        features: connector outputs of every group of each video. Each signal is computed at most once per pass, however
        many stages ask. Image tiles are left out. ValueError: a signal that was not in `wanted`, attn and probe at
        once, or a tower that dropped patches."""
        if unknown := signals - self._wanted:
            raise ValueError(f"{sorted(unknown)} were not wanted when the tower ran, only {sorted(self._wanted)}")
        if {"attn", "probe"} <= signals:
            raise ValueError("attn and probe both fill salience_G; a stage may ask for one of them")
        frames = signals - {"text"} - ({"aligned"} if self._siglip is None else frozenset())
        if tower.row_S is not None and frames:
            raise ValueError(
                f"{sorted(frames)} need whole frames, but a stage inside the tower has dropped patches; let the stage "
                "that asks for them act alone, without one at site 'vit'"
            )
        if not grids:
            return []
        counts = [grid.t for grid in grids]
        with torch.autocast(visual.pixels.device.type, enabled=False):
            for signal in sorted(signals - self._made.keys()):
                if signal == "text":
                    self._made[signal] = self._text(questions, len(grids), visual.pixels.device)
                elif signal == "aligned" and self._siglip is None:
                    self.sources["aligned"] = "none: no aligned tower (the question counts for nothing)"
                    self._made[signal] = [None] * len(grids)
                elif signal == "frame":
                    self._made[signal] = self._frame(tower, visual, features, counts)
                else:
                    self._made[signal] = [self._groups(signal, tower, visual, video) for video in range(len(grids))]
        return [{_FIELDS[signal]: self._made[signal][video] for signal in signals} for video in range(len(grids))]

    def _text(self, questions: Sequence[str] | None, num_videos: int, device: torch.device) -> list[Tensor | None]:
        """The question of each video; equal ones are encoded once."""
        if self._siglip is None or questions is None:
            why = "no aligned text tower" if self._siglip is None else "no question was given"
            self.sources["text"] = f"none: {why} (global debiasing off)"
            return [None] * num_videos
        self.sources["text"] = f"text tower of {self._siglip.name}"
        different = list(dict.fromkeys(questions))
        text_QC = self._siglip.encode(different, device)
        return [text_QC[different.index(question)] for question in questions]

    def _frame(
        self, tower: TowerOutput, visual: Visual, features: Sequence[Tensor], counts: list[int]
    ) -> list[Tensor | None]:
        """(T, C) of each video."""
        if self._siglip is not None:
            self.sources["frame"] = f"pooling head of {self._siglip.name}"
            return [self._pool(self._siglip, tower, visual, video)[0] for video in range(len(counts))]
        self.sources["frame"] = "mean of each frame's projected tokens (no pooling head loaded)"
        return [x.float().unflatten(0, (t, -1)).mean(1) for x, t in zip(features, counts, strict=True)]

    def _groups(self, signal: Signal, tower: TowerOutput, visual: Visual, video: int) -> Tensor:
        """(G,) of attn or probe, (G, E) of keys."""
        rows_GW, weight_GW = self._adapter.groups(visual, video)

        def pool(value_TNx: Tensor) -> Tensor:
            value_Nx = value_TNx.flatten(0, 1)
            weights = weight_GW.to(value_Nx.dtype).view(*weight_GW.shape, *[1] * (value_Nx.dim() - 1))
            return (value_Nx[rows_GW.clamp_min(0)] * weights).sum(1)

        if signal == "probe" and self._siglip is not None:
            self.sources[signal] = f"attention of the pooling head of {self._siglip.name}, mean over heads"
            return pool(self._pool(self._siglip, tower, visual, video)[1])
        if signal == "aligned" and self._siglip is not None:
            self.sources[signal] = f"each patch alone through the pooling head of {self._siglip.name} (ours)"
            return pool(self._siglip.align(self._last_tap(tower, visual, video)))
        q_TUHE, k_TUHE = self._qk_of(visual, video)
        if signal == "keys":
            self.sources[signal] = f"keys of {self._where}, mean over heads"
            return pool(k_TUHE.float().mean(2))
        if visual.class_tokens:
            self.sources[signal] = f"attention of the class token in {self._where}, mean over heads"
            return pool(class_attention(q_TUHE, k_TUHE))
        if signal == "attn":
            self.sources[signal] = f"attention of {self._where}, mean over heads and queries"
            return pool(received_attention(q_TUHE, k_TUHE))
        self.sources[signal] = "mean query of each frame on its keys, last tower block (no pooling head loaded)"
        if self._adapter.pools_keys:
            k_TPHE = pool(k_TUHE.float()).unflatten(0, (len(k_TUHE), -1))
            return mean_query_attention(q_TUHE, k_TPHE).flatten()
        return pool(mean_query_attention(q_TUHE, k_TUHE))

    def _pool(self, siglip: SiglipSource, tower: TowerOutput, visual: Visual, video: int) -> tuple[Tensor, Tensor]:
        """The head's feature and attention of every frame of a video; `probe` and `frame` share one run."""
        if video not in self._pooled:
            self._pooled[video] = siglip.pool(self._last_tap(tower, visual, video))
        return self._pooled[video]

    def _last_tap(self, tower: TowerOutput, visual: Visual, video: int) -> Tensor:
        """(T, N, D) of the last block that the connector reads."""
        taps = self._adapter.taps()
        return _frames_of(tower.taps[taps.index(max(taps))].detach(), visual, video)

    def _qk_of(self, visual: Visual, video: int) -> tuple[Tensor, Tensor]:
        """(T, N, H, E) each, whether the tower ran on a batch of frames or on one packed row."""
        if self._qk is None:
            raise ValueError("nothing was captured; run the tower inside `with collector.capture()`")
        q_TUHE, k_TUHE = (_frames_of(x.transpose(1, 2).flatten(0, 1), visual, video) for x in self._qk)
        return q_TUHE, k_TUHE


def _frames_of(x_S: Tensor, visual: Visual, video: int) -> Tensor:
    """(T, N, ...) rows of one video from those of the whole tower input."""
    sizes = [visual.num_tile_patches, *visual.patches_per_video]
    return x_S.split(sizes)[1 + video].unflatten(0, (visual.grids[video].t, -1))
