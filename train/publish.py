"""`stts export`: any trained thing as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from stts.models.checkpoints import hub
from stts.models.checkpoints.llava_video import convert_llava_video


def export(
    *paths: Path,
    scorer_only: bool = False,
    merge: bool = False,
    adapter: bool = False,
    base_model: str | None = None,
    pruner: str | None = None,
    from_reference: Path | None = None,
    retention_ratio: float | None = None,
    from_llava_video: bool = False,
) -> Path:
    """Write a trained model to publish: a complete folder, or its scorer alone.

    stts export FOLDER OUT, or stts export --from_reference FILE --base_model MODEL OUT

    Args:
        paths: FOLDER, which is a trained folder, a checkpoint or a scorer alone; and OUT, a new or empty folder.
        scorer_only: write the scorer alone, without model weights.
        merge: put a scorer alone, or an adapter, together with the weights of its base.
        adapter: of a checkpoint of a run with LoRA, write the adapter in peft's format, and the scorer, alone.
        base_model: folder or hub id with the weights a scorer alone belongs to.
        pruner: name of the folder's pruner, where it is your own ('module:Class' or 'file.py:Class'); with
            --from_reference whose release it is.
        from_reference: checkpoint of the release of STTS, or of --pruner visionselector or cacovid.
        retention_ratio: fraction kept, for --from_reference; null: 0.5.
        from_llava_video: make the original files of LLaVA-Video (FOLDER) a stock folder.
    """
    num_paths = 1 if from_reference else 2
    if len(paths) != num_paths:
        raise ValueError(f"got {len(paths)} paths; expected {'OUT' if from_reference else 'FOLDER and OUT'}")
    out = paths[-1]
    if from_llava_video:
        return convert_llava_video(paths[0], out)
    if from_reference is not None:
        if merge:
            raise ValueError("--merge is for folders of ours, not for --from_reference; leave it out")
        if base_model is None:
            raise ValueError("--from_reference needs --base_model, the stock checkpoint that the scorer belongs to")
        ratio = 0.5 if retention_ratio is None else retention_ratio
        return hub.export_reference(
            from_reference,
            out,
            base_model=base_model,
            retention_ratio=ratio,
            scorer_only=scorer_only,
            pruner=pruner or "stts",
        )
    if retention_ratio is not None:
        raise ValueError("--retention_ratio is for --from_reference; a trained folder records its own")
    if (paths[0] / "run.json").is_file():
        if merge or pruner is not None:
            raise ValueError(f"{paths[0]} is a checkpoint of stts fit: --merge and --pruner are for other folders")
        from .export import export_checkpoint  # needs Lightning, which all other folders do without

        return export_checkpoint(paths[0], out, scorer_only=scorer_only, adapter=adapter, base_model=base_model)
    if adapter:
        raise ValueError(f"{paths[0]} is no checkpoint of stts fit; --adapter is for <out>/checkpoints/step-...")
    return hub.export(paths[0], out, pruner=pruner, scorer_only=scorer_only, merge=merge, base_model=base_model)
