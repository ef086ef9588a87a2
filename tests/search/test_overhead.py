"""What bookkeeping costs, on a small study; `overhead.py` measures a large one."""

from __future__ import annotations

import statistics
import time

import pytest
from overhead import measure_headsearch
from sqlalchemy import event, text
from toy import make_spec, report_of

from headsearch.search import leases, studies
from headsearch.search.claims import claim
from headsearch.search.database import Database
from headsearch.search.schema import migrate

pytestmark = [pytest.mark.postgres, pytest.mark.slow]


@pytest.fixture
def make_claim(postgres_server):
    """A claim in a database of its own, beside any number of other trials with their reports."""
    made = []

    def make(others: int):
        name = postgres_server.create_database()
        database = Database(postgres_server.address(name).url)
        made.append((name, database))
        migrate(database)
        budget = {"trials": others + 1, "epochs": 9}
        study, _ = studies.create(database, make_spec(mode="search", budget=budget, space=SPACE))
        work = claim(database, study, "w", "cpu")
        leases.describe(database, study, work, projection_dim=8, head_parameters=1)
        with database.begin() as connection:
            for statement in FILL:
                connection.execute(text(statement), {"study_id": study.study_id, "others": others})
        return database, study, work

    yield make
    for name, database in made:
        database.close()
        postgres_server.drop_database(name)


SPACE = {"head.projection_dim": [2, 4, 8], "optimizer.learning_rate": {"low": 0.1, "high": 0.2}}
FILL = (
    """
    INSERT INTO headsearch.trials (study_id, number, trial_id, point_key, seed, params, epoch, state,
        outcome, projection_dim, head_parameters, finished_at)
    SELECT :study_id, n, 1000000 + n, n::text, 0, '{"head.projection_dim": 8}', 3, 'complete',
        '{"state": "complete", "values": [0.5, 8], "facts": {}}', 8, 1, clock_timestamp()
    FROM generate_series(1, :others) n
    """,
    """
    INSERT INTO headsearch.reports (study_id, number, epoch, loss, probe_accuracy, feature_rank,
        projection_rank, views_per_second, train_seconds, attempt)
    SELECT :study_id, n, e, 1, 0.5, 3, 2, 100, e, 1
    FROM generate_series(1, :others) n, generate_series(1, 3) e
    """,
    "ANALYZE headsearch.trials",
    "ANALYZE headsearch.reports",
)


def test_eight_workers_share_the_budget_exactly_and_break_no_rule(database_url):
    measured = measure_headsearch(database_url, trials=150, processes=8)
    assert (measured.trials, measured.repeated, measured.violations) == (150, 0, ())
    assert set(measured.states) == {"complete", "pruned"}
    assert measured.whole["ask new"].n == 150
    assert measured.whole["tell"].n == measured.states["complete"]
    assert measured.reports < 150 * 9
    assert {"ask new", "ask promoted", "report", "arrive"} <= measured.last.keys()


def test_a_report_takes_no_longer_among_twenty_thousand_trials(make_claim):
    """Each in turn, so that whatever else the machine does slows both. A scan of so many takes five times as long."""
    sides = [make_claim(others=10), make_claim(others=20_000)]
    seconds = [[], []]
    for epoch in range(1, 301):
        for side, (database, study, work) in enumerate(sides):
            began = time.perf_counter()
            leases.report(database, study, work, report_of(work, epoch))
            seconds[side].append(time.perf_counter() - began)
    few, many = (statistics.median(times[20:]) for times in seconds)
    assert many < 2 * few


def test_what_a_worker_says_of_its_trial_is_found_by_index(make_claim):
    database, study, work = make_claim(others=20_000)
    said = []

    @event.listens_for(database.engine, "before_cursor_execute")
    def note(connection, cursor, statement, parameters, context, many):
        said.append((statement, parameters))

    leases.describe(database, study, work, projection_dim=8, head_parameters=1)
    leases.report(database, study, work, report_of(work, 1))
    leases.renew(database, study, work)
    leases.arrive(database, study, work)
    event.remove(database.engine, "before_cursor_execute", note)
    assert len(said) == 5
    with database.begin() as connection:
        for statement, parameters in said:
            plan = "\n".join(connection.exec_driver_sql(f"EXPLAIN {statement}", parameters).scalars())
            assert "Seq Scan on trials" not in plan, plan
            assert "Seq Scan on reports" not in plan, plan
            assert "Index" in plan or "Insert on reports" in plan, plan
