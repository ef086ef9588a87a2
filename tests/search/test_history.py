"""What samplers see of a study's trials is what Optuna's own storage has."""

from __future__ import annotations

import threading

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import Engine, event
from toy import outcome_of, report_of, train, work_off

from headsearch.search import history, leases, outcomes, steering
from headsearch.search.claims import Claim, Idle, claim
from headsearch.search.database import Database
from headsearch.search.history import History
from headsearch.search.outcomes import Outcome

pytestmark = pytest.mark.postgres


def look(trial):
    return (
        trial.number,
        trial._trial_id,
        trial.state,
        list(trial.params.items()),
        trial.distributions,
        trial.values,
        trial.system_attrs,
    )


def seen(database, memory):
    with database.begin() as connection:
        return [look(trial) for trial in memory.read(connection)]


def theirs(database, study):
    stored = optuna.load_study(study_name=study.name, storage=database.url)
    return [look(trial) for trial in stored.get_trials(deepcopy=False)]


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_memory_that_is_read_again_and_again_is_what_optuna_has(database, make_study, sampler):
    """With trials that run, pause, are promoted, complete, fail, are left by a dead worker, or are another's."""
    study = make_study(
        sampler={"name": sampler, "startup_trials": 4}, budget={"trials": 24, "epochs": 9, "rungs": [1, 3]}
    )
    memory, loaded = History(study.study_id), optuna.load_study(study_name=study.name, storage=database.url)
    states = set()
    for step in range(60):
        if step == 10:
            loaded.ask().suggest_categorical("head.kind", ["mlp", "linear"])
        if step == 20:
            loaded.tell(loaded.ask(), state=TrialState.FAIL)
        work = claim(database, study, "w", "cpu")
        if not isinstance(work, Claim):
            break
        assert seen(database, memory) == theirs(database, study)
        if step % 7 == 3:
            outcomes.finish(
                database, study, work.number, work.attempt, Outcome("failed", reason="error", message="x")
            )
        elif step % 7 == 5:
            leases.give_back(database, study, work)
        else:
            train(database, study, work)
        assert seen(database, memory) == theirs(database, study)
        states |= {trial[2] for trial in theirs(database, study)}
    assert {TrialState.RUNNING, TrialState.COMPLETE, TrialState.FAIL} <= states
    work_off(database, study)
    assert seen(database, memory) == theirs(database, study) == seen(database, History(study.study_id))
    assert TrialState.PRUNED in {trial[2] for trial in theirs(database, study)}


def test_a_trial_whose_parameters_come_later_is_read_again(database, make_study):
    study = make_study()
    memory, loaded = History(study.study_id), optuna.load_study(study_name=study.name, storage=database.url)
    left = loaded.ask()
    assert [trial[3] for trial in seen(database, memory)] == [[]]
    left.suggest_categorical("head.kind", ["mlp", "linear"])
    assert [len(trial[3]) for trial in seen(database, memory)] == [1]
    claim(database, study, "w", "cpu")
    assert seen(database, memory) == theirs(database, study)


def test_an_attribute_is_written_once_and_not_on_a_trial_that_is_finished(database, make_study):
    study = make_study()
    work = claim(database, study, "w", "cpu")
    for value in ("first", {"é": [None, 0.5]}):
        with database.begin() as connection:
            history.write(connection, "trial_user_attributes", work.trial_id, {"key": value, "other": 1})
    stored = optuna.load_study(study_name=study.name, storage=database.url)
    assert stored.trials[0].user_attrs == {"key": {"é": [None, 0.5]}, "other": 1}
    stored.tell(0, state=TrialState.FAIL)
    with database.begin() as connection:
        history.write(connection, "trial_user_attributes", work.trial_id, {"key": "late"})
    assert stored.trials[0].user_attrs["key"] == {"é": [None, 0.5]}


def test_workers_that_are_free_together_share_the_telling(database, make_study, monkeypatch):
    """Each trial's last step is taken by one of them, or by two that met, not by all."""
    study = make_study(budget={"trials": 40, "epochs": 9})
    claims = [claim(database, study, f"w{index}", "cpu") for index in range(40)]
    with monkeypatch.context() as patched:
        patched.setattr(outcomes, "tell_decided", lambda *_: None)
        steering.cancel(database, study.name)
    assert len(claims) == 40
    told, real = [], history.write

    def write(connection, table, trial_id, values):
        told.append(trial_id)
        real(connection, table, trial_id, values)

    monkeypatch.setattr(history, "write", write)

    def free():
        own = Database(database.url)
        claim(own, study, "free", "cpu")
        own.close()

    threads = [threading.Thread(target=free) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {trial[2] for trial in theirs(database, study)} == {TrialState.FAIL}
    assert len(set(told)) == 40
    assert len(told) < 80


def test_a_trial_costs_as_many_statements_late_as_early_and_few(database, make_study):
    """Whatever is paused meanwhile; Optuna's own storage sends one for each attribute, and reads all that is paused."""
    study = make_study(budget={"trials": 60, "epochs": 3, "rungs": [1]}, sampler={"startup_trials": 4})
    sent, costs = [], []

    def note(connection, cursor, statement, parameters, context, many):
        sent.append(statement)

    work_off(Database(database.url), make_study(name="warm", budget={"trials": 1, "epochs": 1}))
    event.listen(Engine, "before_cursor_execute", note)
    try:
        while not isinstance(work := claim(database, study, "w", "cpu"), Idle):
            asked = len(sent)
            leases.describe(
                database, study, work, projection_dim=work.params["head.projection_dim"], head_parameters=1
            )
            leases.report(database, study, work, report_of(work, work.epoch + 1))
            if work.stop_at:
                leases.arrive(database, study, work)
                costs.append((work.origin, asked, 0))
            else:
                sent.clear()
                outcomes.finish(database, study, work.number, work.attempt, outcome_of(work, 3))
                costs.append((work.origin, asked, len(sent)))
            sent.clear()
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    new, promoted = ([asked for origin, asked, _ in costs if origin == kind] for kind in ("new", "promoted"))
    told = [finish for *_, finish in costs if finish]
    assert len(new) == 60
    assert max(new[20:]) <= 32
    assert max(promoted[2:]) <= 12
    assert max(told) <= 12
