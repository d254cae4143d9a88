"""A stock VLM with its pruner attached, to load, save and publish as one thing."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from stts.budget import check_ratio
from stts.models.checkpoints.chat import Asked, Chat, Piece
from stts.models.checkpoints.load import (
    ADAPTER_FILE,
    PRUNER_FILE,
    TRAINED,
    absolute,
    as_recorded,
    check_no_run,
    fill,
    load_vlm,
    own_files,
    pruner_settings,
    recorded_options,
    recorded_pruner,
    resize_videos,
    save_pruned,
)
from stts.models.checkpoints.named_release import read_named
from stts.models.checkpoints.stts_release import read_reference
from stts.models.families.attention import is_on
from stts.models.pruning.checks import without_adapters
from stts.models.pruning.context import Pruning
from stts.models.pruning.report import Report
from stts.models.pruning.siglip import SiglipSource, load_siglip
from stts.pruners.base import Positions


class PrunedVLM(nn.Module):
    """A stock model, its processor and a `Pruning` that stays attached until `detach`.

    A wrapper: use `.model` where a stock model is expected. As a module it has the parameters of the model and of the
    learned part, `scorer`, moves both, and in train mode adds the learned part's own losses to the model's, so that a
    plain loop or a trainer of another library trains both."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        pruning: Pruning,
        *,
        base: str | None = None,
        trained: Mapping[str, Any] | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ) -> None:
        """base: the checkpoint the model was started from (default: where it was loaded from). trained: how it was
        trained (`load.TRAINED`), to be written with it. loss_weights: of the learned part's losses, by name (default:
        as `stts fit`, temporal 0.5)."""
        super().__init__()
        self.model, self.processor, self.pruning = model, processor, pruning
        self.scorer = pruning.module
        self.loss_weights = dict({"temporal": 0.5} if loss_weights is None else loss_weights)
        self.train(model.training)
        self.trained: Mapping[str, Any] = trained or {}
        self.base = absolute(model.name_or_path if base is None else base)
        pruning.attach()

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.model.parameters())
        size = f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
        about = f"{type(self.model).__name__} from {self.model.name_or_path}, {size} parameters"
        kind = f"{str(self.model.dtype).removeprefix('torch.')} on {self.model.device}"
        return f"PrunedVLM({about}, {kind}; {self.pruning.description})"

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        pruner: str | None = None,
        retention_ratio: float | None = None,
        *,
        base_model: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        positions: Positions | None = None,
        exact: bool | None = None,
        chunk_frames: int | None = None,
        siglip: SiglipSource | None = None,
        **options: Any,
    ) -> PrunedVLM:
        """Load `base`, a folder or hub id: a stock checkpoint, or one that we wrote, complete or a scorer alone
        (with an adapter of peft beside it, which is merged into its base).

        What is None, and options left out, come from what we wrote there; for a stock checkpoint `pruner` must be
        named, and the rest is as in `Pruning`. base_model: where to load the model of a scorer alone from (default:
        the base it names). ValueError when anything does not fit; a pruner that learns is never left random."""
        if retention_ratio is not None:
            check_ratio(retention_ratio)
        folder = own_files(base)
        settings = pruner_settings(folder) or {}
        alone = bool(settings) and not (folder / "config.json").is_file()
        if base_model is not None and not alone:
            raise ValueError(f"{base} has weights of its own; base_model={str(base_model)!r} is for a scorer alone")
        if pruner is None and not settings:
            raise ValueError(f"{base} has no {PRUNER_FILE}, so name a pruner, for example pruner='novelty'")
        name = pruner or recorded_pruner(folder, settings)
        origin = str(base_model or settings.get("base") or base)
        model, processor = _load_base(folder, origin, dtype) if alone else load_vlm(base, dtype=dtype)
        if alone and "video_size" in settings:
            resize_videos(processor, settings["video_size"])
        if device is not None:
            model.to(device)
        chosen = as_recorded(folder, retention_ratio=retention_ratio, exact=exact, positions=positions)
        pruning = Pruning(
            model,
            name,
            retention_ratio=0.5 if chosen["retention_ratio"] is None else chosen["retention_ratio"],
            exact=chosen["exact"] is not False,
            positions=chosen["positions"],
            chunk_frames=chunk_frames,
            siglip=siglip,
            weights=folder,
            **recorded_options(folder, name, options),
        )
        trained = {key: settings[key] for key in TRAINED if key in settings}
        if name != settings.get("pruner"):
            trained.pop("retention_trained", None)
        return cls(model, processor, pruning, base=origin, trained=trained)

    @property
    def last(self) -> Report | None:
        """What the last forward pass with video did."""
        return self.pruning.last

    def forward(self, **inputs: Any) -> Any:
        """A forward pass of the model; in train mode its `loss` includes the weighted losses of the learned part.

        ValueError for a loss that `loss_weights` does not name."""
        out = self.model(**inputs)
        if self.model.training and out.loss is not None and self.last is not None:
            losses = self.last.losses
            if unknown := sorted(set(losses) - set(self.loss_weights)):
                raise ValueError(f"the pruner gives the losses {unknown}, which loss_weights={self.loss_weights} lacks")
            for name, value in losses.items():
                out.loss = out.loss + self.loss_weights[name] * value
        return out

    @property
    def config(self) -> Any:
        """Of the model."""
        return self.model.config

    def generate(self, **inputs: Any) -> Any:
        """`generate` of the model."""
        return self.model.generate(**inputs)

    def chat(self, *, num_frames: int | None = None, sampler: str | None = None, max_fps: float | None = None) -> Chat:
        """A `Chat` with this model. Where `num_frames` or `sampler` is None it is as the model was trained, else 32
        frames by uniform_inclusive."""
        recorded = self.trained
        return Chat(
            self.pruning,
            self.processor,
            num_frames=num_frames or recorded.get("num_frames") or 32,
            sampler=sampler or recorded.get("sampler") or "uniform_inclusive",
            max_fps=max_fps or recorded.get("max_fps"),
        )

    def ask(
        self,
        video: str | Path,
        question: str,
        *,
        num_frames: int | None = None,
        sampler: str | None = None,
        clip: tuple[float, float] | None = None,
        folder_fps: float = 1.0,
        max_new_tokens: int = 32,
    ) -> Asked:
        """The answers with every token and with those that the pruner keeps; `print` shows both, and what was saved.

        video: a file, or a folder with its frames as pictures, `folder_fps` of them a second. clip: seconds (start,
        end) to look at. Frames that are None are chosen as the model was trained, else 16 by uniform_inclusive. Each
        answer is timed behind an untimed first token. ValueError: the video is broken, or the pruner drops nothing."""
        chat = self.chat(num_frames=num_frames or self.trained.get("num_frames") or 16, sampler=sampler)
        learning = self.training
        self.eval()
        try:
            return chat.side_by_side(Piece("video", video, clip, folder_fps), question, max_new_tokens=max_new_tokens)
        finally:
            self.train(learning)

    def detach(self) -> None:
        """Take the pruner off; the model is the stock one again, bit for bit."""
        self.pruning.detach()

    def save_pretrained(self, directory: str | Path, *, scorer_only: bool = False) -> Path:
        """Write a complete folder, which the stock class can load alone, or the scorer and the name of its base.

        The folder appears whole or not at all. ValueError: it is there and not empty; or `scorer_only` where weights of
        the model differ from the base, which is loaded once more to compare."""
        return self._save(Path(directory), scorer_only, public=False)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        scorer_only: bool = False,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload the folder that `save_pretrained` writes, with no local base named in it; returns the commit's URL."""
        if scorer_only and Path(self.base).exists():
            raise ValueError(
                f"the base {self.base} is a local folder, which nobody else can load; upload without scorer_only, or "
                "load this scorer with base_model= a hub id"
            )
        with tempfile.TemporaryDirectory() as scratch:
            folder = self._save(Path(scratch) / "model", scorer_only, public=True)
            api = HfApi(token=token)
            repo = api.create_repo(repo_id, private=private, exist_ok=True)
            message = commit_message or f"Upload with pruner {self.pruning.name}"
            return str(api.upload_folder(repo_id=repo.repo_id, folder_path=folder, commit_message=message))

    def _save(self, directory: Path, scorer_only: bool, *, public: bool) -> Path:
        check_empty(directory)
        if self.pruning.name is None or not self.pruning.pruner.stages:
            raise ValueError("there is no pruner to write; give Pruning a name other than 'none', not an object")
        if scorer_only:
            self._check_unmodified()
        attached = any(is_on(config) for config in self.pruning.adapter.configs)
        self.pruning.detach()  # the switched-on attention must not end up in config.json
        try:
            parts = (_merged(self.model), self.processor, self.pruning)
            return save_pruned(
                directory, *parts, base=self.base, scorer_only=scorer_only, public=public, trained=self.trained
            )
        finally:
            if attached:
                self.pruning.attach()

    def _check_unmodified(self) -> None:
        theirs = load_vlm(self.base, dtype=self.model.dtype)[0].state_dict()
        own = self.model.state_dict()
        changed = [name for name in own if name not in theirs or not torch.equal(own[name].cpu(), theirs[name])]
        if changed:
            raise ValueError(
                f"{len(changed)} tensors of the model differ from its base {self.base} ({changed[0]} is the first), "
                "so a scorer alone would not give this model; write the complete folder"
            )


def load_chat(
    pretrained: str | Path,
    pruner: str | None = None,
    retention_ratio: float | None = None,
    *,
    num_frames: int | None = None,
    sampler: str | None = None,
    max_fps: float | None = None,
    siglip: str | Path | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Chat:
    """How other frameworks load a model: `PrunedVLM.from_pretrained`, then `PrunedVLM.chat`. What is None comes from a
    folder of ours; `none` as pruner is the stock model. siglip: a folder or hub id. ValueError: something does not fit.
    """
    source = None if siglip is None else load_siglip(siglip)
    vlm = PrunedVLM.from_pretrained(pretrained, pruner, retention_ratio, device=device, siglip=source, **options)
    return vlm.chat(num_frames=num_frames, sampler=sampler, max_fps=max_fps)


def _merged(model: Any) -> PreTrainedModel:
    """The stock model to write: a peft model's adapters are added to a copy of its weights."""
    stock: PreTrainedModel = model
    if without_adapters(model) is not model:
        stock = copy.deepcopy(model).merge_and_unload()
    return stock


def export(
    folder: str | Path,
    out: str | Path,
    *,
    pruner: str | None = None,
    scorer_only: bool = False,
    merge: bool = False,
    base_model: str | Path | None = None,
) -> Path:
    """Write a trained folder, or a scorer alone, anew: complete, or with `scorer_only` as a scorer alone.

    merge: put a scorer alone together with the weights of its base. ValueError: `out` is not empty, or the two
    folders differ in kind without `merge` or `scorer_only` saying so."""
    check_no_run(folder)
    check_empty(Path(out))
    alone = pruner_settings(folder) is not None and not (Path(folder) / "config.json").is_file()
    if merge and (scorer_only or not alone):
        raise ValueError(
            f"merge is for a scorer alone that becomes complete; {folder} is complete or scorer_only is on"
        )
    if alone and not (merge or scorer_only):
        raise ValueError(f"{folder} holds a scorer alone; add --merge for a complete folder, or --scorer_only")
    vlm = PrunedVLM.from_pretrained(folder, pruner, base_model=base_model)
    return vlm.save_pretrained(out, scorer_only=scorer_only)


def export_reference(
    file: str | Path,
    out: str | Path,
    *,
    base_model: str | Path,
    retention_ratio: float = 0.5,
    scorer_only: bool = False,
    pruner: str = "stts",
) -> Path:
    """Write the learned part of the authors' release of `pruner` beside the stock checkpoint `base_model`."""
    check_empty(Path(out))
    tensors = read_reference(file) if pruner == "stts" else {}
    model, processor = load_vlm(base_model)
    pruning = Pruning(model, pruner, retention_ratio=retention_ratio, untrained=True)
    if pruning.module is None:
        raise ValueError(f"pruner {pruner!r} has no learned part, so there is nothing to read from {file}")
    tensors = tensors or read_named(file, pruning.module.state_dict())
    fill(pruning.module, tensors, str(file))
    return PrunedVLM(model, processor, pruning).save_pretrained(out, scorer_only=scorer_only)


def check_empty(path: Path) -> None:
    """ValueError where something would be overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not an empty folder; choose another one or remove it")


def _load_base(folder: Path, base: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The base, with the adapter in it that lies in the folder, where one does."""
    try:
        model, processor = load_vlm(base, dtype=dtype)
    except ValueError as error:
        raise ValueError(
            f"{folder} holds a scorer for the base {base!r}; name its place with base_model=: {error}"
        ) from error
    if not (folder / ADAPTER_FILE).is_file():
        return model, processor
    if find_spec("peft") is None:
        raise ValueError(f"{folder} holds an adapter, which needs peft: pip install 'stts-video[lora]'")
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")  # they would stay random
        try:
            adapted: Any = PeftModel.from_pretrained(model, str(folder))
        except (UserWarning, RuntimeError) as error:
            raise ValueError(f"the adapter in {folder} does not fit the base {base!r}: {error}") from error
    return adapted.merge_and_unload().eval(), processor
