"""`stts doctor`: what this machine has, what works when tried, what will be slow, what is missing and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from importlib import metadata, util
from json import dumps
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from huggingface_hub import constants

import stts
from stts.data.video.sample import sample_frames
from stts.models.families.base import TESTED_TRANSFORMERS
from stts.packing.attention import kernel_name, packed_attention
from stts.packing.naive import naive_packed_attention
from stts.packing.segments import Segments

_SHOWN = (
    "torch", "transformers", "torchvision", "numpy", "av", "safetensors", "huggingface_hub", "jsonargparse",
    "lightning", "deepspeed", "wandb", "peft", "pyarrow", "flash-attn", "triton", "sentencepiece", "protobuf",
)  # fmt: skip
_OPTIONAL = {
    "lightning": ("`stts fit`", "pip install 'stts-video[fit]'"),
    "deepspeed": ("`stts fit` with ZeRO on many GPUs", "pip install 'stts-video[train]'"),
    "pyarrow": ("benchmarks and data in Parquet files", "pip install 'stts-video[parquet]'"),
    "peft": ("`stts fit` with LoRA", "pip install 'stts-video[lora]'"),
    "wandb": ("logging to Weights & Biases", "pip install 'stts-video[train]'"),
    "sentencepiece": ("the text tower of `--siglip`", "pip install 'stts-video[siglip]'"),
    "protobuf": ("the text tower of `--siglip`", "pip install 'stts-video[siglip]'"),
}
_CODECS = ("h264", "hevc", "vp9", "av1")
_FREE_GIB = 20  # a 7B checkpoint in bf16 is about 15 GiB


def examine() -> dict[str, Any]:
    """Everything below, as plain data; nothing raises, what fails is told under its name."""
    versions = {name: _version(name) for name in _SHOWN}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts: dict[str, Any] = {
        "stts": stts.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "device": _device(device),
        "attention": _attention(device),
        "video": _video(),
        "cache": _cache(),
    }
    return {**facts, "slow": _slow(facts, device), "missing": _missing(versions, facts, device)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"kind": device.type, "threads": torch.get_num_threads(), "cores": _cores()}
    if device.type == "cuda":
        found["gpus"] = [
            {
                "name": torch.cuda.get_device_name(number),
                "memory_gib": round(torch.cuda.get_device_properties(number).total_memory / 2**30, 1),
                "capability": "{}.{}".format(*torch.cuda.get_device_capability(number)),
            }
            for number in range(torch.cuda.device_count())
        ]
        found["cuda"] = torch.version.cuda
        found["bf16"] = torch.cuda.is_bf16_supported()
    return found


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _attention(device: torch.device) -> dict[str, Any]:
    """Which kernels are there, which one is chosen, and whether it gives what the naive loops give."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found: dict[str, Any] = {
        "available": [
            "SDPA",
            *(["torch varlen"] if device.type == "cuda" and util.find_spec("torch.nn.attention.varlen") else []),
            *(["flash-attn varlen"] if device.type == "cuda" and util.find_spec("flash_attn") else []),
        ]
    }
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, 2, 16, generator=generator).to(device, dtype) for _ in range(3))
    segments = Segments.from_lengths(torch.tensor([5, 4], device=device), 5)
    try:
        found["chosen"] = f"{kernel_name(device, dtype)} ({str(dtype).removeprefix('torch.')})"
        out = packed_attention(q, k, v, segments, scale=0.25)
        expected = naive_packed_attention(q.float(), k.float(), v.float(), segments, scale=0.25)
        error = (out.float() - expected).abs().max().item()
        found["works"] = error < (2e-2 if dtype == torch.bfloat16 else 1e-4)
        found["error"] = f"largest difference from the naive loops: {error:.1e}"
    except Exception as error:  # a broken kernel may raise anything; this is where it is to be told
        found |= {"works": False, "error": _line(error)}
    return found


def _video() -> dict[str, Any]:
    """Write a real MP4, read it back, and see that the frames come in order."""
    decoders = [name for name in _CODECS if _has_decoder(name)]
    found: dict[str, Any] = {"ffmpeg": av.ffmpeg_version_info, "decoders": decoders}
    levels = (40, 120, 200)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            with av.open(str(path), "w") as container:
                stream = container.add_stream("libx264", rate=4)
                stream.width = stream.height = 64
                stream.pix_fmt = "yuv420p"
                for level in levels:
                    picture = np.full((64, 64, 3), level, np.uint8)
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                container.mux(stream.encode(None))
            means = sample_frames(path, num_frames=3).frames.mean((1, 2, 3))
        found["works"] = bool(np.abs(means - levels).max() < 8)
        found["error"] = (
            "" if found["works"] else f"frames of brightness {levels} came back as {means.round().tolist()}"
        )
    except Exception as error:
        found |= {"works": False, "error": _line(error)}
    return found


def _has_decoder(name: str) -> bool:
    try:
        av.Codec(name, "r")
    except ValueError:
        return False
    return True


def _cache() -> dict[str, Any]:
    """The folder for downloaded checkpoints, or where it would be made."""
    folder = Path(constants.HF_HUB_CACHE)
    present = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=present):
            writable = True
    except OSError:
        writable = False
    free = shutil.disk_usage(present).free / 2**30
    return {
        "folder": str(folder), "writable": writable, "free_gib": round(free, 1), "offline": constants.HF_HUB_OFFLINE
    }  # fmt: skip


def _slow(found: Mapping[str, Any], device: torch.device) -> list[str]:
    """What will be slow here, and why."""
    reasons = []
    if device.type == "cpu":
        reasons.append(
            "no GPU: right for the shipped small model and the tests; a checkpoint of 0.5B or more needs a GPU"
        )
        if torch.version.cuda is None and (shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists()):
            reasons.append(
                "there is an NVIDIA GPU, but this torch is built for the CPU: install torch from pytorch.org"
            )
    else:
        if not found["device"]["bf16"]:
            reasons.append("this GPU has no bf16: load models in float16, or attention falls back to SDPA in float32")
        if found["attention"].get("chosen", "").startswith("SDPA"):
            reasons.append(
                "no variable-length kernel: attention is padded to the longest sequence (install flash-attn)"
            )
    threads, cores = found["device"]["threads"], found["device"]["cores"]
    if threads < cores:
        reasons.append(f"torch uses {threads} of {cores} cores: unset OMP_NUM_THREADS, or set it to {cores}")
    return reasons


def _missing(
    versions: Mapping[str, str | None], found: Mapping[str, Any], device: torch.device
) -> list[dict[str, str]]:
    """What is not there or does not work: name, what it is for, how to get it."""
    missing = [
        {"name": name, "for": purpose, "how": how}
        for name, (purpose, how) in _OPTIONAL.items()
        if versions[name] is None
    ]
    if device.type == "cuda" and versions["flash-attn"] is None:
        how = "pip install flash-attn --no-build-isolation (optional: without it torch's own kernel runs)"
        missing.append({"name": "flash-attn", "for": "faster attention on packed rows", "how": how})
    lowest, above = TESTED_TRANSFORMERS
    version = tuple(int(part) for part in (versions["transformers"] or "0.0").split(".")[:2])
    if not lowest <= version < above:
        tested = f"transformers>={lowest[0]}.{lowest[1]},<{above[0]}.{above[1]}"
        missing.append({"name": tested, "for": "the tested range", "how": f"pip install '{tested}'"})
    if int((versions["av"] or "0").split(".")[0]) < 17:
        missing.append({"name": "av>=17", "for": "noticing every cut-off MP4", "how": "pip install -U av"})
    lost = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if versions["deepspeed"] and lost:
        how = "apt install g++; pip install ninja (and put its folder on the PATH)"
        missing.append({"name": ", ".join(lost), "for": "DeepSpeed's CPU optimizer, compiled on first use", "how": how})
    if not found["attention"]["works"]:
        how = f"{found['attention']['error']}; reinstall torch, or flash-attn for this torch"
        missing.append({"name": "working attention", "for": "every pruned forward pass", "how": how})
    if not found["video"]["works"]:
        how = f"{found['video']['error']}; reinstall PyAV: pip install --force-reinstall av"
        missing.append({"name": "working video decoding", "for": "reading any video", "how": how})
    lost = [name for name in _CODECS if name not in found["video"]["decoders"]]
    if lost:
        missing.append({"name": f"decoders {', '.join(lost)}", "for": "such videos", "how": "pip install --upgrade av"})
    cache = found["cache"]
    if not cache["writable"]:
        how = "set HF_HOME to a folder you may write to"
        missing.append({"name": f"writable cache {cache['folder']}", "for": "downloading checkpoints", "how": how})
    elif cache["free_gib"] < _FREE_GIB:
        how = f"{cache['free_gib']} GiB free at {cache['folder']}; make room, or set HF_HOME to another disk"
        missing.append({"name": "disk space", "for": "a 7B checkpoint (about 15 GiB)", "how": how})
    return missing


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def render(found: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    device, attention, video, cache = (found[name] for name in ("device", "attention", "video", "cache"))
    gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB, capability {gpu['capability']}" for gpu in device.get("gpus", [])]
    lines = [
        f"stts {found['stts']}, Python {found['python']}, {found['system']}",
        "",
        *(f"  {name:16}{version or '-'}" for name, version in found["versions"].items()),
        "",
        f"device      {'; '.join(gpus) or 'CPU'}; {device['threads']} threads on {device['cores']} cores",
        f"attention   {_verdict(attention)}: {attention.get('chosen', 'none')}; available: "
        + ", ".join(attention["available"]),
        f"video       {_verdict(video)}: FFmpeg {video['ffmpeg']}; decodes {', '.join(video['decoders'])}",
        f"cache       {'ok' if cache['writable'] else 'NOT WRITABLE'}: {cache['folder']}, {cache['free_gib']} GiB free"
        + (", offline (HF_HUB_OFFLINE)" if cache["offline"] else ""),
        "",
        "will be slow:" if found["slow"] else "nothing here will be slow for a known reason",
        *(f"  {reason}" for reason in found["slow"]),
        "missing:" if found["missing"] else "nothing is missing",
        *(f"  {item['name']}, for {item['for']}: {item['how']}" for item in found["missing"]),
    ]
    return "\n".join(lines)


def _verdict(part: Mapping[str, Any]) -> str:
    return "ok" if part["works"] else f"BROKEN ({part['error']})"


def doctor(*, json: bool = False) -> str:
    """Tell what this machine has and what it lacks.

    Args:
        json: for programs.
    """
    facts = examine()
    return dumps(facts, indent=1) if json else render(facts)
