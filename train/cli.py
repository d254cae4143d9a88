"""`stts fit --config configs/x.yaml [--model.pruner stts ...]`: LightningCLI over `VideoFinetune` and `VideoData`.

Everything in a YAML file is an argument of one of these classes or of Lightning's Trainer, plus `out` (the folder of
everything the run writes) and `resume`."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from .callbacks import Export, ProgressLines, SkipList
from .data_module import VideoData
from .module import VideoFinetune


class FitCLI(LightningCLI):
    """The parser and the objects; `fit` runs them."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.usage = (
            "stts fit --config FILE.yaml [--out DIR] [--model.NAME VALUE] [--data.NAME VALUE] [--trainer.NAME VALUE]"
        )
        parser.add_argument(
            "--out", type=str, required=True, help="folder for logs, checkpoints and the exported model"
        )
        parser.add_argument(
            "--resume", type=str | None, default=None, help="checkpoint to go on from; 'last': the newest in `out`"
        )
        parser.add_argument("--progress_every", type=int, default=50, help="optimizer steps between progress lines")
        parser.add_argument(
            "--checkpoint_every", type=int, default=500, help="optimizer steps between checkpoints; 0: none"
        )

    def before_instantiate_classes(self) -> None:
        resume = self.config["resume"]
        if resume not in (None, "last") and not Path(resume).exists():
            raise ValueError(f"no checkpoint at {resume}; give a file of <out>/checkpoints, or 'last'")

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config, out = self.config_init, Path(self.config_init["out"])
        trainer = config["trainer"]
        if trainer["default_root_dir"] is None:
            trainer["default_root_dir"] = str(out)
        if trainer["logger"] in (None, True):  # anything else (W&B, say) only when the config asks for it
            trainer["logger"] = CSVLogger(out, name="log")
        extra: list[pl.Callback] = [ProgressLines(config["progress_every"]), SkipList(out), Export(out)]
        if config["checkpoint_every"]:
            # save_last names the newest `last.ckpt`; written to a temporary name first by Lightning
            extra.append(
                ModelCheckpoint(
                    out / "checkpoints", save_last=True, save_top_k=1, every_n_train_steps=config["checkpoint_every"]
                )
            )
        else:
            trainer["enable_checkpointing"] = False
        trainer["callbacks"] = [*extra, *(trainer["callbacks"] or [])]
        return super().instantiate_trainer(**kwargs)


def make_cli(argv: Sequence[str]) -> FitCLI:
    """Parse and build, without running. SystemExit with a message for a bad config, ValueError for bad settings."""
    return FitCLI(
        VideoFinetune,
        VideoData,
        args=list(argv),
        run=False,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "stts fit"},
        save_config_kwargs={"overwrite": True},
        # our batches are sharded by rank already; a replaced sampler would undo token-budget batches
        trainer_defaults={"use_distributed_sampler": False, "enable_progress_bar": sys.stderr.isatty()},
    )


def fit(argv: Sequence[str]) -> int:
    """Run training and return the exit code; errors in input or settings are one line on stderr, and code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked loader workers would warn, once each
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")  # `stts fit` hands over its own
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")  # Lightning 2.6 on torch 2.13
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # no validation asked for
    try:
        cli = make_cli(argv)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config["resume"], weights_only=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 130 if cli.trainer.interrupted else 0


if __name__ == "__main__":
    raise SystemExit(fit(sys.argv[1:]))
