"""Several looks at one video, one answer: which frames each look gets, and how their answers are put together.

`parallel` and `packed` scaling (arXiv 2509.08016, 2511.17945) show a model k disjoint interleaved parts of the frames.
Each look gives one log-probability per option; looks are put together by their mean, or by majority (arXiv 2503.20472),
where a tie goes to the option of higher mean log-probability, and the last tie to the first option."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Vote = Literal["mean", "majority"]


@dataclass(frozen=True)
class Verdict:
    option: int
    """Number of the option that won."""
    mean_logprob: tuple[float, ...]
    """Per option, over the looks."""
    votes: tuple[int, ...]
    """Looks whose best option this is."""


def interleaved(num_frames: int, num_looks: int) -> list[list[int]]:
    """Frames of every look: look j takes j, j + k, j + 2k, ...; together they take each frame once.

    ValueError where a look would see nothing."""
    if not 1 <= num_looks <= num_frames:
        raise ValueError(
            f"num_subsets={num_looks} must be in [1, {num_frames}]: each needs at least one of {num_frames} frames"
        )
    return [list(range(look, num_frames, num_looks)) for look in range(num_looks)]


def combine(logprob_KO: Sequence[Sequence[float]], how: Vote) -> Verdict:
    """One answer from K looks at O options. ValueError for looks at different options, or a log-probability that is
    none (NaN, or above 0)."""
    if how not in get_args(Vote):
        raise ValueError(f"vote={how!r} must be one of {get_args(Vote)}")
    widths = {len(look) for look in logprob_KO}
    if len(widths) != 1 or widths == {0}:
        raise ValueError(f"got looks at {sorted(widths) or 'no'} options; every look must score the same options")
    if any(math.isnan(value) or value > 1e-6 for look in logprob_KO for value in look):
        values = [list(look) for look in logprob_KO]
        raise ValueError(f"{values} are not log-probabilities; expected numbers of at most 0")
    [num_options] = widths
    mean = tuple(math.fsum(look[option] for look in logprob_KO) / len(logprob_KO) for option in range(num_options))
    best = [list(look).index(max(look)) for look in logprob_KO]
    votes = tuple(best.count(option) for option in range(num_options))
    rank = [(votes[option] if how == "majority" else 0, mean[option], -option) for option in range(num_options)]
    return Verdict(rank.index(max(rank)), mean, votes)
