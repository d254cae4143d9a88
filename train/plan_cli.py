"""The verb `stts plan`: the parser of `stts fit` with questions of its own, and the plan as text (`plan.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.cli import LightningArgumentParser

from stts.models.families.published import config_of

from .cli import ReadingCLI, read_config
from .parser import translate
from .plan import GIB, SPARE, describe, make_plan
from .plan_config import Run, run_of


class PlanCLI(ReadingCLI):
    """The parser of `stts fit` with the questions of `stts plan`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.prog = "stts plan"
        parser.usage = "stts plan --config FILE.yaml [--gpus N] [--gpu_gib G] [options of stts fit]"
        parser.description = "Memory, tokens and FLOPs of a run of `stts fit` before it starts, and what to change."
        height, width = Run.frame_size
        parser.add_argument("--gpus", type=int, default=0, help="GPUs in all; 0: devices x nodes of the config")
        parser.add_argument("--gpu_gib", type=float, default=Run.gpu_gib, help="memory of one GPU")
        parser.add_argument("--model_config", type=Path | None, help="config.json of a model that is not here")
        parser.add_argument(
            "--frame_size", type=str, default=f"{height}x{width}", help="of the video files, height x width"
        )
        parser.add_argument(
            "--text_tokens", type=int, default=Run.text_tokens, help="of a conversation without its video"
        )
        parser.add_argument("--answer_tokens", type=int, default=Run.answer_tokens, help="how many of them are answers")


def read_run(argv: Sequence[str]) -> Run:
    """The run that a config describes. ValueError for settings `stts fit` would refuse, and for unknown models."""
    settings = read_config(argv, PlanCLI)
    if settings["gpus"] < 0 or settings["gpu_gib"] <= 0:
        raise ValueError(f"--gpus {settings['gpus']} and --gpu_gib {settings['gpu_gib']} must be above 0")
    height, _, width = settings["frame_size"].partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise ValueError(f"--frame_size {settings['frame_size']} must be HEIGHTxWIDTH in pixels, such as 720x1280")
    return run_of(
        settings,
        config_of(settings["model"]["model"], settings["model_config"]),
        gpus=settings["gpus"],
        frame_size=(int(height), int(width)),
        **{name: settings[name] for name in ("gpu_gib", "text_tokens", "answer_tokens")},
    )


def plan(argv: Sequence[str]) -> int:
    """`stts plan`: 0 when the run fits, 1 when it does not."""
    run = read_run(translate(argv))
    result = make_plan(run)
    print(describe(run, result))
    return 0 if result.total <= run.gpu_gib * (1 - SPARE) * GIB else 1
