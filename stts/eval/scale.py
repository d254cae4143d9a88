"""`stts scale`: what more frames are worth at test time, with unchanged weights.

It is the short way to say a `stts compare` at several numbers of frames:

    --mode frames    --num_frames 16 32 64, for --multiples 1 2 4 of 16 frames
    --mode budget    the same with --budget: at most so many visual tokens at every number of frames
    --mode parallel  the same with --parts 1 2 4: passes over parts of 16 frames each, put together by --vote
    --mode packed    the same with --packed true: all parts as one packed row, each attending to itself only
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from stts.eval.answering.ranks import Ranks
from stts.eval.compare import FILES, CompareConfig, run_compare
from stts.eval.results.result import ComparisonResult
from stts.eval.results.table import render_text
from stts.eval.run_config import resumable

Mode = Literal["frames", "budget", "parallel", "packed"]


@dataclass(frozen=True, kw_only=True)
class ScaleConfig(CompareConfig):
    """Test-time scaling: more frames for the same model, against tokens, FLOPs and seconds."""

    mode: Mode = "frames"
    """frames, budget, parallel or packed, see the documentation of stts.eval.scale."""
    multiples: tuple[int, ...] = (1, 2, 4)
    """Of num_frames, the frames that the model was trained with: how many frames each point shows."""
    pruners: tuple[str, ...] = ("stts", "holitom", "visionzip")
    """Names (see `stts pruners`), module:Class or file.py:Class. Dense is always run."""
    retention_ratios: tuple[float, ...] = (0.7, 0.5, 0.3, 0.2)
    """Fractions of visual tokens kept, each in (0, 1]; not used by --mode budget."""
    batch_size: int = 1
    """Questions answered at once."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiples", tuple(self.multiples))
        if self.mode not in get_args(Mode):
            raise ValueError(f"--mode {self.mode!r} must be one of {get_args(Mode)}")
        if not self.multiples or min(self.multiples) < 1 or list(self.multiples) != sorted(set(self.multiples)):
            raise ValueError(f"--multiples {list(self.multiples)} must be whole numbers from 1 on, increasing")
        if self.parts != (1,) or self.packed:
            raise ValueError("--parts and --packed follow from --mode parallel and packed; or use `stts compare`")
        if self.budget is not None and self.mode != "budget":
            raise ValueError(f"--budget {self.budget} goes with --mode budget only")
        if self.chunk_frames is not None and self.mode == "packed":
            raise ValueError("--chunk_frames cannot go with --mode packed, one pass for all; use --mode parallel")
        super().__post_init__()
        if self.save_kept:
            raise ValueError("--save_kept is not supported here; `stts compare --num_frames N` writes kept tokens")

    def to_compare(self) -> CompareConfig:
        """The same run as a comparison. ValueError where it is none."""
        frames = self.as_recorded()[0].frames
        if len(frames) != 1:
            raise ValueError(f"--num_frames {list(frames)} must be one number here; --multiples says how many of them")
        same = {item.name: getattr(self, item.name) for item in fields(CompareConfig)}
        same["num_frames"] = tuple(multiple * frames[0] for multiple in self.multiples)
        if self.mode == "budget":
            same["budget"] = "dense" if self.budget is None else self.budget
        if self.mode in ("parallel", "packed"):
            same |= {"parts": self.multiples, "packed": self.mode == "packed"}
        return CompareConfig(**same)


def run_scale(
    config: ScaleConfig,
    *,
    progress: bool = True,
    ranks: Ranks = Ranks(),  # noqa: B008
) -> ComparisonResult | None:
    """`run_compare` of what `config` says the short way."""
    return run_compare(config.to_compare(), progress=progress, ranks=ranks)


def scale(config: ScaleConfig) -> str | None:
    """`stts scale`: the table, and what was written; None on ranks other than 0."""
    with resumable(config.out):
        result = run_scale(config, ranks=Ranks.from_env())
    written = f"written: {', '.join(str(Path(config.out) / name) for name in FILES)}"
    return None if result is None else f"{render_text(result, wide=config.wide)}\n\n{written}"
