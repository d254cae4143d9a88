"""`stts fit`: what comes before training. With `--config` the words go on as they are; with a model and rows alone the
recipe of the model's family is filled in (`recipe.py`), rows, memory and hours are told, and the run starts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
import yaml

from . import cli
from .console import print_wrapped
from .parser import translate
from .plan import GIB, make_plan
from .plan_config import Run, run_of
from .recipe import Machine, find_config, for_machine, for_rows, recipe_of, value_of
from .row_check import check_rows

_SHARE = 0.4  # of the speed of one large product that a training step is taken to reach; the line that uses it says so


def fit(argv: Sequence[str]) -> int:
    """Run training and return the exit code. ValueError where there is neither a config nor a model with rows."""
    words = translate(argv)
    if needs_recipe(words):
        rehearsed = ["--dry-run"] if "--dry-run" in words else []
        words = complete([word for word in words if word not in rehearsed]) + rehearsed
    return cli.fit(words)


def needs_recipe(words: Sequence[str]) -> bool:
    """Whether the words name a model and no config. ValueError for words with neither."""
    asks = any(word in ("-h", "--help", "--print_config") or word.startswith("--help") for word in words)
    if asks or value_of(words, "--config") is not None:
        return False
    if value_of(words, "--model.model") is None:
        raise ValueError(
            "give --config FILE.yaml; or --model.model FOLDER_OR_HUB_ID and --data.train FILE, and the recipe of the "
            "model's family is used"
        )
    return value_of(words, "--data.kind") != "shapes"


def complete(words: Sequence[str]) -> list[str]:
    """The words with the recipe of the model in front and what it leaves to machine and rows behind; prints what is
    known before a run. ValueError: rows that cannot be read, a family without a recipe."""
    if value_of(words, "--data.train") is None:
        raise ValueError("without --config, give --data.train FILE, the rows to train on (docs/data.md shows three)")
    model = value_of(words, "--model.model") or ""
    model_config = find_config(model)
    path = recipe_of(model_config)
    recipe, machine = yaml.safe_load(path.read_text(encoding="utf-8")), Machine.here()
    fitted = for_machine(words, recipe, machine)
    whole = ["--config", str(path), *words, *_words(fitted)]
    config = cli.read_config(whole)
    rows = check_rows(config["data"])
    ranks = int(value_of(whole, "--trainer.num_nodes") or 1) * _devices(whole, machine)
    run = run_of(config, model_config, gpus=ranks)
    more = for_rows(words, recipe, ranks, rows.number, make_plan(run).tokens["samples per batch"])
    whole += _words(more)
    told = [f"recipe   {path.name}; fitted to machine and rows: {' '.join(_words(fitted | more)) or 'nothing'}"]
    told += [f"rows     {line}" for line in rows.lines]
    run = replace(run, accumulate=int(value_of(whole, "--trainer.accumulate_grad_batches") or 1))
    for line in told + _costs(run, int(value_of(whole, "--trainer.max_steps") or 1), machine):
        print_wrapped(line, indent=9)
    return whole


def _words(options: dict[str, str]) -> list[str]:
    return [f"{option}={value}" for option, value in options.items()]


def _devices(words: Sequence[str], machine: Machine) -> int:
    given = value_of(words, "--trainer.devices") or ""
    return int(given) if given.isdigit() else machine.devices


def _costs(run: Run, steps: int, machine: Machine) -> list[str]:
    """Memory and hours, as far as they can be known before the first step."""
    plan = make_plan(run)
    device = torch.device("cuda" if machine.is_gpu else "cpu")
    if machine.is_gpu:
        room, where = torch.cuda.get_device_properties(0).total_memory, "one GPU here"
    else:
        room, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine"
    needed = plan.total + plan.host + plan.ready * (not machine.is_gpu)
    line = f"memory   about {needed / GIB:.1f} GiB a rank of the {room / GIB:.1f} of {where}"
    if needed > room:
        line += f": too much; `stts plan --config ... --gpu_gib {room / GIB:.0f}` says what fits, such as --model.lora"
    speed = _measured(device, torch.bfloat16 if "bf16" in run.precision else torch.float32)
    flops = sum(plan.flops.values()) / run.gpus
    hours = steps * flops / (_SHARE * speed) / 3600
    return [
        line,
        f"time     {steps} steps of {flops / 1e12:.3g} TFLOPs a rank: at least {_span(hours)} if they run at "
        f"{_SHARE:.0%} of the {speed / 1e12:.2g} TFLOPs/s of one large product here; reading and decoding not counted",
    ]


def _span(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large product on this device."""
    size = 4096 if device.type == "cuda" else 512
    x_NN = torch.randn(size, size, device=device, dtype=dtype)
    x_NN @ x_NN
    best = float("inf")
    for _ in range(3):
        begin = time.perf_counter()
        y_NN = x_NN @ x_NN
        y_NN[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
