"""Batches from items of which some may be unusable: what one sample breaks is skipped, or raised with its name."""

from __future__ import annotations

from collections.abc import Sequence

from stts.data.collate import Batch, Collator
from stts.data.datasets import Example, Skipped
from stts.data.rows import OnError, Sample


def make_batch(
    collate: Collator, items: Sequence[Example | Skipped], on_error: OnError
) -> tuple[Batch | None, tuple[Skipped, ...]]:
    """The batch of all usable examples, None without any, and what was skipped: before this call or in it.

    Files that decode can still be refused later: by a limit of the processor (sides, aspect ratio, text length), or for
    a `<video>` in a question. If the batch fails, each example is tried alone. `on_error="raise"`: ValueError that
    names the first faulty sample and its files. An error of no single sample (some models take images and
    videos in separate batches) is raised as it is."""
    skipped = [item for item in items if isinstance(item, Skipped)]
    examples = [item for item in items if isinstance(item, Example)]
    try:
        batch = collate(items)
    except MemoryError:
        raise
    except Exception as error:
        faults = [(example, _fault(collate, example)) for example in examples]
        refused = [(example.sample, fault) for example, fault in faults if fault is not None]
        if not refused:
            raise
        if on_error == "raise":
            sample, fault = refused[0]
            raise ValueError(_describe(sample, fault)) from error
        skipped += [Skipped(sample.uid, _describe(sample, fault)) for sample, fault in refused]
        usable = [example for example, fault in faults if fault is None]
        batch = collate([*skipped, *usable])
    return batch, tuple(skipped)


def _fault(collate: Collator, example: Example) -> Exception | None:
    try:
        collate([example])
    except MemoryError:
        raise
    except Exception as error:  # processors raise whatever they meet: IndexError, TypeError, RuntimeError
        return error
    return None


def _describe(sample: Sample, fault: Exception) -> str:
    """The fault behind the sample's name and files."""
    name = f"sample {sample.uid!r}"
    text = str(fault).removeprefix(name).removeprefix(":").strip()
    if not isinstance(fault, ValueError):
        text = f"{type(fault).__name__}: {text}"
    return (
        f"{name} ({sample.files or 'no media'}): {text}; correct or drop the row, or skip such rows with on_error=skip"
    )
