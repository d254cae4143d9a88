"""What does not learn stays out of checkpoints: it is that of the model which the run started from.

A run with LoRA writes adapters and the scorer, some hundredths of the model. That the frozen rest is still the same
when a run goes on, or is exported, is told by a fingerprint of it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 64  # values of each tensor that enter the fingerprint
DEEPSPEED_PREFIX = "_forward_module."
"""What Lightning's strategy for DeepSpeed wraps around the module, in front of names in its checkpoints."""


def leave_out_frozen(module: nn.Module) -> None:
    """From now on `module.state_dict()` holds what learns alone, and loading it misses nothing, in place.

    `whole_state` has everything."""
    module.register_state_dict_post_hook(_drop)
    module.register_load_state_dict_post_hook(_excuse)


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the module, frozen or not, under the names of `state_dict()`; parameters as they are."""
    whole: dict[str, Tensor] = {}
    for name, child in module.named_children():
        whole |= child.state_dict(prefix=f"{name}.", keep_vars=True)
    return whole


def frozen_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that do not learn, by name; tied ones under each of their names."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if not parameter.requires_grad}


def fingerprint(module: nn.Module) -> str:
    """Of the frozen parameters, of some values of each: equal for equal weights, on any machine. "" without any.

    Call it before training converts or cuts them."""
    frozen = frozen_parameters(module)
    digest = hashlib.sha256()
    for name in sorted(frozen):
        flat = frozen[name].detach().flatten()
        digest.update(f"{name} {tuple(frozen[name].shape)}".encode())
        digest.update(flat[:: max(1, len(flat) // _SAMPLES)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16] if frozen else ""


def learning_shapes(module: nn.Module) -> str:
    """A digest of names and shapes of what learns: equal where a checkpoint of one module fits another.

    Call it before training cuts them."""
    named = {name: tuple(parameter.shape) for name, parameter in module.named_parameters() if parameter.requires_grad}
    return hashlib.sha256(repr(sorted(named.items())).encode()).hexdigest()[:16]


def frozen_dtype(module: nn.Module) -> str:
    """The dtype in which a run holds what is frozen, such as "bfloat16"; "" where there are several: as loaded."""
    dtypes = {parameter.dtype for parameter in frozen_parameters(module).values()}
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else ""


def frozen_tensors(module: nn.Module, dtype: str) -> dict[str, Tensor]:
    """The frozen parameters as a run held them; dtype: what `frozen_dtype` said of it."""
    frozen = frozen_parameters(module)
    return {n: p.detach().to(getattr(torch, dtype)) if dtype else p.detach() for n, p in frozen.items()}


def _drop(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in frozen_parameters(module):
        state.pop(prefix + name, None)


def _excuse(module: nn.Module, keys: Any) -> None:
    frozen = frozen_parameters(module)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name.removeprefix(DEEPSPEED_PREFIX) not in frozen]
