"""Tables of an earlier headsearch are carried forward with what is in them."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from toy import make_spec

from headsearch.errors import DatabaseError
from headsearch.search import leases, schema, snapshot, studies
from headsearch.search.claims import Claim, claim
from headsearch.search.database import Database
from headsearch.search.leases import Report

pytestmark = pytest.mark.postgres


def versions(database: Database) -> list[int]:
    with database.begin() as connection:
        return list(connection.scalars(text("SELECT version FROM headsearch.migrations ORDER BY version")))


def test_reports_of_version_1_have_no_measures_and_later_ones_do(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = Database(database_url)
    with monkeypatch.context() as earlier:
        earlier.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
        schema.migrate(database)
    assert versions(database) == [1]
    made, _ = studies.create(database, make_spec())
    work = claim(database, made, "w", "cpu")
    assert isinstance(work, Claim)
    with database.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO headsearch.reports (study_id, number, epoch, loss, probe_accuracy, feature_rank, "
                "projection_rank, views_per_second, train_seconds, attempt) "
                "VALUES (:study, :number, 1, 1, 0.5, 1, 1, 1, 1, 1)"
            ),
            {"study": made.study_id, "number": work.number},
        )
    schema.migrate(database)
    assert versions(database) == list(range(1, len(schema.MIGRATIONS) + 1))
    said = Report(2, 1.0, 0.6, 9.0, 3.0, 1000.0, 2.0, {"knn_accuracy": 0.4, "bound_lower": float("nan")})
    leases.report(database, made, work, said)
    with database.begin() as connection:
        kept = connection.scalars(text("SELECT measures FROM headsearch.reports ORDER BY epoch")).all()
    assert kept == [{}, {"knn_accuracy": 0.4}]
    assert snapshot.read(database, made.name).trials[0].probe_accuracy == 0.6


def test_a_newer_database_is_left_alone(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(database_url)
    schema.migrate(database)
    monkeypatch.setattr(schema, "MIGRATIONS", schema.MIGRATIONS[:1])
    with pytest.raises(DatabaseError, match=r"schema version 2, headsearch .* knows 1; upgrade headsearch"):
        schema.migrate(database)
