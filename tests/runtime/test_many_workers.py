"""Sixty-four workers on one PostgreSQL as it comes, with its hundred connections."""

from __future__ import annotations

import threading

import psycopg2
import pytest
from processes import Command

from headsearch.home import postgres_folder
from headsearch.runtime import pglaunch
from headsearch.runtime.database import libpq_url
from headsearch.runtime.postgres import EmbeddedServer
from headsearch.runtime.session import open_session
from headsearch.runtime.verifying import verify
from headsearch.search import snapshot, studies
from headsearch.spec import StudySpec

pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.hostile, pytest.mark.timeout(900)]

WORKERS = 64
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
        self.counts: list[int] = []
        self.backends: list[int] = []

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
            self.counts.append(ours)
            self.backends.append(all_of_them)
        connection.close()


def test_sixty_four_workers_fit_into_the_default_connections(headsearch_home, monkeypatch):
    monkeypatch.setitem(pglaunch._SETTINGS, "max_connections", str(DEFAULT_CONNECTIONS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    server = EmbeddedServer(postgres_folder(headsearch_home))
    with server.attach() as handle, open_session() as session:
        study, _ = studies.create(session.database, StudySpec.model_validate(SPEC))
        counter = Counter(handle.url("owner"))
        counter.start()
        crowd = [Command("worker", "--study", "crowd", "--threads", "1") for _ in range(WORKERS)]
        said = [process.communicate(timeout=800)[0] for process in crowd]
        counter.ended.set()
        counter.join(10)
        seen = snapshot.read(session.database, "crowd")
        verdict = verify(session, "crowd")
        with session.database.begin() as connection:
            most = int(connection.exec_driver_sql("SHOW max_connections").scalar())
            workers = connection.exec_driver_sql("SELECT count(*) FROM headsearch.workers").scalar()
    print(
        f"\n{WORKERS} workers, {TRIALS} trials: at most {max(counter.counts)} connections of ours, "
        f"{max(counter.backends)} of all, of {most}; {dict(seen.counts)}"
    )
    assert most == DEFAULT_CONNECTIONS
    assert [process.returncode for process in crowd] == [0] * WORKERS, [
        lines[-300:] for lines, process in zip(said, crowd, strict=True) if process.returncode
    ]
    assert workers == WORKERS
    assert [line for lines in said for line in lines.splitlines() if "database" in line] == []
    assert max(counter.counts) >= WORKERS, "they were never there together"
    assert max(counter.backends) <= DEFAULT_CONNECTIONS - RESERVED
    assert verdict.clean, verdict.lines()
    assert [trial.number for trial in seen.trials] == list(range(study.spec.trials))
    assert set(seen.counts) <= {"complete", "pruned"}
