"""status, pause, resume, requeue, cancel and upgrade through the command line, on a real database."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from test_study_commands import STUDY, fill, parsed, said

from headsearch import __version__
from headsearch.cli.app import run
from headsearch.runtime.session import Session, open_session
from headsearch.search import leases, studies, workers
from headsearch.search.claims import Claim, claim
from headsearch.search.leases import Report

pytestmark = pytest.mark.postgres


@pytest.fixture
def session(
    headsearch_home: Path, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Session]:
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database_url)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.toml"
    path.write_text(STUDY)
    assert run(["study", "create", str(path), "--no-check"]) == 0
    with open_session() as opened:
        yield opened


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert run(list(words)) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    return line


def begin(session: Session, name: str) -> Claim:
    """A registered worker that has a trial at epoch 1."""
    study = studies.get(session.database, "small")
    worker = workers.register(session.database, study, device=f"cpu {name}", threads=1)
    work = claim(session.database, study, worker, f"cpu {name}")
    assert isinstance(work, Claim)
    leases.report(session.database, study, work, Report(1, 1.0, 0.5, 9.0, 3.0, 1000.0, 1.0))
    return work


def test_status_shows_workers_their_trials_and_orphans(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no worker: headsearch worker --study small" in said(capsys, "study", "status", "small")
    begin(session, "one")
    given_back, lost = begin(session, "two"), begin(session, "three")
    study = studies.get(session.database, "small")
    leases.give_back(session.database, study, given_back)
    with session.database.begin() as connection:
        connection.execute(
            text(
                "UPDATE headsearch.trials SET lease_until = clock_timestamp() - interval '1 s' WHERE number = :n"
            ),
            {"n": lost.number},
        )
        connection.execute(
            text(
                "UPDATE headsearch.workers SET beat_at = beat_at - interval '5 min' WHERE device = 'cpu three'"
            )
        )
    lines = said(capsys, "study", "status", "small.toml").splitlines()
    assert lines[0].startswith("study small is open: 3 of 6 trials begun: 1 running, 2 orphaned;")
    assert lines[1] == "waiting for a worker: 3 to begin, 2 orphaned; 0 paused at a rung"
    one, _, three = (line.split() for line in lines[4:7])
    assert one[1:5] == ["cpu", "one", "0", "1/3"]
    assert three[1:5] == ["cpu", "three", "5", "min"]
    assert three[-1] == "(lost)"
    assert "trial 1 orphaned at epoch 1: given back; the next free worker takes it up" in lines
    assert any(line.startswith("trial 2 orphaned at epoch 1: the lease of ") for line in lines)
    data = parsed(capsys, "study", "status", "small", "--json")
    assert data["waiting"] == {"to_begin": 3, "orphaned": 2, "paused": 0}
    assert data["orphaned"] == [1, 2]
    assert [(w["device"], w["trial"], w["epoch"], w["lost"]) for w in data["workers"]] == [
        ("cpu one", 0, 1, False), ("cpu two", None, None, False), ("cpu three", None, None, True),
    ]  # fmt: skip


def test_pause_and_resume(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "study", "pause", "small") == (
        "study small is paused; to go on: headsearch study resume small\n"
    )
    assert "to go on: headsearch study resume small" in said(capsys, "study", "status", "small")
    assert parsed(capsys, "study", "list", "--json")[0]["state"] == "paused"
    assert "study small is open" in said(capsys, "study", "resume", "small")
    fill(session)
    assert refused(capsys, "study", "pause", "small") == (
        "error: study 'small': is complete; only an open one can be paused"
    )
    assert "headsearch study requeue small" in refused(capsys, "study", "resume", "small")
    assert refused(capsys, "study", "pause", "smal") == (
        "error: study 'smal': not in the database; there is small; did you mean small?"
    )


def test_requeue(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    fill(session)
    assert refused(capsys, "study", "requeue", "small", "0").endswith(
        "trial 0: is complete; only failed trials can be requeued"
    )
    assert said(capsys, "study", "requeue", "small", "--reason", "lost") == (
        "no failed trial of reason lost: nothing requeued\n"
    )
    assert "requeued: trial 1; train" in said(capsys, "study", "requeue", "small")
    assert parsed(capsys, "study", "show", "small", "--json")["state"] == "open"
    fill(session)
    shown = parsed(capsys, "study", "show", "small", "--json")
    assert shown["state"] == "complete"
    assert shown["counts"]["complete"] == 6
    assert [trial["number"] for trial in shown["trials"]] == [0, 2, 3, 4, 5, 6]
    assert "study small is clean: 7 trials" in said(capsys, "study", "verify", "small")


def test_cancel(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    begin(session, "one")
    begin(session, "two")
    assert said(capsys, "study", "cancel", "small", "1") == "cancelled: trial 1\n"
    assert refused(capsys, "study", "cancel", "small", "1") == "error: trial 1: is failed already"
    assert refused(capsys, "study", "cancel", "small") == "error: --yes: needed where nobody can be asked"
    assert said(capsys, "study", "cancel", "small", "--yes") == "study small is cancelled: trial 0\n"
    assert said(capsys, "study", "cancel", "small", "--yes") == (
        "study small is cancelled: no trial was unfinished\n"
    )
    out = said(capsys, "run", "small.toml", "--no-check", code=1)
    assert "study small is cancelled; to go on: headsearch study resume small" in out
    assert "study small is clean" in said(capsys, "study", "verify", "small")


def test_upgrade(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    with session.database.begin() as connection:
        connection.execute(text("UPDATE headsearch.studies SET version = '99.0.0'"))
    assert said(capsys, "study", "upgrade", "small") == (
        f"study small is of headsearch {__version__} from here on\n"
    )
    assert studies.get(session.database, "small").version == __version__
