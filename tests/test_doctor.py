"""`stts doctor`: always an answer, true about this machine, and what is wrong is told with its remedy."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from stts import doctor
from stts.cli import main as stts
from stts.packing.attention import kernel_name


def test_it_tells_versions_device_kernel_and_a_decoded_video(capsys: pytest.CaptureFixture[str]) -> None:
    assert stts(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == metadata.version("torch")
    assert found["device"]["kind"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert (
        found["attention"]["works"] and found["attention"]["chosen"].split(" (")[0] in found["attention"]["available"]
    )
    assert found["video"]["works"] and "h264" in found["video"]["decoders"]
    for item in found["missing"]:
        assert set(item) == {"name", "for", "how"} and all(item.values())


def test_the_text_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert stts(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch ", "transformers", "attention   ok", "video       ok", "cache       ", "missing"):
        assert word in text


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/proc/self/no/such/place")  # nobody can write there, not even root
    assert stts(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "NOT WRITABLE" in text and "set HF_HOME" in text
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "to" / "be" / "made"))
    assert doctor.examine()["cache"]["writable"] and not (tmp_path / "to").exists()


def test_a_broken_part_is_a_finding_and_no_crash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("undefined symbol:\n  x")

    monkeypatch.setattr(doctor, "packed_attention", broken)
    monkeypatch.setattr(doctor, "sample_frames", broken)
    assert stts(["doctor"]) == 0
    text = capsys.readouterr().out
    assert (
        "attention   BROKEN (RuntimeError: undefined symbol: x)" in text and "pip install --force-reinstall av" in text
    )


def test_fewer_threads_than_cores_is_told() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        told = " ".join(doctor.examine()["slow"])
    finally:
        torch.set_num_threads(before)
    assert ("torch uses 1 of" in told) == (doctor._cores() > 1)


def test_the_kernel_on_a_cpu_is_sdpa() -> None:
    assert kernel_name(torch.device("cpu"), torch.bfloat16) == "SDPA"


def test_what_is_absent_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"av": "15.1.0", "pyarrow": None, "deepspeed": "0.19.8"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    missing = {item["name"]: item["how"] for item in doctor.examine()["missing"]}
    assert "stts-video[parquet]" in missing["pyarrow"] and "ninja" in missing["g++, ninja"]
    assert "av" in missing["av>=17"]
