"""A DeepSpeed configuration file as users have it: read, checked, and its "auto" values filled in.

What DeepSpeed does is taken from the file: stage, offloading, buckets. What this project decides elsewhere, in one
place each (batch sizes, clipping, precision, optimizer, schedule), may stand in the file as "auto", or with the value
that the run has; a value that contradicts the run is refused by name.

`"auto"` means what it means in Hugging Face's Trainer; formulas for buckets are those of its documentation."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stts.command_line import nearest

AUTO = "auto"
_PASSED_ON = frozenset(
    {
        "zero_optimization",
        "bf16",
        "fp16",
        "gradient_clipping",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "activation_checkpointing",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "aio",
        "comms_logger",
        "flops_profiler",
        "torch_autocast",
        "data_types",
        "seq_parallel_communication_data_type",
        "checkpoint",
    }
)
_DECIDED_HERE = frozenset(
    {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler"}
)


def read_deepspeed_json(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file or mapping, "auto" values as they are. ValueError for what DeepSpeed would not know."""
    name, settings = "the DeepSpeed config", source
    if isinstance(source, str | Path):
        name = str(source)
        try:
            settings = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{name} is no DeepSpeed configuration: expected a JSON file ({error})") from error
    if not isinstance(settings, Mapping):
        raise ValueError(f"{name} holds {type(settings).__name__}; expected a JSON object with zero_optimization")
    if unknown := sorted(set(settings) - _PASSED_ON - _DECIDED_HERE):
        raise ValueError(
            f"{name} has the keys {unknown}, which are not known here{nearest(unknown[0], sorted(_PASSED_ON))}; "
            f"expected {', '.join(sorted(_PASSED_ON))}"
        )
    zero = settings.get("zero_optimization", {})
    check_zero(name, zero)
    return copy.deepcopy(dict(settings)) | {"zero_optimization": {"stage": 0, **zero}}


def check_zero(name: str, zero: Mapping[str, Any]) -> None:
    """ValueError, opened by `name`, for a zero_optimization section that DeepSpeed would not take, or not run."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    if zero.get("stage", 0) not in (0, 1, 2, 3):
        raise ValueError(f"{name}: zero_optimization.stage={zero['stage']!r} is not a stage of ZeRO; use 0, 1, 2 or 3")
    plain = {key: value for key, value in zero.items() if value != AUTO}
    try:
        DeepSpeedZeroConfig(**plain)
    except ValueError as error:  # pydantic: a paragraph for each key
        lines = [line for line in str(error).splitlines()[1:] if "further information" not in line]
        raise ValueError(f"{name}: zero_optimization is not as DeepSpeed expects: {' '.join(lines)}") from error
    for part in ("offload_optimizer", "offload_param"):
        offload = zero.get(part) or {}
        path = offload.get("nvme_path")
        if offload.get("device") == "nvme" and not (path and Path(path).is_dir()):
            raise ValueError(
                f"{name}: zero_optimization.{part}.nvme_path={path!r} is no folder; create it on a "
                "local disk, or use device: cpu"
            )
        if part == "offload_param" and offload.get("device", "none") != "none" and zero.get("stage") != 3:
            raise ValueError(f"{name}: offload_param needs stage 3, where parameters are cut; got {zero.get('stage')}")


def fill_in(
    settings: Mapping[str, Any],
    *,
    accumulate: int,
    ranks: int,
    batch_size: int,
    max_grad_norm: float | None,
    precision: str,
    llm_width: int,
) -> dict[str, Any]:
    """The settings that DeepSpeed gets, with the values of this run in place of "auto".

    batch_size: samples per batch and rank; 0 where a token budget decides. ValueError for a value of the file that
    contradicts the run, with the setting that decides."""
    filled = copy.deepcopy(dict(settings))
    samples = batch_size or None
    decided = {
        "gradient_accumulation_steps": (accumulate, "trainer.accumulate_grad_batches", ""),
        "train_micro_batch_size_per_gpu": (samples, "data.batch_size", ""),
        "train_batch_size": (
            samples and samples * accumulate * ranks,
            "data.batch_size",
            f" ({samples} samples x {accumulate} batches x {ranks} ranks)",
        ),
        "gradient_clipping": (max_grad_norm or 0.0, "model.max_grad_norm", ""),
    }
    for key, (value, setting, how) in decided.items():
        stated = filled.pop(key, AUTO)
        if stated != AUTO and value is None:
            raise ValueError(
                f"{key}={stated} in the DeepSpeed config contradicts data.max_tokens, by which batches differ in "
                "samples; write 'auto', or set data.batch_size and data.max_tokens=0"
            )
        if stated != AUTO and stated != value:
            raise ValueError(
                f"{key}={stated} in the DeepSpeed config contradicts {setting}, by which it is {value}{how}; "
                "write 'auto'"
            )
    filled["gradient_clipping"] = max_grad_norm or 0.0
    for key, kinds in (("bf16", ("bf16-mixed", "bf16-true")), ("fp16", ("16-mixed", "16-true"))):
        section = dict(filled.get(key) or {})
        stated, value = section.get("enabled", AUTO), precision in kinds
        if stated != AUTO and bool(stated) != value:
            raise ValueError(
                f"{key}.enabled={stated} in the DeepSpeed config contradicts trainer.precision={precision}; set one of "
                f"{' or '.join(kinds)} there, or write 'auto'"
            )
        filled.pop(key, None)
        if value:
            filled[key] = {**{k: v for k, v in section.items() if v != AUTO}, "enabled": True}
    for key, setting in (("optimizer", "model.llm_lr and its siblings"), ("scheduler", "model.warmup_steps")):
        section = filled.pop(key, None) or {}
        stated = {name: value for name, value in section.get("params", {}).items() if value != AUTO}
        if stated:
            raise ValueError(
                f"{key}.params={stated} in the DeepSpeed config is decided by {setting}; write 'auto', or leave the "
                "section out: AdamW with a warm-up and a cosine"
            )
    zero = dict(filled["zero_optimization"])
    automatic = {
        "reduce_bucket_size": llm_width**2,
        "stage3_prefetch_bucket_size": int(0.9 * llm_width**2),
        "stage3_param_persistence_threshold": 10 * llm_width,
    }
    for key in [key for key, value in zero.items() if value == AUTO]:
        if key in automatic:
            zero[key] = automatic[key]
        else:
            del zero[key]  # DeepSpeed's default
    filled["zero_optimization"] = zero
    filled.setdefault("zero_allow_untested_optimizer", True)
    return filled
