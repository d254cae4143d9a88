"""Tokens, FLOPs and activation memory of one training step, for `stts plan`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from stts.metrics.cost import llm_prefill_flops, vit_block_flops
from stts.metrics.memory import Widths, block_bytes, head_bytes, input_bytes, scorer_bytes
from stts.models.families.base import vlm_shape
from stts.models.pruning.context import Pruning
from stts.models.pruning.report import planned_cost
from stts.tokens import Grid

from .plan_config import Run
from .precision import PIXEL_DTYPES


@dataclass(frozen=True)
class _Work:
    """Activations and FLOPs of one batch."""

    run: Run
    pruning: Pruning
    grid: Grid
    kept: int
    sample: int
    samples: int
    row: int

    @property
    def upstream(self) -> dict[str, bool]:
        """Whether gradients pass through a part: it learns, or something before it does."""
        rates, scorer = self.run.rates, self.pruning.module is not None and "scorer" in self.run.rates
        vit = "vit" in rates or scorer
        return {"vit": vit, "connector": vit or "connector" in rates, "llm": True}

    @property
    def _drop(self) -> tuple[int, int]:
        """First block that gradients pass through, and the first that runs on survivors (the depth, if none does)."""
        site = next((stage.site for stage in self.pruning.pruner.stages if stage.site.kind == "vit"), None)
        depth = self.pruning.adapter.host.vit_depth
        after = depth if site is None or site.drop_after is None else site.drop_after + 1
        if "vit" in self.run.rates:
            return 0, after
        return (depth if site is None or site.layer is None else site.layer + 1), after

    @property
    def _patches(self) -> tuple[int, int]:
        """Of all frames of a video, and of those left (shared patches of overlapping windows: a little more)."""
        host = self.pruning.adapter.host
        num_patches = self.grid.num_groups * host.patches_per_group
        if host.patches_per_frame:
            num_patches = self.grid.t * host.patches_per_frame
        return num_patches, round(num_patches * self.kept / self.grid.num_groups)

    @property
    def pixels(self) -> int:
        """Bytes of the pixels of a batch, in the dtype in which they leave the loader."""
        vision = vlm_shape(self.run.config).vit
        element = 2 if self.run.precision in PIXEL_DTYPES else 4
        return element * self.samples * self._patches[0] * vision.channels * vision.patch_size**2

    def activations(self) -> dict[str, int]:
        """Bytes kept for the backward pass, by part."""
        run, config, host = self.run, self.run.config, self.pruning.adapter.host
        low, mixed = "16" in run.precision, run.precision.endswith("mixed") and not run.strategy.deepspeed
        widths = Widths(compute=2 if low else 4, stream=4 if mixed or not low else 2)
        vit, llm = self.pruning.adapter.block_shapes(config)
        llm_learns = "llm" in run.rates and run.lora is None
        whole, left = self._patches
        start, dropped = self._drop
        dense, pruned = max(0, dropped - start), host.vit_depth - max(dropped, start)
        if not self.upstream["vit"]:
            dense = pruned = 0
        patches = self.samples * (dense * whole + pruned * left)
        one_vit = block_bytes(vit, widths, learns="vit" in run.rates)
        one_llm = block_bytes(llm, widths, learns=llm_learns)
        if run.checkpointing:
            tower, language = patches * input_bytes(vit, widths), self.row * host.llm_layers * input_bytes(llm, widths)
            busiest = max(self.samples * whole * one_vit if dense else 0, self.row * one_llm)
        else:
            tower, language, busiest = patches * one_vit, self.row * host.llm_layers * one_llm, 0
        if run.lora is not None and "llm" in run.rates and not run.checkpointing:  # inputs of the adapters, in fp32
            inputs = {"o_proj": llm.query, "down_proj": llm.mlp}
            widest = sum(4 * inputs.get(name, llm.width) + 4 * run.lora.rank for name in run.lora.targets)
            language += self.row * host.llm_layers * widest
        connector, per_item = self.pruning.adapter.connector_bytes(config, widths)
        items = self.samples * (left if per_item == 1 else self.kept)
        learned = self.pruning.module is not None and "scorer" in run.rates
        groups = self.samples * self.grid.num_groups if learned else 0
        scorer = scorer_bytes(host.vit_width, host.vit_mlp, host.vit_heads, host.patches_per_group, widths)
        return {
            "pixels": self.pixels,
            "tower activations": tower,
            "scorer activations": groups * scorer,
            "connector activations": items * connector if self.upstream["connector"] else 0,
            "LLM activations": language,
            "block recomputed": busiest,
            "logits": head_bytes(config, widths, self.samples * run.answer_tokens * self.samples),
        }

    def flops(self) -> dict[str, int]:
        """Of one sample, forward, backward and recomputation."""
        run, config = self.run, self.run.config
        shape, host, pruner = vlm_shape(config), self.pruning.adapter.host, self.pruning.pruner
        start, _ = self._drop
        drops = self.kept < self.grid.num_groups
        cost = planned_cost(pruner, shape, host, self.grid, run.retention_ratio if drops else 1.0)
        if not drops:  # in training its stages run all the same
            own = sum(stage.flops(self.grid, host.vit_width, self.kept) for stage in pruner.stages)
            cost = replace(cost, pruner=own)
        shape = shape.at(self.grid)
        language = llm_prefill_flops(shape.llm, self.sample)
        head = 2 * run.answer_tokens * shape.llm.width * config.text_config.vocab_size
        through, redo = self.upstream, int(run.checkpointing)
        unreached = self.grid.t * sum(vit_block_flops(shape.vit, shape.vit.patches, block) for block in range(start))
        vit_back = (2 if "vit" in run.rates else 1) + redo if through["vit"] else 0
        connector_back = ("connector" in run.rates) + through["vit"]
        llm_back = 1 + ("llm" in run.rates and run.lora is None) + redo
        return {
            "ViT": cost.vit + cost.vit_embed + vit_back * max(0, cost.vit - unreached),
            "scorer": cost.pruner * (3 if "scorer" in run.rates and self.pruning.module is not None else 1),
            "connector": cost.connector * (1 + connector_back),
            "LLM": language * (1 + llm_back) + 3 * head,
        }
