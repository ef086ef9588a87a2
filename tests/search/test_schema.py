"""Tables of an earlier headsearch are carried forward with what is in them."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import optuna
import pytest
from sqlalchemy import text
from toy import make_spec, work_off

from headsearch.errors import DatabaseError
from headsearch.search import leases, schema, snapshot, studies
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


def test_a_newer_database_is_left_alone(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(database_url)
    schema.migrate(database)
    monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
    with pytest.raises(DatabaseError, match=r"schema version 3, headsearch .* knows 1; upgrade headsearch"):
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
