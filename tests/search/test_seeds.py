"""The point is what a study judges: its seeds pause, go on and end together, and Optuna hears of it once."""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict

import optuna
import pytest
import toy
from optuna.trial import TrialState
from sqlalchemy import text
from toy import make_spec, outcome_of, report_of, train, work_off

from headsearch.search import leases, outcomes, snapshot, steering, studies
from headsearch.search.audit import audit
from headsearch.search.claims import Idle, claim, point_key
from headsearch.search.database import Database
from headsearch.search.outcomes import Outcome

pytestmark = pytest.mark.postgres

SEEDS = [3, 4, 5]
BUDGET = {"trials": 36, "epochs": 9, "rungs": [1, 3]}


def told(database, study):
    return optuna.load_study(study_name=study.name, storage=database.url).get_trials(deepcopy=False)


def points(database, study):
    found = defaultdict(list)
    for trial in snapshot.read(database, study.name).trials:
        found[point_key(trial.params)].append(trial)
    return list(found.values())


def broken(database, study):
    found = audit(database, studies.get(database, study.name)).findings
    return [finding.message for finding in found if finding.violated]


def fail(database, study, work, reason):
    outcome = Outcome("failed", reason=reason, message="made up")
    outcomes.finish(database, study, work.number, work.attempt, outcome)


def crowd(database, study, count=4):
    """Workers that work the study off together."""
    raised = []

    def run(index):
        own = Database(database.url)
        try:
            work_off(own, study, f"w{index}")
        except Exception as error:  # noqa: BLE001
            raised.append(error)
        finally:
            own.close()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert raised == []


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("rule", ["promote", "stop"])
@pytest.mark.parametrize("mode", ["search", "grid"])
def test_seeds_end_together_and_optuna_has_their_mean(database, make_study, rule, workers, mode):
    grid = {"mode": "grid", "budget": BUDGET | {"trials": None},
            "space": {"head.kind": ["mlp", "linear"], "head.projection_dim": [2, 4, 8, 16, 32, 64]}}  # fmt: skip
    study = make_study(
        seeds=SEEDS, pruning={"rule": rule}, **(grid if mode == "grid" else {"budget": BUDGET})
    )
    crowd(database, study, workers)
    seen = snapshot.read(database, study.name)
    assert [trial.number for trial in seen.trials] == list(range(36))
    assert set(seen.counts) == {"complete", "pruned"}
    assert [trial.number for trial in told(database, study)] == list(range(12))
    for trials in points(database, study):
        assert sorted(trial.seed for trial in trials) == SEEDS
        assert len({(trial.state, trial.epoch) for trial in trials}) == 1
        (number,) = {trial.point for trial in trials}
        theirs = told(database, study)[number]
        assert theirs.params == trials[0].params
        assert [one["number"] for one in theirs.user_attrs["seeds"]] == [trial.number for trial in trials]
        if trials[0].state == "complete":
            columns = zip(*(trial.values for trial in trials), strict=True)
            assert theirs.values == [statistics.fmean(column) for column in columns]
            assert theirs.user_attrs["n"] == "3"
            assert theirs.user_attrs["probe_accuracy"] == theirs.values[0]
        else:
            assert theirs.state == TrialState.PRUNED
            assert theirs.user_attrs["pruned_at_epoch"] == trials[0].epoch
    assert broken(database, study) == []
    assert snapshot.progress(database, study).best_accuracy == pytest.approx(
        max(statistics.fmean(t.values[0] for t in trials) for trials in points(database, study)
            if trials[0].state == "complete")
    )  # fmt: skip


def test_one_lucky_seed_does_not_carry_its_point(database, make_study, monkeypatch):
    """Two points of one dim: those of the second are far apart, and worse in the mean. The first to come goes on."""
    space = {"head.width": [16, 8], "head.projection_dim": [4], "head.kind": ["mlp"]}
    table = {(8, 0): 0.9, (8, 1): 0.3, (8, 2): 0.3, (16, 0): 0.6, (16, 1): 0.6, (16, 2): 0.6}
    monkeypatch.setattr(toy, "accuracy", lambda work, _: table[work.params["head.width"], work.seed])
    study = make_study(
        mode="grid", seeds=[0, 1, 2], space=space, budget={"epochs": 4, "rungs": [1]}, pruning={"eta": 2}
    )
    work_off(database, study)
    states = {(t.params["head.width"], t.state) for t in snapshot.read(database, study.name).trials}
    assert states == {(8, "pruned"), (16, "complete")}


@pytest.mark.parametrize("rule", ["promote", "stop"])
def test_a_point_waits_for_its_seeds_which_begin_before_another_point(database, make_study, rule):
    study = make_study(seeds=SEEDS, budget=BUDGET, pruning={"rule": rule})
    first, second = claim(database, study, "a", "cpu"), claim(database, study, "b", "cpu")
    assert (point_key(first.params), first.seed, second.seed) == (point_key(second.params), 3, 4)
    assert [train(database, study, work) for work in (first, second)] == ["paused", "paused"]
    third = claim(database, study, "a", "cpu")
    assert (point_key(third.params), third.seed, third.origin) == (point_key(first.params), 5, "new")
    other = claim(database, study, "b", "cpu")
    assert point_key(other.params) != point_key(first.params)
    assert train(database, study, third) == "paused"
    taken = [claim(database, study, worker, "cpu") for worker in "acd"]
    assert [(work.number, work.origin) for work in taken] == [(n, "promoted") for n in (0, 1, 2)]
    assert {work.trial_id for work in (*taken, first, second, third)} == {first.trial_id}


def test_by_the_rule_stop_a_point_that_came_with_all_seeds_is_judged_once(database, make_study):
    study = make_study(
        seeds=[0, 1], budget={"trials": 8, "epochs": 4, "rungs": [1]}, pruning={"rule": "stop"}
    )
    works = [claim(database, study, f"w{n}", "cpu") for n in range(8)]
    for work in works:
        dim = work.params["head.projection_dim"]
        leases.describe(database, study, work, projection_dim=dim, head_parameters=1)
        leases.report(database, study, work, report_of(work, 1))
        assert leases.arrive(database, study, work) == "paused"
    left = work_off(database, study)
    seen = snapshot.read(database, study.name)
    assert seen.counts["pruned"] + seen.counts["complete"] == 8
    assert 0 < seen.counts["pruned"] < 8
    assert len(left) == seen.counts["complete"], "what was pruned is not taken up again"
    assert broken(database, study) == []


def test_a_seed_that_a_machine_failed_leaves_the_others_and_is_no_value_of_optunas(database, make_study):
    study = make_study(seeds=SEEDS, budget={"trials": 3, "epochs": 2, "rungs": [1]})
    works = [claim(database, study, worker, "cpu") for worker in "abc"]
    fail(database, study, works[0], "lost")
    work_off_others = [train(database, study, work) for work in works[1:]]
    assert work_off_others == ["paused", "paused"], "they wait for nobody: the third has failed"
    work_off(database, study)
    seen = snapshot.read(database, study.name)
    assert seen.counts == {"failed": 1, "complete": 2}
    (theirs,) = told(database, study)
    assert (theirs.state, theirs.values) == (TrialState.FAIL, None)
    assert theirs.user_attrs["n"] == "2 of 3"
    assert broken(database, study) == []
    assert steering.requeue(database, study.name) == [0]
    again = claim(database, study, "d", "cpu")
    assert (again.number, again.seed, again.origin) == (3, 3, "new")
    assert train(database, study, again) == "paused"
    work_off(database, study)
    old, new = told(database, study)
    assert (old.state, new.state) == (TrialState.FAIL, TrialState.COMPLETE)
    values = [trial.values for trial in snapshot.read(database, study.name).trials]
    assert len(values) == 3
    assert new.values == [statistics.fmean(column) for column in zip(*values, strict=True)]
    assert new.params == old.params
    assert broken(database, study) == []


def test_a_point_whose_configuration_failed_is_not_promoted(database, make_study):
    study = make_study(seeds=SEEDS, budget={"trials": 6, "epochs": 4, "rungs": [1]})
    works = [claim(database, study, worker, "cpu") for worker in "abc"]
    assert [train(database, study, work) for work in works[:2]] == ["paused", "paused"]
    fail(database, study, works[2], "collapsed")
    work_off(database, study)
    first, second = points(database, study)
    assert [trial.state for trial in first] == ["pruned", "pruned", "failed"]
    assert [trial.state for trial in second] == ["complete"] * 3
    assert [trial.state for trial in told(database, study)] == [TrialState.FAIL, TrialState.COMPLETE]
    assert snapshot.progress(database, study).best_accuracy == pytest.approx(
        told(database, study)[1].values[0]
    )
    assert broken(database, study) == []
    assert steering.requeue(database, study.name) == [0, 1, 2], "a point is judged whole or not at all"
    work_off(database, study)
    assert broken(database, study) == []
    assert snapshot.read(database, study.name).counts["failed"] == 0


def test_the_last_two_seeds_may_end_at_the_same_moment(database, make_study, monkeypatch):
    study = make_study(seeds=[0, 1], budget={"trials": 2, "epochs": 2})
    works = [claim(database, study, worker, "cpu") for worker in "ab"]
    barrier, real = threading.Barrier(2), outcomes.tell_decided

    def together(*arguments):
        barrier.wait(30)
        real(*arguments)

    monkeypatch.setattr(outcomes, "tell_decided", together)

    def end(work):
        own = Database(database.url)
        for epoch in (1, 2):
            leases.report(own, study, work, report_of(work, epoch))
        outcomes.finish(own, study, work.number, work.attempt, outcome_of(work, 2))
        own.close()

    threads = [threading.Thread(target=end, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.setattr(outcomes, "tell_decided", real)
    assert [trial.state for trial in told(database, study)] == [TrialState.COMPLETE]
    work_off(database, study)
    assert broken(database, study) == []


@pytest.mark.parametrize("dies_at", ["_describe", "_runs_beside"])
def test_a_worker_that_dies_while_it_tells_is_finished_by_the_next(
    database, make_study, monkeypatch, dies_at
):
    study = make_study(seeds=[0, 1], budget={"trials": 2, "epochs": 1})
    works = [claim(database, study, worker, "cpu") for worker in "ab"]
    assert train(database, study, works[0]) == "complete"
    real = getattr(outcomes, dies_at)

    class Dead(Exception):
        pass

    def die(*arguments, locking=False):
        found = real(*arguments, locking=locking) if dies_at == "_runs_beside" else real(*arguments)
        if locking or dies_at == "_describe":
            raise Dead
        return found

    with monkeypatch.context() as patched:
        patched.setattr(outcomes, dies_at, die)
        with pytest.raises(Dead):
            train(database, study, works[1])
    assert [trial.state for trial in told(database, study)] == [TrialState.RUNNING]
    with database.begin() as connection:
        connection.execute(
            text("UPDATE headsearch.trials SET lease_until = clock_timestamp() WHERE number = 1")
        )
    assert claim(database, study, "c", "cpu") is Idle.COMPLETED
    assert [trial.state for trial in told(database, study)] == [TrialState.COMPLETE]
    assert broken(database, study) == []


def test_a_study_cancelled_between_seeds_goes_on_where_it_is_resumed(database, make_study):
    study = make_study(seeds=SEEDS, budget={"trials": 6, "epochs": 2})
    works = [claim(database, study, worker, "cpu") for worker in "ab"]
    assert train(database, study, works[0]) == "complete"
    assert steering.cancel(database, study.name) == [1]
    assert [trial.state for trial in told(database, study)] == [TrialState.FAIL]
    assert broken(database, study) == []
    steering.resume(database, study.name)
    assert steering.requeue(database, study.name) == [1]
    work_off(database, study)
    assert {(len(p), *{t.state for t in p}) for p in points(database, study)} == {(3, "complete")}
    states = [trial.state for trial in told(database, study)]
    assert states == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert broken(database, study) == []


def test_a_study_cancelled_with_paused_seeds_is_clean_and_can_be_finished(database, make_study):
    study = make_study(seeds=SEEDS, budget=BUDGET)
    works = [claim(database, study, worker, "cpu") for worker in "abcd"]
    assert [train(database, study, work) for work in works] == ["paused"] * 4
    promoted = claim(database, study, "a", "cpu")
    assert (promoted.origin, promoted.number) == ("promoted", 0)
    steering.cancel(database, study.name)
    assert broken(database, study) == []
    steering.resume(database, study.name)
    assert steering.requeue(database, study.name) == [0, 1, 2]
    work_off(database, study)
    seen = snapshot.read(database, study.name)
    assert (seen.study.state, len(seen.trials)) == ("complete", 36)
    assert broken(database, study) == []


# What is done to a finished study, and the rule that must notice.
BROKEN = {
    "UPDATE headsearch.trials SET state = 'complete', outcome = jsonb_set(outcome, '{state}', '\"complete\"') "
    "WHERE number = (SELECT min(number) FROM headsearch.trials WHERE state = 'pruned')": "seeds",
    "UPDATE public.trial_values SET value = value + 0.01 WHERE objective = 0": "Optuna's trial",
    "UPDATE public.trials SET state = 'PRUNED' WHERE state = 'COMPLETE'": "Optuna's state",
    "UPDATE headsearch.trials SET trial_id = (SELECT max(trial_id) FROM public.trials) WHERE number = 0": "Optuna's trial",
    "UPDATE headsearch.trials SET epoch = 9 "
    "WHERE number = (SELECT min(number) FROM headsearch.trials WHERE epoch = 1)": "seeds",
}


@pytest.mark.parametrize("damage", BROKEN, ids=list(map(str, range(len(BROKEN)))))
def test_what_is_broken_is_noticed(database, make_study, damage):
    study = make_study(seeds=SEEDS, budget=BUDGET)
    work_off(database, study)
    with database.begin() as connection:
        connection.execute(text(damage))
    assert BROKEN[damage] in {finding.rule for finding in audit(database, study).findings if finding.violated}


def test_a_budget_that_is_no_multiple_of_the_seeds_is_refused():
    with pytest.raises(ValueError, match=r"budget\.trials: 35 is not a multiple of the 3 seeds"):
        make_spec(seeds=SEEDS, budget=BUDGET | {"trials": 35})
