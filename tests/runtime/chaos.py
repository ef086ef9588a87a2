"""A study under fire: workers and the database killed every second or two until it is complete."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
from chaos_worker import POINTS, Orders, work
from sqlalchemy import text

from headsearch.errors import DatabaseError
from headsearch.home import postgres_folder
from headsearch.runtime.database import libpq_url
from headsearch.runtime.patience import patiently
from headsearch.runtime.postgres import EmbeddedServer
from headsearch.runtime.session import Session
from headsearch.search import snapshot, studies
from headsearch.search.claims import point_key
from headsearch.search.snapshot import Snapshot
from headsearch.spec import StudySpec

WORKERS = 4
ANYWHERE = "anywhere"
POSTMASTER = "the postmaster"
CONNECTION = "a connection"
BACKEND = "a backend process"
KINDS = (*POINTS, *[ANYWHERE] * 6, *[POSTMASTER] * 2, *[CONNECTION] * 2, BACKEND)
"""Each point once; what is drawn by time alone more often."""

BASE: dict[str, Any] = {
    "data": {"name": "digits", "limit": 200},
    "encoder": {"width": 4},
    "training": {"batch_size": 64, "precision": "fp32"},
    "autoencoder": {"epochs": 2},
    "probe": {"report_images": 200, "report_iterations": 5, "iterations": 20, "penalties": [1e-2]},
}
SPACE: dict[str, Any] = {
    "head.kind": ["mlp", "autoencoder", "linear"],
    "head.projection_dim": [2, 4, 8, 16, 32, 64],
    "head.width": {"choices": [8, 16, 24], "when": {"head.kind": "mlp"}},
    "head.embedding_dim": {"choices": [8, 16], "when": {"head.kind": "autoencoder"}},
    "objective.temperature": {"low": 0.1, "high": 1.0},
}


def spec_of(trials: int, name: str, **changes: Any) -> StudySpec:
    tree: dict[str, Any] = {
        "name": name,
        "budget": {"trials": trials, "epochs": 9, "rungs": [1, 3]},
        "lease": {"seconds": 2.0, "max_attempts": 1000},
        "base": BASE,
        "space": SPACE,
    }
    return StudySpec.model_validate(tree | changes)


def again(spec: StudySpec, seen: Snapshot, name: str) -> StudySpec:
    """The same points, trained whole."""
    points = {point_key(trial.params): trial.params for trial in seen.trials}
    return spec_of(
        1,
        name,
        mode="points",
        points=list(points.values()),
        seeds=spec.seeds,
        space={},
        budget={"epochs": spec.budget.epochs},
        lease={"seconds": 60.0},
    )


@dataclass
class Fire:
    """What was killed."""

    kills: Counter[str] = field(default_factory=Counter)
    """By kind."""
    seconds: float = 0.0
    workers_started: int = 0
    missed: Counter[str] = field(default_factory=Counter)
    """Orders that no worker came by in time to take."""


class Crew:
    """Worker processes from a fork server, started again when they die."""

    def __init__(self, study: str, folder: Path, count: int = WORKERS) -> None:
        self.study, self.folder, self.count = study, folder, count
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["chaos_worker"])
        self.processes: list[Any] = []
        self.started = 0
        self.orders = Orders(folder / "orders")
        self.orders.folder.mkdir(exist_ok=True)

    def fill(self) -> None:
        for process in [one for one in self.processes if not one.is_alive()]:
            process.join()
            self.processes.remove(process)
        while len(self.processes) < self.count:
            log = str(self.folder / f"{self.study}.log")
            process = self.context.Process(
                target=work, args=(self.study, str(self.orders.folder), log, dict(os.environ))
            )
            process.start()
            self.processes.append(process)
            self.started += 1

    def stop(self) -> None:
        for process in self.processes:
            process.join(60)
            if process.is_alive():
                process.kill()
                process.join()


def burn(session: Session, spec: StudySpec, folder: Path, *, seed: int, kills: int) -> Fire:
    """Work the study off with `WORKERS` workers while something is killed every second or two.

    When `kills` are done the workers are left in peace; if the study is complete earlier, so is the fire.
    """
    draw, fire, began = random.Random(seed), Fire(), time.monotonic()
    crew = Crew(spec.name, folder)
    server = EmbeddedServer(postgres_folder(session.home))
    try:
        while not done(session, spec.name):
            crew.fill()
            if fire.kills.total() >= kills:
                time.sleep(0.2)
                continue
            time.sleep(draw.uniform(0.3, 1.7))
            kind = draw.choice(KINDS)
            if kill(kind, crew, server, draw):
                fire.kills[kind] += 1
            else:
                fire.missed[kind] += 1
    finally:
        crew.stop()
    fire.seconds, fire.workers_started = time.monotonic() - began, crew.started
    return fire


def done(session: Session, name: str) -> bool:
    return patiently(session, lambda: studies.get(session.database, name), lambda _: None).state == "complete"


def kill(kind: str, crew: Crew, server: EmbeddedServer, draw: random.Random) -> bool:
    if kind in POINTS:
        crew.orders.give(kind)
        until = time.monotonic() + 4
        while time.monotonic() < until and not crew.orders.taken(kind):
            crew.fill()
            time.sleep(0.02)
        return not crew.orders.withdraw(kind)
    if kind == ANYWHERE:
        alive = [process for process in crew.processes if process.is_alive()]
        if not alive:
            return False
        draw.choice(alive).kill()
        return True
    status = server.status()
    if not status.running or status.pid is None:
        return False
    if kind == POSTMASTER:
        os.kill(status.pid, signal.SIGKILL)
        return True
    try:
        connection = psycopg2.connect(libpq_url(server.url("owner")), connect_timeout=5)
    except (psycopg2.Error, DatabaseError):
        return False
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute(
            "SELECT pid FROM pg_stat_activity WHERE application_name = 'headsearch' AND pid <> pg_backend_pid() "
            "ORDER BY pid"
        )
        backends = [pid for (pid,) in cursor.fetchall()]
        if not backends:
            return False
        victim = draw.choice(backends)
        if kind == BACKEND:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
        else:
            cursor.execute("SELECT pg_terminate_backend(%s)", (victim,))
    return True


def curves(seen: Session, name: str) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """What was reported of each point, without what depends on the clock."""
    with seen.database.begin() as connection:
        rows = connection.execute(
            text(
                "SELECT t.point_key, t.seed, r.epoch, r.loss, r.probe_accuracy, r.feature_rank, r.projection_rank, "
                "CAST(r.measures AS text) FROM headsearch.reports r "
                "JOIN headsearch.trials t USING (study_id, number) "
                "JOIN headsearch.studies s USING (study_id) WHERE s.name = :name"
            ),
            {"name": name},
        ).all()
    found = {tuple(row[:3]): tuple(row[3:]) for row in rows}
    assert len(found) == len(rows), "a report is there twice"
    return found


def calm(session: Session, spec: StudySpec, folder: Path) -> None:
    """Work a study off with one worker that nobody disturbs."""
    crew = Crew(spec.name, folder, count=1)
    crew.fill()
    crew.processes[0].join()
    assert crew.processes[0].exitcode == 0, (folder / f"{spec.name}.log").read_text()[-2000:]


def compare(session: Session, under_fire: str, undisturbed: str) -> dict[str, int]:
    """Assert that both studies say the same of every point, to the bit; returns how much was compared."""
    burnt, straight = curves(session, under_fire), curves(session, undisturbed)
    different = [key for key, value in burnt.items() if straight[key] != value]
    assert not different, f"{len(different)} reports differ, such as {different[0]}"
    whole = {(point_key(t.params), t.seed): t for t in snapshot.read(session.database, undisturbed).trials}
    complete = snapshot.read(session.database, under_fire).complete
    for trial in complete:
        other = whole[point_key(trial.params), trial.seed]
        assert (trial.values, trial.test_accuracy) == (other.values, other.test_accuracy), trial.number
    return {"reports": len(burnt), "complete": len(complete)}


def ends_told(log: Path) -> Counter[int]:
    """How often workers said that they had brought each trial to its end."""
    said = re.findall(r"^trial (\d+) complete: ", log.read_text(encoding="utf-8"), re.MULTILINE)
    return Counter(map(int, said))
