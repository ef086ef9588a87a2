"""A whole study by workers whose role can do no more, and passwords that change under them."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path

import faults
import psycopg2
import pytest
from processes import Command
from test_dashboard import Client, serving
from test_roles import make
from test_worker import TINY, wait_for

from headsearch.cli.app import run
from headsearch.errors import DatabaseError
from headsearch.report.publish import FIGURE_ID
from headsearch.runtime.database import given_address, libpq_url, open_database
from headsearch.runtime.session import open_session
from headsearch.runtime.verifying import verify
from headsearch.search import snapshot, studies
from headsearch.search.roles import READER, WORKER

pytestmark = [pytest.mark.postgres, pytest.mark.slow, pytest.mark.hostile]


@pytest.fixture
def lab_team(a_team, monkeypatch):
    """The database is of no superuser, and we are a worker."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    a_team.become(monkeypatch, WORKER)
    return a_team


def start(name="tiny", fault=None):
    return Command("worker", "--study", name, "--threads", "1", fault=fault)


def epochs(name="tiny"):
    with open_session() as session:
        return [trial.epoch for trial in snapshot.read(session.database, name).trials]


def test_workers_finish_a_study_with_promotion_pruning_and_adoption(lab_team, monkeypatch):
    # One dim, so that all compete, and few are promoted: some are pruned whoever comes when.
    make(
        lab_team,
        monkeypatch,
        budget={"trials": 10, "epochs": 4, "rungs": [2, 3]},
        lease={"seconds": 3},
        pruning={"eta": 5},
        space=TINY["space"] | {"head.projection_dim": [4]},
    )
    victim = start(fault=partial(faults.signal_itself, signal.SIGKILL, trial=1, epoch=1))
    victim.communicate(timeout=280)
    assert victim.returncode == -signal.SIGKILL
    assert len(epochs()) == 2
    survivors = [start(), start()]
    said = ""
    for process in survivors:
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
        said += output
    assert " promoted at epoch " in said
    assert "trial 1 adopted at epoch " in said
    with open_session() as session:
        seen = snapshot.read(session.database, "tiny")
        verdict = verify(session, "tiny")
    assert verdict.clean, verdict.lines()
    assert seen.study.state == "complete"
    assert len(seen.trials) == 10
    assert {trial.state for trial in seen.trials} == {"complete", "pruned"}, [t.message for t in seen.trials]
    assert seen.promoted
    # Figure and note are on the dashboard, which reads as the reader, who may also ask for results.
    lab_team.become(monkeypatch, READER)
    for command in ("show", "status", "front", "compare", "verify"):
        assert run(["study", command, "tiny"]) == 0, command
    address = given_address()
    assert address is not None
    with serving(address) as request:
        listed = json.loads(request("GET", "/api/studies")[2])["study_summaries"]
        assert [one["study_name"] for one in listed] == ["tiny"]
        number = listed[0]["study_id"]
        shown = json.loads(request("GET", f"/api/studies/{number}")[2])
        assert "# tiny" in shown["note"]["body"]
        assert [one["id"] for one in shown["plotly_graph_objects"]] == [FIGURE_ID]
        assert len(shown["trials"]) == 10


def test_a_lost_trial_fails_and_a_bad_one_too_as_the_worker_role(lab_team, monkeypatch):
    base = TINY["base"] | {"optimizer": {"learning_rate": 1e4, "momentum": 0.99, "weight_decay": 1e4}}
    make(lab_team, monkeypatch, base=base, budget={"trials": 2, "epochs": 4})
    worker = start()
    output, _ = worker.communicate(timeout=280)
    assert worker.returncode == 0, output
    with open_session() as session:
        assert [t.state for t in snapshot.read(session.database, "tiny").trials] == ["failed"] * 2
    # Far from its end when its worker dies; the next one only finds it lost.
    make(
        lab_team,
        monkeypatch,
        name="lost",
        budget={"trials": 1, "epochs": 5000},
        lease={"seconds": 1, "max_attempts": 1},
    )
    victim = start("lost")
    wait_for(lambda: any(epochs("lost")))
    victim.kill()
    victim.communicate()
    worker = start("lost")
    output, _ = worker.communicate(timeout=280)
    assert worker.returncode == 0, output
    with open_session() as session:
        assert [t.reason for t in snapshot.read(session.database, "lost").trials] == ["lost"]


def test_a_password_that_changes_stops_no_worker(lab_team, monkeypatch):
    """Changed at the server first, then in the file; all connections are cut in between."""
    make(lab_team, monkeypatch, budget={"trials": 2, "epochs": 150})
    worker = start()
    wait_for(lambda: any(epoch >= 2 for epoch in epochs()))
    file = lab_team.file(WORKER)
    old = file.read_text()
    lab_team.give(WORKER, "a new one: \\")
    lab_team.bring_up(monkeypatch)
    file.write_text(old)
    with (
        pytest.raises(
            DatabaseError, match=r"refuses user headsearch_worker: check .*HEADSEARCH_DATABASE_PASSWORD_FILE"
        ),
        open_database(),
    ):
        pass
    cut = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        f"WHERE usename = '{WORKER}' AND datname = current_database()"
    )
    assert lab_team.ask("headsearch", cut)
    wait_for(lambda: "password authentication failed" in worker.said)
    assert worker.returncode is None
    file.write_text("a new one: \\\n")
    output, _ = worker.communicate(timeout=280)
    assert worker.returncode == 0, output
    assert "the database answers again" in output
    with open_session() as session:
        seen = snapshot.read(session.database, "tiny")
    assert [(t.state, t.losses) for t in seen.trials] == [("complete", 0)] * 2


def test_a_dashboard_outlives_its_old_password(lab_team, monkeypatch):
    make(lab_team, monkeypatch)
    lab_team.become(monkeypatch, READER)
    address = given_address()
    assert address is not None
    assert lab_team.passwords[READER] not in repr(address)
    with serving(address) as request:
        assert request("GET", "/api/studies")[0] == 200
        lab_team.give(READER, "a new one")
        lab_team.bring_up(monkeypatch)
        lab_team.ask(
            "headsearch", f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '{READER}'"
        )
        assert request("GET", "/healthz")[0] == 200
        assert request("GET", "/api/studies")[0] == 200


def test_the_reader_s_dashboard_may_start_before_the_tables(new_team, monkeypatch, subprocess_env):
    with psycopg2.connect(libpq_url(new_team.url("headsearch", password=True))) as connection:
        connection.cursor().execute(f"CREATE ROLE {READER} LOGIN")
        connection.cursor().execute(f"ALTER ROLE {READER} PASSWORD %s", (new_team.passwords[READER],))
    connection.close()
    new_team.become(monkeypatch, READER)
    dashboard = Command("dashboard", "--port", "0")
    try:
        wait_for(lambda: "dashboard on http" in dashboard.said or dashboard.returncode is not None)
        request = Client(dashboard.said.split()[2].rsplit("/", 1)[0])
        assert request("GET", "/healthz")[0] == 200
        status, _, body = request("GET", "/dashboard")
        assert status == 503
        assert b"no study yet" in body
        # Any command of the owner's makes the tables, with the grants for the role that is there.
        new_team.owner = "headsearch"
        make(new_team, monkeypatch)
        assert request("GET", "/dashboard")[0] == 200
        assert b"tiny" in request("GET", "/api/studies")[2]
    finally:
        dashboard.send_signal(signal.SIGTERM)
        output, _ = dashboard.communicate(timeout=60)
    assert dashboard.returncode == 0, output


def test_a_writable_dashboard_needs_a_role_that_writes(a_team, monkeypatch, capsys, headsearch_home):
    study = make(a_team, monkeypatch)
    a_team.become(monkeypatch, READER)
    assert run(["dashboard", "--writable", "--port", "0"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --writable: the role of postgresql+psycopg2://headsearch_reader@")
    assert "may not write: give the owner's URL, or that of headsearch_worker" in said
    assert said.count("\n") == 1
    # A worker's role writes notes and deletes nothing.
    a_team.become(monkeypatch, WORKER)
    address = given_address()
    assert address is not None
    page = f"/api/studies/{study.study_id}"
    with serving(address, writable=True) as request:
        assert request("PUT", f"{page}/note", {"version": 1, "body": "a note"})[0] == 204
        assert json.loads(request("GET", page)[2])["note"]["body"] == "a note"
        assert request("DELETE", page, {})[0] == 500
        assert request("POST", f"{page}/rename", {"study_name": "other"})[0] >= 400
        assert request("GET", page)[0] == 200


def test_a_password_file_that_is_being_replaced_is_a_database_that_is_away(lab_team):
    with open_session() as session:
        file = lab_team.file(WORKER)
        text = file.read_text()
        session.database.engine.dispose()
        file.unlink()
        with pytest.raises(DatabaseError, match=r"does not answer: .*PASSWORD_FILE: cannot read") as caught:
            studies.all_studies(session.database)
        assert caught.value.transient
        file.write_text(text)
        assert studies.all_studies(session.database) == []
