"""The audit: clean on studies that workers left, and each rule noticed when it is broken by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text
from toy import make_spec, report_of, train, work_off

from headsearch.cli.app import run
from headsearch.core.checkpoint import CheckpointFolder
from headsearch.home import checkpoint_folder
from headsearch.runtime.session import open_session
from headsearch.runtime.verifying import verify
from headsearch.search import leases, studies, workers
from headsearch.search.audit import audit
from headsearch.search.claims import Claim, claim
from headsearch.search.database import Database
from headsearch.search.studies import Study

pytestmark = pytest.mark.postgres


def worked_off(database: Database, make_study) -> Study:
    study = make_study()
    work_off(database, study)
    return studies.get(database, study.name)


def rules(database: Database, study: Study) -> set[tuple[str, bool]]:
    return {(finding.rule, finding.violated) for finding in audit(database, study).findings}


def test_a_finished_study_is_clean(database: Database, make_study) -> None:
    found = audit(database, worked_off(database, make_study))
    assert found.findings == ()
    assert found.trials == 12
    assert found.reports > 12
    assert found.paused == ()


def test_a_study_under_way_is_clean_and_names_its_paused_trials(database: Database, make_study) -> None:
    study = make_study()
    worker = workers.register(database, study, device="cpu", threads=1)
    first = claim(database, study, worker, "cpu")
    assert isinstance(first, Claim)
    assert train(database, study, first) == "paused"
    held = claim(database, study, worker, "cpu")
    assert isinstance(held, Claim)
    found = audit(database, study)
    assert found.findings == ()
    assert [(trial.number, trial.epoch) for trial in found.paused] == [(first.number, 1)] * (
        held.number != first.number
    )


def test_waiting_for_adoption_is_a_note(database: Database, make_study) -> None:
    study = make_study()
    work = claim(database, study, "gone", "cpu")
    assert isinstance(work, Claim)
    leases.give_back(database, study, work)
    assert rules(database, study) == {("leases", False)}


# What is done to a finished study, and the rule that must notice.
BROKEN = {
    "DELETE FROM headsearch.reports WHERE number = 3 AND epoch = 1": "reports",
    "UPDATE headsearch.reports SET attempt = 99 WHERE number = 2 AND epoch = 1": "fencing",
    "UPDATE headsearch.reports SET reported_at = reported_at + interval '1 day' WHERE number = 2": "reports",
    "UPDATE headsearch.trials SET epoch = epoch + 1 WHERE number = 1": "reports",
    "DELETE FROM headsearch.trials WHERE number = 11": "budget",
    "UPDATE public.trials SET state = 'RUNNING' WHERE number = 4": "Optuna's state",
    "UPDATE headsearch.trials SET outcome = jsonb_set(outcome, '{values}', '[0.5]') WHERE state = 'complete'": "outcome",
    "UPDATE headsearch.trials SET state = 'paused', finished_at = NULL WHERE number = 5": "budget",
    "UPDATE headsearch.trials SET epoch = 2 WHERE state = 'pruned'": "rungs",
}


@pytest.mark.parametrize("damage", BROKEN, ids=list(map(str, range(len(BROKEN)))))
def test_what_is_broken_is_noticed(database: Database, make_study, damage: str) -> None:
    study = worked_off(database, make_study)
    with database.begin() as connection:
        connection.execute(text(damage))
    assert (BROKEN[damage], True) in rules(database, study)


def test_a_lease_of_a_worker_that_ended_is_noticed(database: Database, make_study) -> None:
    study = make_study()
    worker = workers.register(database, study, device="cpu", threads=1)
    assert isinstance(claim(database, study, worker, "cpu"), Claim)
    assert rules(database, study) == set()
    workers.leave(database, worker)
    assert rules(database, study) == {("leases", True)}
    assert isinstance(claim(database, study, "nobody", "cpu"), Claim)
    assert {finding.message.split(": ")[1] for finding in audit(database, study).findings} == {
        f"its worker {worker} has ended", "its worker nobody is not registered",
    }  # fmt: skip


def test_paused_trials_need_a_checkpoint_of_their_epoch(
    database_url: str,
    headsearch_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database_url)
    with open_session() as session:
        study, _ = studies.create(session.database, make_spec())
        work = claim(session.database, study, "w", "cpu")
        assert isinstance(work, Claim)
        leases.describe(session.database, study, work, projection_dim=4, head_parameters=4)
        leases.report(session.database, study, work, report_of(work, 1))
        assert leases.arrive(session.database, study, work) == "paused"
        assert [finding.rule for finding in verify(session, study.name).findings] == ["checkpoints"]
        folder = CheckpointFolder(checkpoint_folder(headsearch_home, study.folder, work.number))
        folder.save({"epoch": 1})
        half = folder.path / ".1-abc.partial"
        half.write_bytes(b"half")
        verdict = verify(session, study.name)
        assert verdict.clean
        assert verdict.checkpoints == 1
        assert half.exists()  # whoever looks does not tidy up for the owner
    assert run(["study", "verify", "toy"]) == 0
    assert "study toy is clean: 1 trials, 1 reports, 1 checkpoints" in capsys.readouterr().out
    for path in folder.path.glob("*.checkpoint"):
        path.write_bytes(path.read_bytes()[:-3])
    assert run(["study", "verify", "toy"]) == 1
    assert "broken  checkpoints: trial 0 paused at epoch 1: no checkpoint" in capsys.readouterr().out
