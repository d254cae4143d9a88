"""Which strategies are tried with what, on two real processes: the tests run these cases, and docs/training.md shows
them as a table; a test compares the two."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from tests.train.launch import strategy

STEPS = 6  # optimizer steps of the runs of test_strategies.py
FROZEN = {
    "": [],
    "lora": ["--model.lora={rank: 4}", "--model.vit_lr=0", "--model.connector_lr=0"],
    "scorer": ["--model.llm_lr=0", "--model.vit_lr=0", "--model.connector_lr=0"],
    "tower": ["--model.vit_lr=0"],
    "dense steps": [  # every second step is dense, teaches the scorer, and leaves all else alone
        "--model.retention_ratio={target: 0.5, dense_every: 2, dense_trains: scorer}",
        "--model.pruner_options.teacher={share: 0.2}",
        "--model.loss_weights.teacher=1",
    ],
}
STAGES = ("deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
STRATEGIES = ("ddp", *STAGES, "fsdp2")


@dataclass(frozen=True)
class Case:
    """A run on two ranks with one sample each: as one process, exported by itself and from its checkpoint."""

    strategy: str
    precision: str = "32-true"
    per_step: int = 1
    frozen: str = ""
    """Which parts do not learn; see `FROZEN`."""

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.precision}-{self.per_step}-{self.frozen}"

    @property
    def options(self) -> list[str]:
        more = [f"--trainer.precision={self.precision}", f"--trainer.accumulate_grad_batches={self.per_step}"]
        more += FROZEN[self.frozen]
        return [*strategy(self.strategy), *more, f"--trainer.max_steps={STEPS // self.per_step}"]


CASES = {
    "torch": [
        *(Case(name, frozen=frozen) for name in ("ddp", "fsdp2") for frozen in ("", "lora", "scorer")),
        Case("fsdp2", "bf16-mixed"),
    ],
    "zero": [
        *(Case(stage) for stage in STAGES),
        *(Case(stage, "bf16-mixed") for stage in STAGES[1:]),
        *(Case(stage, per_step=2) for stage in STAGES),
    ],
    "zero, offload and frozen parts": [
        Case(f"{STAGES[1]}_offload", frozen="lora"),
        *(Case(f"{STAGES[2]}_offload", frozen=frozen) for frozen in ("", "scorer")),
        *(Case(stage, frozen="scorer") for stage in STAGES),
        *(Case(stage, frozen="lora") for stage in STAGES[1:]),
        Case("deepspeed_stage_3", frozen="tower"),
    ],
    "torch and zero, dense steps": [Case(name, frozen="dense steps") for name in STRATEGIES],
}
KILLED = ("ddp", "deepspeed_stage_2", "deepspeed_stage_3", "fsdp2")
"""Killed, told to stop, and gone on with, everything learning; see test_resume.py."""


@dataclass(frozen=True)
class Move:
    """A run that is stopped twice, and goes on with other numbers of ranks or under other ZeRO stages."""

    strategy: str
    frozen: str = ""
    then: tuple[str, str] | None = None
    """Strategies after the first and the second stop; None: the same."""

    @property
    def strategies(self) -> tuple[str, str, str]:
        return (self.strategy, *(self.then or (self.strategy, self.strategy)))

    @property
    def stays(self) -> list[tuple[int, int]]:
        """Ranks, and the last step on them. Full runs go from two ranks to one and back, others from two to two to one;
        that the same number goes on with everything learning is what `KILLED` is for."""
        return [(2, 3), (2, 5), (1, 9)] if self.frozen else [(2, 5), (1, 7), (2, 9)]


MOVES = [
    *(Move(name) for name in KILLED),
    Move(STAGES[0], then=(STAGES[0], STAGES[2])),
    *(Move(name, "scorer") for name in ("ddp", "fsdp2")),
    Move("fsdp2", "lora"),
    Move(STAGES[0], "lora", (STAGES[1], STAGES[2])),
    Move(STAGES[2], "lora", (STAGES[2], STAGES[1])),
    *(Move(stage, "scorer") for stage in STAGES[:2]),
    Move(STAGES[2], "scorer", (STAGES[2], STAGES[0])),
]


def table() -> str:
    """The cases as Markdown; a case of a strategy is in fp32 unless the cell says otherwise."""
    lines = [
        "| strategy | what learns | as one process | goes on: same ranks | other ranks | other stage | offload |",
        "|---|---|---|---|---|---|---|",
    ]
    cases = {(case.strategy, case.frozen) for kind in CASES.values() for case in kind}
    low = {case.strategy for kind in CASES.values() for case in kind if case.precision != "32-true"}
    for name in STRATEGIES:
        for frozen, what in (("", "everything"), ("lora", "LoRA and scorer"), ("scorer", "scorer")):
            precisions = "fp32, bf16" if name in low and not frozen else "fp32"
            stays = [list(zip(m.strategies, m.stays, strict=True)) for m in MOVES if m.frozen == frozen]
            pairs = [(was, now, a, b) for s in stays for (was, (a, _)), (now, (b, _)) in pairwise(s) if was == name]
            same = (name, name, 2, 2) in pairs or (name in KILLED and not frozen)
            moved = " and ".join(f"{a} to {b}" for _, now, a, b in pairs if a != b and now == name)
            staged = ", ".join(
                f"{now[-1]}{f' ({a} to {b} ranks)' if a != b else ''}" for _, now, a, b in pairs if now != name
            )
            offload = "yes" if (f"{name}_offload", frozen) in cases else "-"
            compared = precisions if (name, frozen) in cases else "-"
            goes_on = f"{'yes' if same else '-'} | {moved or '-'} | {staged or '-'}"
            lines.append(f"| `{name}` | {what} | {compared} | {goes_on} | {offload} |")
    return "\n".join(lines) + "\n"
