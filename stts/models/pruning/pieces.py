"""The visual part of one pass in pieces of a few frames, so that its memory does not grow with the video.

Frames are independent in every supported tower and connector, so pieces give what the whole gives. A stage at site
`vit` sees each video twice: the first time only its blocks run and only the scores stay, then the whole video decides,
then the tower runs again and only survivors go on. What must be held, whatever the pieces:

    no pruner, site `pre_llm` or `llm`   connector outputs of every group, and the signals that were asked for
    STTS                                 one score per group, one frame of patches, connector outputs of kept groups

Shape suffixes beside those of `stts.tokens`: W = patches per group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stts.models.families.base import Connected, TowerOutput, Visual
from stts.models.pruning.pass_videos import PassVideos
from stts.models.pruning.signals import Collector
from stts.models.pruning.stages import to_drop
from stts.models.pruning.tower import Drop
from stts.pruners.base import InPieces, Stage
from stts.pruners.temporal import key_bias
from stts.tokens import Kept

Spans = Sequence[tuple[int, int]]
"""First frame and the one after the last of every piece of a video."""


@dataclass(frozen=True)
class _Choice:
    """What a stage decided about one video."""

    keep_G: Tensor
    """bool"""
    weight_G: Tensor | None


def check_in_pieces(stage: Stage) -> InPieces:
    """ValueError for a stage inside the tower that must see a whole video at once."""
    if not isinstance(stage, InPieces):
        raise ValueError(
            f"{type(stage).__name__} decides inside the tower and needs all frames of a video at once, so chunk_frames "
            "cannot bound its memory; leave chunk_frames out, or use 'stts' or a pruner that acts before the LLM"
        )
    return stage


def needs_pieces(visual: Visual, chunk_frames: int | None, *, runs_all: bool) -> bool:
    """Whether a pass goes through its videos in pieces. ValueError where it should and cannot.

    runs_all: it runs every module once, as in training."""
    if visual.streamed and chunk_frames is None:
        raise ValueError("streamed pixel values are read in pieces; pass chunk_frames, such as chunk_frames=64")
    if chunk_frames is None or not visual.grids:
        return False
    if runs_all or torch.is_grad_enabled():
        raise ValueError(
            f"chunk_frames={chunk_frames} is for evaluation without gradients; call the model inside "
            "torch.no_grad() or torch.inference_mode(), or leave chunk_frames out"
        )
    return visual.streamed or max(grid.t for grid in visual.grids) > chunk_frames


def encode_in_pieces(
    now: PassVideos, collector: Collector, chunk_frames: int
) -> tuple[Connected, list[list[int]] | None]:
    """Connector outputs of images and of the groups left of every video of a pass, and the patches left of every frame
    (None where no stage acts inside the tower). `collector` then has the signals of the whole pass."""
    spans = [
        [(first, min(first + chunk_frames, grid.t)) for first in range(0, grid.t, chunk_frames)] for grid in now.grids
    ]
    stage = now.setup.sites.vit[0] if now.setup.sites.vit else None
    choices: list[_Choice | None] = [None] * len(spans)
    if stage is not None:
        choices = _decide(now, stage, spans)
    images, early_images = _encode_images(now)
    videos: list[list[Tensor]] = []
    kept_patches: list[list[int]] = []
    for video, choice in enumerate(choices):
        features, lengths = _encode_video(now, video, _parts(now, video, spans[video], choice), stage, collector)
        videos.append(features)
        kept_patches.append(lengths)
    early = tuple(
        (early_images[layer] if early_images else (), tuple(row[1 + layer] for row in videos))
        for layer in range(len(videos[0]) - 1)
    )
    dropped = any(choice is not None for choice in choices)
    return Connected(images, tuple(row[0] for row in videos), early), kept_patches if dropped else None


def _encode_images(now: PassVideos) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
    """Features of the images, and those for early layers of the LLM."""
    adapter = now.setup.adapter
    if not now.visual.num_tiles:
        return (), []
    part = adapter.part(now.visual, None)
    connected = adapter.connect(now.setup.tower(adapter.embed(part), adapter.blocks(), adapter.taps()), part, [])
    return connected.images, [layer for layer, _ in connected.early]


def _encode_video(
    now: PassVideos,
    video: int,
    parts: Iterator[tuple[Visual, _Choice | None]],
    stage: Stage | None,
    collector: Collector,
) -> tuple[list[Tensor], list[int]]:
    """Features of one video, those of early layers behind them, and the patches left of its frames."""
    rows: list[list[Tensor]] = []
    lengths: list[Tensor] = []
    for part, choice in parts:
        if choice is not None and not bool(choice.keep_G.any()):  # frames without survivors need no second run
            lengths.append(torch.zeros(len(part.frames), dtype=torch.long))
            continue
        part = part.loaded()
        with collector.piece() as note:
            tower, cells = _run(now, video, part, stage, choice)
        connected = now.setup.adapter.connect(tower, part, [cells])
        note(tower, part, connected.videos)
        rows.append([connected.videos[0], *(layer[0] for _, layer in connected.early)])
        rows_F = torch.tensor(part.frames) if tower.lengths_F is None else tower.lengths_F.cpu()
        lengths.append(rows_F - part.class_tokens)
        del tower, connected, part
    collector.end_of_video()
    return [torch.cat(column) for column in zip(*rows, strict=True)], torch.cat(lengths).tolist()


def _parts(
    now: PassVideos, video: int, spans: Spans, choice: _Choice | None
) -> Iterator[tuple[Visual, _Choice | None]]:
    """The pieces of a video, not loaded yet, each with its share of the choice."""
    per_frame = now.grids[video].per_frame
    for first, last in spans:
        part = now.setup.adapter.part(now.visual, video, first, last)
        if choice is None:
            yield part, None
            continue
        groups = slice(first * per_frame, last * per_frame)
        yield part, _Choice(choice.keep_G[groups], None if choice.weight_G is None else choice.weight_G[groups])


def _run(
    now: PassVideos, video: int, part: Visual, stage: Stage | None, choice: _Choice | None
) -> tuple[TowerOutput, Tensor | None]:
    """The tower on one piece, with what was decided about it, and its kept cells (None: all)."""
    adapter = now.setup.adapter
    embedded = adapter.embed(part)
    if stage is None or choice is None:
        return now.setup.tower(embedded, adapter.blocks(), adapter.taps()), None
    group_GW, _ = adapter.groups(part, 0)
    cells, weight_G = choice.keep_G.nonzero().squeeze(1), choice.weight_G

    def decide(x_SD: Tensor) -> Drop:
        bias_S = None if weight_G is None else key_bias(weight_G, group_GW, len(x_SD))
        piece = now.video(video, x_SD, grid=part.grids[0], group_GW=group_GW)
        return to_drop([Kept(cells, attention_bias_N=bias_S)], [piece], 0, part.class_tokens)

    return now.setup.tower(embedded, adapter.blocks(), adapter.taps(), stage.site, decide), cells


def _decide(now: PassVideos, stage: Stage, spans: Sequence[Spans]) -> list[_Choice | None]:
    """First pass: scores of every video piece by piece, then one decision. None: the video stays whole."""
    scorer = check_in_pieces(stage)
    scores = [_score(now, video, scorer, pieces) for video, pieces in enumerate(spans)]
    with now.calling(stage, scores[0]):
        indices, weights = scorer.settle(scores, now.grids, now.budgets[0])
    now.note([Kept(index_K, scores_G=score_G) for index_K, score_G in zip(indices, scores, strict=True)])
    choices: list[_Choice | None] = []
    for video, (index_K, score_G) in enumerate(zip(indices, scores, strict=True)):
        keep_G = torch.zeros_like(score_G, dtype=torch.bool)
        keep_G[index_K] = True
        is_whole = len(index_K) == len(score_G)
        choices.append(None if is_whole else _Choice(keep_G, None if weights is None else weights[video]))
    return choices


def _score(now: PassVideos, video: int, stage: InPieces, spans: Spans) -> Tensor:
    """(G,) of one video; the last frame of a piece is carried over to the next."""
    adapter, layer = now.setup.adapter, stage.site.layer
    assert layer is not None and layer >= 0
    per_frame, scores = now.grids[video].per_frame, []
    before_SD: Tensor | None = None
    for first, last in spans:
        part = adapter.part(now.visual, video, first, last).loaded()
        x_SD = now.setup.tower(adapter.embed(part), adapter.blocks()[: layer + 1], [layer]).taps[0]
        last_SD = x_SD[-part.frames[-1] :].clone()  # a view would keep the whole piece
        context = int(before_SD is not None)
        if before_SD is not None:
            x_SD = torch.cat([before_SD, x_SD])
        seen = adapter.part(now.visual, video, first - context, last)  # for its groups; no pixel of it is read
        piece = now.video(video, x_SD, grid=seen.grids[0], group_GW=adapter.groups(seen, 0)[0])
        with now.calling(stage, x_SD):
            scores.append(stage.score([piece])[0][context * per_frame :])
        before_SD = last_SD
    return torch.cat(scores)
