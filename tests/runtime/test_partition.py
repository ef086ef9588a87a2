"""Workers on machines of their own, and cables that are cut: a trial goes on elsewhere and is told once.

Three network namespaces: two workers, and the database. Both workers have one home folder, as machines with
a shared disk, so that whoever adopts a trial goes on from its checkpoint.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from namespaces import (
    Network,
    NetworkServer,
    Process,
    Processes,
    clear_leftovers,
    missing,
    namespaces,
    network_with_server,
)
from sqlalchemy import text

from headsearch.runtime.session import Session, open_session
from headsearch.search import audit, snapshot, studies, workers
from headsearch.search.claims import Claim, claim, point_key
from headsearch.search.database import lock_claims
from headsearch.spec import StudySpec

pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.hostile]

SECONDS = 2.0
"""Of the lease."""
EPOCHS = 60
"""Seconds in which a cable can still be cut."""
TWO_TRIALS = {
    "mode": "points",
    "points": [
        {"head.kind": "mlp", "head.projection_dim": 16, "head.width": 16},
        {"head.kind": "mlp", "head.projection_dim": 8, "head.width": 16},
    ],
    "budget": {"epochs": EPOCHS},
    "lease": {"seconds": SECONDS},
    "base": {
        "data": {"name": "digits", "limit": 200},
        "encoder": {"width": 4},
        "training": {"batch_size": 64, "precision": "fp32"},
        # A final probe of about a second: time to cut a cable between the last report and the outcome.
        "probe": {
            "report_images": 200,
            "report_iterations": 5,
            "iterations": 1000,
            "penalties": [1e-3, 1e-4],
        },
    },
}
ONE_TRIAL = TWO_TRIALS | {"points": TWO_TRIALS["points"][:1]}

FENCED = "trial 0: another worker holds it now"
OF_REPORTS = (
    "FROM headsearch.reports WHERE study_id = (SELECT study_id FROM headsearch.studies WHERE name = :name)"
)

# Every time that Optuna's row, or ours, is written with a final state. Telling twice would be seen here
# even where the second word is the same as the first.
WATCH = """
    CREATE SCHEMA watch;
    CREATE TABLE watch.told (whose text, study_id integer, number integer, state text);
    CREATE FUNCTION watch.note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO watch.told VALUES (TG_TABLE_SCHEMA, NEW.study_id, NEW.number, lower(NEW.state::text));
        RETURN NULL;
    END $$;
    CREATE TRIGGER watch AFTER UPDATE ON public.trials
        FOR EACH ROW WHEN (NEW.state IN ('COMPLETE', 'PRUNED', 'FAIL')) EXECUTE FUNCTION watch.note();
    CREATE TRIGGER watch AFTER UPDATE ON headsearch.trials
        FOR EACH ROW WHEN (NEW.state IN ('complete', 'pruned', 'failed')) EXECUTE FUNCTION watch.note();
"""
SLOW_TELLING = """
    CREATE FUNCTION watch.wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        PERFORM pg_sleep(0.1);
        RETURN NULL;
    END $$;
    CREATE TRIGGER wait AFTER INSERT ON public.trial_user_attributes
        FOR EACH ROW EXECUTE FUNCTION watch.wait();
"""

IN_A_CLAIM = """
import sys, time
from sqlalchemy import text
from headsearch.search.database import Database, lock_claims
url, study_id, where = sys.argv[1:]
with Database(url).begin() as connection:
    connection.execute(text("SELECT 1"))
    if where == "waiting":
        print("ready", flush=True)
    lock_claims(connection, int(study_id))
    print("ready", flush=True)
    time.sleep(600)
"""


@dataclass(frozen=True)
class World:
    """The database as the test sees it, and what runs on the machines."""

    session: Session
    server: NetworkServer
    started: Processes

    @property
    def network(self) -> Network:
        return self.server.network

    def make(self, name: str, spec: dict[str, Any], **changes: object) -> studies.Study:
        spec = StudySpec.model_validate(spec | {"name": name} | changes)
        return studies.create(self.session.database, spec)[0]

    def python(self, machine: str, *arguments: str) -> Process:
        env = os.environ | {
            "HEADSEARCH_HOME": str(self.session.home),
            "HEADSEARCH_DATABASE_URL": self.server.network_url,
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
        }
        return self.started.start(machine, [sys.executable, *arguments], env)

    def worker(self, machine: str, name: str, *options: str) -> Process:
        command = ["-m", "headsearch", "worker", "--study", name, "--threads", "1", *options]
        return self.python(machine, *command)

    def two_workers(self, name: str) -> tuple[Process, Process]:
        """The one that trains the study's only trial, two epochs into it, and the one that comes too late."""
        pair = self.worker("a", name), self.worker("b", name)
        wait_for(lambda: self.reported(name) >= 2, *pair)
        holder = (self.read(name).trials[0].worker_id or "").split(":")[1]
        first, second = sorted(pair, key=lambda process: str(process.popen.pid) != holder)
        assert str(first.popen.pid) == holder
        return first, second

    def freeze(self, process: Process) -> None:
        """Stop a process between two transactions: in one, its locks would keep everybody waiting."""
        busy = "SELECT 1 FROM pg_stat_activity WHERE client_addr = CAST(:address AS inet) AND state <> 'idle'"
        while True:
            process.popen.send_signal(signal.SIGSTOP)
            time.sleep(0.03)
            if not self.query(busy, address=self.network.address(process.machine)):
                return
            process.popen.send_signal(signal.SIGCONT)
            time.sleep(0.01)

    def read(self, name: str) -> snapshot.Snapshot:
        return snapshot.read(self.session.database, name)

    def reported(self, name: str) -> int:
        """The last epoch of trial 0 that is stored."""
        return max((trial.epoch for trial in self.read(name).trials[:1]), default=0)

    def attempts(self, name: str) -> list[int]:
        """Of each report of trial 0, by epoch: the claim under which it was stored."""
        return [
            row[0]
            for row in self.query(f"SELECT attempt {OF_REPORTS} AND number = 0 ORDER BY epoch", name=name)
        ]

    def results(self, name: str) -> dict[str, list[Any]]:
        """What was reported and told of each point, without what depends on the clock."""
        columns = "number, epoch, loss, probe_accuracy, feature_rank, projection_rank"
        rows = self.query(f"SELECT {columns} {OF_REPORTS} ORDER BY epoch", name=name)
        return {
            point_key(trial.params): [*(row[1:] for row in rows if row[0] == trial.number), trial.values]
            for trial in self.read(name).trials
        }

    def query(self, sql: str, **values: object) -> list[tuple]:
        with self.session.database.begin() as connection:
            return [tuple(row) for row in connection.execute(text(sql), values)]

    def execute(self, sql: str) -> None:
        with self.session.database.begin() as connection:
            connection.exec_driver_sql(sql)

    def check_told_once(self, name: str, undisturbed: dict[str, list[Any]]) -> None:
        """Every trial is complete and was told once, is what it is undisturbed, and breaks no rule."""
        study = studies.get(self.session.database, name)
        assert study.state == "complete"
        assert [finding.message for finding in audit.audit(self.session.database, study).findings] == []
        told = "SELECT whose, number, state FROM watch.told WHERE study_id = :study_id ORDER BY whose, number"
        once = [
            (whose, number, "complete")
            for whose in ("headsearch", "public")
            for number in range(study.spec.trials)
        ]
        assert self.query(told, study_id=study.study_id) == once
        results = self.results(name)
        assert results == {key: undisturbed[key] for key in results}
        assert {len(result) for result in results.values()} == {EPOCHS + 1}
        assert not list((self.session.home / "checkpoints").glob("*/*/*"))


@contextmanager
def a_world(server: NetworkServer, home: Path) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADSEARCH_DATABASE_URL", server.url)
        patch.setenv("HEADSEARCH_HOME", str(home))
        with open_session() as session, Processes(server.network, home) as started:
            try:
                yield World(session, server, started)
            finally:
                for machine in ("a", "b"):
                    server.network.restore(machine)


@pytest.fixture(scope="module")
def server():
    reason = missing()
    if reason:
        pytest.skip(reason)
    with network_with_server("a", "b") as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(server, open_folder_factory) -> dict[str, list[Any]]:
    """The results of both points when nothing happens to anybody."""
    with open_folder_factory("headsearch-calm-") as home, a_world(server, home) as world:
        world.execute(WATCH)
        world.make("calm", TWO_TRIALS, lease={"seconds": 60})
        worker = world.worker("a", "calm")
        assert worker.wait() == 0, worker.output
        assert world.attempts("calm") == [1] * EPOCHS
        return world.results("calm")


@pytest.fixture
def world(server, undisturbed, headsearch_home):
    with a_world(server, headsearch_home) as made:
        yield made


def wait_for(condition: Callable[[], object], *running: Process, seconds: float = 120) -> None:
    """Until `condition` holds; where it does not, fails with what the processes said."""
    deadline = time.monotonic() + seconds
    while not condition():
        said = "".join(f"\n--- {process.log.name}\n{process.output}" for process in running)
        assert time.monotonic() < deadline, f"it did not happen in time{said}"
        time.sleep(0.02)


@pytest.mark.parametrize("how", ["cut", "unplug"])
def test_a_cable_that_is_cut_carries_nothing(server, how):
    """And one that is restored does. Without this, tests of cuts that cut nothing would pass."""
    database = server.network.address("db")
    connect = f"import socket; socket.create_connection(({database!r}, 5432), timeout=1)"

    def connects(machine: str) -> bool:
        command = server.network.command(machine, [sys.executable, "-S", "-c", connect])
        return subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0

    assert connects("a")
    getattr(server.network, how)("a")
    assert (connects("a"), connects("b")) == (False, True)
    server.network.restore("a")
    # The link may be seen to be up only after a second, and frames be lost until then.
    wait_for(lambda: connects("a"))


def test_the_next_run_clears_what_a_killed_one_left(server, subprocess_env):
    code = (
        "import time, namespaces\n"
        "with namespaces.network_with_server('a') as server:\n"
        "    print(server.socket_folder, flush=True)\n"
        "    time.sleep(600)"
    )
    env = subprocess_env | {"PYTHONPATH": f"{Path(__file__).parent}:{subprocess_env['PYTHONPATH']}"}
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    socket_folder = Path(killed.stdout.readline().strip())
    killed.kill()
    killed.communicate()
    assert (socket_folder / ".s.PGSQL.5432").is_socket()
    assert sum(f"-{killed.pid}-" in name for name in namespaces()) == 3
    clear_leftovers()
    assert not socket_folder.parent.exists()
    assert not any(f"-{killed.pid}-" in name for name in namespaces())
    assert any(f"-{os.getpid()}-" in name for name in namespaces())


def test_a_worker_cut_off_is_fenced_and_goes_on(world, undisturbed):
    """Its trial is adopted; back on the network it changes nothing there, and trains the next trial."""
    # Longer than the first needs to hear of its cable: the second, which is stopped then, is not to be late.
    world.make("cut", TWO_TRIALS, lease={"seconds": 15})
    first = world.worker("a", "cut")
    wait_for(lambda: world.reported("cut") >= 2, first)
    world.network.unplug("a")
    wait_for(lambda: world.read("cut").trials[0].state == "orphaned", first)
    second = world.worker("b", "cut", "--count", "1")
    wait_for(lambda: 2 in world.attempts("cut"), first, second)
    # Stopped, so that the trial is still the second's when the first comes back, however fast machines are.
    world.freeze(second)
    held, attempts = world.read("cut").trials[0], world.attempts("cut")
    assert (held.state, held.attempt) == ("running", 2)
    assert FENCED not in first.output
    world.network.restore("a")
    wait_for(lambda: FENCED in first.output, first, second)
    assert world.read("cut").trials[0] == held
    assert world.attempts("cut") == attempts
    second.popen.send_signal(signal.SIGCONT)
    assert (second.wait(), first.wait()) == (0, 0), first.output + second.output
    epoch = attempts.index(2)
    assert 2 <= epoch < EPOCHS
    assert f"trial 0 adopted at epoch {epoch}" in second.output
    assert "trial 0 complete" in second.output
    assert "trial 0 complete" not in first.output
    assert "trial 1 complete" in first.output
    assert world.attempts("cut") == [1] * epoch + [2] * (EPOCHS - epoch)
    assert [trial.losses for trial in world.read("cut").trials] == [1, 0]
    world.check_told_once("cut", undisturbed)


def test_a_cut_shorter_than_the_lease_changes_nothing(world, undisturbed):
    world.make("blink", ONE_TRIAL, lease={"seconds": 10})
    first, second = world.two_workers("blink")
    world.network.cut(first.machine)
    began = time.monotonic()
    time.sleep(0.3)
    reported = world.reported("blink")
    wait_for(lambda: len(world.read("blink").workers) == 2 and time.monotonic() > began + 2, first, second)
    assert world.reported("blink") == reported < EPOCHS
    world.network.restore(first.machine)
    assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
    assert "adopted" not in first.output + second.output
    assert world.attempts("blink") == [1] * EPOCHS
    assert [(trial.attempt, trial.losses) for trial in world.read("blink").trials] == [(1, 0)]
    world.check_told_once("blink", undisturbed)


def test_a_worker_cut_off_after_its_last_report_leaves_the_outcome_to_the_other(world, undisturbed):
    world.make("silent", ONE_TRIAL)
    first, second = world.two_workers("silent")
    wait_for(lambda: world.reported("silent") == EPOCHS, first, second)
    world.network.unplug(first.machine)
    assert second.wait() == 0, first.output + second.output
    assert f"trial 0 adopted at epoch {EPOCHS}" in second.output
    assert "trial 0 complete" in second.output
    assert world.read("silent").study.state == "complete"
    world.network.restore(first.machine)
    assert first.wait() == 0, first.output
    assert FENCED in first.output
    assert "trial 0 complete" not in first.output
    assert world.attempts("silent") == [1] * EPOCHS
    world.check_told_once("silent", undisturbed)


def test_a_worker_cut_off_while_it_tells_tells_once(world, undisturbed):
    """The outcome is decided and half told: the other may tell the rest, or find that it need not."""
    world.make("half", ONE_TRIAL)
    first, second = world.two_workers("half")
    world.execute(SLOW_TELLING)
    try:
        decided = (
            "SELECT 1 FROM headsearch.trials t JOIN headsearch.studies s USING (study_id) "
            "WHERE s.name = 'half' AND outcome IS NOT NULL AND t.state = 'running'"
        )
        wait_for(lambda: world.query(decided), first, second)
        world.network.cut(first.machine)
        assert world.query(decided)
        time.sleep(2 * SECONDS)
        world.network.restore(first.machine)
        assert (first.wait(), second.wait()) == (0, 0), first.output + second.output
    finally:
        world.execute("DROP TRIGGER wait ON public.trial_user_attributes")
    assert "adopted" not in first.output + second.output
    world.check_told_once("half", undisturbed)


def test_a_worker_cut_off_in_a_claim_loses_the_studys_lock(world):
    """While it holds it, and where it gets it after the cut: within what `SERVER_OPTIONS` say, about 20 s.

    While an answer waits for its acknowledgement keepalives do nothing: `tcp_user_timeout` is what helps.
    """
    database = world.session.database
    held = {where: world.make(where, ONE_TRIAL) for where in ("holding", "waiting")}
    with database.begin() as connection:
        lock_claims(connection, held["waiting"].study_id)
        holders = [
            world.python("a", "-c", IN_A_CLAIM, world.server.network_url, str(study.study_id), where)
            for where, study in held.items()
        ]
        wait_for(lambda: all("ready" in holder.output for holder in holders), *holders)
        time.sleep(0.5)  # the one's answer is acknowledged, the other's question is on the server
        world.network.cut("a")
    began = time.monotonic()
    for where, study in held.items():
        worker_id = workers.register(database, study, device="cpu", threads=1)
        assert isinstance(claim(database, study, worker_id, "cpu"), Claim), where
        print(f"{where}: claimed {time.monotonic() - began:.1f} s after the cut")
    assert 5 < time.monotonic() - began < 45
