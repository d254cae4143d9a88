"""The console entry: one line per verb; each imports its room when called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


def _fit(argv: list[str]) -> int:
    from stts_train.cli import fit

    return int(fit(argv) or 0)


def _compare(argv: list[str]) -> int:
    from stts.eval.compare import main as compare

    return int(compare(argv) or 0)


def _data(argv: list[str]) -> int:
    from jsonargparse import auto_cli

    from stts.data.shapes_files import shapes

    print(f"wrote {auto_cli({'shapes': shapes}, args=argv, as_positional=False)}")
    return 0


def _init(argv: list[str]) -> int:
    from jsonargparse import auto_cli

    from stts.models.small import write_small_vlm

    print(f"wrote {auto_cli(write_small_vlm, args=argv, as_positional=False)}")
    return 0


def _pruners(argv: list[str]) -> int:
    from stts.pruners.registry import describe_pruners

    if argv:
        raise ValueError(f"stts pruners takes no arguments, got {argv}")
    print(describe_pruners())
    return 0


VERBS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "init": ("write an untrained small LLaVA-OneVision for ShapesQA", _init),
    "data": ("write a data set: stts data shapes --out DIR", _data),
    "fit": ("train or fine-tune: stts fit --config configs/shapes_stts.yaml", _fit),
    "compare": ("compare pruners with dense on the same model, videos and budgets", _compare),
    "pruners": ("list the pruners", _pruners),
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
