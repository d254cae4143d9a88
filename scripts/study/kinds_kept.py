"""What a method keeps of each kind of cell, and of how many different things it keeps at least one sighting.

    stts compare --model FOLDER --data runs/study_distractors/data/test/test.jsonl --out OUT --save_kept all ...
    python scripts/study/kinds_kept.py runs/study_distractors/data/test/test.jsonl OUT [OUT ...]

One row per method and ratio of every comparison, in percent of the cells beyond the first frame, which is kept whole by
most methods and shows every resting thing. A thing is a cell that shows one kind without a break: an event, or a thing
at rest. `left` is where the rest of the places went: cells that show nothing."""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stts.data.shapes.files import read_cells
from stts.data.shapes.world import BACKGROUND, DISTRACTOR, FLASH, PAIR, RESTING
from stts.eval.answering.kept_tokens import read_kept

KINDS = ("resting", "flash", "pair", "distractor")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="questions of ShapesQA, with the labels of their clips beside")
    parser.add_argument("comparisons", type=Path, nargs="+", help="folders that `stts compare --save_kept all` wrote")
    args = parser.parse_args(argv)
    label_TYX = read_cells(args.data)
    head = ["method", *(f"{kind} cells" for kind in KINDS), "flash things", "pair things", "resting things", "left"]
    print(f"| {' | '.join(head)} |\n| {' | '.join(['---'] * len(head))} |")
    for folder in args.comparisons:
        for cell, counts in kept_by_kind(folder, label_TYX):
            shown = [f"{100 * counts[name][0] / counts[name][1]:.1f}" if counts[name][1] else "-" for name in (
                *KINDS, "flash things", "pair things", "resting things")]  # fmt: skip
            taken, places = counts["background"][0], counts["places"][0]
            print(f"| {folder.name} {cell} | {' | '.join(shown)} | {100 * taken / places:.1f} % of the places |")
    return 0


def kept_by_kind(folder: Path, labels: dict[str, NDArray[np.uint8]]) -> Iterator[tuple[str, dict[str, list[int]]]]:
    """Cell of the comparison, and by name how many were kept, and how many there are."""
    numbers = {"resting": RESTING, "flash": FLASH, "pair": PAIR, "distractor": DISTRACTOR, "background": BACKGROUND}
    records = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["records"]
    video_of = {record["uid"]: record["video"] for record in records}
    kept = read_kept(folder, video_of)
    first_of = {video: uid for uid, video in reversed(video_of.items()) if uid in kept}  # one question per clip
    for cell in next(iter(kept.values())).index:
        counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for video, uid in first_of.items():
            label_TG = labels[video].reshape(len(labels[video]), -1)
            kept_TG = np.zeros(label_TG.shape, bool)
            kept_TG.reshape(-1)[kept[uid].index[cell].numpy()] = True
            later_TG, kept_later_TG = label_TG[1:], kept_TG[1:]
            add(counts["places"], kept_later_TG)
            for name, number in numbers.items():
                add(counts[name], kept_later_TG[later_TG == number])
            for name in ("resting", "flash", "pair"):
                things = [kept_TG[first:stop, place].any() for place, first, stop in runs(label_TG == numbers[name])]
                add(counts[f"{name} things"], np.array(things, bool))
        yield cell, counts


def add(count: list[int], kept: NDArray[np.bool_]) -> None:
    count[0] += int(kept.sum())
    count[1] += kept.size


def runs(shown_TG: NDArray[np.bool_]) -> Iterator[tuple[int, int, int]]:
    """Place, first frame and the frame behind the last one of every unbroken run."""
    edge_TG = np.diff(np.pad(shown_TG, ((1, 1), (0, 0))).astype(np.int8), axis=0)
    for place in range(shown_TG.shape[1]):
        yield from ((place, int(first), int(stop)) for first, stop in zip(
            np.flatnonzero(edge_TG[:, place] > 0), np.flatnonzero(edge_TG[:, place] < 0), strict=True))  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
