"""An earlier evaluation of every token, to which another one is paired question by question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from stts.metrics.accuracy import mcnemar, paired_bootstrap, paired_difference

_SAME = (
    "model", "questions", "num_frames", "sampler", "max_fps", "prompt", "wordings", "scoring", "limit",
    "max_new_tokens",
)  # fmt: skip
"""Of an identity: what both must share."""


@dataclass(frozen=True)
class DenseReference:
    folder: Path
    correct: Mapping[str, bool]
    """By key."""

    @classmethod
    def open(cls, folder: str | Path, identity: Mapping[str, Any]) -> Self:
        """ValueError unless `folder` holds a finished evaluation with pruner none that shares questions, frames and
        scoring with this `identity`."""
        folder = Path(folder)
        results = sorted(folder.glob("*/*_results.json"))
        if not results:
            raise ValueError(
                f"--dense_reference {folder} holds no finished `stts eval`; run one with --pruner none first"
            )
        own = json.loads(results[-1].read_text(encoding="utf-8"))["stts"]
        if own["pruner"] != "none":
            raise ValueError(f"--dense_reference {folder} was run with pruner {own['pruner']!r}; it must be none")
        here: Mapping[str, Any] = json.loads(json.dumps(identity))
        other = [name for name in _SAME if own["identity"].get(name) != here.get(name)]
        if _model_files(own["identity"]) != _model_files(here):
            other.append("files of the model")
        if other:
            raise ValueError(
                f"--dense_reference {folder} is of another run (different: {', '.join(other)}); pairs need the same "
                "model, questions, frames and scoring"
            )
        stamp = results[-1].name.removesuffix("_results.json")
        lines = [
            json.loads(line)["stts"]
            for file in sorted(results[-1].parent.glob(f"{stamp}_samples_*.jsonl"))
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        return cls(folder, {line["uid"]: line["correct"] for line in lines if line["counted"]})

    def paired(self, correct: Mapping[str, bool], videos: Mapping[str, str]) -> dict[str, float | str | None] | None:
        """Of the questions that both answered, by key; None where there are none. Ends of intervals are None where the
        videos carry none (`stts.metrics.accuracy`)."""
        keys = [key for key in correct if key in self.correct]
        if not keys:
            return None
        here, there = [correct[key] for key in keys], [self.correct[key] for key in keys]
        shown: Sequence[str] = [videos[key] for key in keys]
        change, drawn = paired_difference(here, there, shown), paired_bootstrap(here, there, shown)
        dense = sum(there) / len(there)
        return {
            "acc": dense,
            "num_samples": len(keys),
            "difference": change.value,
            "difference_low": change.low,
            "difference_high": change.high,
            "retained": sum(here) / len(here) / dense if dense else 0.0,
            "p_mcnemar": mcnemar(here, there, shown),
            "p_bootstrap": drawn.p_value,
            "bootstrap_low": drawn.low,
            "bootstrap_high": drawn.high,
            "bootstrap_note": drawn.reason,
        }


def _model_files(identity: Mapping[str, Any]) -> dict[str, str]:
    """Contents of the model's files; none for a hub id."""
    files: Mapping[str, str] = identity.get("files", {})
    return {name: stamp for name, stamp in files.items() if Path(name).parent == Path(identity["model"])}
