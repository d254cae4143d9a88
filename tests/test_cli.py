"""The console entry: verbs, words on the command line, and how quickly help comes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import stts
from stts.cli import VERBS, main
from stts.command_line import join_words, parse, run
from stts.pruners.registry import PRUNERS


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_load_neither_torch_nor_the_parser(option: str) -> None:
    call = f"from stts.cli import main; main([{option!r}])"
    code = f"{call}; import sys; print({{'torch', 'jsonargparse'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_threads_sleep_while_they_wait() -> None:
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "from stts.cli import main; main(['--version']); import torch"
    kept["OMP_DISPLAY_ENV"] = "true"
    shown = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True)
    if "OMP_WAIT_POLICY" not in shown.stderr:
        pytest.skip("this build of torch has another OpenMP, or none")
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown.stderr


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {verb} " in text for verb in VERBS) and max(map(len, text.splitlines())) <= 120
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"stts {stts.__version__}\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("compa", "compare"),
        ("compare --retention", "--retention_ratios"),
        ("compare --vote ''", "mean majority"),
        ("compare --pruners tango,visionz", "tango,visionzip"),
        ("fit --model.pruner fastvi", "fastvid"),
        ("pruners earl", "earlytom"),
        ("data shapes --proc", "--processes"),
        ("fit --trainer.dev", "--trainer.devices"),
        ("ask clip", ""),  # a file: the shell's own
    ],
)
def test_bash_completes_verbs_options_and_values(words: str, offered: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out + f"\nCOMP_WORDS=(stts {words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _stts"
    done = subprocess.run(["bash", "-c", f'{script}; echo "${{COMPREPLY[*]}}"'], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == (offered, "")


def test_completion_offers_every_pruner(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "bash"]) == 0
    assert f'"compare --pruners") words="{" ".join(PRUNERS)}"' in capsys.readouterr().out


def test_completion_is_for_shells_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "fish"]) == 2
    assert "--completion fish: expected one of bash, zsh" in capsys.readouterr().err
    assert main(["--completion", "zsh"]) == 0
    assert "autoload -U +X bashcompinit && bashcompinit\n_stts() {" in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_is_offered_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "zsh"]) == 0
    words = "emulate ksh; COMP_WORDS=(stts compare --pruners tango,visionz); COMP_CWORD=3"  # as bashcompinit calls it
    script = f'{capsys.readouterr().out}\n{words}; _stts; echo "${{COMPREPLY[*]}}"'
    done = subprocess.run(["zsh", "-f", "-c", script], capture_output=True, text=True, timeout=30)
    assert "tango,visionzip" in done.stdout.split() and not done.stderr, "zsh itself drops what does not begin so"


def test_a_wrong_verb_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compair"]) == 2
    assert "did you mean 'compare'?" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from stts.cli import main; sys.exit(main(['pruners']))"
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    assert running.stderr.read() == "" and running.wait() == 141


def example(
    video: Path, /, *, names: tuple[str, ...] = (), span: tuple[float, float] | None = None, merge: bool = False
) -> str:
    """Say what came.

    Args:
        video: a file.
        names: any number.
    """
    return f"{video} {names} {span} {merge}"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["a.mp4"], "a.mp4 () None False"),
        (["a.mp4", "--names", "x", "y", "--merge"], "a.mp4 ('x', 'y') None True"),
        (["--names=x,y", "--merge", "false", "a.mp4"], "a.mp4 ('x', 'y') None False"),
        (["a.mp4", "--span", "1", "2.5"], "a.mp4 () (1.0, 2.5) False"),
    ],
)
def test_a_signature_is_a_command_line(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(example, "stts example", words) == 0
    assert capsys.readouterr().out == text + "\n"


def test_options_are_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(example, "stts example", ["a.mp4", "--nam", "x"])
    assert "--nam" in capsys.readouterr().err


def test_other_words_stay_as_they_are() -> None:
    assert join_words({"names": tuple[str, ...], "merge": bool}, ["--out", "--names", "[a,b]", "--merge=no"]) == [
        "--out", "--names", "[a,b]", "--merge", "no",
    ]  # fmt: skip
