"""The embedded server keeps its promises: one server, found again after any crash, never left behind."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest
from embedded import kill_postmaster, query, spawn, wait_until

from headsearch.errors import ServerError, StorageError
from headsearch.runtime import pgroles
from headsearch.runtime import postgres as postgres_module
from headsearch.runtime.database import libpq_url
from headsearch.runtime.postgres import EmbeddedServer

pytestmark = pytest.mark.postgres


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


def test_attaching_while_the_server_dies(server: EmbeddedServer) -> None:
    """A process that was just killed stands in the process table for a moment, and its port may answer."""
    with server.attach():
        for _ in range(8):
            os.kill(server.status().pid, signal.SIGKILL)
            with server.attach() as again:
                assert query(again.url(), "SELECT 1") == [(1,)]


@pytest.mark.parametrize("case", ["unrelated", "zombie", "half-written", "gone"])
def test_stale_pid_file(server: EmbeddedServer, case: str) -> None:
    with server.attach():
        kill_postmaster(server)
    pid_file = server.folder.data_dir / "postmaster.pid"
    lines = pid_file.read_text().splitlines()
    # A process of another user would not do: PostgreSQL knows that such a pid is not its own.
    owner = server.folder.data_dir.stat()
    same_user = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL, **same_user) as sleeper:
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


def killed_at_each_milestone(state_dir: Path, env: dict[str, str]) -> bool:
    """Whether each start was killed before it was through."""
    made = state_dir / "pgdata"
    for milestone in ("start.lock", "pgdata.*/data/base", "pgdata.*/data/postgresql.conf"):
        with spawn(state_dir, env) as starter:
            wait_until(lambda one=milestone: any(state_dir.glob(one)) or made.exists())
            starter.kill()
        if made.exists():
            return False
    for milestone in ("pgdata", "server.log", "pgdata/postmaster.pid"):
        with spawn(state_dir, env) as starter:
            wait_until(lambda one=milestone: any(state_dir.glob(one)))
            starter.kill()
    return True


def test_start_killed_at_any_moment_leaves_no_half_server(
    headsearch_home: Path, subprocess_env: dict[str, str]
) -> None:
    for attempt in range(5):
        state_dir = headsearch_home / f"postgres-{attempt}"
        all_killed = killed_at_each_milestone(state_dir, subprocess_env)
        server = EmbeddedServer(state_dir)
        with server.attach() as handle:
            assert query(handle.url("reader"), "SELECT current_database()") == [(pgroles.DATABASE,)]
        assert not server.status().running
        assert not list(state_dir.glob("pgdata.*"))
        if all_killed:
            return
    raise AssertionError("a start is through before it can be killed")


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
