"""Answers counted while validating: how many are right as a whole, by question family, and the mean loss per token;
and, where clips have labels, how much is kept of the evidence and of what only distracts.

Shape suffixes beside those of `stts.tokens`: B = rows, A = places where some row has an answer, V = vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from stts.data.collate import IGNORED
from stts.eval.answering.evidence import Counts, count_kept, share_kept

from .loss import answer_loss
from .step_losses import TrainingPass, world_size


class Validation:
    """Counts of one validation epoch.

    Teacher forcing: an answer is right when the argmax at every one of its tokens is right."""

    def __init__(self) -> None:
        self._families: dict[str, list[int]] = {}
        self._loss, self._tokens = 0.0, 0
        self._kept: list[Counts] = []

    def add(self, now: TrainingPass) -> None:
        """Count the answers of one batch; of a blank one nothing."""
        if now.batch.blank:
            return
        asked_BA = now.labels_BA != IGNORED
        right_B = ((now.logits_BAV.argmax(-1) == now.labels_BA) | ~asked_BA).all(1).tolist()
        num_tokens = int(asked_BA.sum())
        self._loss += answer_loss(now.logits_BAV, now.labels_BA).item() * num_tokens
        self._tokens += num_tokens
        for sample, right in zip(now.batch.samples, right_B, strict=True):
            count = self._families.setdefault(str(sample.meta.get("family", "other")), [0, 0])
            count[0] += right
            count[1] += 1
        report, labels = now.report, now.batch.cell_labels
        if report is not None and len(report.grids) == len(labels):  # not where images are pruned among the videos
            for index_K, grid, label_TYX in zip(report.index, report.grids, labels, strict=True):
                if label_TYX is not None:
                    self._kept.append(count_kept(index_K, grid, label_TYX))

    def values(self) -> dict[str, float]:
        """Logged values over all ranks, which must all call it; empty where nothing was counted."""
        own = self._families, self._loss, self._tokens, self._kept
        ranks: list[Any] = [own]
        if world_size() > 1:
            ranks = [None] * world_size()
            torch.distributed.all_gather_object(ranks, own)
        total: dict[str, list[int]] = {}
        for families, _, _, _ in ranks:
            for family, (right, seen) in families.items():
                count = total.setdefault(family, [0, 0])
                count[0] += right
                count[1] += seen
        values = {f"val/accuracy/{family}": right / seen for family, (right, seen) in sorted(total.items())}
        if total:
            values["val/accuracy"] = sum(right for right, _ in total.values()) / sum(seen for _, seen in total.values())
            values["val/answer_loss"] = sum(loss for _, loss, _, _ in ranks) / sum(n for _, _, n, _ in ranks)
        kept = [counts for _, _, _, rank in ranks for counts in rank]
        for name in ("evidence", "distractors"):
            share = share_kept(kept, name)
            if share is not None:
                values[f"val/{name}_kept"] = share
        return values
