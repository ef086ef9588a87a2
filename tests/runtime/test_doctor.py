from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_nvidia import NO_DRIVER, FakeNvidia, gpus

from headsearch import __version__
from headsearch.cli.app import run
from headsearch.core import processor
from headsearch.runtime import doctor
from headsearch.runtime import gpus as gpus_module
from headsearch.runtime.doctor import Finding, examine
from headsearch.runtime.gpulocks import take
from headsearch.runtime.gpus import listing


def named(findings: list[Finding], name: str) -> list[Finding]:
    return [finding for finding in findings if finding.name == name]


@pytest.mark.postgres
def test_a_machine_in_order(headsearch_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings = examine()
    assert [finding for finding in findings if finding.state == "broken"] == []
    assert __version__ in named(findings, "headsearch")[0].text
    assert "precision auto = fp32 (" in named(findings, "cpu")[0].text
    assert str(headsearch_home) in named(findings, "home")[0].text
    assert "starts by itself" in named(findings, "database")[0].text
    assert not (headsearch_home / "postgres" / "pgdata").exists()
    assert run(["doctor"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(findings)
    assert run(["doctor", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(findings)


def test_what_is_broken_has_a_line_and_makes_the_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADSEARCH_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", "postgresql://me:secret@127.0.0.1:1/heads")
    assert run(["doctor"]) == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert "secret" not in said.out
    lines = {line.split()[1]: line for line in said.out.splitlines() if line.startswith("broken")}
    assert "HEADSEARCH_HOME" in lines["home"]
    assert "no PostgreSQL answers" in lines["database"]


def test_a_package_that_is_not_there(headsearch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise ModuleNotFoundError(f"No package metadata was found for {name}")

    monkeypatch.setattr(doctor.importlib.metadata, "version", missing)
    broken = named(examine(), "versions")
    assert [finding.state for finding in broken] == ["broken"]
    assert broken[0].remedy


def test_a_full_disk_and_a_wrong_data_folder_are_notes(
    headsearch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 30))
    monkeypatch.setenv("HEADSEARCH_DATA", str(headsearch_home / "missing"))
    monkeypatch.setenv("BROWSER_PATH", "/some/browser")
    findings = examine()
    assert [(f.state, f.remedy is not None) for f in named(findings, "home")] == [("note", True)]
    assert [f.state for f in named(findings, "data")] == ["ok", "note"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeNvidia:
    fake = FakeNvidia(tmp_path)
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HEADSEARCH_GPU_LOCKS", str(tmp_path / "locks"))
    for name in ("CUDA_VISIBLE_DEVICES", "HEADSEARCH_GPU_SLOTS"):
        monkeypatch.delenv(name, raising=False)
    return fake


def test_gpus_that_torch_cannot_use_are_told(headsearch_home: Path, fake: FakeNvidia) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch uses the GPU here")
    assert "no GPU" in named(examine(), "cuda")[0].text
    fake.show(gpus(1))
    (cuda,) = named(examine(), "cuda")
    assert "nvidia-smi lists 1 GPUs that torch" in cuda.text
    assert cuda.remedy


def test_leases_of_gpus_are_shown(
    headsearch_home: Path, fake: FakeNvidia, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = gpus(2)
    fake.show(shown)
    looked = list(doctor._gpus())
    assert [(f.name, f.text.split(": ")[1]) for f in looked[:2]] == [("cuda:0", "free"), ("cuda:1", "free")]
    assert not (tmp_path / "locks").exists(), "looking makes nothing"
    (tmp_path / "locks").mkdir()
    lease = take(listing().gpus, 1, tmp_path / "locks")
    assert lease
    lease.sign("lab-3:77:abc")
    first, second, locks = doctor._gpus()
    assert first.text.startswith(f"NVIDIA A100-SXM4-40GB {shown[0].uuid}: held by lab-3:77:abc since 20")
    assert second.text == f"NVIDIA A100-SXM4-40GB {shown[1].uuid}: free"
    assert locks.text == f"leases in {tmp_path / 'locks'}, 1 for each GPU (HEADSEARCH_GPU_SLOTS)"
    monkeypatch.setenv("HEADSEARCH_GPU_SLOTS", "2")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    only, _ = doctor._gpus()
    assert "slot 0 held by lab-3:77:abc since" in only.text
    assert only.text.endswith("; slot 1 free")
    lease.release()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    hidden, _ = doctor._gpus()
    assert (hidden.state, hidden.text) == ("note", "CUDA_VISIBLE_DEVICES='5' leaves none of 2 GPUs")


def test_a_driver_that_fails_is_a_note_and_one_that_hangs_is_broken(
    headsearch_home: Path, fake: FakeNvidia, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.say(NO_DRIVER, code=9)
    (finding,) = named(examine(), "gpus")
    assert finding.state == "note"
    assert "couldn't communicate" in finding.text
    monkeypatch.setattr(gpus_module, "ANSWER_SECONDS", 0.2)
    fake.hang()
    assert [f.state for f in named(examine(), "gpus")] == ["broken"]
    monkeypatch.setenv("HEADSEARCH_GPU_SLOTS", "x")
    fake.show(gpus(1))
    assert "HEADSEARCH_GPU_SLOTS" in named(examine(), "gpus")[0].text


def test_decoded_data_sets_are_counted(headsearch_home: Path) -> None:
    from headsearch.config import DataConfig
    from headsearch.core.images import load_images

    load_images(DataConfig(), home=headsearch_home)
    assert "1 decoded data sets in the cache, 1,797 images" in named(examine(), "data")[0].text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("avx2", "precision auto = fp32 (no native bf16)"),
        ("avx512_bf16", "precision auto = fp32 (bf16 may be faster: headsearch bench --precision bf16)"),
    ],
)
def test_a_cpu_that_multiplies_bf16_is_told_of(headsearch_home, tmp_path, monkeypatch, flags, said):
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    processor.CPUINFO.write_text(f"flags\t\t: fpu {flags}\n")
    [cpu] = named(examine(), "cpu")
    assert cpu.text.endswith(said)
