"""`stts fit --config configs/x.yaml [--model.pruner stts ...]`: LightningCLI over `VideoFinetune` and `VideoData`.

Everything in a YAML file is an argument of one of these classes or of Lightning's Trainer, plus `out` (the folder of
everything the run writes) and `resume`."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from . import strategies  # noqa: F401  (its short names)
from .callbacks import Export, ProgressLines, SkipList
from .checkpoints import Checkpoints, Stopped, check_fits, check_model, check_size, choose, settings_of
from .console import one_line, print_rank_zero, print_wrapped
from .data_module import VideoData
from .dry_run import not_rehearsed, rehearsal
from .loggers import make_loggers
from .lost_ranks import RankLost, Roster
from .module import VideoFinetune
from .overlays import Overlays
from .parser import FitParser
from .quiet import silence
from .recipe import Machine, high_rates
from .row_check import check_rows, sources_of
from .summary import Summary
from .throughput import Throughput


class FitCLI(LightningCLI):
    """The parser and the objects; `fit` runs them."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.usage = "stts fit --model.model M --data.train FILE [options], or stts fit --config FILE [options]"
        parser.description = (
            "Fine-tune a stock video VLM under a pruner. Without --config, the recipe of the model's family is used, "
            "fitted to rows and machine. --dry-run rehearses the run in seconds. Every option can stand in the YAML of "
            "--config, with dots as levels. Names of Hugging Face's TrainingArguments are understood: "
            "--model_name_or_path, --output_dir, --learning_rate (of the LLM), --per_device_train_batch_size, "
            "--max_steps, --bf16, --report_to, --resume_from_checkpoint and others."
        )
        parser.add_argument(
            "--out", type=str, required=True, help="folder for logs, checkpoints and the exported model"
        )
        parser.add_argument(
            "--resume",
            type=str | None,
            default="auto",
            help="'auto': go on from the newest checkpoint in `out` if it has these settings, else start; 'last': go "
            "on from the newest whatever its settings; a folder of <out>/checkpoints: from that one; null: start",
        )
        parser.add_argument(
            "--logger",
            type=str | list[str],
            default="csv",
            help="where values are logged: csv, wandb, tensorboard, or several, as in csv,wandb",
        )
        parser.add_argument(
            "--overlay_every", type=int, default=0, help="optimizer steps between pictures of kept tokens; 0: none"
        )
        parser.add_argument(
            "--peak_tflops",
            type=float | None,
            default=None,
            help="bf16 peak of one device in 10^12 FLOPs per second, for `mfu`; null: by its name, where known",
        )
        parser.add_argument("--progress_every", type=int, default=50, help="optimizer steps between progress lines")
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=500,
            help="optimizer steps between checkpoints; 0: only at the end, at each best validation, and on SIGTERM",
        )
        parser.add_argument("--keep_checkpoints", type=int, default=2, help="newest checkpoints kept, beside the best")

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """**Differs** from Lightning's: data before the model, so that files that are not there are named before a
        model is loaded."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})
        parser.add_lightning_class_args(VideoData, "data")
        parser.add_lightning_class_args(VideoFinetune, "model")

    def before_instantiate_classes(self) -> None:
        trainer, started = self.config["trainer"], Machine.started()
        if started is not None:  # torchrun has started so many; another number in a config is that of other machines
            trainer["devices"], trainer["num_nodes"] = started.devices, started.nodes
        for line in high_rates(self.config["model"]):
            print_wrapped(line)
        self.settings = settings_of(yaml.safe_load(self.parser.dump(self.config, skip_none=False)))
        self.saved, self.why = choose(self.config["resume"], Path(self.config["out"]), self.settings)
        devices = trainer["devices"]
        if self.saved is not None and isinstance(devices, int) and devices > 0:
            check_size(self.saved, devices * trainer["num_nodes"], trainer["accumulate_grad_batches"])

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config, out = self.config_init, Path(self.config_init["out"])
        trainer = config["trainer"]
        if trainer["default_root_dir"] is None:
            trainer["default_root_dir"] = str(out)
        if trainer["logger"] in (None, True):
            settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
            saved = self.saved
            trainer["logger"] = make_loggers(
                config["logger"],
                out,
                config=settings,
                run_id="" if saved is None else saved.log_id,
                version=None if saved is None else saved.log_version,
                first_step=0 if saved is None else saved.step,
            )
        self.roster, every_picture = Roster(), config["overlay_every"]
        every, keep = config["checkpoint_every"], config["keep_checkpoints"]
        callbacks = trainer["callbacks"] or []
        trainer["callbacks"] = [
            self.roster,
            ProgressLines(config["progress_every"]),
            SkipList(out),
            Summary(self.config),
            Export(out),
            Throughput(config["peak_tflops"]),
            *([Overlays(out, every_picture)] if every_picture else []),
            Checkpoints(out, self.settings, every, keep, resumed=self.saved),
            *(callbacks if isinstance(callbacks, list) else [callbacks]),
        ]
        return super().instantiate_trainer(**kwargs)


class ReadingCLI(FitCLI):
    """Parses and builds nothing."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def make_cli(argv: Sequence[str]) -> FitCLI:
    """Parse and build, without running. SystemExit with a message for a bad config, ValueError for bad settings."""
    return _cli(FitCLI, argv)


def read_config(argv: Sequence[str], cli_class: type[ReadingCLI] = ReadingCLI) -> Any:
    """Every setting of a run with its default, by the parser that a run uses; nothing is loaded."""
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
    return _cli(cli_class, [*argv, "--seed_everything=false"]).config


def _cli(cli_class: type[FitCLI], argv: Sequence[str]) -> FitCLI:
    return cli_class(
        VideoFinetune,
        VideoData,
        args=list(argv),
        run=False,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        parser_kwargs={"prog": "stts fit"},
        parser_class=FitParser,
        save_config_kwargs={"overwrite": True},
        # our batches are sharded by rank already; a replaced sampler would undo token-budget batches
        trainer_defaults={"use_distributed_sampler": False, "enable_progress_bar": sys.stderr.isatty()},
    )


def _train(cli: FitCLI) -> None:
    state = None if cli.saved is None else cli.saved.state
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=state, weights_only=True)
    except (ValueError, RuntimeError) as error:
        launcher = cli.trainer.strategy.launcher
        if launcher is not None:  # the ranks that Lightning started may wait for this one
            launcher.kill(signal.SIGKILL)
        if cli.roster.lost:
            raise RankLost(cli.roster.lost) from error
        raise


def fit(argv: Sequence[str]) -> int:
    """Run training and return the exit code; errors in input or settings are one line on stderr, and code 2; a rank
    that is lost is one line, and code 1."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked loader workers would warn, once each
    silence()
    argv = list(argv)
    try:
        if "--dry-run" in argv:
            argv.remove("--dry-run")
            config = read_config(argv)
            if all(Path(str(source["path"])).exists() for source in sources_of(config["data"])):
                for line in check_rows(config["data"]).lines:
                    print_wrapped(f"rows: {line}")
            with tempfile.TemporaryDirectory() as scratch:
                code = fit(rehearsal(argv, config, Path(scratch)))
            if code == 0:
                print_wrapped(f"rehearsed, and removed; {not_rehearsed(config)}")
            return code
        cli = make_cli(argv)
        if cli.saved is not None:
            check_fits(cli.saved, cli.trainer)
            check_model(cli.saved, cli.model)
        if cli.why:
            print_rank_zero(cli.why)
        _train(cli)
    except Stopped as stopped:
        print_rank_zero(str(stopped))
        return 0
    except RankLost:  # and has been told
        return 1
    except ValueError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 130 if cli.trainer.interrupted else 0


if __name__ == "__main__":
    raise SystemExit(fit(sys.argv[1:]))
