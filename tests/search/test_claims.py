"""Claims, leases and outcomes on a real PostgreSQL, with trials that cost nothing to train."""

from __future__ import annotations

import threading
import time

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import text
from toy import make_spec, outcome_of, report_of, train, work_off

from headsearch.errors import LeaseLost, UnknownStudyError
from headsearch.search import leases, outcomes, snapshot, studies
from headsearch.search.claims import Claim, Idle, claim, point_key
from headsearch.search.database import Database
from headsearch.search.outcomes import Outcome

pytestmark = pytest.mark.postgres


def optuna_trials(database, study):
    return optuna.load_study(study_name=study.name, storage=database.url).get_trials(deepcopy=False)


def expire(database, number):
    """Let the lease run out now, without waiting for it."""
    with database.begin() as connection:
        connection.execute(
            text(
                "UPDATE headsearch.trials SET lease_until = clock_timestamp() - interval '1 s' WHERE number = :n"
            ),
            {"n": number},
        )


def test_a_search_ends_with_its_exact_budget_a_front_and_pruned_trials(database, make_study):
    study = make_study()
    claims = work_off(database, study)
    seen = snapshot.read(database, study.name)
    assert seen.study.state == "complete"
    assert len(seen.trials) == 12
    assert set(seen.counts) == {"complete", "pruned"}
    assert [c.number for c in claims if c.origin == "new"] == list(range(12))
    assert any(c.origin == "promoted" for c in claims)
    trials = optuna_trials(database, study)
    assert [t.number for t in trials] == list(range(12))
    for ours, theirs in zip(seen.trials, trials, strict=True):
        assert {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}[ours.state] == theirs.state
        assert ours.params == theirs.params
        assert theirs.user_attrs["config"]["seed"] == ours.seed
        if ours.state == "complete":
            assert theirs.values == list(ours.values)
            assert ours.epoch == 9
        else:
            assert theirs.values is None
            assert theirs.user_attrs["pruned_at_epoch"] == ours.epoch in (1, 3)
    assert seen.epochs_trained < seen.epochs_without_pruning
    assert claim(database, study, "late", "cpu") is Idle.DONE


def test_the_same_history_gives_the_same_search(database, make_study):
    first, second = make_study(name="one"), make_study(name="two")
    points = [
        [(c.number, c.params, c.origin) for c in work_off(database, study)] for study in (first, second)
    ]
    assert points[0] == points[1]
    other = make_study(name="three", sampler={"seed": 5})
    assert [c.params for c in work_off(database, other)] != [params for _, params, _ in points[0]]


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2", "gp", "qmc"])
def test_every_sampler_finishes_a_study_without_repeating_a_point(database, make_study, sampler):
    study = make_study(
        sampler={"name": sampler, "startup_trials": 4}, budget={"trials": 14, "epochs": 2, "rungs": [1]}
    )
    work_off(database, study)
    seen = snapshot.read(database, study.name)
    assert len({point_key(t.params) for t in seen.trials}) == 14


def test_a_search_of_the_whole_space_finds_every_point_once(database, make_study):
    study = make_study(
        space={"head.kind": ["mlp", "linear"], "head.projection_dim": [2, 4, 8]},
        budget={"trials": 6, "epochs": 1},
    )
    work_off(database, study)
    assert len({point_key(t.params) for t in snapshot.read(database, study.name).trials}) == 6


def test_seeds_of_a_search_share_their_points(database, make_study):
    study = make_study(seeds=[3, 4, 5], budget={"trials": 12, "epochs": 2})
    work_off(database, study)
    groups = {}
    for trial in snapshot.read(database, study.name).trials:
        groups.setdefault(point_key(trial.params), []).append(trial.seed)
    assert sorted(map(sorted, groups.values())) == [[3, 4, 5]] * 4


def test_a_grid_is_trained_whole_in_order(database, make_study):
    study = make_study(
        mode="grid", seeds=[0, 1], budget={"epochs": 1},
        space={"head.kind": ["mlp", "linear"], "head.projection_dim": [2, 4]},
    )  # fmt: skip
    claims = work_off(database, study)
    assert [(c.params, c.seed) for c in claims] == study.spec.cells()


@pytest.mark.parametrize("rule", ["stop", "none"])
def test_the_other_rules(database, make_study, rule):
    study = make_study(pruning={"rule": rule})
    claims = work_off(database, study)
    seen = snapshot.read(database, study.name)
    assert all(c.origin == "new" for c in claims)
    assert len(seen.trials) == 12
    assert (seen.counts["pruned"] > 0) == (rule == "stop")


def test_workers_that_start_together_share_the_budget_exactly(database, make_study):
    study = make_study(budget={"trials": 30, "epochs": 4, "rungs": [1, 2]})
    errors = []

    def run(index):
        own = Database(database.url)
        try:
            time.sleep(0.05 * index * (index % 2))
            work_off(own, study, f"w{index}")
        except Exception as error:  # noqa: BLE001
            errors.append(error)
        finally:
            own.close()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    seen = snapshot.read(database, study.name)
    assert len(seen.trials) == 30
    assert set(seen.counts) == {"complete", "pruned"}
    assert len({(point_key(t.params), t.seed) for t in seen.trials}) == 30
    with database.begin() as connection:
        told = connection.execute(
            text(
                "SELECT number, array_agg(epoch ORDER BY epoch) AS e FROM headsearch.reports GROUP BY number"
            )
        )
        assert all(row.e == list(range(1, len(row.e) + 1)) for row in told)
    assert len(optuna_trials(database, study)) == 30


def test_an_orphan_is_adopted_and_its_first_worker_is_fenced(database, make_study):
    study = make_study()
    lost = claim(database, study, "first", "cpu")
    leases.describe(
        database, study, lost, projection_dim=lost.params["head.projection_dim"], head_parameters=1
    )
    leases.report(database, study, lost, report_of(lost, 1))
    expire(database, lost.number)
    assert snapshot.read(database, study.name).trials[0].state == "orphaned"
    adopted = claim(database, study, "second", "cpu")
    assert (adopted.number, adopted.origin, adopted.epoch, adopted.attempt) == (lost.number, "adopted", 1, 2)
    for act in (
        lambda: leases.report(database, study, lost, report_of(lost, 2)),
        lambda: leases.renew(database, study, lost),
        lambda: leases.arrive(database, study, lost),
        lambda: leases.give_back(database, study, lost),
        lambda: outcomes.finish(database, study, lost.number, lost.attempt, outcome_of(lost, 9)),
    ):
        with pytest.raises(LeaseLost):
            act()
    row = snapshot.read(database, study.name).trials[0]
    assert (row.state, row.worker_id, row.epoch, row.losses) == ("running", "second", 1, 1)


def test_a_lease_that_ran_out_but_was_not_taken_is_still_its_workers(database, make_study):
    study = make_study()
    work = claim(database, study, "slow", "cpu")
    expire(database, work.number)
    assert train(database, study, work) == "paused"


def test_a_trial_given_back_is_no_loss_and_one_lost_too_often_fails(database, make_study):
    study = make_study(lease={"max_attempts": 2})
    work = claim(database, study, "a", "cpu")
    leases.give_back(database, study, work)
    work = claim(database, study, "b", "cpu")
    assert snapshot.read(database, study.name).trials[0].losses == 0
    expire(database, work.number)
    work = claim(database, study, "c", "cpu")
    assert (work.number, work.origin) == (0, "adopted")
    expire(database, work.number)
    assert claim(database, study, "d", "cpu").number == 1
    row = snapshot.read(database, study.name).trials[0]
    assert (row.state, row.reason, row.losses) == ("failed", "lost", 2)
    assert row.message == "2 times: lost by b at epoch 0; lost by c at epoch 0"
    assert optuna_trials(database, study)[0].state == TrialState.FAIL


def test_a_worker_that_died_between_deciding_and_telling_is_finished_by_the_next(
    database, make_study, monkeypatch
):
    study = make_study(budget={"trials": 1, "epochs": 1})
    work = claim(database, study, "a", "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(outcomes, "tell_decided", lambda *_: None)
        outcomes.finish(database, study, work.number, work.attempt, outcome_of(work, 1))
    assert optuna_trials(database, study)[0].state == TrialState.RUNNING
    expire(database, 0)
    assert claim(database, study, "b", "cpu") is Idle.COMPLETED
    assert optuna_trials(database, study)[0].values == list(outcome_of(work, 1).values)


@pytest.mark.parametrize("stored", [0, 1])
def test_a_trial_that_optuna_has_and_we_do_not_is_taken_with_its_number_and_parameters(
    database, make_study, stored
):
    """What a worker leaves that dies between `ask` and its lease."""
    study = make_study(budget={"trials": 2, "epochs": 1})
    theirs = optuna.load_study(study_name=study.name, storage=database.url)
    left = theirs.ask()
    if stored:
        left.suggest_categorical("head.kind", ["mlp", "linear"])
    work = claim(database, study, "a", "cpu")
    assert (work.number, work.trial_id) == (0, left._trial_id)
    if stored:
        assert work.params["head.kind"] == left.params["head.kind"]
    train(database, study, work)
    work_off(database, study)
    assert [t.number for t in optuna_trials(database, study)] == [0, 1]


def test_a_trial_finished_or_a_study_deleted_by_another_client_is_survived(database, make_study):
    study = make_study()
    work = claim(database, study, "a", "cpu")
    optuna.load_study(study_name=study.name, storage=database.url).tell(work.number, state=TrialState.FAIL)
    outcomes.finish(database, study, work.number, work.attempt, outcome_of(work, 9))
    assert optuna_trials(database, study)[0].state == TrialState.FAIL
    assert snapshot.read(database, study.name).trials[0].state == "complete"
    held = claim(database, study, "a", "cpu")
    optuna.delete_study(study_name=study.name, storage=database.url)
    with pytest.raises(LeaseLost):
        leases.report(database, study, held, report_of(held, 1))
    with pytest.raises(UnknownStudyError):
        claim(database, study, "a", "cpu")


def test_failures_are_told_and_do_not_stop_the_study(database, make_study):
    study = make_study(budget={"trials": 3, "epochs": 1})
    work = claim(database, study, "a", "cpu")
    outcomes.finish(
        database, study, work.number, work.attempt, Outcome("failed", reason="non_finite_loss", message="nan")
    )
    work_off(database, study)
    seen = snapshot.read(database, study.name)
    assert seen.counts == {"failed": 1, "complete": 2}
    assert seen.trials[0].reason == "non_finite_loss"


def test_waiting_while_another_trains_then_promoting(database, make_study):
    study = make_study(budget={"trials": 2, "epochs": 4, "rungs": [1]})
    first, second = (claim(database, study, name, "cpu") for name in ("a", "b"))
    assert claim(database, study, "c", "cpu") is Idle.WAIT
    train(database, study, first)
    promoted = claim(database, study, "c", "cpu")
    assert (promoted.number, promoted.origin, promoted.stop_at) == (first.number, "promoted", None)
    train(database, study, second)
    train(database, study, promoted)
    assert isinstance(claim(database, study, "c", "cpu"), Claim | Idle)


def test_two_studies_of_one_name_cannot_be(database):
    spec = make_spec()
    made = []

    def make():
        own = Database(database.url)
        made.append(studies.create(own, spec))
        own.close()

    threads = [threading.Thread(target=make) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(new for _, new in made) == [False] * 5 + [True]
    assert len({study.study_id for study, _ in made}) == 1


def test_the_database_keeps_the_order_of_the_space(database, make_study):
    space = {"optimizer.learning_rate": {"low": 0.1, "high": 0.2}, "head.projection_dim": [2, 4]}
    study = make_study(space=space)
    assert list(studies.get(database, study.name).spec.space) == list(space)
    work = claim(database, study, "a", "cpu")
    assert list(work.params) == list(space)
