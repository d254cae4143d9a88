"""Every stage of the study at its smallest size, from an untrained model to the page of results."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from stts import cli
from stts.eval.results.table import BEFORE, DENSE, Row
from tests.scripts import load_script

ROOT = Path(__file__).parents[1]


def test_the_study_names_its_pruners_and_every_seed(capsys: pytest.CaptureFixture[str]) -> None:
    from stts.pruners.registry import PRUNERS

    study, run_study = load_script("study/steps"), load_script("study/run_study")
    assert run_study.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert set(study.FROZEN) <= set(PRUNERS) - {"none", "stts"}, "a chosen part of the zoo"
    assert all(
        f"--out runs/study_cpu/stts-{kind}-s{seed} " in shown
        for kind in ("0.5", "0.2", "elastic")
        for seed in (0, 1, 2)
    )
    assert all(f"--num_frames {frames}" in shown for frames in (8, 16, 32, 64))
    fit = next(line for line in shown.splitlines() if line.strip().startswith("stts fit"))
    data = next(line for line in shown.splitlines() if line.strip().startswith("stts data"))
    for name, value in study.SCALES["cpu"].form.items():  # the config trains on the wide form
        trained = f"--data.shapes.{name} {shlex.quote(value)} " in fit
        assert trained or name == "questions_per_family", "what is trained is what is tested, with more questions"
        assert f"--form.{name} {shlex.quote(value)} " in data
    assert "configs/shapes_pretrain.yaml" not in shown and "--model.model stts/assets/shapes_vlm" in shown


def test_the_configs_train_on_the_form_that_is_tested() -> None:
    study = load_script("study/steps")
    forms = {"shapes_pretrain": study.WIDE, "shapes_study_stts": study.WIDE, "shapes_pretrain_small": study.SMALL}
    for name, tested in forms.items():
        form = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())["data"]["shapes"]
        form["questions_per_family"] = yaml.safe_load(tested["questions_per_family"])  # training asks about more
        assert form == {option: yaml.safe_load(value) for option, value in tested.items()}, name


def test_arms_differ_in_the_choice_of_tokens_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms, steps, run_study = (load_script(f"study/{name}") for name in ("arms", "steps", "run_study"))
    assert run_study.main(["--scale", "distractors", "--list"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    fits = [shlex.split(line) for line in lines if line.startswith("stts fit")]
    scale = steps.SCALES["distractors"]
    runs = [arm for arm in scale.arms for _ in arms.ArmsStudy(tmp_path, scale).seeds(arm)]
    assert len(fits) == len(runs) < len(scale.arms) * len(scale.seeds), "some arms have the first seed only"
    shared = []
    for words, arm in zip(fits, runs, strict=True):
        own, out = arms.ARMS[arm].options, words.index("--out") + 1
        place = next(n for n in range(len(words)) if tuple(words[n : n + len(own)]) == own)
        shared.append(words[:out] + words[out + 1 : place] + words[place + len(own) : -4])
        assert str(arms.TRAINED_AT) in own[own.index("--model.retention_ratio") + 1]
    assert shared[1:] == shared[:-1] and "[3,5]" in shared[0], "the same otherwise, the seeds at the end apart"
    data = [line for line in lines if line.startswith("stts data")]
    assert all("--form.distractors '[3,5]'" in line for line in data if "/world-" not in line)
    assert len({line.partition("--form")[2] for line in data}) == len(data), "no two worlds are the same"
    page = load_script("study/report_arms").write_arms(arms.ArmsStudy(tmp_path / "runs", scale), tmp_path / "out")
    assert page.read_text().count("not run") > 20 and not re.search(r"\d \[", page.read_text())


def test_an_arm_of_more_frames_goes_on_from_one_that_is_there(tmp_path: Path) -> None:
    arms, steps = load_script("study/arms"), load_script("study/steps")
    study = arms.ArmsStudy(tmp_path, steps.SCALES["frozen_tower"])
    by_name = {step.name: step for step in reversed(study.steps())}
    for arm, begins in (("teacher-frames", "teacher-longer"), ("evs-frames", "evs-longer")):
        fit = by_name[f"{arm}-s0"]
        assert fit.needs(by_name[f"{begins}-s0"]) and "num_sampled: 64" in " ".join(fit.argv)
        long = by_name[f"long-64-{arm}"]
        assert long.needs(fit) and long.argv[long.argv.index("--retention_ratios") + 1] == "[0.25]"


def test_the_frozen_tower_is_that_of_the_vlm_it_began_with() -> None:
    """What the scale `frozen_tower` claims: its tower never saw the world of its questions; its LLM did."""
    from safetensors.torch import load_file

    before, after = (
        load_file(ROOT / "stts" / "assets" / name / "model.safetensors")
        for name in ("shapes_vlm", "shapes_vlm_frozen_tower")
    )
    same = {name: after[name].equal(tensor) for name, tensor in before.items()}
    tower = {name for name in same if "vision_tower" in name}
    assert tower and all(same[name] for name in tower)
    assert not any(same[name] for name in same if "layers" in name and name not in tower and "proj" in name)


def test_results_that_are_not_there_are_called_not_run(tmp_path: Path) -> None:
    study, report = load_script("study/steps"), load_script("study/report")
    page = report.write_report(study.Study(tmp_path / "runs", study.SCALES["cpu"]), tmp_path / "results").read_text()
    assert page.count("not run") > 100 and not re.search(r"\d \[", page), "no number with an interval"
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["README.md", "commands.md"], (
        "no plot of nothing"
    )


def test_a_plain_copy_trains_without_installation_video_decoder_or_deepspeed() -> None:
    code = (
        "import sys; sys.modules.update(stts_train=None, av=None, deepspeed=None)\n"
        "sys.path.insert(0, 'scripts/study')\n"
        "import run_study; run_study._reach(); del sys.modules['stts_train']\n"
        "import stts_train.cli, stts_train.module, report\n"
        "print(stts_train.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "/stts-study-" in done.stdout, done.stderr


def test_a_step_needs_those_whose_output_it_reads() -> None:
    study = load_script("study/steps")
    steps = study.Study(Path("runs"), study.SCALES["tiny"]).steps()
    by_name = {step.name: step for step in reversed(steps)}  # the fit, not the comparison of the same name
    needed = {name: {other.name for other in steps if other is not step and step.needs(other)}
              for name, step in by_name.items()}  # fmt: skip
    assert needed["dense"] == {"untrained folder"} and needed["stts-0.2-s0"] == {"dense"}
    assert needed["stts-0.5-s0"] == {"dense"}, "its own comparison comes later and has a folder of its own"
    assert needed["long-likewise-16"] == {"long, clip", "ablation-dense-fine-tuned-likewise"}
    assert not needed["test, clip"]


@pytest.mark.slow
def test_every_stage_runs_side_by_side_and_the_page_is_made_of_it(tmp_path: Path) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    argv = ["scripts/study/run_study.py", "--scale", "tiny", "--jobs", "2", "--runs", str(runs), "--out", str(results)]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *argv, *more], cwd=ROOT, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith(("begun", "ended"))]
    ended = next(place for place, line in enumerate(said) if line.startswith("ended: pretrain, dense"))
    assert ended < said.index("begun: finetune, stts-0.5-s0"), "a model is fine-tuned once it is there"
    assert said[1].startswith("begun"), "the second step begins beside the first"
    assert "answer_loss" in (runs / "log" / "finetune-stts-0.5-s0.txt").read_text(), "each step has its own log"

    page = (results / "README.md").read_text()
    assert page.count("not run") == 1, "in the introduction only"
    assert page.startswith("# Does learning the scores pay?\n\n* At 50% of the tokens"), "the finding comes first"
    written = {path.name: path for path in results.iterdir()}
    assert set(written) == {"README.md", "commands.md", "retention.png", "scaling.png"}
    assert written["commands.md"].read_text().count("stts compare") > 10 and "stts compare" not in page
    again = run()
    assert again.returncode == 0 and "begun" not in again.stdout, "a second run finds everything there"
    assert (results / "README.md").read_text() == page

    failing = run("--model", str(tmp_path / "none"), "--runs", str(tmp_path / "again"), "--stages", "finetune")
    assert failing.returncode != 0 and "the same command goes on there" in failing.stderr


def test_dense_of_a_fine_tuned_model_is_not_the_model_before() -> None:
    cells = load_script("study/cells")
    rows = [Row(name, "unpruned", 1.0, accuracy=share) for name, share in ((BEFORE, 0.9), (DENSE, 0.8))]
    rows.append(Row("adatp (our reconstruction)", "inside the LLM", 0.5, accuracy=0.7))
    result = SimpleNamespace(rows=rows)
    assert cells.find_row(result, DENSE).accuracy == 0.8 and cells.find_row(result, "adatp", 0.5).accuracy == 0.7


RESULTS = {"cpu": ROOT / "docs" / "results"} | {
    scale: ROOT / "docs" / "results" / scale for scale in ("wide", "distractors", "frozen_tower", "calm")
}


@pytest.mark.parametrize("scale", RESULTS)
def test_the_committed_page_is_made_of_the_committed_answers(
    scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, results = load_script("study/steps"), RESULTS[scale]
    made_of_arms = bool(study.SCALES[scale].arms)
    with tarfile.open(results / "comparisons.tar.xz") as archive:
        archive.extractall(tmp_path / "runs")  # `filter` came with Python 3.11.4
    for other in [*results.glob("*.md"), *results.glob("*/README.md")]:
        (tmp_path / other.relative_to(results)).parent.mkdir(exist_ok=True)
        (tmp_path / other.relative_to(results)).write_bytes(other.read_bytes())
    monkeypatch.chdir(tmp_path)
    runs = Path(f"runs/study_{scale}")
    kind = load_script("study/arms").ArmsStudy if made_of_arms else study.Study
    write = load_script("study/report_arms").write_arms if made_of_arms else load_script("study/report").write_report
    made = kind(runs, study.SCALES[scale], (), f"python scripts/study/run_study.py --scale {scale} --runs {runs}")
    write(made, tmp_path)
    for name in ("README.md", "commands.md"):
        assert (tmp_path / name).read_text() == (results / name).read_text(), name
    missing = {step.name for step in made.steps() if not made.is_there(step)}
    assert not missing, "nothing is left to run, and no model is made again whose answers are there"


@pytest.mark.slow
def test_committed_answers_come_out_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the committed page, on the first clips, with one or two of its methods at one ratio."""
    monkeypatch.chdir(ROOT)
    clips, methods = 20, ["novelty", "visionzip"]
    commands = (RESULTS["cpu"] / "commands.md").read_text().splitlines()
    data = next(line for line in commands if line.startswith("stts data shapes") and "/data/test " in line)
    compare = next(line for line in commands if line.startswith("stts compare") and "/frozen " in line)
    runs = re.findall(r"--out (\S+)/data/test ", data)[0]
    data, compare = (line.replace(runs, str(tmp_path)) for line in (data, compare))
    assert cli.main([*shlex.split(data)[1:], "--test", str(clips)]) == 0  # the last of two counts
    options = ["--pruners", f"[{','.join(methods)}]", "--retention_ratios", "[0.5]"]
    assert cli.main([*shlex.split(compare)[1:], *options]) == 0
    made = json.loads((tmp_path / "compare" / "frozen" / "comparison.json").read_text())["records"]
    with tarfile.open(RESULTS["cpu"] / "comparisons.tar.xz") as archive:
        [frozen] = [name for name in archive.getnames() if name.endswith("/frozen/comparison.json")]
        kept = {one["uid"]: one for one in json.load(archive.extractfile(frozen))["records"]}  # type: ignore[arg-type]
    assert len(made) == 3 * clips
    for cell in ("dense", *(f"{method}@0.5" for method in methods)):
        same = [one["outcomes"][cell]["prediction"] == kept[one["uid"]]["outcomes"][cell]["prediction"] for one in made]
        assert sum(same) >= len(same) - 1, f"{cell}: ties may fall otherwise on another CPU, but {same}"

    argv = shlex.split(compare)
    model, asked = (argv[argv.index(name) + 1] for name in ("--model", "--data"))
    out = tmp_path / "eval"
    assert cli.main(["eval", "--model", model, "--data", asked, "--out", str(out), "--max_new_tokens", "2"]) == 0
    [file] = out.glob("*/*_results.json")
    [metrics] = json.loads(file.read_text())["results"].values()
    right = [one["outcomes"]["dense"]["correct"] for one in made]
    assert metrics["acc,none"] == pytest.approx(sum(right) / len(right)), "`stts eval` and `stts compare` agree"
