"""A finished comparison: its settings, cells, answers and times, as it is written to and read from a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

from stts.eval.answering.cell import DENSE, Cell
from stts.eval.results.grading import Record, TaskScore
from stts.eval.results.summary import Row, make_row


@dataclass(frozen=True)
class ComparisonResult:
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    cells: tuple[Cell, ...]
    records: tuple[Record, ...]
    skipped: tuple[Mapping[str, str], ...]
    """`uid` and `reason` of every sample whose video could not be read."""
    batch_ms: Mapping[str, tuple[float, ...]]
    """By `Cell.key`: milliseconds per sample of every timed batch."""
    signals: Mapping[str, Mapping[str, str]]
    """By `Cell.key`: see `Row`."""
    scores: Mapping[str, Mapping[str, TaskScore]] = field(default_factory=dict)
    """By `Cell.key`, then by task."""
    phase_ms: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    """By `Cell.key`, then by phase (`summary.PHASES`): milliseconds per sample of every timed batch."""
    peak_gib: Mapping[str, float] = field(default_factory=dict)
    """By `Cell.key`: most memory allocated on the GPU."""
    weights_gib: float | None = None
    notes: tuple[str, ...] = ()
    """What the tasks' own files say about the result, such as another number of rows than published."""

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(
            make_row(
                cell,
                self.records,
                batch_ms=self.batch_ms.get(cell.key, ()),
                phase_ms=self.phase_ms.get(cell.key),
                signals=self.signals.get(cell.key),
                scores=self.scores.get(cell.key),
                dense_scores=self.scores.get(DENSE),
                peak_gib=self.peak_gib.get(cell.key),
            )
            for cell in self.cells
        )

    @property
    def frames(self) -> list[int]:
        """The numbers of frames that were compared."""
        frames: int | list[int] = self.config["num_frames"]
        return list(frames) if isinstance(frames, list | tuple) else [frames]

    @property
    def has_points(self) -> bool:
        """Whether rows differ in their frames or parts."""
        return len(self.frames) > 1 or any(cell.parts > 1 for cell in self.cells)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(record.task for record in self.records))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        return cls(
            config=content["config"],
            environment=content["environment"],
            cells=tuple(Cell(**cell) for cell in content["cells"]),
            records=tuple(Record.from_json(row) for row in content["records"]),
            skipped=tuple(content["skipped"]),
            batch_ms={key: tuple(values) for key, values in content["batch_ms"].items()},
            signals=content["signals"],
            scores={
                key: {task: TaskScore(**score) for task, score in tasks.items()}
                for key, tasks in content.get("scores", {}).items()
            },
            phase_ms={
                key: {phase: tuple(values) for phase, values in phases.items()}
                for key, phases in content.get("phase_ms", {}).items()
            },
            peak_gib=content.get("peak_gib", {}),
            weights_gib=content.get("weights_gib"),
            notes=tuple(content.get("notes", ())),
        )
