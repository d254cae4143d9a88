"""One method on one batch: answers, what was kept, what it cost, how long it took."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, ProcessorMixin

import stts
from stts.data.collate import Batch
from stts.eval.table import BEFORE, DENSE, Cell, Outcome
from stts.metrics.accuracy import grade
from stts.metrics.cost import VideoCost, VlmShape, video_cost
from stts.models.base import host_info
from stts.models.load import load_pruner, load_vlm
from stts.models.pruning import Pruning, Report
from stts.pruners.base import HostInfo, Positions, Pruner

_SEEDED = ("random", "random-vit")


@dataclass(frozen=True)
class Runner:
    """A cell of the table with the pruner attached to its model, or the reason why there is none in `cell`."""

    cell: Cell
    pruning: Pruning | None

    def answer(self, batch: Batch, processor: ProcessorMixin, max_new_tokens: int) -> tuple[list[Outcome], float]:
        """One outcome per row of `batch` (each row shows one video), and the milliseconds that `generate` took."""
        assert self.pruning is not None
        model = self.pruning.model
        with self.pruning, torch.inference_mode():
            self.pruning.describe(batch.video_uids, batch.timestamps_s)
            begin = _now(model.device)
            ids_BL = model.generate(
                **batch.inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1,
                temperature=None, top_p=None, top_k=None,  # silences a warning where the checkpoint sets them
            )  # fmt: skip
            elapsed_ms = 1000 * (_now(model.device) - begin)
            report = self.pruning.last
        assert report is not None, "a batch of videos leaves a report"
        new_BL = ids_BL[:, batch.inputs["input_ids"].shape[1] :]
        texts = processor.tokenizer.batch_decode(new_BL, skip_special_tokens=True)
        shape, host = VlmShape.from_config(model.config), self.pruning.adapter.host
        outcomes = []
        for row, (text, answer, sample) in enumerate(zip(texts, batch.answers, batch.samples, strict=True)):
            graded = grade(text, answer, sample.meta.get("options") or ())
            grid = report.grids[row]
            cost = _cost(shape, host, self.pruning.pruner, report, row)
            outcomes.append(
                Outcome(text, graded.parsed, graded.correct, grid.t, grid.num_groups, report.num_kept[row], cost)
            )
        return outcomes, elapsed_ms


def make_runners(
    model: PreTrainedModel,
    path: str | Path,
    *,
    pruners: Sequence[str],
    retention_ratios: Sequence[float],
    positions: Positions | None,
    seed: int,
) -> list[Runner]:
    """Dense, then every ratio with every pruner; learned weights come from the folder `path`.

    ValueError for an unknown pruner and a learned one without weights. A cell that this model cannot run (a ratio no
    video reaches, a site it lacks) is kept, with the reason."""
    runners = [Runner(Cell(DENSE), Pruning(model, "none"))]
    names = [name for name in pruners if name != "none"]
    made = {name: load_pruner(path, model, name, {"seed": seed} if name in _SEEDED else None) for name in names}
    for ratio in retention_ratios:
        for name, pruner in made.items():
            try:
                pruning = Pruning(model, pruner, retention_ratio=ratio, exact=True, positions=positions)
            except ValueError as error:
                runners.append(Runner(Cell(name, ratio, str(error)), None))
            else:
                runners.append(Runner(Cell(name, ratio), pruning))
    return runners


def make_baseline(path: str | Path, like: PreTrainedModel, processor: ProcessorMixin) -> Runner:
    """Dense on the checkpoint before fine-tuning. ValueError when it cannot read the batches made for `like`."""
    model, own = load_vlm(path, dtype=like.dtype)
    same_words = own.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    if host_info(model) != host_info(like) or not same_words:
        raise ValueError(
            f"--baseline_model {path} has another architecture or vocabulary than --model; it must be the checkpoint "
            "that was fine-tuned"
        )
    return Runner(Cell(BEFORE), Pruning(model.to(like.device), "none"))


def _cost(shape: VlmShape, host: HostInfo, pruner: Pruner, report: Report, video: int) -> VideoCost:
    grid = report.grids[video]
    own, drop_after = 0, None
    for stage, kept in zip(pruner.stages, report.stage_kept, strict=False):  # empty where nothing was to be pruned
        inside = stage.site.kind == "vit"
        own += stage.flops(grid, host.vit_width if inside else host.llm_width, kept[video])
        drop_after = stage.site.drop_after if inside else drop_after
    return video_cost(
        shape,
        num_frames=grid.t,
        num_kept=report.num_kept[video],
        kept_patches=report.kept_patches[video] if report.kept_patches else None,
        drop_after=drop_after,
        pruner_flops=own,
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """What the times and the answers may depend on."""
    cuda = model.device.type == "cuda"
    return {
        "stts": stts.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(model.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
    }
