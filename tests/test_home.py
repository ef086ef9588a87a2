"""The home folder: where it is, who may enter it, and what is said when it cannot be used."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from headsearch import home
from headsearch.errors import StorageError


def mode(folder: Path) -> int:
    return stat.S_IMODE(folder.stat().st_mode)


def test_variable_names_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSEARCH_HOME", str(tmp_path / "a" / ".." / "b"))
    assert home.home_folder() == tmp_path / "b"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEADSEARCH_HOME", "relative")
    assert home.home_folder() == tmp_path / "relative"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HEADSEARCH_HOME", "~/mine")
    assert home.home_folder() == tmp_path / "mine"


@pytest.mark.parametrize("value", ["", None])
def test_default_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("HEADSEARCH_HOME", raising=False)
    else:
        monkeypatch.setenv("HEADSEARCH_HOME", value)
    monkeypatch.setattr(home, "_SYSTEM_HOME", tmp_path / "system")
    monkeypatch.setattr(home.platformdirs, "user_data_dir", lambda name, appauthor: str(tmp_path / name))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert home.home_folder() == tmp_path / "system"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert home.home_folder() == tmp_path / "headsearch"


@pytest.mark.parametrize(("uid", "expected"), [(0, 0o755), (1000, 0o700)])
def test_modes_do_not_depend_on_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, expected: int
) -> None:
    """PostgreSQL's user must be able to pass through a home that root makes."""
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setenv("HEADSEARCH_HOME", str(tmp_path / "outer" / "home"))
    before = mode(tmp_path)
    for umask in (0o077, 0o000):
        old = os.umask(umask)
        try:
            folder = home.postgres_folder(home.home_folder())
        finally:
            os.umask(old)
        assert [mode(f) for f in (folder, *folder.parents[:2])] == [expected] * 3
        (tmp_path / "outer").rename(tmp_path / f"outer-{umask}")
    assert mode(tmp_path) == before


def test_existing_folder_keeps_its_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir(mode=0o750)
    monkeypatch.setenv("HEADSEARCH_HOME", str(tmp_path / "home"))
    assert mode(home.home_folder()) == 0o750


def test_unusable_home_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "home", Path("/proc/headsearch")):
        monkeypatch.setenv("HEADSEARCH_HOME", str(path))
        with pytest.raises(StorageError, match=f"{path}.*HEADSEARCH_HOME"):
            home.home_folder()
    monkeypatch.setenv("HEADSEARCH_HOME", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StorageError, match=f"cannot write to {tmp_path}"):
        home.home_folder()


def test_sub_folders(tmp_path: Path) -> None:
    made = [
        home.postgres_folder(tmp_path), home.image_cache(tmp_path), home.autoencoder_cache(tmp_path),
        home.data_folder(tmp_path), home.logs_folder(tmp_path),
    ]  # fmt: skip
    names = [str(folder.relative_to(tmp_path)) for folder in made]
    assert names == ["postgres", "cache/images", "cache/autoencoders", "data", "logs"]
    assert all(folder.is_dir() for folder in made)


def test_checkpoint_folders_never_meet(tmp_path: Path) -> None:
    assert home.checkpoint_folder(tmp_path, "cifar10", 7) == tmp_path / "checkpoints" / "cifar10" / "7"
    studies = ["a/b", "a b", "a%2f.b", "a", "..", ".", "A", "ä", "", "%a", "a.b", "%2e.%2e."]
    folders = {home.checkpoint_folder(tmp_path, study, 0) for study in studies}
    assert len(folders) == len(studies)
    assert {folder.parents[1] for folder in folders} == {tmp_path / "checkpoints"}
    assert not (tmp_path / "checkpoints").exists()
