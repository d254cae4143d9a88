"""The console entry: verbs are functions; a signature gives the options of a verb, its docstring the help."""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import stts

VERBS = {  # verb -> what it does, and the function that does it
    "init": ("write an untrained small VLM for ShapesQA", "stts.models.checkpoints.shapes_vlm:write_small_vlm"),
    "data shapes": ("write ShapesQA, a synthetic video QA set: --out DIR", "stts.data.shapes.files:shapes"),
    "fit": ("fine-tune: stts fit --model.model M --data.train x.jsonl, or --config FILE.yaml", "stts_train.start:fit"),
    "plan": (
        "memory, tokens and FLOPs of a training run before it starts, and what to change",
        "stts_train.plan_cli:plan",
    ),
    "eval": (
        "one model and pruner on benchmarks or a file, in lmms-eval's formats; many ranks with torchrun",
        "stts.eval.evaluate:evaluate",
    ),
    "compare": ("compare pruners with dense on the same model, videos and budgets", "stts.eval.compare:compare"),
    "scale": ("more frames at test time: accuracy against tokens, FLOPs and seconds", "stts.eval.scale:scale"),
    "report": (
        "one HTML page of comparisons: table, plots, samples with the tokens that were kept",
        "stts.report.page:report",
    ),
    "ask": (
        'ask a video: stts ask CLIP "question" --model M, with every token and with few',
        "stts.report.visualize:ask",
    ),
    "app": ("a page on this machine to ask clips on, with two methods side by side", "stts.report.app:app"),
    "visualize": (
        "one video, one question, one pruner: what was kept, as .png, .mp4 or .html",
        "stts.report.visualize:visualize",
    ),
    "doctor": ("what this machine has, what will be slow, what is missing and how to get it", "stts.doctor:doctor"),
    "export": ("write a trained model to publish: a complete folder, or its scorer alone", "stts_train.publish:export"),
    "pruners": ("list the pruners, show one of them, or check your own", "stts.pruners.listing:pruners"),
}

HELP = Path(__file__).parent / "assets" / "help"
FORMS = {  # (verb, option) -> the function that does it where this option is given; --help of the verb names them
    ("compare", "--video"): "stts.report.one_clip:compare_clip",
    ("eval", "--rescore"): "stts.eval.evaluate:rescore",
}
NEEDS = {"app": "gradio"}
"""Verb -> what only it needs, an extra of its name: looked for before a model's libraries are imported, for seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Bad input prints one line that says what to change, and gives exit code 2."""
    args = list(sys.argv[1:] if argv is None else argv)
    # Threads that spin while they wait slow every step many times over where something else runs on the cores. OpenMP
    # reads this once, when torch is loaded; scripts/quickstart.sh says the same.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return _main(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\nstopped{f': {stopped}' if str(stopped) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `stts pruners | head`: nobody reads on, which is no fault of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it flushes at exit
        return 141


def _main(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        width = max(map(len, VERBS))
        lines = (f"  {verb:{width}}  {text}" for verb, (text, _) in VERBS.items())
        print("usage: stts VERB ... (stts VERB --help for its options; stts --version)\n", *lines, sep="\n")
        print('\nTab completes verbs and options after: eval "$(stts --completion bash)", or zsh')
        return 0
    if args[0] == "--version":
        print(f"stts {stts.__version__}")
        return 0
    if args[0] == "--completion":
        if len(args) != 2 or args[1] not in SHELLS:
            raise ValueError(f"--completion {' '.join(args[1:])}: expected one of {', '.join(SHELLS)}")
        print(completion(args[1]))
        return 0
    if " ".join(args[:2]) in VERBS:
        args = [" ".join(args[:2]), *args[2:]]
    if args[0] not in VERBS:
        close = difflib.get_close_matches(args[0], VERBS, n=1)
        tip = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown verb {args[0]!r}; {tip}known: {', '.join(VERBS)}")
    if (text := help_of(args[0], args[1:])) is not None:
        print(text)
        return 0
    if args[0] in NEEDS and find_spec(NEEDS[args[0]]) is None:
        raise ValueError(
            f"stts {args[0]} needs {NEEDS[args[0]]}, which is not installed: pip install 'stts-video[{args[0]}]'"
        )
    from stts.command_line import run  # jsonargparse takes a third of a second, which `stts --help` need not wait for
    from stts_train.quiet import silence  # late too; every verb meets lines of Lightning

    silence()
    module, _, name = target_of(args[0], args[1:]).partition(":")
    return run(getattr(importlib.import_module(module), name), f"stts {args[0]}", args[1:])


def help_of(verb: str, words: Sequence[str]) -> str | None:
    """The help that the words ask for, as scripts/make_docs.py wrote it: the parsers themselves import a model's
    libraries first, for seconds. None where they ask for none."""
    asked = {"-h", "--help"} & set(words)
    if not asked and not (verb in ("fit", "plan") and "--help-trainer" in words):
        return None
    given = {word.partition("=")[0] for word in words}
    form = next((option for name, option in FORMS if name == verb and option in given), "")
    name = f"{verb.replace(' ', '-')}{form.replace('--', '-')}" if asked else "fit-trainer"
    return (HELP / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")


_ZSH = """\
(( $+functions[compdef] )) || { autoload -U compinit && compinit -i; }
autoload -U +X bashcompinit && bashcompinit
"""
SHELLS = {"bash": "", "zsh": _ZSH}
"""Shells that `stts --completion` knows, and what comes in front of bash's own words there."""
_COMPLETION = """\
_stts() {{
  local words="{verbs}" verb="${{COMP_WORDS[1]}}" word="${{COMP_WORDS[COMP_CWORD]}}" before=""
  if [ "$COMP_CWORD" -gt 1 ]; then
    case "$verb ${{COMP_WORDS[COMP_CWORD - 1]}}" in
{values}
      *)
        words=""
        case "$verb" in
{options}
        esac ;;
    esac
  fi
  case "$word" in *,*) before="${{word%,*}}," ;; esac
  COMPREPLY=($(compgen -P "$before" -W "$words" -- "${{word##*,}}"))
}}
complete -o default -F _stts stts"""

_TAKE_PRUNERS = ("--pruner", "--pruners", "--model.pruner", "--match_to", "--check")


def completion(shell: str) -> str:
    """A script that teaches the shell our verbs, options, named values and pruners, from the texts of help and
    registry: nothing is imported, so it is there at once. Where none of them fits, the shell completes files."""
    registry = (HELP.parents[1] / "pruners" / "registry.py").read_text(encoding="utf-8")
    pruners = " ".join(re.findall(r'^    "([\w+-]+)": ', registry.partition("\nPRUNERS: ")[2], re.MULTILINE))
    options: dict[str, list[str]] = {"data": ["shapes"], "pruners": pruners.split()}
    values: dict[str, str] = {}
    for file in sorted(HELP.glob("*.txt")):
        verb = file.stem.partition("-")[0]
        for name, given in re.findall(r"^  (--[\w.]+)(?: (\S+))?", file.read_text(encoding="utf-8"), re.MULTILINE):
            options.setdefault(verb, []).append(name)
            if choices := re.fullmatch(r"[\[{]?[a-z]\w*(?:[,|][a-z]\w*)+[\]}]?", given):
                values[f"{verb} {name}"] = re.sub(r"\W+", " ", choices[0]).strip()
            elif name in _TAKE_PRUNERS:
                values[f"{verb} {name}"] = pruners
    first = dict.fromkeys(verb.partition(" ")[0] for verb in VERBS)
    lines = [f'          {verb}) words="{" ".join(dict.fromkeys(options.get(verb, [])))}" ;;' for verb in first]
    cases = [f'      "{name}") words="{words}" ;;' for name, words in values.items()]
    script = _COMPLETION.format(verbs=" ".join(first), values="\n".join(cases), options="\n".join(lines))
    return SHELLS[shell] + script


def target_of(verb: str, words: Sequence[str]) -> str:
    """`module:function` of a verb with these words behind it."""
    given = {word.partition("=")[0] for word in words}
    return next(
        (target for (name, option), target in FORMS.items() if name == verb and option in given), VERBS[verb][1]
    )


if __name__ == "__main__":
    sys.exit(main())
