"""Tables of an earlier headsearch are carried forward with what is in them."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from sqlalchemy import text
from toy import make_spec, work_off

from headsearch.errors import DatabaseError
from headsearch.search import leases, schema, snapshot, studies
from headsearch.search.audit import audit
from headsearch.search.claims import Claim, claim, point_key
from headsearch.search.database import LOCK_SCHEMA, Database
from headsearch.search.leases import Report

pytestmark = pytest.mark.postgres


def versions(database: Database) -> list[int]:
    with database.begin() as connection:
        return list(connection.scalars(text("SELECT version FROM headsearch.migrations ORDER BY version")))


def test_a_database_of_version_1_is_brought_forward_and_worked_off(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by the SQL of that time: a study with a trial at epoch 1, whose lease ran out."""
    database, spec = Database(database_url), make_spec()
    with monkeypatch.context() as earlier:
        earlier.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        earlier.setattr(schema, "GRANTS", ())  # they name tables of later versions
        schema.migrate(database)
    assert versions(database) == [1]
    trial = optuna.create_study(
        study_name=spec.name, storage=database.url, directions=list(spec.directions)
    ).ask()
    params = {"head.kind": "linear", "head.projection_dim": 4}
    with database.begin() as connection:
        study_id = connection.scalar(text("SELECT study_id FROM public.studies"))
        names = {
            "study": study_id,
            "spec": json.dumps(spec.to_json()),
            "hash": spec.hash,
            "trial": trial._trial_id,
        }
        for statement in (
            """INSERT INTO headsearch.studies (study_id, name, spec, spec_hash, protocol, version)
            VALUES (:study, 'toy', :spec, :hash, 'holdout', '0.0')""",
            """INSERT INTO headsearch.trials (study_id, number, trial_id, point_key, seed, params, worker_id,
            lease_until, epoch) VALUES (:study, 0, :trial, :point, 0, :params, 'h:1:a', clock_timestamp(), 1)""",
            """INSERT INTO headsearch.reports (study_id, number, epoch, loss, probe_accuracy, feature_rank,
            projection_rank, views_per_second, train_seconds, attempt)
            VALUES (:study, 0, 1, 1, 0.5, 1, 1, 1, 1, 1)""",
        ):
            connection.execute(
                text(statement), names | {"params": json.dumps(params), "point": point_key(params)}
            )
    schema.migrate(database)
    assert versions(database) == list(range(1, len(schema.MIGRATIONS) + 1))
    made = studies.get(database, "toy")
    assert len(made.uid) == 8
    assert made.version == "0.0"
    work = claim(database, made, "w", "cpu")
    assert isinstance(work, Claim)
    assert (work.number, work.origin, work.epoch, work.params) == (0, "adopted", 1, params)
    said = Report(2, 1.0, 0.6, 9.0, 3.0, 1000.0, 2.0, {"knn_accuracy": 0.4, "bound_lower": float("nan")})
    leases.report(database, made, work, said)
    with database.begin() as connection:
        kept = connection.scalars(text("SELECT measures FROM headsearch.reports ORDER BY epoch")).all()
    assert kept == [{}, {"knn_accuracy": 0.4}]
    leases.give_back(database, made, work)
    work_off(database, made)
    seen = snapshot.read(database, "toy")
    assert len(seen.trials) == spec.trials
    assert seen.trials[0].losses == 1


# Runs of two seeds as version 3 left them, each with a trial of Optuna's: (point, seed, state, value, epoch).
BEFORE = [
    (2, 0, "complete", 0.50, 9), (2, 1, "complete", 0.60, 9),
    (4, 0, "pruned", None, 1), (4, 1, "complete", 0.70, 9),
    (8, 0, "paused", None, 3), (8, 1, "complete", 0.80, 9),
    (16, 0, "failed", None, 0), (16, 1, "complete", 0.65, 9),
    (32, 0, "paused", None, 1), (32, 1, "paused", None, 1),
    (64, 0, "paused", None, 1),
]  # fmt: skip


def test_a_study_whose_seeds_were_judged_one_by_one_is_brought_forward_and_finished(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by the SQL of version 3: points that are whole, half pruned, half complete, and not all begun."""
    database = Database(database_url)
    spec = make_spec(
        seeds=[0, 1], space={"head.projection_dim": [2, 4, 8, 16, 32, 64]}, base={"head.kind": "linear"}
    )
    with monkeypatch.context() as earlier:
        earlier.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:3])
        earlier.setattr(schema, "GRANTS", ())
        schema.migrate(database)
    theirs = optuna.create_study(study_name=spec.name, storage=database.url, directions=list(spec.directions))
    states = {"complete": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}
    with database.begin() as connection:
        study_id = connection.scalar(text("SELECT study_id FROM public.studies"))
        names = {"study": study_id, "spec": json.dumps(spec.to_json()), "hash": spec.hash}
        connection.execute(
            text(
                "INSERT INTO headsearch.studies (study_id, name, spec, spec_hash, protocol, version) "
                "VALUES (:study, 'toy', :spec, :hash, 'holdout', '0.1.0')"
            ),
            names,
        )
    for number, (dim, seed, state, value, epoch) in enumerate(BEFORE):
        theirs.enqueue_trial({"head.projection_dim": dim})
        trial = theirs.ask({"head.projection_dim": CategoricalDistribution((2, 4, 8, 16, 32, 64))})
        params = {"head.projection_dim": dim}
        if state in states:
            theirs.tell(number, [value, dim] if value else None, state=optuna.trial.TrialState[states[state]])
        outcome = {"state": state, "values": value and [value, dim], "reason": "lost", "message": "m",
                   "facts": {"probe_accuracy": value, "test_accuracy": value}}  # fmt: skip
        with database.begin() as connection:
            for statement in (
                """INSERT INTO headsearch.trials (study_id, number, trial_id, point_key, seed, params, state, epoch,
                rung, projection_dim, head_parameters, outcome, finished_at)
                VALUES (:study, :number, :trial, :point, :seed, :params, :state, :epoch,
                (:epoch > 1)::int + (:epoch > 3)::int, :dim, 1, CAST(:outcome AS jsonb),
                CASE WHEN :ended THEN clock_timestamp() END)""",
                """INSERT INTO headsearch.reports (study_id, number, epoch, loss, probe_accuracy, feature_rank,
                projection_rank, views_per_second, train_seconds, attempt, reported_at)
                SELECT :study, :number, e, 1, 0.4, 1, 1, 1, 1, 1, clock_timestamp() - interval '1 h'
                FROM generate_series(1, :epoch) AS e""",
            ):
                connection.execute(
                    text(statement),
                    names
                    | {"number": number, "trial": trial._trial_id, "seed": seed, "state": state, "dim": dim}
                    | {"epoch": epoch, "ended": state in states, "params": json.dumps(params)}
                    | {"point": point_key(params)}
                    | {"outcome": json.dumps(outcome) if state in states else None},
                )
    schema.migrate(database)
    study = studies.get(database, "toy")
    assert study.seeds_apart
    findings = audit(database, study).findings
    assert [one.message for one in findings if one.violated] == []
    told = {trial.params["head.projection_dim"]: trial for trial in kept(database)}
    assert {dim: trial.state.name for dim, trial in told.items()} == {
        2: "COMPLETE", 4: "PRUNED", 8: "RUNNING", 16: "FAIL", 32: "RUNNING", 64: "RUNNING",
    }  # fmt: skip
    assert told[2].values == [pytest.approx(0.55), 2.0]
    work_off(database, study)
    study = studies.get(database, "toy")
    assert study.state == "complete"
    assert [one.message for one in audit(database, study).findings if one.violated] == []
    ended: dict[int, list[str]] = {}
    for trial in snapshot.read(database, "toy").trials:
        ended.setdefault(trial.params["head.projection_dim"], []).append(trial.state)
    assert ended[8] == ["complete", "complete"], "its point had passed the rung at which one seed waited"
    assert {len(states) for states in ended.values()} == {2}
    assert all(len(set(ended[dim])) == 1 for dim in (2, 8, 32, 64))
    assert {trial.state.name for trial in kept(database)} <= {"COMPLETE", "PRUNED", "FAIL"}


def kept(database: Database) -> list[optuna.trial.FrozenTrial]:
    """Optuna's trials that rows of ours name."""
    with database.begin() as connection:
        ids = set(connection.scalars(text("SELECT trial_id FROM headsearch.trials")))
    stored = optuna.load_study(study_name="toy", storage=database.url).get_trials(deepcopy=False)
    return [trial for trial in stored if trial._trial_id in ids]


def test_a_newer_database_is_left_alone(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(database_url)
    schema.migrate(database)
    newest = len(schema.MIGRATIONS)
    monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
    with pytest.raises(
        DatabaseError, match=rf"schema version {newest}, headsearch .* knows 1; upgrade headsearch"
    ):
        schema.migrate(database)


def test_the_search_path_is_set_by_one_at_a_time(database_url: str) -> None:
    """PostgreSQL takes no lock for a role's setting: the second of two first ones is refused."""
    ahead, database = Database(database_url), Database(database_url)
    name = database.engine.url.database
    assert database.engine.url.username == "headsearch"
    with ThreadPoolExecutor(1) as beside:
        with ahead.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK_SCHEMA})
            connection.exec_driver_sql(f"ALTER ROLE headsearch IN DATABASE {name} SET search_path = public")
            migrating = beside.submit(schema.migrate, database)
            waiting = text(
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'advisory' AND database = "
                "(SELECT oid FROM pg_database WHERE datname = current_database())"
            )
            deadline = time.monotonic() + 60
            while not connection.scalar(waiting):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        migrating.result(timeout=60)
    assert versions(database) == list(range(1, len(schema.MIGRATIONS) + 1))
    ahead.close()
    database.close()


def test_twelve_that_come_first_together_make_the_tables_once(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(12)]
    with ThreadPoolExecutor(len(databases)) as crowd:
        for made in [crowd.submit(schema.migrate, database) for database in databases]:
            made.result(timeout=60)
    assert versions(databases[0]) == list(range(1, len(schema.MIGRATIONS) + 1))
    for database in databases:
        database.close()
