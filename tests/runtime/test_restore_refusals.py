"""Files and moments at which nothing is restored, and nothing is changed."""

from __future__ import annotations

import os

import pytest
from dumped import begin, content, finished, use
from embedded import query
from search.toy import make_spec, report_of

from headsearch.errors import (
    DatabaseError,
    InputError,
    LeaseLost,
    StudyBusyError,
)
from headsearch.runtime import dumps, pgclients, reloading
from headsearch.runtime.dumps import backup, restore
from headsearch.search import leases, studies, workers
from headsearch.search.claims import claim
from headsearch.search.database import Database

pytestmark = pytest.mark.postgres


def damaged(kind, file):
    data = file.read_bytes()
    if kind == "flipped":
        # Within the rows, which come last.
        position = len(data) - 2000
        data = data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]
    else:
        data = data[: kind if kind >= 0 else len(data) + kind]
    file.write_bytes(data)


@pytest.mark.parametrize("kind", [0, 3, 60, 5000, 40_000, -3000, -40, -1, "flipped"])
def test_a_damaged_file_changes_nothing(database, tmp_path, kind):
    begin(database)
    backup(tmp_path / "b.dump")
    studies.create(database, make_spec(name="since"))
    before = content(database)
    damaged(kind, tmp_path / "b.dump")
    with pytest.raises(InputError) as caught:
        restore(tmp_path / "b.dump", replace=True, force=True)
    assert str(caught.value).startswith(f"{tmp_path / 'b.dump'}: ")
    assert "\n" not in str(caught.value)
    assert content(database) == before


def test_a_file_that_breaks_while_it_is_read_changes_nothing(database, tmp_path, monkeypatch):
    """The disk fails after the tables were emptied."""
    begin(database)
    file = tmp_path / "b.dump"
    backup(file)
    query(database.url, "UPDATE headsearch.trials SET device = 'changed since'")
    before = content(database)
    emptied = []
    really = reloading.empty

    def empty(cursor, version):
        really(cursor, version)
        cursor.execute("SELECT count(*) FROM headsearch.trials")
        emptied.append(cursor.fetchone())
        os.truncate(file, file.stat().st_size - 1500)

    monkeypatch.setattr(reloading, "empty", empty)
    with pytest.raises(InputError, match=r"b\.dump: damaged .*; the database is as it was"):
        restore(file, replace=True, force=True)
    assert emptied == [(0,)]
    assert content(database) == before


def alter(statement):
    return lambda database: query(database.url, statement)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            alter("INSERT INTO headsearch.migrations (version, applied_by) VALUES (99, '9.9')"),
            r"has schema version 99, headsearch .* reads 1 to \d+; upgrade headsearch",
        ),
        (alter("DELETE FROM headsearch.migrations"), "has schema version 0"),
        (
            alter("UPDATE public.alembic_version SET version_num = 'v9.0'"),
            "its Optuna tables are of version v9.0, those of this machine's Optuna of v",
        ),
        (
            alter("ALTER TABLE headsearch.reports ADD COLUMN colour text"),
            'its rows do not fit headsearch.reports .*"colour".*; the database is as it was',
        ),
        (
            alter("ALTER TABLE headsearch.reports DROP COLUMN loss, ADD COLUMN lost int"),
            "its rows do not fit headsearch.reports",
        ),
        (
            alter("DROP TABLE public.trial_values"),
            "not a backup of headsearch: it has no public.trial_values",
        ),
        (alter("DROP TABLE headsearch.reports"), r"damaged \(it has no headsearch.reports\)"),
    ],
    ids=["newer", "no version", "optuna", "more columns", "other columns", "no optuna", "no table"],
)
def test_a_file_that_does_not_fit_changes_nothing(make_database, tmp_path, monkeypatch, change, complaint):
    target = make_database()
    begin(target, "kept")
    source = make_database()
    begin(source)
    change(source)
    backup(tmp_path / "b.dump")
    use(monkeypatch, target)
    before = content(target)
    with pytest.raises(InputError, match=complaint) as caught:
        restore(tmp_path / "b.dump", replace=True, force=True)
    assert "\n" not in str(caught.value)
    assert content(target) == before


def test_what_is_no_backup_is_refused(make_database, tmp_path):
    database = make_database()
    for name, text, complaint in (
        ("text", "SELECT 1;\n" * 100, "not a file of headsearch db backup"),
        ("-x", "", "not a file of headsearch db backup"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=complaint):
            restore(tmp_path / name)
    with pytest.raises(InputError, match="there is no such file"):
        restore(tmp_path / "nowhere")
    with pytest.raises(InputError, match="not a regular file"):
        restore(tmp_path)
    foreign = make_database(migrated=False)
    query(foreign.url, "CREATE TABLE other AS SELECT 1 AS i")
    with pytest.raises(InputError, match="no headsearch studies yet"):
        backup(tmp_path / "b.dump")
    dump_options = ["--format=custom"]
    (tmp_path / "foreign").touch()
    pgclients.dump(foreign.url, dump_options, tmp_path / "foreign", server=18, tls=False)
    with pytest.raises(InputError, match=r"not a backup of headsearch: it has no headsearch\.migrations"):
        restore(tmp_path / "foreign")
    assert query(database.url, "SELECT count(*) FROM headsearch.studies") == [(0,)]


def test_workers_keep_a_restore_off_and_force_fences_them(database, tmp_path):
    study, running = begin(database)
    file = tmp_path / "b.dump"
    backup(file)
    with pytest.raises(InputError, match="add --replace"):
        restore(file, force=True)
    with pytest.raises(StudyBusyError, match=f"'toy': workers are training trial {running.number}; stop"):
        restore(file, replace=True)
    leases.give_back(database, study, running)
    before = content(database)
    with pytest.raises(StudyBusyError, match=r"'toy': worker .*:\d+:\w+ answered \d+ s ago; stop it first"):
        restore(file, replace=True)
    assert content(database) == before
    again = claim(database, study, "second", "cpu")
    assert again.number == running.number
    restore(file, replace=True, force=True)
    for lost in (running, again):
        with pytest.raises(LeaseLost):
            leases.report(database, study, lost, report_of(lost, lost.epoch + 1))
    fresh = Database(database.url)
    finished(fresh)
    fresh.close()


def test_workers_that_are_silent_or_gone_keep_nothing_off(database, tmp_path):
    study, running = begin(database)
    workers.register(database, study, device="cpu", threads=1)
    backup(tmp_path / "b.dump")
    leases.give_back(database, study, running)
    query(database.url, "UPDATE headsearch.workers SET beat_at = beat_at - interval '61 seconds'")
    restore(tmp_path / "b.dump", replace=True)


def test_plain_optuna_studies_are_not_given_up_silently(make_database, pareto_study, monkeypatch, tmp_path):
    """They are in the same tables, whoever made them."""
    begin(make_database())
    backup(tmp_path / "b.dump")
    url = pareto_study._storage._backend.url
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", url)
    with pytest.raises(InputError, match="the database holds study heads: add --replace"):
        restore(tmp_path / "b.dump")
    assert query(url, "SELECT count(*) FROM public.trials") == [(24,)]


def test_tables_that_others_hold_are_waited_for_and_left(database, tmp_path, monkeypatch):
    begin(database)
    backup(tmp_path / "b.dump")
    before = content(database)
    monkeypatch.setattr(dumps, "LOCK_SECONDS", 1)
    other = Database(database.url)
    with other.begin() as connection:
        connection.exec_driver_sql("SELECT count(*) FROM public.trials")
        with pytest.raises(DatabaseError, match="others use the tables"):
            restore(tmp_path / "b.dump", replace=True, force=True)
    other.close()
    assert content(database) == before
    restore(tmp_path / "b.dump", replace=True, force=True)


def test_rows_that_end_early_are_never_taken_for_all(database, tmp_path):
    """Be it those of the last table that is asked for."""
    begin(database)
    file = tmp_path / "b.dump"
    backup(file)
    archive = pgclients.open_archive(file)
    reports = ("headsearch", "reports")
    epochs = archive.column(reports, "epoch")
    assert (len(epochs),) in query(database.url, "SELECT count(*) FROM headsearch.reports")
    whole = file.read_bytes()
    found = []
    for size in range(len(whole) - 200, len(whole) // 2, -1500):
        file.write_bytes(whole[:size])
        try:
            found.append(archive.column(reports, "epoch"))
        except InputError as error:
            found.append(str(error).split(" (")[0])
    damaged = f"{file}: damaged"
    assert damaged in found
    assert all(one in (epochs, damaged) for one in found)
