"""What tests of backups share: a study in the middle of its work, and what a database holds."""

from __future__ import annotations

from embedded import query
from search.toy import make_spec, report_of, train, work_off

from headsearch.search import leases, studies, workers
from headsearch.search.audit import audit
from headsearch.search.claims import claim


def use(monkeypatch, database):
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database.url)


def begin(database, name="toy", **changes):
    """A study with complete and paused trials, and one that is running, on a worker that lives."""
    study = studies.create(database, make_spec(name=name, **changes))[0]
    states = []
    while "complete" not in states or len(states) < 7:
        states.append(train(database, study, claim(database, study, "first", "cpu")))
    worker = workers.register(database, study, device="cpu", threads=1)
    running = claim(database, study, worker, "cpu")
    dim = running.params["head.projection_dim"]
    leases.describe(database, study, running, projection_dim=dim, head_parameters=dim)
    leases.report(database, study, running, report_of(running, running.epoch + 1))
    return study, running


def content(database, tables=None):
    """All rows of all tables, ours and Optuna's."""
    if tables is None:
        found = query(
            database.url,
            "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables "
            "WHERE schemaname IN ('public', 'headsearch') ORDER BY 1",
        )
        tables = [name for (name,) in found]
    return {name: query(database.url, f"SELECT t::text FROM {name} t ORDER BY 1") for name in tables}


def finished(database, name="toy"):
    """Work the study off; it must come out exact and clean."""
    study = studies.get(database, name)
    claims = work_off(database, study, "later")
    study = studies.get(database, name)
    assert study.state == "complete"
    seen = audit(database, study)
    assert seen.trials == study.spec.trials
    assert seen.findings == ()
    return claims


def names(folder):
    return sorted(path.name for path in folder.iterdir())
