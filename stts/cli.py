"""The console entry: one line per verb; each imports its room when called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def _fit(argv: list[str]) -> int:
    from stts_train.cli import fit

    return int(fit(argv) or 0)


def _plan(argv: list[str]) -> int:
    from stts_train.plan import main as plan

    return plan(argv)


def _compare(argv: list[str]) -> int:
    from stts.eval.compare import main as compare

    return int(compare(argv) or 0)


def _scale(argv: list[str]) -> int:
    from stts.eval.scale import main as scale

    return scale(argv)


def _eval(argv: list[str]) -> int:
    from stts.eval.evaluate import main as evaluate

    return evaluate(argv)


def _report(argv: list[str]) -> int:
    from stts.report.page import main as report

    return report(argv)


def _visualize(argv: list[str]) -> int:
    from stts.report.visualize import main as visualize

    return visualize(argv)


def _doctor(argv: list[str]) -> int:
    from stts.doctor import main as doctor

    return doctor(argv)


def _data(argv: list[str]) -> int:
    from jsonargparse import auto_cli, set_parsing_settings

    from stts.data.shapes.files import shapes

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    out = auto_cli({"shapes": shapes}, args=argv, as_positional=False, prog="stts data")
    print(f"wrote {out}")
    return 0


def _init(argv: list[str]) -> int:
    from jsonargparse import auto_cli

    from stts.models.checkpoints.shapes_vlm import write_small_vlm

    out = auto_cli(write_small_vlm, args=argv, as_positional=False, prog="stts init")
    print(f"wrote {out}")
    return 0


def _export(argv: list[str]) -> int:
    import argparse
    from pathlib import Path

    from stts.models.checkpoints.hub import export, export_reference

    usage = "stts export [options] FOLDER OUT | stts export --from_reference FILE --base_model MODEL [options] OUT"
    parser = argparse.ArgumentParser(prog="stts export", usage=usage, description=export.__doc__)
    parser.add_argument(
        "paths", nargs="+", help="a trained folder, a checkpoint or a scorer alone; a new or empty folder"
    )
    parser.add_argument("--scorer_only", action="store_true", help="write the scorer alone, without model weights")
    parser.add_argument("--merge", action="store_true", help="put a scorer alone together with the weights of its base")
    parser.add_argument("--base_model", help="folder or hub id with the weights a scorer alone belongs to")
    parser.add_argument("--pruner", help="name of the folder's pruner, where it is 'module:Class'")
    parser.add_argument("--from_reference", metavar="FILE", help="checkpoint of the STTS release, for its scorer")
    parser.add_argument("--retention_ratio", type=float, help="fraction kept, for --from_reference (default 0.5)")
    parser.add_argument(
        "--from_llava_video", action="store_true", help="make the original files of LLaVA-Video (FOLDER) a stock folder"
    )
    args = parser.parse_intermixed_args(argv)
    if args.from_llava_video:
        from stts.models.checkpoints.llava_video import convert_llava_video

        if len(args.paths) != 2:
            raise ValueError(f"got {argv}; usage: stts export --from_llava_video FOLDER OUT")
        print(f"wrote {convert_llava_video(*args.paths)}")
        return 0
    reference = args.from_reference is not None
    misplaced = args.merge or args.pruner or not args.base_model if reference else args.retention_ratio
    if misplaced or len(args.paths) != 2 - reference:
        raise ValueError(f"got {argv}; usage: {usage}")
    if reference:
        ratio = 0.5 if args.retention_ratio is None else args.retention_ratio
        scorer_only, base_model = args.scorer_only, args.base_model
        out = export_reference(
            args.from_reference, *args.paths, base_model=base_model, retention_ratio=ratio, scorer_only=scorer_only
        )
    elif (Path(args.paths[0]) / "run.json").is_file():
        from stts_train.export import export_checkpoint

        if args.merge or args.pruner:
            raise ValueError(f"{args.paths[0]} is a checkpoint of stts fit: --merge and --pruner are for other folders")
        out = export_checkpoint(*args.paths, scorer_only=args.scorer_only, base_model=args.base_model)
    else:
        names = ("pruner", "scorer_only", "merge", "base_model")
        out = export(*args.paths, **{name: getattr(args, name) for name in names})
    print(f"wrote {out}")
    return 0


def _pruners(argv: list[str]) -> int:
    from stts.pruners.check import check_pruner
    from stts.pruners.listing import MATRIX, describe_pruner, describe_pruners
    from stts.pruners.registry import make_pruner

    match argv:
        case []:
            print(describe_pruners())
        case ["--check", name]:
            promises = check_pruner(lambda host: make_pruner(name, host))
            for promise in promises:
                print(f"{'ok    ' if promise.ok else 'FAILED'}  {promise.name} ({promise.found})")
            return 0 if all(promise.ok for promise in promises) else 1
        case ["--matrix"]:
            print(
                MATRIX.read_text(encoding="utf-8"),
                "\nall: fit, forward and generate, as run by the tests on tiny models",
            )
        case [name] if not name.startswith("-"):
            print(describe_pruner(name))
        case _:
            raise ValueError(
                f"got {argv}; usage: stts pruners [NAME | --check NAME | --matrix], NAME as listed or module:Class"
            )
    return 0


VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "init": ("write an untrained small VLM for ShapesQA", _init),
    "data": ("write a data set: stts data shapes --out DIR", _data),
    "fit": ("train or fine-tune: stts fit --config configs/shapes_stts.yaml", _fit),
    "plan": ("memory, tokens and FLOPs of a training run before it starts, and what to change", _plan),
    "eval": ("one model and pruner on benchmarks or a file, in lmms-eval's formats; many ranks with torchrun", _eval),
    "compare": ("compare pruners with dense on the same model, videos and budgets", _compare),
    "scale": ("more frames at test time: accuracy against tokens, FLOPs and seconds", _scale),
    "report": ("one HTML page of comparisons: table, plots, samples with the tokens that were kept", _report),
    "visualize": ("one video, one question, one pruner: what was kept, as .png, .mp4 or .html", _visualize),
    "doctor": ("what this machine has, what will be slow, what is missing and how to get it", _doctor),
    "export": ("write a trained model to publish: a complete folder, or its scorer alone", _export),
    "pruners": (
        "list the pruners; stts pruners NAME: one of them; --check NAME: try its promises; --matrix: families",
        _pruners,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Bad input prints one line that says what to change, and gives exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        lines = (f"  {verb:{width}}  {text}" for verb, (text, _) in VERBS.items())
        print("usage: stts VERB ... (stts VERB --help for its options)\n", *lines, sep="\n")
        return 0
    if args[0] not in VERBS:
        print(f"error: unknown verb {args[0]!r}; known: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return VERBS[args[0]][1](args[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
