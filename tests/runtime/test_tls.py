"""A server elsewhere over TLS: verified by every part, refused in a line where it is not who it should be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psycopg2
import pytest
from processes import Command
from team import LAB, Team
from test_dashboard import serving
from test_roles import FORBIDDEN, LARGE_OBJECTS, WRITES, allowed, make
from test_worker import TINY
from tls import PASSWORD, EncryptingServer, encrypting_programs, encrypting_server

from headsearch.errors import DatabaseError
from headsearch.runtime.database import check, given_address, open_database
from headsearch.runtime.dumps import backup, restore
from headsearch.runtime.migration import bring_up
from headsearch.runtime.pgbinaries import find_folder
from headsearch.runtime.session import open_session
from headsearch.search import snapshot, studies
from headsearch.search.roles import READER, WORKER
from headsearch.spec import StudySpec

pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.hostile]


@pytest.fixture(scope="module")
def server(open_folder_factory):
    place = encrypting_programs()
    if place is None:
        pytest.skip(
            "no PostgreSQL that encrypts: install a distribution's, such as apt-get install postgresql"
        )
    with open_folder_factory("headsearch-tls-") as folder, encrypting_server(folder, place) as running:
        yield running


@pytest.fixture
def owner_file(tmp_path: Path) -> Path:
    file = tmp_path / "owner"
    file.write_text(PASSWORD)
    return file


def become(monkeypatch, server: EncryptingServer, user: str, file: Path) -> None:
    url = server.url(user=user, password="", sslmode="verify-full", sslrootcert=str(server.authority))
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", url)
    monkeypatch.setenv("HEADSEARCH_DATABASE_PASSWORD_FILE", str(file))


def test_what_is_not_verified_is_refused_in_a_line(server: EncryptingServer, tmp_path: Path) -> None:
    right = str(server.authority)
    check(server.url(sslmode="verify-full", sslrootcert=right))
    check(server.url("127.0.0.1", sslmode="verify-ca", sslrootcert=right))
    absent = tmp_path / "absent.crt"
    cases = {
        server.url(sslmode="verify-full", sslrootcert=str(server.other_authority)): (
            f"the database at localhost:{server.port} shows a certificate of another authority than that in sslrootcert"
        ),
        server.url("127.0.0.1", sslmode="verify-full", sslrootcert=right): (
            f"the database at 127.0.0.1:{server.port} shows a certificate of another host than 127.0.0.1"
        ),
        server.url(sslmode="disable"): (
            f"the database at localhost:{server.port} wants an encrypted connection, or does not let this host"
        ),
        server.url(
            sslmode="verify-full", sslrootcert=str(absent)
        ): f'"{absent}" does not exist): name the certificate',
        server.url(
            password="wrong", sslmode="verify-full", sslrootcert=right
        ): "refuses user headsearch: check user",
    }
    for url, expected in cases.items():
        with pytest.raises(DatabaseError) as caught:
            check(url)
        message = str(caught.value)
        assert expected in message
        assert "\n" not in message
        assert PASSWORD not in message


def encrypted(session) -> set[tuple[str, bool]]:
    """Users of the connections to this database, and whether they are encrypted."""
    with session.database.begin() as connection:
        rows = connection.exec_driver_sql(
            "SELECT usename, ssl FROM pg_stat_activity JOIN pg_stat_ssl USING (pid) WHERE datname = current_database()"
        )
        return {tuple(row) for row in rows}


def test_everything_goes_over_it(
    server: EncryptingServer, owner_file: Path, tmp_path: Path, headsearch_home: Path, monkeypatch
) -> None:
    """Migration, owner, worker process, reader's dashboard, backup and restore, all with verify-full."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    worker_file, reader_file = tmp_path / "worker", tmp_path / "reader"
    worker_file.write_text("w:@/")
    reader_file.write_text("r\\:d")
    become(monkeypatch, server, "headsearch", owner_file)
    bring_up(worker=worker_file, reader=reader_file)
    with open_session() as session:
        studies.create(
            session.database, StudySpec.model_validate(TINY | {"budget": {"trials": 2, "epochs": 2}})
        )
        become(monkeypatch, server, WORKER, worker_file)
        worker = Command("worker", "--study", "tiny", "--threads", "1")
        output, _ = worker.communicate(timeout=280)
        assert worker.returncode == 0, output
        assert snapshot.read(session.database, "tiny").study.state == "complete"
        become(monkeypatch, server, READER, reader_file)
        address = given_address()
        assert address is not None
        with serving(address) as request:
            assert request("GET", "/healthz")[0] == 200
            assert b"tiny" in request("GET", "/api/studies")[2]
            assert encrypted(session) == {("headsearch", True), (READER, True)}
    become(monkeypatch, server, "headsearch", owner_file)
    monkeypatch.setenv("PATH", f"{server.programs}:{os.environ['PATH']}")
    written = backup(tmp_path / "b.dump")
    assert (written.studies, written.trials) == (1, 2)
    assert restore(tmp_path / "b.dump", replace=True).trials == 2


def test_a_backup_without_a_pg_dump_that_encrypts_says_so(
    server: EncryptingServer, owner_file: Path, tmp_path: Path, headsearch_home: Path, monkeypatch
) -> None:
    become(monkeypatch, server, "headsearch", owner_file)
    with open_session():
        pass
    only_sh = tmp_path / "bin"
    only_sh.mkdir()
    (only_sh / "sh").symlink_to(shutil.which("sh") or "/bin/sh")
    monkeypatch.setenv("PATH", str(only_sh))
    assert find_folder().is_dir()
    major = server.programs.parent.name
    with pytest.raises(DatabaseError) as caught:
        backup(tmp_path / "b.dump")
    assert (
        "the connection is encrypted, which the embedded package's cannot be: put pg_dump of PostgreSQL"
        in str(caught.value)
    )
    assert major.isdigit() is False or f"PostgreSQL {major} or newer on PATH" in str(caught.value)
    assert not (tmp_path / "b.dump").exists()


def test_a_session_with_the_wrong_authority_begins_nothing(
    server: EncryptingServer, owner_file: Path, headsearch_home: Path, monkeypatch
) -> None:
    become(monkeypatch, server, "headsearch", owner_file)
    url = server.url(password="", sslmode="verify-full", sslrootcert=str(server.other_authority))
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", url)
    with pytest.raises(DatabaseError, match="another authority"), open_database():
        pass


def test_the_roles_are_as_tight_on_this_server(
    server: EncryptingServer, tmp_path: Path, headsearch_home: Path, monkeypatch
) -> None:
    """Of another version than the embedded one, with a database as CREATE DATABASE makes it."""
    connection = psycopg2.connect(server.url())
    connection.autocommit = True
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE ROLE {LAB} LOGIN CREATEROLE PASSWORD 'x'")
        cursor.execute("CREATE DATABASE team")
    connection.close()
    members = Team(server.port, "team", "headsearch", tmp_path)
    for role, password in (("headsearch", PASSWORD), (WORKER, "w"), (READER, "r")):
        members.give(role, password)
    members.bring_up(monkeypatch)
    make(members, monkeypatch)
    assert allowed(members, WORKER, FORBIDDEN + LARGE_OBJECTS) == []
    assert allowed(members, READER, FORBIDDEN + LARGE_OBJECTS + WRITES) == []
