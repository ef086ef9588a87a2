"""The file that a backup becomes, and the programs that write it."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from dumped import begin

from headsearch.errors import (
    DatabaseError,
    InputError,
    StorageError,
)
from headsearch.runtime import pgclients
from headsearch.runtime.dumps import backup, restore

pytestmark = pytest.mark.postgres


def test_an_existing_file_is_replaced_only_by_force(database, tmp_path):
    begin(database)
    file = tmp_path / "b.dump"
    file.write_text("precious")
    file.chmod(0o644)
    with pytest.raises(InputError, match=r"b\.dump: exists already; .*--force"):
        backup(file)
    assert file.read_text() == "precious"
    link = tmp_path / "link"
    link.symlink_to(file)
    backup(link, force=True)
    assert link.is_symlink()
    assert file.read_bytes().startswith(b"PGDMP")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.dump", "link"]


def test_names_that_cannot_be_written_are_refused(database, tmp_path):
    begin(database)
    with pytest.raises(InputError, match=f"there is no folder {tmp_path / 'no'}"):
        backup(tmp_path / "no" / "b.dump")
    with pytest.raises(InputError, match="not a regular file"):
        backup(tmp_path, force=True)
    with pytest.raises(InputError, match="/dev/null: not a regular file"):
        backup(Path("/dev/null"), force=True)


def test_a_folder_that_is_not_ours_is_named(database, headsearch_home, open_folder_factory):
    begin(database)
    with open_folder_factory("headsearch-backups-") as folder:
        folder.chmod(0o555)
        headsearch_home.chmod(0o777)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)  # root may write everywhere
        try:
            with pytest.raises(StorageError, match=f"cannot write {folder / 'b.dump'}: Permission denied"):
                backup(folder / "b.dump")
        finally:
            os.seteuid(me)
        assert list(folder.iterdir()) == []


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts scripts in the place of pg_dump: the embedded package's, and the one on PATH."""

    def put(place, script):
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        for name in ("initdb", "pg_ctl", "postgres"):
            (folder / name).touch()
        (folder / "pg_dump").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "pg_dump").chmod(0o755)

    monkeypatch.setenv("HEADSEARCH_POSTGRES_BIN", str(tmp_path / "embedded"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    put("embedded", "exit 1")
    put("path", "exit 1")
    return put


def of_version(version, script="exit 0"):
    return f'[ "$1" = --version ] && echo "pg_dump (PostgreSQL) {version}" && exit 0\n{script}'


REAL = pgclients.programs("pg_dump")[0].path if shutil.which("sh") else None
SAYING = """
printf "%s\\n" "$@" > {0}/argv
env > {0}/environment
passfile=$(printf "%s" "$*" | sed -n "s/.*passfile=\\([^ ']*\\).*/\\1/p")
stat --dereference --format=%a "$passfile" > {0}/mode
cat "$passfile" > {0}/passfile
"""


def test_the_password_is_on_no_command_line(database, tmp_path, programs, monkeypatch):
    begin(database)
    programs("embedded", of_version("18.4", SAYING.format(tmp_path) + f'\nexec {REAL} "$@"'))
    backup(tmp_path / "b.dump")
    password = database.engine.url.password
    assert (tmp_path / "passfile").read_text() == f"*:*:*:*:{password}\n"
    assert (tmp_path / "mode").read_text() == "600\n"
    argv = (tmp_path / "argv").read_text()
    assert "--dbname=" in argv
    assert password not in argv
    monkeypatch.delenv("HEADSEARCH_DATABASE_URL")
    (tmp_path / "environment").unlink()
    pgclients.dump(database.url, ["--schema-only"], tmp_path / "b.dump", server=18, tls=False)
    assert password not in (tmp_path / "environment").read_text()
    monkeypatch.delenv("HEADSEARCH_POSTGRES_BIN")


def test_a_password_is_given_as_it_is_and_never_repeated(tmp_path, programs):
    complaint = (
        f'echo "pg_dump: error: connection with $(cut -d: -f5- {tmp_path}/passfile) failed" >&2; exit 1'
    )
    programs("embedded", of_version("18.4", SAYING.format(tmp_path) + "\n" + complaint))
    url = "postgresql+psycopg2://me:p%40ss%20%2F%25'@h:5/d?application_name=x"
    with pytest.raises(DatabaseError) as caught:
        pgclients.dump(url, [], tmp_path / "b.dump", server=18, tls=False)
    assert str(caught.value) == "pg_dump: connection with *** failed"
    assert (tmp_path / "passfile").read_text() == "*:*:*:*:p@ss /%'\n"
    argv = (tmp_path / "argv").read_text()
    assert "host=h port=5" in argv.replace("'", "") or "port=5" in argv
    assert "p@ss" not in argv
    with pytest.raises(InputError, match="sslpassword: pg_dump would show it"):
        pgclients.dump(f"{url}&sslpassword=x", [], tmp_path / "b.dump", server=18, tls=False)


def test_a_server_newer_than_every_pg_dump_is_named(tmp_path, programs):
    programs("embedded", of_version("18.4"))
    programs("path", of_version("15.18 (Debian 15.18-0+deb12u1)"))
    url = "postgresql+psycopg2://me:secret@h/d"
    with pytest.raises(DatabaseError) as caught:
        pgclients.dump(url, [], tmp_path / "b.dump", server=19, tls=False)
    assert str(caught.value) == (
        "the server runs PostgreSQL 19, pg_dump here is of 18 and 15: "
        "put pg_dump of PostgreSQL 19 or newer on PATH"
    )
    assert not caught.value.transient
    programs("path", of_version("19beta1", f"echo used > {tmp_path}/b.dump"))
    pgclients.dump(url, [], tmp_path / "b.dump", server=19, tls=False)
    assert (tmp_path / "b.dump").read_text() == "used\n"


def test_an_encrypted_connection_stays_encrypted(tmp_path, programs, monkeypatch):
    programs("embedded", of_version("18.4"))
    programs("path", of_version("18.6", SAYING.format(tmp_path)))
    url = "postgresql+psycopg2://me:secret@h/d"
    for given, wanted in (
        ("", "require"),
        ("?sslmode=prefer", "require"),
        ("?sslmode=verify-full", "verify-full"),
    ):
        pgclients.dump(url + given, [], tmp_path / "b.dump", server=18, tls=True)
        assert f"sslmode={wanted}" in (tmp_path / "argv").read_text()
    monkeypatch.setenv("PGSSLMODE", "verify-ca")
    pgclients.dump(url, [], tmp_path / "b.dump", server=18, tls=True)
    assert "sslmode" not in (tmp_path / "argv").read_text()


def test_the_embedded_package_cannot_encrypt_and_says_so(database, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DatabaseError, match=r"the connection is encrypted, .* put pg_dump of PostgreSQL 18"):
        pgclients.dump(database.url, [], tmp_path / "b.dump", server=18, tls=True)


@pytest.mark.parametrize("existing", [False, True])
def test_a_dump_cut_short_leaves_no_file_and_the_old_one(database, tmp_path, programs, existing):
    begin(database)
    folder = tmp_path / "backups"
    folder.mkdir()
    if existing:
        (folder / "b.dump").write_text("old")
    full = (
        'for a in "$@"; do case $a in --file=*) printf half > "${a#--file=}";; esac; done\n'
        'echo "pg_dump: error: could not write to output file: No space left on device" >&2; exit 1'
    )
    programs("embedded", of_version("18.4", full))
    with pytest.raises(StorageError, match=r"the backup cannot be written: .*No space left"):
        backup(folder / "b.dump", force=True)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("b.dump", "old")] * existing
    programs("embedded", of_version("18.4", "kill -9 $$"))
    with pytest.raises(DatabaseError, match="pg_dump: ended by signal 9"):
        backup(folder / "b.dump", force=True)
    assert [path.name for path in folder.iterdir()] == ["b.dump"] * existing


def test_a_file_of_a_newer_pg_dump_says_which_program_is_missing(database, tmp_path, programs, monkeypatch):
    begin(database)
    monkeypatch.delenv("HEADSEARCH_POSTGRES_BIN")
    backup(tmp_path / "b.dump")
    programs("path", "exit 1")
    newer = '[ "$1" = --version ] && echo "pg_restore (PostgreSQL) 99.1" && exit 0\n'
    script = tmp_path / "path" / "pg_restore"
    script.write_text(
        f'#!/bin/sh\n{newer}echo "pg_restore: error: unsupported version (1.99) in file header" >&2; exit 1\n'
    )
    script.chmod(0o755)
    with pytest.raises(InputError, match=r"written by a pg_dump newer than pg_restore 99, the newest here"):
        restore(tmp_path / "b.dump", replace=True, force=True)
