"""The visual part of one pass in pieces of a few frames, so that its memory does not grow with the video.

Frames are independent in every supported tower and connector, so pieces give what the whole gives. A stage at site
`vit` sees each video twice: the first time only its blocks run and only the scores stay, then the whole video decides,
then the tower runs again and only survivors go on. What must be held, whatever the pieces:

    no pruner, site `pre_llm` or `llm`   connector outputs of every group, and the signals that were asked for
    STTS                                 one score per group, one frame of patches, connector outputs of kept groups

Shape suffixes: S = patches of a piece, G = groups of a video, K = kept groups, W = patches per group, d = LLM width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stts.models.families.base import Adapter, Connected, TowerOutput, Visual
from stts.models.pruning.signals import Collector
from stts.models.pruning.stages import Pass
from stts.models.pruning.tower import Drop, run_tower
from stts.pruners.base import InPieces, Stage
from stts.pruners.temporal import key_bias
from stts.tokens import Kept, VideoTokens


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


def encode(
    adapter: Adapter, visual: Visual, now: Pass, stage: Stage | None, collector: Collector, chunk_frames: int
) -> tuple[Connected, list[list[int]] | None]:
    """Connector outputs of images and of the groups left of every video, and the patches left of every frame (None
    where no stage acts inside the tower). `collector` then has the signals of the whole pass."""
    pieces = [
        [(first, min(first + chunk_frames, grid.t)) for first in range(0, grid.t, chunk_frames)] for grid in now.grids
    ]
    choices: list[_Choice | None] = [None] * len(pieces)
    if stage is not None:
        choices = _decide(adapter, visual, now, stage, pieces)
    images: tuple[Tensor, ...] = ()
    early_images: list[tuple[Tensor, ...]] = []
    if visual.num_tiles:
        part = adapter.part(visual, None)
        tower = run_tower(adapter.embed(part), adapter.blocks(), adapter.taps())
        connected = adapter.connect(tower, part, [])
        images, early_images = connected.images, [layer for layer, _ in connected.early]
    videos: list[list[Tensor]] = []
    kept_patches: list[list[int]] = []
    for video, spans in enumerate(pieces):
        rows: list[list[Tensor]] = []
        lengths: list[Tensor] = []
        for part, choice in _parts(adapter, visual, video, spans, choices[video]):
            if choice is not None and not bool(choice.keep_G.any()):  # frames without survivors need no second run
                lengths.append(torch.zeros(len(part.frames), dtype=torch.long))
                continue
            part = part.loaded()
            with collector.piece() as note:
                tower, cells = _run(adapter, part, stage, choice)
            connected = adapter.connect(tower, part, [cells])
            note(tower, part, connected.videos)
            rows.append([connected.videos[0], *(layer[0] for _, layer in connected.early)])
            lengths.append(torch.tensor(part.frames) if tower.lengths_F is None else tower.lengths_F.cpu())
            del tower, connected, part
        collector.end_of_video()
        videos.append([torch.cat(column) for column in zip(*rows, strict=True)])
        kept_patches.append(torch.cat(lengths).tolist())
    early = tuple(
        (early_images[layer] if early_images else (), tuple(row[1 + layer] for row in videos))
        for layer in range(len(videos[0]) - 1)
    )
    dropped = any(choice is not None for choice in choices)
    return Connected(images, tuple(row[0] for row in videos), early), kept_patches if dropped else None


def _parts(
    adapter: Adapter, visual: Visual, video: int, spans: Sequence[tuple[int, int]], choice: _Choice | None
) -> Iterator[tuple[Visual, _Choice | None]]:
    """The pieces of a video, not loaded yet, each with its share of the choice."""
    per_frame = visual.grids[video].per_frame
    for first, last in spans:
        part = adapter.part(visual, video, first, last)
        if choice is None:
            yield part, None
            continue
        groups = slice(first * per_frame, last * per_frame)
        yield part, _Choice(choice.keep_G[groups], None if choice.weight_G is None else choice.weight_G[groups])


def _run(
    adapter: Adapter, part: Visual, stage: Stage | None, choice: _Choice | None
) -> tuple[TowerOutput, Tensor | None]:
    """The tower on one piece, with what was decided about it, and its kept cells (None: all)."""
    given = adapter.embed(part)
    if stage is None or choice is None:
        return run_tower(given, adapter.blocks(), adapter.taps()), None
    group_GW, _ = adapter.groups(part, 0)
    cells = choice.keep_G.nonzero().squeeze(1)

    def decide(x_SD: Tensor) -> Drop:
        alive = torch.zeros(len(x_SD) + 1, dtype=torch.bool, device=x_SD.device)
        alive[group_GW[cells].flatten()] = True  # -1 falls into the spare last place
        bias_S = None if choice.weight_G is None else key_bias(choice.weight_G, group_GW, len(x_SD))
        return Drop(alive[:-1], bias_S)

    return run_tower(given, adapter.blocks(), adapter.taps(), stage.site, decide), cells


def _decide(
    adapter: Adapter, visual: Visual, now: Pass, stage: Stage, pieces: Sequence[Sequence[tuple[int, int]]]
) -> list[_Choice | None]:
    """First pass: scores of every video piece by piece, then one decision. None: the video stays whole."""
    scorer = check_in_pieces(stage)
    scores = [_score(adapter, visual, video, scorer, spans) for video, spans in enumerate(pieces)]
    indices, weights = scorer.settle(scores, now.grids, now.budgets[0])
    now.note([Kept(index_K, scores_G=score_G) for index_K, score_G in zip(indices, scores, strict=True)])
    choices: list[_Choice | None] = []
    for video, (index_K, score_G) in enumerate(zip(indices, scores, strict=True)):
        keep_G = torch.zeros_like(score_G, dtype=torch.bool)
        keep_G[index_K] = True
        whole = len(index_K) == len(score_G)
        choices.append(None if whole else _Choice(keep_G, None if weights is None else weights[video]))
    return choices


def _score(adapter: Adapter, visual: Visual, video: int, stage: InPieces, spans: Sequence[tuple[int, int]]) -> Tensor:
    """(G,) of one video; the last frame of a piece is carried over to the next."""
    layer = stage.site.layer
    assert layer is not None and layer >= 0
    per_frame, found = visual.grids[video].per_frame, []
    before_SD: Tensor | None = None
    for first, last in spans:
        part = adapter.part(visual, video, first, last).loaded()
        x_SD = run_tower(adapter.embed(part), adapter.blocks()[: layer + 1], [layer]).taps[0]
        last_SD = x_SD[-part.frames[-1] :].clone()  # a view would keep the whole piece
        context = int(before_SD is not None)
        if before_SD is not None:
            x_SD = torch.cat([before_SD, x_SD])
        seen = adapter.part(visual, video, first - context, last)  # for its groups; no pixel of it is read
        tokens = VideoTokens(
            x_ND=x_SD,
            grid=seen.grids[0],
            cell_G=torch.arange(seen.grids[0].num_groups, device=x_SD.device),
            group_GW=adapter.groups(seen, 0)[0],
        )
        found.append(stage.score([tokens])[0][context * per_frame :])
        before_SD = last_SD
    return torch.cat(found)
