"""Help and mistakes at the terminal: at once, in plain words, on one line, with the nearest name."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stts.cli import FORMS, HELP, VERBS, main
from stts.command_line import metavar, type_words
from stts_train.parser import ALIASES, translate
from tests.scripts import load_script

FILES = sorted(HELP.glob("*.txt"))
TEXTS = {file.stem: file.read_text(encoding="utf-8") for file in FILES}


def test_the_texts_are_those_of_the_parsers() -> None:
    made = load_script("make_docs").helps()
    forms = {f"{verb}{option.replace('--', '-')}" for verb, option in FORMS}
    assert set(made) == set(TEXTS) == {verb.replace(" ", "-") for verb in VERBS} | forms | {"fit-trainer"}
    for name, text in made.items():
        if name != "fit-trainer":  # its words are those of the Lightning that is installed
            assert TEXTS[name] == text, f"{name}: run `python scripts/make_docs.py`"


@pytest.mark.parametrize("name", TEXTS)
def test_a_help_fits_the_terminal_and_shows_no_raw_types(name: str) -> None:
    text = TEXTS[name]
    assert text.startswith("usage: stts ")
    assert name == "fit-trainer" or max(map(len, text.splitlines())) <= 100
    assert not re.search(r"type: |<class|Union\[|Optional\[|typing\.|paramref|print_config", text)
    assert "--help" in text or name == "fit-trainer"


def test_training_shows_ours_first_and_lightning_s_trainer_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    own = TEXTS["fit"]
    places = [own.index(f"\n  {option} ") for option in ("--out", "--model.model", "--data.train", "--trainer.devices")]
    assert places == sorted(places) and own.count("\n  --trainer.") == 5 and "--data.shapes.grid" not in own
    assert main(["fit", "--help-trainer"]) == 0
    trainer = capsys.readouterr().out
    assert "--trainer.gradient_clip_val" in trainer and "--model." not in trainer.split("Lightning's Trainer:")[1]


@pytest.mark.parametrize("words", ["fit --help", "compare --help", "compare --video x.mp4 --help", "data shapes -h"])
def test_help_imports_no_library_and_comes_at_once(words: str) -> None:
    code = f"import sys; from stts.cli import main; main({words.split()!r})"
    code += "; print({'torch', 'jsonargparse'} & set(sys.modules))"
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - begin
    assert done.stdout.startswith("usage: stts ") and done.stdout.splitlines()[-1] == "set()"
    assert seconds < 15, "0.1 s on an idle machine; a library would take five"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ask a.mp4 q --modle x", "unknown option --modle; did you mean --model?"),
        ("compare --model x --data y --out z --retention_ratio 0.2", "did you mean --retention_ratios?"),
        ("compare --model x --data y --out z --retention 0.2", "unknown option --retention"),
        ("compare --model x --data y --out z --batch_size many", "--batch_size: expected a whole number, got many"),
        ("compare --model x --data y --out z --match size", "--match: expected one of tokens, flops, both, got size"),
        ("compare --config CONFIG --model x --out z", "unknown setting prunrs; did you mean pruners?"),
        ("ask a.mp4 what colour --model x", "'colour' is one word too many; values with spaces need quotes"),
        ("ask a.mp4", "the following arguments are required: question, model"),
        ("data shapes --out x --form.grd 3", "unknown option --form.grd; did you mean --form.grid?"),
    ],
)
def test_a_mistake_is_one_line(words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("prunrs: [tango]\n")
    with pytest.raises(SystemExit) as stopped:
        main(words.replace("CONFIG", str(tmp_path / "c.yaml")).split())
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1
    assert err.startswith("error: ") and said in err and "--help)" in err


def test_types_are_said_in_words() -> None:
    assert type_words(int | None) == "a whole number, or null"
    assert type_words(tuple[str, ...] | None) == "a list of a text, or null"
    assert (metavar(bool), metavar(Path | None), metavar(float | None)) == ("[true|false]", "PATH", "X")


def test_names_of_other_trainers_are_ours() -> None:
    words = "--model_name_or_path m --output-dir=o --learning_rate 1e-5 --max_steps 9 --bf16 --report_to none"
    words += " --per_device_train_batch_size 4 --resume_from_checkpoint True --out p"
    assert translate(words.split()) == [
        "--model.model=m", "--out=o", "--model.llm_lr=1e-5", "--trainer.max_steps=9", "--trainer.precision=bf16-mixed",
        "--logger=csv", "--data.batch_size=4", "--data.max_tokens=0", "--resume=last", "--out", "p",
    ]  # fmt: skip
    options = {word.partition("=")[0] for alias in ALIASES.values() for word in alias("1")}
    listed = TEXTS["fit"] + TEXTS["fit-trainer"]
    assert not [option for option in options if f"  {option} " not in listed]


def test_other_verbs_take_the_two_names_that_everybody_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--model_name_or_path", "/nowhere/at/all", "--output_dir", "o", "--data", "x.jsonl"]) == 2
    assert "--model '/nowhere/at/all' is no folder" in capsys.readouterr().err
