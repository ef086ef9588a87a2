"""Crowds of workers: on one PostgreSQL as it comes, with its hundred connections, and behind a pooler."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import psycopg2
import pytest
from embedded import query, wait_until
from processes import Command

from headsearch.home import postgres_folder
from headsearch.runtime import pglaunch
from headsearch.runtime.database import libpq_url
from headsearch.runtime.pgbinaries import server_user
from headsearch.runtime.postgres import EmbeddedServer
from headsearch.runtime.session import open_session
from headsearch.runtime.verifying import verify
from headsearch.search import snapshot, studies
from headsearch.spec import StudySpec

pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.hostile, pytest.mark.timeout(1800)]

TRIALS = 96
DEFAULT_CONNECTIONS = 100
RESERVED = 3
SPEC = {
    "name": "crowd",
    "budget": {"trials": TRIALS, "epochs": 3, "rungs": [1]},
    "base": {
        "data": {"name": "digits", "limit": 200},
        "encoder": {"width": 4},
        "training": {"batch_size": 64, "precision": "fp32"},
        "probe": {"report_images": 200, "report_iterations": 5, "iterations": 20, "penalties": [1e-2]},
    },
    "space": {
        "head.kind": ["mlp", "linear"],
        "head.projection_dim": [2, 4, 8, 16, 32],
        "objective.temperature": {"low": 0.1, "high": 1.0},
    },
}


class Counter(threading.Thread):
    """Counts the connections of workers until it is stopped."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.ended = url, threading.Event()
        self.ours: list[int] = []
        self.all: list[int] = []

    def run(self) -> None:
        connection = psycopg2.connect(libpq_url(self.url))
        connection.autocommit = True
        cursor = connection.cursor()
        while not self.ended.wait(0.05):
            cursor.execute(
                "SELECT count(*) FILTER (WHERE application_name = 'headsearch'), count(*) "
                "FROM pg_stat_activity WHERE backend_type = 'client backend'"
            )
            ours, all_of_them = cursor.fetchone()
            self.ours.append(ours)
            self.all.append(all_of_them)
        connection.close()


@contextmanager
def counted(handle, session, workers):
    """Start workers, wait for them, see that they did what they should; gives the largest counts."""
    studies.create(session.database, StudySpec.model_validate(SPEC))
    counter = Counter(handle.url("owner"))
    counter.start()
    crowd = [Command("worker", "--study", "crowd", "--threads", "1") for _ in range(workers)]
    said = [process.communicate(timeout=800)[0] for process in crowd]
    counter.ended.set()
    counter.join(10)
    seen = snapshot.read(session.database, "crowd")
    verdict = verify(session, "crowd")
    with session.database.begin() as connection:
        registered = connection.exec_driver_sql("SELECT count(*) FROM headsearch.workers").scalar()
    print(
        f"\n{workers} workers, {TRIALS} trials: at most {max(counter.ours)} connections of workers, "
        f"{max(counter.all)} of all; {dict(seen.counts)}"
    )
    assert [process.returncode for process in crowd] == [0] * workers, [
        lines[-300:] for lines, process in zip(said, crowd, strict=True) if process.returncode
    ]
    assert registered == workers
    troubles = [line for lines in said for line in lines.splitlines() if "database" in line]
    assert not troubles, troubles[:3]
    assert verdict.clean, verdict.lines()
    assert [trial.number for trial in seen.trials] == list(range(TRIALS))
    assert set(seen.counts) <= {"complete", "pruned"}
    yield counter


@pytest.fixture
def turn(tmp_path_factory):
    """Crowds take turns: 64 processes that have torch take 16 GiB, and pytest may run two tests at once."""
    with (tmp_path_factory.getbasetemp().parent / "crowd").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture
def server(turn, headsearch_home, monkeypatch):
    """With as many connections as PostgreSQL has by default."""
    monkeypatch.setitem(pglaunch._SETTINGS, "max_connections", str(DEFAULT_CONNECTIONS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with EmbeddedServer(postgres_folder(headsearch_home)).attach() as handle:
        assert query(handle.url("owner"), "SHOW max_connections") == [(str(DEFAULT_CONNECTIONS),)]
        yield handle


def test_sixty_four_workers_fit_into_the_default_connections(server):
    with open_session() as session, counted(server, session, 64) as counter:
        assert max(counter.ours) >= 64, "they were never there together"
        assert max(counter.all) <= DEFAULT_CONNECTIONS - RESERVED


@contextmanager
def pooler(url, folder, size):
    """PgBouncer as the README has it, with `size` connections to the server; gives its URL."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("no PgBouncer")
    parts = urlsplit(url)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    folder.mkdir(mode=0o755)
    (folder / "users").write_text(f'"{parts.username}" "{parts.password}"\n')
    (folder / "settings").write_text(
        f"[databases]\n* = host=127.0.0.1 port={parts.port}\n[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = scram-sha-256\nauth_file = {folder}/users\n"
        "pool_mode = transaction\nignore_startup_parameters = options\n"
        f"max_client_conn = 500\ndefault_pool_size = {size}\n"
    )
    user = server_user(folder / "nobody-has-made-it")
    for path in (folder, folder / "users", folder / "settings"):
        os.chown(path, user.uid, user.gid)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [program, str(folder / "settings")],
            user=user.uid, group=user.gid, extra_groups=[], stdout=log, stderr=log,
        )  # fmt: skip
    through = parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}").geturl()
    try:
        wait_until(lambda: answers(through, process, folder / "log"))
        yield through
    finally:
        process.terminate()
        process.wait(20)


def answers(url, process, log):
    assert process.poll() is None, log.read_text()
    try:
        return query(url, "SELECT 1") == [(1,)]
    except psycopg2.OperationalError:
        return False


def test_thirty_two_workers_behind_a_pooler_of_three(server, headsearch_home, monkeypatch):
    """While 31 wait for their turn to claim, the one that claims gets its second connection."""
    with open_session():
        pass  # makes the tables: what it settles for the owner's role holds for connections made afterwards
    with pooler(server.url("owner"), headsearch_home / "pooler", 3) as url:
        monkeypatch.setenv("HEADSEARCH_DATABASE_URL", url)
        with open_session() as session, counted(server, session, 32) as counter:
            assert max(counter.all) <= 3 + 1, "the counter has one of its own"
