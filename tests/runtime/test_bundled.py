from __future__ import annotations

from pathlib import Path

import pytest

from headsearch.errors import SpecError
from headsearch.runtime.bundled import bundled, study_file, study_name
from headsearch.study_file import load_study


def test_every_bundled_study_is_valid_and_named_after_its_file() -> None:
    assert "quickstart" in bundled()
    for name, path in bundled().items():
        assert load_study(path).name == name.replace("/", "-")


def test_a_file_comes_before_a_bundled_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert study_file("quickstart") == study_file("quickstart.toml") == bundled()["quickstart"]
    (tmp_path / "quickstart").mkdir()
    assert study_file("quickstart") == bundled()["quickstart"]
    (tmp_path / "quickstart.toml").write_text("")
    assert study_file("quickstart.toml") == Path("quickstart.toml")


def test_neither_file_nor_bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError, match=r"quickstrt: no such study file; .*did you mean quickstart"):
        study_file("quickstrt")
    assert study_file("folder/quickstart.toml") == Path("folder/quickstart.toml")


def test_a_file_stands_for_the_study_in_it(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'name = "b"\nbudget = {trials = 1, epochs = 1}\nspace."head.kind" = ["linear"]\n'
    )
    assert study_name(str(tmp_path / "a.toml")) == "b"
    assert study_name("anything") == "anything"
    with pytest.raises(SpecError):
        study_name("missing.toml")
