"""LoRA (arXiv 2106.09685) on the language model, through peft: the class, the names and the forward code stay stock.

Exported folders are ordinary ones: the low-rank product is added to the weights it belongs to, so the stock class loads
them without peft. On request the adapter alone is written, as a folder of peft's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

MARK = ".lora_"
"""In the names of all adapter parameters and of no others."""


@dataclass(frozen=True)
class Lora:
    """Train low-rank additions to the LLM's linear layers and nothing else of it, at the rate `llm_lr`."""

    rank: int = 16
    alpha: float = 32.0
    """The addition is scaled by alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of every decoder layer, by name; all families share these names."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1 or self.alpha <= 0 or not self.targets:
            raise ValueError(
                f"lora rank={self.rank} must be at least 1, alpha={self.alpha} above 0 and targets={self.targets} not "
                "empty; leave `lora` out to train the whole LLM"
            )


def add_lora(llm: nn.Module, lora: Lora) -> None:
    """Put adapters into this language model, in place. They start at zero and are fp32 whatever the weights are.

    ValueError: peft is missing, or a target is no linear layer of this model."""
    if find_spec("peft") is None:
        raise ValueError("model.lora needs peft: pip install 'stts-video[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    linear = {name.rpartition(".")[2] for name, module in llm.named_modules() if isinstance(module, nn.Linear)}
    if unknown := sorted(set(lora.targets) - linear):
        raise ValueError(
            f"lora targets {unknown} are no linear layers of {type(llm).__name__}; it has {sorted(linear)}"
        )
    # peft decides by configs meant for whole models; a list of exact names leaves nothing to decide
    targets = [
        name
        for name, module in llm.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in lora.targets
    ]
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)  # type: ignore[arg-type, unused-ignore]
    inject_adapter_in_model(config, llm)
    for name, parameter in llm.named_parameters():
        if MARK in f".{name}":
            parameter.data = parameter.data.float()


def merge(tensors: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """The tensors under stock names, the adapters added to the weights they belong to."""
    merged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if MARK in name:
            continue
        if ".base_layer." not in name:
            merged[name] = tensor
            continue
        if name.endswith(".weight"):
            up, down = (tensors[name.replace("base_layer", f"lora_{side}.default")].float() for side in "BA")
            tensor = (tensor.float() + up @ down * (lora.alpha / lora.rank)).to(tensor.dtype)
        merged[name.replace(".base_layer.", ".")] = tensor
    return merged


def save_adapter(folder: Path, tensors: Mapping[str, Tensor], lora: Lora, base: str) -> None:
    """Write the adapters among these tensors into `folder`, so that `peft.PeftModel.from_pretrained(model, folder)`
    puts them on the stock model `base`.

    tensors: named as in `VideoFinetune`, with "model." before the names of the stock model."""
    from peft import LoraConfig

    adapters = {name: tensor for name, tensor in tensors.items() if MARK in name}
    targets = sorted({name.removeprefix("model.").partition(MARK)[0] for name in adapters})
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, inference_mode=True)  # type: ignore[arg-type, unused-ignore]
    config.base_model_name_or_path = base
    config.save_pretrained(str(folder))
    named = {f"base_model.{name.replace('.default.', '.')}": tensor for name, tensor in adapters.items()}
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
