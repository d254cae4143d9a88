"""One thing to load, save and publish: what comes out of a folder is what went in, whole or alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, RepoUrl
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import stts
from stts.cli import main
from stts.models.checkpoints.hub import PrunedVLM
from stts.models.checkpoints.load import load_vlm, pruner_settings, save_pruned
from stts.models.checkpoints.shapes_vlm import write_small_vlm
from stts.models.checkpoints.stts_release import ANCHOR, TO_OURS, read_reference, to_ours
from tests.conftest import TINY, make_inputs
from tests.golden.conftest import cases
from tests.models.families import molmo2_tiny as molmo2
from tests.models.families import qwen_tiny

OURS = {"stts.json", "scorer.safetensors", "README.md"}
STOCK = {
    "config.json", "generation_config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja",
}  # fmt: skip


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@pytest.fixture
def live(tiny: Any) -> tuple[PrunedVLM, Any]:
    """A model with a scorer that was "trained", and a prompt."""
    model, processor = tiny
    torch.manual_seed(5)
    pruning = stts.Pruning(model, "stts", retention_ratio=0.3, positions="original", prune_block=1)
    assert pruning.module is not None
    pruning.module.eval()
    return PrunedVLM(model, processor, pruning), make_inputs(processor, ["v which is red ?"])


@torch.no_grad()
def logits(vlm: PrunedVLM, inputs: Any) -> torch.Tensor:
    out: torch.Tensor = vlm(**inputs).logits
    return out


@pytest.mark.parametrize("scorer_only", [False, True])
def test_saved_and_loaded_gives_the_same_pruned_logits(live: Any, tmp_path: Path, scorer_only: bool) -> None:
    vlm, inputs = live
    before = logits(vlm, inputs)
    folder = vlm.save_pretrained(tmp_path / "out", scorer_only=scorer_only)
    assert names(folder) == (OURS if scorer_only else OURS | STOCK)
    assert torch.equal(logits(vlm, inputs), before), "still attached"
    again = stts.PrunedVLM.from_pretrained(folder)
    assert torch.equal(logits(again, inputs), before)
    assert again.last is not None and vlm.last is not None
    assert torch.equal(again.last.index[0], vlm.last.index[0]) and len(again.last.index[0]) == 20  # 0.3 of 64, up
    assert (again.pruning.retention_ratio, again.pruning.positions) == (0.3, "original")
    assert torch.equal(again.generate(**inputs, max_new_tokens=3), vlm.generate(**inputs, max_new_tokens=3))
    third = PrunedVLM.from_pretrained(folder, "uniform", 0.5, positions="compact")
    logits(third, inputs)
    assert third.pruning.positions == "compact" and third.last is not None and third.last.num_kept == [32]


def saved_stock(family: str, folder: Path) -> tuple[Path, Any]:
    """A tiny stock checkpoint of another family, and a function that makes inputs for it."""
    if family == "molmo2":
        return molmo2.write_molmo2(folder), lambda processor: molmo2.make_inputs(processor, ["3 what colour ?"])
    vision = {"deepstack_visual_indexes": [5, 6], "num_position_embeddings": 36}
    vision = vision if family == "qwen3_vl" else {"window_size": 16, "fullatt_block_indexes": [1, 4, 7]}
    model, processor = qwen_tiny.make(family, folder, **vision)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, lambda processor: qwen_tiny.make_inputs(processor, ["v what colour ?"])


@pytest.mark.parametrize("family", ["molmo2", "qwen2_5_vl", "qwen3_vl"])
def test_families_whose_files_have_other_names_than_their_modules_come_back_too(family: str, tmp_path: Path) -> None:
    folder, make_inputs_of = saved_stock(family, tmp_path)
    model, processor = load_vlm(folder)
    torch.manual_seed(5)
    pruning = stts.Pruning(model, "stts", retention_ratio=0.5)
    assert pruning.module is not None
    pruning.module.eval()
    vlm, inputs = PrunedVLM(model, processor, pruning), make_inputs_of(processor)
    before = logits(vlm, inputs)
    assert vlm.last is not None and vlm.last.retention_measured < 0.6
    for scorer_only in (True, False):
        out = vlm.save_pretrained(tmp_path / f"out-{scorer_only}", scorer_only=scorer_only)
        assert torch.equal(logits(PrunedVLM.from_pretrained(out), inputs), before)
    vlm.detach()
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "out-False").eval()
    with torch.no_grad():
        assert torch.equal(stock(**inputs).logits, model(**inputs).logits)


def test_the_stock_class_alone_loads_the_complete_folder(live: Any, tiny_folder: Path, tmp_path: Path) -> None:
    vlm, inputs = live
    with torch.no_grad():
        for parameter in vlm.model.parameters():
            parameter.add_(0.01)  # fine-tuned
    trained = save_pruned(tmp_path / "trained", vlm.model, vlm.processor, vlm.pruning)
    pruned = logits(vlm, inputs)
    assert main(["export", str(trained), str(tmp_path / "out")]) == 0
    stock, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again = PrunedVLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, inputs), pruned) and again.base == str(tiny_folder)
    vlm.detach()
    with torch.no_grad():
        assert torch.equal(stock.eval()(**inputs).logits, vlm.model(**inputs).logits)
    assert "packed_or" not in (tmp_path / "out" / "config.json").read_text()


def test_a_scorer_alone_is_not_written_where_the_base_would_be_another_model(live: Any, tmp_path: Path) -> None:
    vlm, _ = live
    with torch.no_grad():
        vlm.model.model.image_newline.add_(1)
    with pytest.raises(ValueError, match=r"1 tensors of the model differ from its base .*image_newline"):
        vlm.save_pretrained(tmp_path / "out", scorer_only=True)
    assert not (tmp_path / "out").exists()


def test_export_turns_folders_into_each_other(live: Any, tmp_path: Path, capsys: Any) -> None:
    vlm, inputs = live
    before = logits(vlm, inputs)
    vlm.save_pretrained(tmp_path / "whole")
    whole, alone, merged = (str(tmp_path / name) for name in ("whole", "alone", "merged"))
    assert main(["export", whole, alone, "--scorer_only"]) == 0
    assert main(["export", "--merge", alone, merged]) == 0
    assert (names(Path(alone)), names(Path(merged))) == (OURS, OURS | STOCK)
    for file in STOCK | {"scorer.safetensors", "stts.json"}:
        if file != "tokenizer.json":  # remembers whether its last call padded
            assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes(), file
    assert torch.equal(logits(PrunedVLM.from_pretrained(merged), inputs), before)
    capsys.readouterr()
    (tmp_path / "file").write_text("mine")
    for argv, message in (
        ([whole, alone], "not an empty folder"),
        ([whole, str(tmp_path / "file")], "not an empty folder"),
        ([alone, "new"], "add --merge"),
        ([whole, "new", "--merge"], "merge is for a scorer alone"),
        ([whole, "new", "--base_model", whole], "weights of its own"),
        ([whole, "new", "--retention_ratio", "0.5"], "for --from_reference"),
        ([whole], "expected FOLDER and OUT"),
        (["--from_reference", "file", "new"], "needs --base_model"),
    ):
        assert main(["export", *argv]) == 2
        assert message in capsys.readouterr().err
    assert not Path("new").exists() and (tmp_path / "file").read_text() == "mine"


def test_a_scorer_alone_can_be_given_its_base(live: Any, tiny_folder: Path, tmp_path: Path) -> None:
    vlm, inputs = live
    folder = vlm.save_pretrained(tmp_path / "alone", scorer_only=True)
    settings = pruner_settings(folder)
    assert settings is not None and settings["base"] == str(tiny_folder)
    (folder / "stts.json").write_text(json.dumps(settings | {"base": "/gone/away"}))
    with pytest.raises(ValueError, match=r"name its place with base_model=: model '/gone/away' is neither"):
        PrunedVLM.from_pretrained(folder)
    again = PrunedVLM.from_pretrained(folder, base_model=tiny_folder, dtype=torch.float32, device="cpu")
    assert torch.equal(logits(again, inputs), logits(vlm, inputs))
    wider = write_small_vlm(tmp_path / "wider", None, **(TINY | {"vit_mlp": 56}))
    with pytest.raises(ValueError, match=r"scorer.mlp.0.weight is \(48, 64\), expected \(56, 64\)"):
        PrunedVLM.from_pretrained(folder, base_model=wider)
    with pytest.raises(ValueError, match="holds a scorer alone"):
        load_vlm(folder)


def test_a_stock_checkpoint_wants_a_pruner_that_is_not_random(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="so name a pruner"):
        PrunedVLM.from_pretrained(tiny_folder)
    with pytest.raises(ValueError, match="would be random"):
        PrunedVLM.from_pretrained(tiny_folder, "stts")
    vlm = PrunedVLM.from_pretrained(tiny_folder, "random", 0.25, seed=7)
    assert vlm.pruning.options == {"seed": 7} and vlm.pruning.retention_ratio == 0.25


def test_the_hub_gets_the_folder_that_save_pretrained_writes(
    live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm, _ = live
    calls: list[tuple[str, dict[str, Any]]] = []
    files: dict[str, bytes] = {}

    def create_repo(api: HfApi, repo_id: str, **given: Any) -> Any:
        calls.append((repo_id, {**given, "token": api.token}))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(api: HfApi, *, folder_path: Path, repo_id: str, **given: Any) -> str:
        calls.append((repo_id, {**given, "token": api.token}))
        files.clear()
        files.update({file.name: file.read_bytes() for file in Path(folder_path).iterdir()})
        return "https://huggingface.co/me/mine/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert vlm.push_to_hub("me/mine", private=True, token="t").endswith("commit/1")
    assert calls == [
        ("me/mine", {"private": True, "exist_ok": True, "token": "t"}),
        ("me/mine", {"commit_message": "Upload with pruner stts", "token": "t"}),
    ]
    saved = {file.name: file.read_bytes() for file in vlm.save_pretrained(tmp_path / "out").iterdir()}
    assert set(files) == set(saved) == OURS | STOCK
    local = {"stts.json", "README.md"}  # these name the base, and a path on this machine is nobody's business
    assert all(files[name] == saved[name] for name in set(saved) - local)
    assert json.loads(files["stts.json"]) == json.loads(saved["stts.json"]) | {"base": None}
    with pytest.raises(ValueError, match="nobody else can load"):
        vlm.push_to_hub("me/mine", scorer_only=True)


def test_the_card_says_what_it_is_and_claims_nothing(live: Any, tmp_path: Path) -> None:
    vlm, _ = live
    card = (vlm.save_pretrained(tmp_path / "local") / "README.md").read_text()
    assert "base_model:" not in card and "| base | tiny (`llava_onevision`) |" in card
    assert "0.3: the fraction" in card and "arxiv.org/abs/2603.18004" in card and "from_pretrained" in card
    card = (
        save_pruned(tmp_path / "hub", vlm.model, vlm.processor, vlm.pruning, base="org/vlm") / "README.md"
    ).read_text()
    assert "\nbase_model: org/vlm\n" in card and "# vlm under stts" in card


def test_a_hub_id_is_read_like_a_folder(live: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """From a cache laid out as the hub's client does, offline; in a new process, since paths are read at import."""
    vlm, inputs = live
    expected = logits(vlm, inputs)
    repository = tmp_path / "hub" / "models--me--mine"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    vlm.save_pretrained(repository / "snapshots" / ("0" * 40), scorer_only=True)
    save_file({name: value for name, value in inputs.items()}, tmp_path / "inputs.safetensors")
    code = (
        "import sys, torch, stts; from safetensors.torch import load_file, save_file\n"
        "vlm = stts.PrunedVLM.from_pretrained('me/mine')\n"
        "with torch.no_grad(): out = vlm(**load_file(sys.argv[1])).logits\n"
        "save_file({'logits': out.contiguous()}, sys.argv[2])"
    )
    root = Path(__file__).parents[3]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}
    argv = [sys.executable, "-c", code, str(tmp_path / "inputs.safetensors"), str(tmp_path / "logits.safetensors")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)


# --- the release's scorer ------------------------------------------------------------------------------------------

PREFIX = "model.vision_backbone.image_vit.temporal_token_scorer."
GOLDEN = cases("stts", "scorer.mlp.w1.weight")


@pytest.mark.parametrize("case", GOLDEN, ids=str)
@pytest.mark.parametrize("prefix", ["temporal_token_scorer.", PREFIX])
def test_the_release_s_names_become_ours_and_go_back(case: Any, prefix: str) -> None:
    theirs = {prefix + name: value for name, value in case.group("scorer").items()}
    ours = to_ours(theirs)
    back = {name.replace("temporal_token_scorer.", prefix): value for name, value in to_reference(ours).items()}
    assert set(ours) == set(TO_OURS.values()) and len(ours) == 14
    assert back.keys() == theirs.keys() and all(torch.equal(back[name], theirs[name]) for name in theirs)
    assert ours["scorer.pooling.query.weight"] is theirs[f"{prefix}patch_token_pooler.wq.weight"]
    assert ours["scorer.mlp.2.bias"] is theirs[f"{prefix}mlp.w3.bias"]


def to_reference(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of `to_ours`; names start at the scorer."""
    return {f"{ANCHOR}.{theirs}": state[ours] for theirs, ours in TO_OURS.items()}


def release(**changes: Any) -> dict[str, torch.Tensor]:
    """A scorer of the release for the tiny tower (width 32, hidden 48), with other tensors around it."""
    torch.manual_seed(1)
    shapes = {"w1": (48, 64), "w2": (48, 48), "w3": (1, 48)}
    weights = {f"mlp.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    weights |= {f"mlp.{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}
    for name in ("wq", "wk", "wv", "wo"):
        weights[f"patch_token_pooler.{name}.weight"] = torch.randn(32, 32)
        weights[f"patch_token_pooler.{name}.bias"] = torch.randn(32)
    named = {PREFIX + name: value for name, value in weights.items()}
    return {**named, "model.transformer.wte.weight": torch.ones(2), **changes}


@pytest.mark.parametrize("kind", ["safetensors", "torch", "wrapped"])
def test_a_release_scorer_becomes_a_folder_that_prunes(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    weights = release()
    file = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "safetensors":
        save_file(weights, file)
    elif kind == "torch":
        torch.save(weights, file)
    else:  # FSDP, compile and a trainer around it, inside a bigger checkpoint
        inner = "image_vit._fsdp_wrapped_module._orig_mod."
        wrapped = {f"module.{name.replace('image_vit.', inner)}": value for name, value in weights.items()}
        torch.save({"step": 3, "model": wrapped}, file)
    argv = ["export", "--from_reference", str(file), "--base_model", str(tiny_folder), "--retention_ratio", "0.25"]
    out = tmp_path / "out"
    assert main([*argv, *(["--scorer_only"] if kind == "torch" else []), str(out)]) == 0
    assert names(out) == (OURS if kind == "torch" else OURS | STOCK)
    vlm = PrunedVLM.from_pretrained(out)
    module = vlm.pruning.module
    assert module is not None and vlm.pruning.retention_ratio == 0.25
    state = module.state_dict()
    assert all(
        torch.equal(value, weights[PREFIX + name.split(".", 1)[1]]) for name, value in to_reference(state).items()
    )
    logits(vlm, make_inputs(vlm.processor, ["v which is red ?"]))
    assert vlm.last is not None and vlm.last.num_kept == [16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({PREFIX + "mlp.w4.weight": torch.ones(1)}, r"not understood: \['model.*mlp.w4.weight'\]"),
        ({"frame_scorer.weight": torch.ones(1)}, r"not understood: \['frame_scorer.weight'\]"),
        ({"ema.temporal_token_scorer.mlp.w1.bias": torch.ones(48)}, r"twice: \['model\S* and ema\S*'\]"),
        ({PREFIX + "mlp.w1.bias": torch.ones(3)}, r"scorer.mlp.0.bias is \(3,\), expected \(48,\)"),
    ],
)
def test_a_release_scorer_that_does_not_fit_is_refused(
    tiny_folder: Path, tmp_path: Path, capsys: Any, changes: Any, message: str
) -> None:
    save_file(release(**changes), tmp_path / "model.safetensors")
    argv = ["export", "--from_reference", str(tmp_path / "model.safetensors"), "--base_model", str(tiny_folder)]
    assert main([*argv, str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "out").exists()


def test_files_that_are_no_release_are_refused(tmp_path: Path) -> None:
    weights = release()
    weights.pop(PREFIX + "mlp.w3.bias")
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"part.safetensors: .*missing: \['temporal_token_scorer.mlp.w3.bias'\]"):
        read_reference(tmp_path / "part.safetensors")
    save_file({"lm_head.weight": torch.ones(1)}, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="no tensor of a scorer"):
        read_reference(tmp_path / "none.safetensors")
    torch.save({"model": Path("x")}, tmp_path / "objects.pt")
    (tmp_path / "text.safetensors").write_text("not tensors")
    for file in ("objects.pt", "text.safetensors"):
        with pytest.raises(ValueError, match="cannot be read as tensors"):
            read_reference(tmp_path / file)
    with pytest.raises(ValueError, match="is not a file"):
        read_reference(tmp_path / "gone.pt")
