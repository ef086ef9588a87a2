"""Races, refusals and crashes at the worst moment, on a real PostgreSQL."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import text
from toy import make_spec, outcome_of, report_of, work_off

from headsearch.errors import DataError, HeadsearchError, LeaseLost, StorageError
from headsearch.search import claims, history, leases, outcomes, snapshot, studies
from headsearch.search.claims import Claim, Idle, claim
from headsearch.search.database import Database, lock_claims
from headsearch.search.outcomes import Outcome
from headsearch.spec import StudySpec

pytestmark = pytest.mark.postgres


def optuna_trials(database, study):
    return optuna.load_study(study_name=study.name, storage=database.url).get_trials(deepcopy=False)


def expire(database, number):
    with database.begin() as connection:
        connection.execute(
            text(
                "UPDATE headsearch.trials SET lease_until = clock_timestamp() - interval '1 s' WHERE number = :n"
            ),
            {"n": number},
        )


def row_of(database, study, number):
    return snapshot.read(database, study.name).trials[number]


def beside(database, call):
    """Run `call(another Database)` in a thread; returns the thread and what it raised."""
    raised: list[BaseException] = []

    def run():
        own = Database(database.url)
        try:
            call(own)
        except BaseException as error:  # noqa: BLE001
            raised.append(error)
        finally:
            own.close()

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


def odd_spec(**more):
    """A space with one combination that TrialConfig refuses, and that no corner shows."""
    space = {"encoder.stem": ["imagenet", "cifar"], "encoder.pretrained": [False, True]}
    tree = {"name": "odd", "base": {"encoder": {"name": "resnet18"}}}
    return StudySpec.model_validate(tree | {"space": space | more, "budget": {"trials": 4, "epochs": 1}})


def test_a_small_space_is_checked_whole():
    with pytest.raises(ValueError, match=r"encoder\.pretrained: needs"):
        odd_spec()


def test_an_unbuildable_combination_ends_its_trial_and_not_the_study(database):
    """In a space too large to list it is refused only when it is drawn."""
    study = studies.create(database, odd_spec(**{"optimizer.learning_rate": {"low": 0.1, "high": 0.2}}))[0]
    work = claim(database, study, "a", "cpu")
    with database.begin() as connection:
        params = {"encoder.stem": "cifar", "encoder.pretrained": True, "optimizer.learning_rate": 0.1}
        connection.execute(text("UPDATE headsearch.trials SET params = :p"), {"p": json.dumps(params)})
    outcome = Outcome("failed", reason="unbuildable", message="x")
    outcomes.finish(database, study, work.number, work.attempt, outcome)
    assert snapshot.read(database, "odd").trials[0].state == "failed"
    assert isinstance(claim(database, study, "a", "cpu"), Claim)
    assert optuna_trials(database, study)[0].user_attrs["config"] == params


def test_a_result_that_arrives_while_its_trial_is_adopted_is_told_or_refused(
    database, make_study, monkeypatch
):
    """The first worker comes back between the adopter's look and its taking."""
    study = make_study(budget={"trials": 1, "epochs": 1})
    slow = claim(database, study, "slow", "cpu")
    leases.report(database, study, slow, report_of(slow, 1))
    expire(database, 0)
    real, late = claims._Decision._take, []

    def take(self, *args, **values):
        with monkeypatch.context() as patched:
            # The result is stored; the worker is about to tell.
            patched.setattr(outcomes, "tell_decided", lambda *_: None)
            thread, raised = beside(
                database,
                lambda own: outcomes.finish(own, study, 0, slow.attempt, outcome_of(slow, 1)),
            )
            thread.join(1.0)
            late.append((thread, raised))
            if not thread.is_alive():
                return real(self, *args, **values)
        return real(self, *args, **values)

    monkeypatch.setattr(claims._Decision, "_take", take)
    adopted = claim(database, study, "quick", "cpu")
    if late:
        thread, raised = late[0]
        thread.join(10)
        refused = bool(raised) and isinstance(raised[0], LeaseLost)
        assert refused or not isinstance(adopted, Claim), (
            "the slow worker's result was accepted and its trial is trained again"
        )


@pytest.mark.parametrize("message", ["no such file: a\x00b", "cannot read caf\udce9.png"])
def test_any_message_can_be_told(database, make_study, message):
    """Neither a NUL nor an undecodable file name fits in jsonb; the trial would be adopted for ever."""
    study = make_study(budget={"trials": 1, "epochs": 1})
    work = claim(database, study, "a", "cpu")
    outcomes.finish(
        database, study, work.number, work.attempt, Outcome("failed", reason="error", message=message)
    )
    assert claim(database, study, "a", "cpu") is Idle.COMPLETED


def test_a_deletion_cut_short_can_be_repeated(database, make_study, monkeypatch):
    study = make_study()
    claim(database, study, "gone", "cpu")
    with monkeypatch.context() as patched:
        patched.setattr(optuna, "delete_study", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            studies.delete(database, study.name, force=True)
    studies.delete(database, study.name, force=True)
    made, new = studies.create(database, make_spec())
    assert new
    assert optuna_trials(database, made) == []


def test_no_trial_of_optunas_stays_running_in_a_complete_study(database, make_study):
    """Optuna repeats an INSERT whose answer was lost, so two trials may be left without a row of ours."""
    study = make_study(budget={"trials": 1, "epochs": 1})
    theirs = optuna.load_study(study_name=study.name, storage=database.url)
    theirs.ask(), theirs.ask()
    work_off(database, study)
    assert studies.get(database, study.name).state == "complete"
    assert TrialState.RUNNING not in {t.state for t in optuna_trials(database, study)}


def test_a_renewal_after_giving_back_does_not_hold_the_trial(database, make_study):
    """The keeper's beat may come between `give_back` and the end of its block."""
    study = make_study()
    work = claim(database, study, "a", "cpu")
    leases.give_back(database, study, work)
    with contextlib.suppress(LeaseLost):
        leases.renew(database, study, work)
    assert row_of(database, study, 0).state == "orphaned"
    assert claim(database, study, "b", "cpu").number == work.number


def test_a_claim_whose_answer_was_lost_is_the_same_workers_and_no_loss(database, make_study):
    """`patiently` claims again after a connection that broke at COMMIT."""
    study = make_study(lease={"max_attempts": 1}, budget={"trials": 2, "epochs": 1})
    lost_answer = claim(database, study, "a", "cpu")
    again = claim(database, study, "a", "cpu")
    assert again.number == lost_answer.number
    assert again.attempt > lost_answer.attempt
    assert row_of(database, study, 0).losses == 0


def test_arriving_twice_at_a_rung_passes_it_once(database, make_study):
    """By the rule `stop`; the first answer was lost, so `patiently` asks again."""
    study = make_study(pruning={"rule": "stop"})
    work = claim(database, study, "a", "cpu")
    leases.describe(
        database, study, work, projection_dim=work.params["head.projection_dim"], head_parameters=1
    )
    leases.report(database, study, work, report_of(work, 1))
    assert leases.arrive(database, study, work) == "go on"
    assert leases.arrive(database, study, work) == "go on"
    expire(database, 0)
    assert claim(database, study, "b", "cpu").stop_at == 3


def test_the_budget_is_exact_whatever_isolation_the_database_defaults_to(database, make_study):
    """A claim that waited for the lock must not decide by a snapshot from before it waited."""
    study = make_study(budget={"trials": 1, "epochs": 1})
    name = database.engine.url.database
    with database.begin() as connection:
        connection.exec_driver_sql(
            f"ALTER DATABASE {name} SET default_transaction_isolation = 'repeatable read'"
        )
    with database.begin() as connection:
        lock_claims(connection, study.study_id)
        threads = [beside(database, lambda own, who=who: claim(own, study, who, "cpu")) for who in "ab"]
        time.sleep(0.5)
    for thread, _ in threads:
        thread.join(10)
    assert len(snapshot.read(database, study.name).trials) == 1
    assert len(optuna_trials(database, study)) == 1


def test_a_worker_that_stops_inside_a_claim_does_not_stop_the_others_for_ever(database):
    """SIGSTOP, a suspended machine or a cut cable leave the study's lock with a silent connection."""
    with database.begin() as connection:
        idle = connection.scalar(
            text("SELECT setting::int FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'")
        )
    assert 0 < idle <= 600_000


def test_what_optuna_shows_of_a_trial_is_what_was_trained(database, make_study, monkeypatch):
    """A claim loses its connection, and with it the lock, while it proposes; another one is quicker."""
    study = make_study()
    real, quick = claims.propose, []

    def propose(*args):
        params = real(*args)
        if not quick:
            quick.append(None)
            with database.engine.connect() as other:
                other.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND granted"
                    )
                )
            own = Database(database.url)
            quick[0] = claim(own, study, "quick", "cpu")
            own.close()
            return params | {"head.kind": "mlp", "head.width": 77, "head.projection_dim": 64}
        return {"head.kind": "linear", "head.projection_dim": 2}

    monkeypatch.setattr(claims, "propose", propose)
    with pytest.raises(HeadsearchError):
        claim(database, study, "slow", "cpu")
    assert row_of(database, study, 0).params == optuna_trials(database, study)[0].params


def test_parameters_are_drawn_in_the_files_order(database, make_study):
    """jsonb sorts keys by their length; the order of a space is part of it, since samplers draw in it."""
    space = {"head.projection_dim": [2, 4], "head.kind": ["mlp", "linear"]}
    study = make_study(space=space, mode="grid", budget={"epochs": 1})
    assert [params for params, _ in study.spec.cells()][:2] == [
        {"head.projection_dim": 2, "head.kind": "mlp"},
        {"head.projection_dim": 2, "head.kind": "linear"},
    ]


def test_a_branch_that_is_used_up_does_not_make_claims_slow(database, make_study, monkeypatch):
    """`linear` has six points here; TPE likes them and proposes them again and again, under the lock."""
    study = make_study(budget={"trials": 34, "epochs": 4, "rungs": [1, 2]})
    real, reads = claims.propose, []

    def propose(optuna_study, trial, space, sampler, *rest):
        backend = optuna_study._storage._backend
        get_trials, count = backend._get_trials, [0]

        def counted(*args, **named):
            count[0] += 1
            return get_trials(*args, **named)

        with monkeypatch.context() as patched:
            patched.setattr(backend, "_get_trials", counted)
            params = real(optuna_study, trial, space, sampler, *rest)
        reads.append(count[0])
        return params

    monkeypatch.setattr(claims, "propose", propose)
    work_off(database, study)
    assert max(reads) == 0, f"reads of trials through Optuna's storage per proposal: {reads}"


def test_a_study_deleted_while_a_result_is_told_does_not_touch_its_namesake(
    database, make_study, monkeypatch
):
    study = make_study(budget={"trials": 1, "epochs": 1})
    work = claim(database, study, "old", "cpu")
    real = history.write

    def replaced(*arguments):
        monkeypatch.setattr(history, "write", real)
        studies.delete(database, study.name, force=True)
        again = studies.create(database, make_spec(budget={"trials": 1, "epochs": 1}))[0]
        claim(database, again, "new", "cpu")
        return real(*arguments)

    monkeypatch.setattr(history, "write", replaced)
    with contextlib.suppress(HeadsearchError, KeyError):
        outcomes.finish(database, study, work.number, work.attempt, outcome_of(work, 1))
    assert [t.state for t in optuna_trials(database, study)] == [TrialState.RUNNING]


@pytest.fixture
def worker(database, make_study, tmp_path, monkeypatch):
    """Runs the real loop of a worker over toy trainings; returns what it said."""
    from headsearch.runtime import worker as module
    from headsearch.runtime.database import DatabaseAddress
    from headsearch.runtime.keeper import LeaseKeeper
    from headsearch.runtime.session import Session
    from headsearch.runtime.signals import Drain

    def run(
        study,
        say=lambda line: None,
        pretrain=None,
        load=lambda self, config: SimpleNamespace(fingerprint="toy"),
    ):
        session = Session(tmp_path, DatabaseAddress(database.url, database.url, embedded=False), database)
        monkeypatch.setattr(module, "pretrain", pretrain or toy_pretrain)
        monkeypatch.setattr(module.StudyImages, "load", load)
        monkeypatch.setattr(
            module, "evaluate", lambda *_, **__: SimpleNamespace(probe_accuracy=0.5, test_accuracy=0.5)
        )
        monkeypatch.setattr(
            module,
            "completed",
            lambda spec, *_: Outcome("complete", (0.5, 2.0), facts={"probe_accuracy": 0.5}),
        )
        keeper = LeaseKeeper(session, study, "w")
        loop = module._Worker(
            session, study, "w", module.torch.device("cpu"), "cpu", keeper, Drain(), say, True
        )
        with keeper.running():
            return loop.work(None)

    def toy_pretrain(config, images, *, device, home, checkpoints, control):
        for epoch in range(1, config.training.epochs + 1):
            yield report_of(SimpleNamespace(params={"head.projection_dim": 2}, seed=0), epoch)

    return run


def test_a_worker_without_the_data_leaves_the_trials_to_others(worker, database, make_study):
    """A host where the data set is missing must not fail a study's whole budget in seconds."""
    study = make_study(budget={"trials": 5, "epochs": 1})

    def load(self, config):
        raise DataError("data.root: no folder images on this machine")

    with contextlib.suppress(HeadsearchError):
        worker(study, load=load)
    states = [t.state for t in snapshot.read(database, study.name).trials]
    assert "failed" not in states


def test_an_output_that_is_closed_costs_no_trial(worker, database, make_study):
    """`headsearch worker ... | head`: the trial goes back, or on; it has not failed."""
    study = make_study(budget={"trials": 2, "epochs": 2})

    def say(line):
        if "epoch 1/" in line:
            raise BrokenPipeError(32, "Broken pipe")

    with contextlib.suppress(OSError):
        worker(study, say=say)
    states = [t.state for t in snapshot.read(database, study.name).trials]
    assert "failed" not in states


def test_a_worker_whose_trial_was_adopted_survives_the_adopters_cleaning(worker, database, make_study):
    """The adopter removes half-written checkpoints and, at the end, the folder: the late writer's rename fails."""
    study = make_study(budget={"trials": 2, "epochs": 1})

    def pretrain(config, images, *, device, home, checkpoints, control):
        with database.begin() as connection:
            taken = connection.execute(
                text(
                    "UPDATE headsearch.trials SET attempt = 9, worker_id = 'other', "
                    "lease_until = clock_timestamp() + interval '3 s' WHERE number = 0 AND attempt = 1"
                )
            ).rowcount
        if taken:
            raise StorageError("checkpoint: cannot be written (No such file or directory)")
        yield report_of(SimpleNamespace(params={"head.projection_dim": 2}, seed=0), 1)

    worker(study, pretrain=pretrain)
    assert [t.state for t in snapshot.read(database, study.name).trials] == ["complete", "complete"]
