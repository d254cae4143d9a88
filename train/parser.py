"""The parser of `stts fit` and `stts plan`: Lightning's, with our words, and Hugging Face's names for our options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from stts.command_line import Spoken

_TRAINER, _SHAPES = "trainer.", "data.shapes."
_OWN_WORDS = {  # for options of Lightning's that its own help says at length, or with other programs in mind
    "config": ("FILE", "YAML file with these settings; several are read one after the other."),
    "seed_everything": ("N", "of all random numbers."),
    "trainer.devices": ("N", "GPUs of this machine (or processes), or auto."),
    "trainer.num_nodes": ("N", "machines."),
    "trainer.strategy": ("NAME", "auto, ddp, fsdp2, or deepspeed_stage_1, _2, _3, _2_offload, _3_offload."),
    "trainer.precision": ("NAME", "bf16-mixed, bf16-true, 32-true, ..."),
    "trainer.max_steps": ("N", "optimizer steps; -1: no limit."),
    "data.train": ("FILE", None),
    "data.val": ("FILE", None),
    "out": ("DIR", None),
}


class FitParser(Spoken, LightningArgumentParser):  # type: ignore[misc]
    """Ours first; Lightning's Trainer but for a few of its settings stands behind --help-trainer."""

    trainer_help = False
    """Whether the help is of the Trainer's settings alone."""

    def shown(self) -> list[tuple[str, list[Any]]]:
        listed = [action for action in self._actions if action.option_strings]
        trainer = [action for action in listed if action.dest.startswith(_TRAINER)]
        if self.trainer_help:
            return [("Lightning's Trainer:", trainer)]
        for action in listed:
            name, words = _OWN_WORDS.get(action.dest, (action.metavar, None))
            action.metavar, action.help = name, words or action.help
        main = [action for action in trainer if action.dest in _OWN_WORDS]
        own = [action for action in listed if not action.dest.startswith(_SHAPES)]
        parts = {name: [one for one in own if one.dest.startswith(f"{name}.")] for name in ("model", "data")}
        loose = [one for one in listed if "." not in one.dest and one.dest not in ("model", "data", "trainer")]
        drawn, machine = "--data.shapes.NAME: as --form.NAME of `stts data shapes`", "more: stts fit --help-trainer"
        return [
            ("options:", loose),
            ("model:", parts["model"]),
            (f"data ({drawn}):", parts["data"]),
            (f"machine ({machine}):", main),
        ]


def _is_true(value: str) -> bool:
    return value.lower() in ("true", "1", "yes", "")


ALIASES: dict[str, Callable[[str], list[str]]] = {
    "model_name_or_path": lambda value: [f"--model.model={value}"],
    "data_path": lambda value: [f"--data.train={value}"],
    "output_dir": lambda value: [f"--out={value}"],
    "learning_rate": lambda value: [f"--model.llm_lr={value}"],
    "weight_decay": lambda value: [f"--model.weight_decay={value}"],
    "max_grad_norm": lambda value: [f"--model.max_grad_norm={value}"],
    "warmup_steps": lambda value: [f"--model.warmup_steps={value}"],
    "gradient_checkpointing": lambda value: [f"--model.gradient_checkpointing={str(_is_true(value)).lower()}"],
    "per_device_train_batch_size": lambda value: [f"--data.batch_size={value}", "--data.max_tokens=0"],
    "per_device_eval_batch_size": lambda value: [f"--data.val_batch_size={value}"],
    "dataloader_num_workers": lambda value: [f"--data.num_workers={value}"],
    "gradient_accumulation_steps": lambda value: [f"--trainer.accumulate_grad_batches={value}"],
    "max_steps": lambda value: [f"--trainer.max_steps={value}"],
    "num_train_epochs": lambda value: [f"--trainer.max_epochs={value}", "--trainer.max_steps=-1"],
    "bf16": lambda value: [f"--trainer.precision={'bf16-mixed' if _is_true(value) else '32-true'}"],
    "report_to": lambda value: [f"--logger={'csv' if value == 'none' else value}"],
    "resume_from_checkpoint": lambda value: [
        f"--resume={'last' if _is_true(value) else 'null' if value.lower() == 'false' else value}"
    ],
    "logging_steps": lambda value: [f"--progress_every={value}"],
    "save_steps": lambda value: [f"--checkpoint_every={value}"],
    "save_total_limit": lambda value: [f"--keep_checkpoints={value}"],
    "seed": lambda value: [f"--seed_everything={value}"],
}
"""Names of Hugging Face's TrainingArguments -> our options. `learning_rate` is that of the LLM; a batch size replaces
the token budget `data.max_tokens`."""


def translate(words: Sequence[str]) -> list[str]:
    """The words with every alias, with underscores or dashes, as our own option."""
    rest, translated = list(words), []
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        alias = ALIASES.get(name[2:].replace("-", "_")) if name.startswith("--") else None
        if alias is None:
            translated.append(word)
            continue
        if not equals and rest and not rest[0].startswith("--"):
            value = rest.pop(0)
        translated += alias(value)
    return translated
