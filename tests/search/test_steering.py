"""What people do to a study while workers are on it, on a real PostgreSQL."""

from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import text
from toy import outcome_of, report_of, train, work_off

from headsearch import __version__
from headsearch.errors import InputError, LeaseLost
from headsearch.search import leases, outcomes, snapshot, steering, studies
from headsearch.search.audit import audit
from headsearch.search.claims import Claim, Idle, claim, point_key
from headsearch.search.database import Database
from headsearch.search.outcomes import Outcome

pytestmark = pytest.mark.postgres


def optuna_states(database, study):
    return [t.state for t in optuna.load_study(study_name=study.name, storage=database.url).get_trials()]


def broken(database, study):
    found = audit(database, studies.get(database, study.name)).findings
    return [finding.message for finding in found if finding.violated]


def fail(database, study, work, reason="lost"):
    outcomes.finish(
        database, study, work.number, work.attempt, Outcome("failed", reason=reason, message="made up")
    )


def test_a_paused_study_gives_no_work_and_says_so_to_those_at_work(database, make_study):
    study = make_study()
    work = claim(database, study, "a", "cpu")
    assert leases.report(database, study, work, report_of(work, 1)) == "open"
    assert steering.pause(database, "toy").state == "paused"
    assert steering.pause(database, "toy").state == "paused"
    assert leases.renew(database, study, work) == "paused"
    assert claim(database, study, "b", "cpu") is Idle.HELD
    leases.give_back(database, study, work)
    assert claim(database, study, "a", "cpu") is Idle.HELD
    assert steering.resume(database, "toy").state == "open"
    again = claim(database, study, "b", "cpu")
    assert (again.number, again.origin, again.epoch) == (work.number, "adopted", 1)
    leases.give_back(database, study, again)
    work_off(database, study)
    seen = snapshot.read(database, "toy")
    assert (seen.study.state, len(seen.trials)) == ("complete", 12)
    assert broken(database, study) == []
    for call in (steering.pause, steering.resume, steering.cancel):
        with pytest.raises(InputError, match="is complete"):
            call(database, "toy")


@pytest.mark.parametrize("mode", ["search", "grid"])
def test_a_requeued_trial_is_trained_again_under_a_new_number(database, make_study, mode):
    grid = {"mode": "grid", "space": {"head.projection_dim": [2, 4, 8]}, "budget": {"epochs": 3}}
    study = make_study(**(grid if mode == "grid" else {"budget": {"trials": 3, "epochs": 3}}))
    first = claim(database, study, "a", "cpu")
    fail(database, study, first)
    work_off(database, study)
    assert studies.get(database, "toy").state == "complete"
    assert steering.requeue(database, "toy") == [0]
    assert steering.requeue(database, "toy") == [], "once is enough"
    assert studies.get(database, "toy").state == "open"
    again = claim(database, study, "b", "cpu")
    assert isinstance(again, Claim)
    assert (again.number, again.params, again.seed) == (3, first.params, first.seed)
    assert claim(database, study, "c", "cpu") is Idle.WAIT, "the budget is spent with it"
    assert train(database, study, again) == "complete"
    assert claim(database, study, "c", "cpu") is Idle.COMPLETED
    seen = snapshot.read(database, "toy")
    assert [t.number for t in seen.trials] == [1, 2, 3]
    assert set(seen.counts) == {"complete"}
    assert len({point_key(t.params) for t in seen.trials}) == 3
    assert optuna_states(database, study) == [TrialState.FAIL, *[TrialState.COMPLETE] * 3]
    assert broken(database, study) == []


def test_requeueing_takes_only_what_failed_and_what_was_named(database, make_study):
    study = make_study(budget={"trials": 4, "epochs": 3})
    works = [claim(database, study, w, "cpu") for w in "abc"]
    fail(database, study, works[0], "lost")
    fail(database, study, works[1], "collapsed")
    with pytest.raises(InputError, match="trial 2: is running; only failed trials"):
        steering.requeue(database, "toy", [0, 2])
    with pytest.raises(InputError, match=r"trial 9: study 'toy' has none"):
        steering.requeue(database, "toy", [9])
    assert steering.requeue(database, "toy", reason="hung") == []
    assert steering.requeue(database, "toy", reason="lost") == [0]
    with pytest.raises(InputError, match="trial 0: is requeued"):
        steering.requeue(database, "toy", [0])
    assert steering.requeue(database, "toy", [1]) == [1]
    leases.give_back(database, study, works[2])
    work_off(database, study)
    seen = snapshot.read(database, "toy")
    assert len(seen.trials) == 4
    assert {t.number for t in seen.trials}.isdisjoint({0, 1})
    with database.begin() as connection:
        history = connection.scalar(text("SELECT history FROM headsearch.trials WHERE number = 1"))
    assert [event["what"] for event in history] == ["requeued"]
    assert broken(database, study) == []


def test_a_cancelled_trial_is_taken_from_its_worker_and_the_rest_goes_on(database, make_study):
    study = make_study()
    work = claim(database, study, "a", "cpu")
    assert train(database, study, claim(database, study, "b", "cpu")) == "paused"
    assert steering.cancel(database, "toy", [0, 1]) == [0, 1]
    for call in (
        lambda: leases.report(database, study, work, report_of(work, 1)),
        lambda: leases.renew(database, study, work),
        lambda: leases.give_back(database, study, work),
    ):
        with pytest.raises(LeaseLost, match="trial 0: cancelled"):
            call()
    with pytest.raises(LeaseLost):
        outcomes.finish(database, study, 0, work.attempt, outcome_of(work, 9))
    seen = snapshot.read(database, "toy")
    assert [(t.state, t.reason) for t in seen.trials] == [("failed", "cancelled")] * 2
    assert optuna_states(database, study) == [TrialState.FAIL] * 2
    with pytest.raises(InputError, match="trial 1: is failed already"):
        steering.cancel(database, "toy", [1])
    work_off(database, study)
    assert len(snapshot.read(database, "toy").trials) == 12
    assert broken(database, study) == []


def test_a_cancelled_study_ends_at_once_and_can_be_opened_again(database, make_study):
    study = make_study()
    begun = [claim(database, study, "b", "cpu"), claim(database, study, "c", "cpu")]
    assert [train(database, study, work) for work in begun] == ["paused", "paused"]
    number = claim(database, study, "a", "cpu").number
    assert number in (0, 1)
    assert steering.cancel(database, "toy") == [0, 1]
    seen = snapshot.read(database, "toy")
    assert seen.study.state == "cancelled"
    assert seen.study.completed_at is not None
    assert {t.number: t.state for t in seen.trials} == {number: "failed", 1 - number: "pruned"}
    assert claim(database, study, "b", "cpu") is Idle.DONE
    assert broken(database, study) == []
    assert steering.cancel(database, "toy") == []
    assert steering.resume(database, "toy").state == "open"
    assert steering.requeue(database, "toy", reason="cancelled") == [number]
    work_off(database, study)
    seen = snapshot.read(database, "toy")
    assert (seen.study.state, len(seen.trials)) == ("complete", 12)
    assert seen.counts["failed"] == 0
    assert broken(database, study) == []


def test_a_cancel_cut_short_is_told_by_whoever_claims_next(database, make_study, monkeypatch):
    study = make_study()
    claim(database, study, "a", "cpu")

    class Cut(Exception):
        pass

    def dies(*_):
        raise Cut

    with monkeypatch.context() as patched:
        patched.setattr(outcomes, "tell_decided", dies)
        with pytest.raises(Cut):
            steering.cancel(database, "toy")
    assert [t.state for t in snapshot.read(database, "toy").trials] == ["running"]
    assert claim(database, study, "b", "cpu") is Idle.DONE
    assert [t.state for t in snapshot.read(database, "toy").trials] == ["failed"]
    assert optuna_states(database, study) == [TrialState.FAIL]
    assert broken(database, study) == []


def test_a_trial_cancelled_while_paused_is_not_promoted(database, make_study, monkeypatch):
    """Between the decision and the telling, another worker looks for work."""
    study = make_study(budget={"trials": 2, "epochs": 9, "rungs": [1]})
    begun = [claim(database, study, "a", "cpu"), claim(database, study, "b", "cpu")]
    assert [train(database, study, work) for work in begun] == ["paused", "paused"]
    tell, claims = outcomes.tell_decided, []

    def slowly(*arguments):
        patched.setattr(outcomes, "tell_decided", tell)
        claims.append(claim(database, study, "b", "cpu"))
        tell(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(outcomes, "tell_decided", slowly)
        steering.cancel(database, "toy", [0, 1])
    assert all(found is Idle.WAIT or found in (Idle.COMPLETED, Idle.DONE) for found in claims)
    work_off(database, study)
    assert snapshot.read(database, "toy").counts == {"failed": 2}
    assert broken(database, study) == []


def test_set_back_counts_and_fails_in_the_end_with_its_history(database, make_study):
    study = make_study(lease={"max_attempts": 2})
    work = claim(database, study, "a", "cpu")
    leases.report(database, study, work, report_of(work, 1))
    said = {"reason": "hung", "message": "no step for 600 s"}
    assert leases.set_back(database, study, work, **said) == "again"
    with pytest.raises(LeaseLost):
        leases.set_back(database, study, work, **said)
    seen = snapshot.read(database, "toy").trials[0]
    assert (seen.state, seen.losses) == ("orphaned", 1)
    work = claim(database, study, "b", "cpu")
    assert (work.number, work.origin) == (0, "adopted")
    assert snapshot.read(database, "toy").trials[0].losses == 1, "adopting counts nothing more"
    assert leases.set_back(database, study, work, **said) == "failed"
    seen = snapshot.read(database, "toy").trials[0]
    assert (seen.state, seen.reason, seen.message, seen.losses) == ("failed", "hung", "no step for 600 s", 2)
    told = optuna.load_study(study_name="toy", storage=database.url).get_trials()[0].user_attrs
    assert [(e["what"], e["worker"], e["epoch"]) for e in told["history"]] == [
        ("hung", "a", 1),
        ("hung", "b", 1),
    ]


def test_a_study_of_another_version_is_refused_until_it_is_upgraded(database, make_study):
    study = make_study()
    steering.check_version(study)
    with database.begin() as connection:
        connection.execute(text("UPDATE headsearch.studies SET version = '99.1.0'"))
    with pytest.raises(
        InputError, match=r"99\.1\.0.*install headsearch==99\.1\.0.*headsearch study upgrade toy"
    ):
        steering.check_version(studies.get(database, "toy"))
    assert steering.upgrade(database, "toy").version == __version__
    steering.check_version(studies.get(database, "toy"))


def test_the_sampler_learns_nothing_from_failures(database, make_study):
    """Wherever the failed trials were in the space, what comes next is the same."""
    proposals = []
    for name, moved in (("here", False), ("there", True)):
        study = make_study(
            name=name,
            space={
                "optimizer.learning_rate": {"low": 0.1, "high": 1.0},
                "head.projection_dim": [2, 4, 8, 16],
            },
            budget={"trials": 40, "epochs": 1},
            sampler={"startup_trials": 6},
        )
        held = [claim(database, study, f"f{index}", "cpu") for index in range(3)]
        for work in held:
            fail(database, study, work)
        if moved:
            with database.begin() as connection:
                connection.execute(
                    text(
                        "UPDATE public.trial_params SET param_value = 0.999 WHERE param_name LIKE '%rate' "
                        "AND trial_id = ANY(:ids)"
                    ),
                    {"ids": [work.trial_id for work in held]},
                )
        fresh = Database(database.url)  # without the cache of ended trials
        for _ in range(10):
            train(fresh, study, claim(fresh, study, "w", "cpu"))
        proposals.append([claim(fresh, study, f"w{index}", "cpu").params for index in range(3)])
        fresh.close()
    assert proposals[0] == proposals[1]
