"""What an adversary found in the database: retries, restores, clocks, and people at the wrong moment."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from sqlalchemy import text
from test_adversary import beside, expire
from toy import outcome_of, report_of, train, work_off

from headsearch.errors import DatabaseError, LeaseLost
from headsearch.search import claims, history, leases, outcomes, snapshot, steering, studies, workers
from headsearch.search.audit import audit
from headsearch.search.claims import Claim, Idle, claim
from headsearch.search.database import Database
from headsearch.search.leases import Report
from headsearch.search.outcomes import Outcome
from headsearch.search.sampling import distributions

pytestmark = pytest.mark.postgres


def broken(database, study):
    return [f.message for f in audit(database, study).findings if f.violated]


def states(database):
    return [t.state.name for t in optuna.load_study(study_name="toy", storage=database.url).get_trials()]


def state_of(database, number):
    return snapshot.read(database, "toy").trials[number].state


def execute(database, sql, **values):
    with database.begin() as connection:
        connection.execute(text(sql), values)


def begun(database, study, worker, accuracy):
    work = claim(database, study, worker, "cpu")
    leases.describe(database, study, work, projection_dim=4, head_parameters=4)
    leases.report(database, study, work, Report(1, 1.0, accuracy, 3.0, 2.0, 100.0, 1.0))
    return work


def test_an_end_at_a_rung_that_was_told_stays_when_it_is_said_again(database, make_study, monkeypatch):
    """Rule `stop`: the answer is lost, and meanwhile the rung has room for one more."""
    study = make_study(
        pruning={"rule": "stop"},
        budget={"trials": 4, "epochs": 9, "rungs": [1]},
        space={"head.projection_dim": [4], "optimizer.learning_rate": {"low": 0.1, "high": 1.0}},
    )
    begun(database, study, "a", 0.9)
    second = begun(database, study, "b", 0.5)
    real, calls = Database.begin, []

    @contextlib.contextmanager
    def flaky(self):
        calls.append(1)
        with real(self) as connection:
            yield connection
        if len(calls) == 4:  # rung, outcome, attributes, and Optuna's state with ours: the answer is lost
            raise DatabaseError("gone")

    with monkeypatch.context() as patched:
        patched.setattr(Database, "begin", flaky)
        with pytest.raises(DatabaseError):
            leases.arrive(database, study, second)
    assert states(database)[1] == "PRUNED"
    begun(database, study, "c", 0.1)
    assert leases.arrive(database, study, second) == "ended"
    assert state_of(database, 1) == "pruned"


def test_an_outcome_that_is_decided_stays(database, make_study):
    study = make_study(lease={"max_attempts": 1})
    work = begun(database, study, "a", 0.5)
    assert leases.set_back(database, study, work, reason="hung", message="no step") == "failed"
    with pytest.raises(LeaseLost):
        outcomes.finish(database, study, 0, work.attempt, outcome_of(work, 9))
    assert (state_of(database, 0), states(database)) == ("failed", ["FAIL"])


def test_saying_an_outcome_again_is_well(database, make_study):
    study = make_study()
    work = begun(database, study, "a", 0.5)
    for _ in range(2):
        outcomes.finish(database, study, 0, work.attempt, outcome_of(work, 9), worker_id=work.worker_id)
    with pytest.raises(LeaseLost):
        outcomes.finish(database, study, 0, work.attempt, Outcome("failed", reason="error", message="x"))
    assert (state_of(database, 0), states(database)) == ("complete", ["COMPLETE"])


def test_a_cancelled_study_keeps_no_stray_of_optunas(database, make_study):
    study = make_study()
    toy = optuna.load_study(study_name="toy", storage=database.url)
    toy.ask()  # what a claim that died leaves
    toy.enqueue_trial({"head.projection_dim": 2})
    steering.cancel(database, "toy")
    assert states(database) == ["FAIL", "FAIL"]
    assert claim(database, study, "w", "cpu") is Idle.DONE
    assert broken(database, study) == []


def test_an_audit_in_the_middle_of_a_cancel_or_a_requeue_finds_nothing_wrong(
    database, make_study, monkeypatch
):
    study = make_study(budget={"trials": 2, "epochs": 1})
    worker = workers.register(database, study, device="cpu", threads=1)
    claim(database, study, worker, "cpu")
    tell, seen = outcomes.tell_decided, []

    def slowly(*arguments):
        seen.append(broken(database, study))
        tell(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(outcomes, "tell_decided", slowly)
        steering.cancel(database, "toy")
    assert seen == [[]]
    steering.resume(database, "toy")
    work_off(database, study)
    complete = studies.get(database, "toy")
    steering.requeue(database, "toy")
    assert broken(database, complete) == [], "the study's state is that of the audit's own moment"


def test_a_trial_given_back_waits_for_no_clock(database, make_study):
    study = make_study(budget={"trials": 1, "epochs": 1})
    leases.give_back(database, study, claim(database, study, "a", "cpu"))
    execute(database, "UPDATE headsearch.trials SET lease_until = lease_until + interval '1 hour'")
    assert isinstance(claim(database, study, "b", "cpu"), Claim)


def test_a_worker_that_was_taken_for_lost_is_alive_when_it_claims(database, make_study):
    study = make_study()
    first, second = (workers.register(database, study, device="cpu", threads=1) for _ in range(2))
    claim(database, study, first, "cpu")
    expire(database, 0)
    claim(database, study, second, "cpu")
    claim(database, study, first, "cpu")
    assert broken(database, study) == []
    assert len(snapshot.read(database, "toy").workers) == 2


@contextlib.contextmanager
def cut_at_commit(monkeypatch):
    """Every transaction of ours loses its connection at COMMIT."""
    real = Database.begin

    @contextlib.contextmanager
    def cut(self):
        with real(self) as connection:
            yield connection
            connection.invalidate()
            raise DatabaseError("cut at COMMIT")

    with monkeypatch.context() as patched:
        patched.setattr(Database, "begin", cut)
        yield


def test_a_claim_that_dies_leaves_nothing(database, make_study, monkeypatch):
    study = make_study()
    with cut_at_commit(monkeypatch), pytest.raises(DatabaseError):
        claim(database, study, "a", "cpu")
    assert states(database) == []
    assert claim(database, study, "a", "cpu").number == 0
    assert states(database) == ["RUNNING"]


def test_other_clients_and_claims_number_their_trials_in_one_sequence(database, make_study):
    """Also where one of them is in the middle: numbers are given under the study's row, as Optuna does."""
    study = make_study()
    toy = optuna.load_study(study_name="toy", storage=database.url)
    with database.begin() as connection:
        ours = history.create(connection, study.study_id)
        with ThreadPoolExecutor(1) as pool:
            theirs = pool.submit(toy.ask)
            with pytest.raises(TimeoutError):
                theirs.result(0.5)
            connection.commit()
            assert (ours.number, theirs.result(10).number) == (0, 1)
    seen = toy.get_trials()
    assert [trial.number for trial in seen] == [0, 1]
    age = abs((seen[0].datetime_start - seen[1].datetime_start).total_seconds())
    assert age < 60, "both in the clock of Optuna's table"


def test_a_stray_with_parameters_of_its_own_serves_no_other_point(database, make_study):
    """Another client began a trial; a requeued point comes next."""
    study = make_study()
    work = claim(database, study, "a", "cpu")
    outcomes.finish(database, study, 0, work.attempt, Outcome("failed", reason="lost", message="x"))
    dims = distributions(study.spec)["head.projection_dim"]
    toy = optuna.load_study(study_name="toy", storage=database.url)
    toy.enqueue_trial({"head.projection_dim": 2 if work.params["head.projection_dim"] != 2 else 4})
    toy.ask({"head.projection_dim": dims})
    assert states(database) == ["FAIL", "RUNNING"]
    steering.requeue(database, "toy", [0])
    again = claim(database, study, "a", "cpu")
    shown = optuna.load_study(study_name="toy", storage=database.url).get_trials()
    assert again.params == work.params == shown[again.number].params
    leases.give_back(database, study, again)
    work_off(database, study)
    assert broken(database, study) == []


def test_cancel_names_what_it_cancelled(database, make_study, monkeypatch):
    study = make_study()
    work = begun(database, study, "a", 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(outcomes, "tell_decided", lambda *_: None)
        outcomes.finish(database, study, 0, work.attempt, outcome_of(work, 9))
    assert steering.cancel(database, "toy", [0]) == []
    assert state_of(database, 0) == "complete"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("UPDATE headsearch.reports SET attempt = attempt + 3 WHERE epoch = 1", "reported after a later one"),
        ("UPDATE public.trial_values SET value = 0.123 WHERE objective = 0", "Optuna has other values"),
        ("UPDATE public.trial_params SET param_value = 0", "Optuna has other parameters"),
        ("UPDATE headsearch.trials SET rung = 0 WHERE state = 'complete'", "passed 0 of 2 rungs"),
    ],
)
def test_the_audit_sees_what_does_not_agree(database, make_study, change, message):
    study = make_study(budget={"trials": 4, "epochs": 9, "rungs": [1, 3]})
    work_off(database, study)
    assert broken(database, study) == []
    execute(database, "UPDATE headsearch.trials SET attempt = attempt + 5")
    execute(database, change)
    assert any(message in line for line in broken(database, study)), broken(database, study)


def test_a_claim_and_a_deletion_do_not_wait_for_each_other(database, make_study, monkeypatch):
    study = make_study()
    real, inside, go_on = claims.distributions, threading.Event(), threading.Event()

    def slowly(spec):
        inside.set()
        go_on.wait(20)
        return real(spec)

    monkeypatch.setattr(claims, "distributions", slowly)
    claimer, raised = beside(database, lambda own: claim(own, study, "w", "cpu"))
    assert inside.wait(20)
    deleter, refused = beside(database, lambda own: studies.delete(own, "toy", force=True))
    threading.Event().wait(0.5)
    go_on.set()
    claimer.join(30)
    deleter.join(30)
    assert not claimer.is_alive()
    assert not deleter.is_alive()
    assert raised + refused == []
    assert studies.all_studies(database) == []


def test_the_same_token_given_twice_is_still_one_workers(database, make_study):
    """After a restore to an older state, attempts are counted again from there."""
    study = make_study()
    old = claim(database, study, "a", "cpu")
    execute(
        database,
        "UPDATE headsearch.trials SET attempt = 0, worker_id = NULL, lease_until = clock_timestamp()",
    )
    new = claim(database, study, "b", "cpu")
    assert (new.number, new.attempt) == (old.number, old.attempt)
    for call in (leases.renew, leases.give_back):
        with pytest.raises(LeaseLost):
            call(database, study, old)
    with pytest.raises(LeaseLost):
        outcomes.finish(database, study, 0, old.attempt, outcome_of(old, 9), worker_id=old.worker_id)
    leases.report(database, study, new, report_of(new, 1))
    assert train(database, study, new) == "paused"


def test_the_server_knows_when_to_give_a_cut_worker_up(database):
    """In seconds, also while an answer is on its way; how long it then takes is measured in test_partition."""
    with database.begin() as connection:
        shown = {
            name: connection.scalar(text(f"SHOW {name}"))
            for name in ("tcp_user_timeout", "tcp_keepalives_idle", "idle_in_transaction_session_timeout")
        }
    assert shown == {
        "tcp_user_timeout": "20000",
        "tcp_keepalives_idle": "10",
        "idle_in_transaction_session_timeout": "5min",
    }
