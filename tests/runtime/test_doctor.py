from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from headsearch import __version__
from headsearch.cli.app import run
from headsearch.runtime import doctor
from headsearch.runtime.doctor import Finding, examine


def named(findings: list[Finding], name: str) -> list[Finding]:
    return [finding for finding in findings if finding.name == name]


@pytest.mark.postgres
def test_a_machine_in_order(headsearch_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings = examine()
    assert [finding for finding in findings if finding.state == "broken"] == []
    assert __version__ in named(findings, "headsearch")[0].text
    assert "precision auto" in named(findings, "cpu")[0].text
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


def test_gpus_that_torch_cannot_use_are_told(headsearch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch uses the GPU here")
    monkeypatch.setattr(doctor, "gpus", lambda: ["GPU 0: H100"])
    (cuda,) = named(examine(), "cuda")
    assert "nvidia-smi lists 1 GPUs that torch" in cuda.text
    assert cuda.remedy


def test_decoded_data_sets_are_counted(headsearch_home: Path) -> None:
    from headsearch.config import DataConfig
    from headsearch.core.images import load_images

    load_images(DataConfig(), home=headsearch_home)
    assert "1 decoded data sets in the cache, 1,797 images" in named(examine(), "data")[0].text
