"""Backups of a database in the middle of its work, and what comes back out of them."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from embedded import query
from search.toy import make_spec, report_of, train, work_off

from headsearch.errors import (
    DatabaseError,
    InputError,
    LeaseLost,
    StorageError,
    StudyBusyError,
)
from headsearch.runtime import dumps, pgclients, reloading
from headsearch.runtime.database import libpq_url
from headsearch.runtime.dumps import backup, restore
from headsearch.search import leases, schema, studies, workers
from headsearch.search.audit import audit
from headsearch.search.claims import claim
from headsearch.search.database import Database

pytestmark = pytest.mark.postgres


@pytest.fixture
def open_database(headsearch_home, postgres_server, monkeypatch):
    """Makes fresh databases; the commands work on the one made last, or named last by `use`."""
    made = []

    def make(*, migrated=True):
        address = postgres_server.address(postgres_server.create_database())
        database = Database(address.url)
        made.append(database)
        monkeypatch.setenv("HEADSEARCH_DATABASE_URL", address.url)
        if migrated:
            schema.migrate(database)
        return database

    yield make
    for database in made:
        database.close()
        postgres_server.drop_database(database.engine.url.database)


@pytest.fixture
def database(open_database):
    return open_database()


def use(monkeypatch, database):
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", database.url)


def begin(database, name="toy", **changes):
    """A study with complete, paused and failing-to-be-there trials: one is running, on a worker that lives."""
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


def test_a_study_comes_back_as_it_was_and_is_worked_off_to_its_exact_budget(
    open_database, tmp_path, monkeypatch
):
    source = open_database()
    _, running = begin(source)
    states = dict(query(source.url, "SELECT number, state FROM headsearch.trials"))
    assert {"complete", "paused", "running"} <= set(states.values())
    file = tmp_path / "b.dump"
    written = backup(file)
    assert (written.studies, written.trials, written.bytes) == (1, len(states), file.stat().st_size)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["b.dump"]
    before = content(source)

    target = open_database(migrated=False)
    assert restore(file) == written
    after = content(target)
    given_back = "headsearch.trials"
    assert {k: v for k, v in after.items() if k != given_back} == {
        k: v for k, v in before.items() if k != given_back
    }
    assert set(before[given_back]) - set(after[given_back]) == set(
        query(source.url, f"SELECT t::text FROM {given_back} t WHERE state IN ('running', 'paused')")
    )
    claims = finished(target)
    # The one that was running is taken up first, and nobody counts it as a loss.
    assert (claims[0].number, claims[0].origin, claims[0].attempt) == (
        running.number,
        "adopted",
        running.attempt + reloading.ATTEMPTS_SINCE + 1,
    )
    assert claims[0].epoch == running.epoch + 1
    assert query(target.url, "SELECT sum(losses) FROM headsearch.trials") == [(0,)]
    # Nothing of this reached the database that was backed up.
    assert content(source) == before


def test_the_dashboards_reader_reads_what_was_restored(open_database, tmp_path, postgres_server):
    begin(open_database())
    backup(tmp_path / "b.dump")
    target = open_database()
    restore(tmp_path / "b.dump")
    reader = postgres_server.address(target.engine.url.database).reader_url
    for table in ("headsearch.trials", "headsearch.migrations", "public.trials"):
        assert query(reader, f"SELECT count(*) > 0 FROM {table}") == [(True,)]


def test_replace_goes_back_in_time_and_numbers_go_on(database, tmp_path):
    study, _ = begin(database)
    file = tmp_path / "b.dump"
    backup(file)
    before = content(database, ["headsearch.reports", "public.trials", "public.trial_params"])
    query(database.url, "UPDATE headsearch.workers SET ended_at = clock_timestamp()")
    query(database.url, "UPDATE headsearch.trials SET lease_until = '2000-01-01' WHERE state = 'running'")
    work_off(database, study)
    studies.create(database, make_spec(name="other"))
    last = query(database.url, "SELECT max(trial_id) FROM public.trials")[0][0]
    with pytest.raises(InputError, match="study toy, other: add --replace"):
        restore(file)
    restore(file, replace=True)
    assert content(database, list(before)) == before
    assert [s.name for s in studies.all_studies(database)] == ["toy"]
    again = Database(database.url)
    finished(again)
    # Ids that were given once are not given again.
    old = {int(row[0].strip("()").split(",")[0]) for row in before["public.trials"]}
    new = {i for (i,) in query(database.url, "SELECT trial_id FROM public.trials")} - old
    assert new
    assert min(new) > last
    again.close()


def test_several_studies_and_odd_texts_survive(open_database, tmp_path):
    source = open_database()
    begin(source)
    odd = "tab\there, back\\slash \\. and \u00fc\u4e2d\U0001f600 'quoted' \"twice\"\nnext line"
    made = studies.create(source, make_spec(name="second", question=odd))[0]
    backup(tmp_path / "b.dump")
    before = content(source, ["public.study_user_attributes", "headsearch.studies", "headsearch.migrations"])
    target = open_database()
    restore(tmp_path / "b.dump")
    assert content(target, list(before)) == before
    assert studies.get(target, "second").spec == made.spec
    assert studies.get(target, "second").uid == made.uid


def test_backups_while_workers_write_are_of_one_moment(open_database, tmp_path, monkeypatch):
    source, target = open_database(), open_database()
    use(monkeypatch, source)
    study = studies.create(source, make_spec(budget={"trials": 40, "epochs": 9, "rungs": [1, 3]}))[0]
    own = Database(source.url)
    thread = threading.Thread(target=work_off, args=(own, study, "busy"))
    thread.start()
    files = []
    while thread.is_alive() and len(files) < 4:
        files.append((tmp_path / f"{len(files)}.dump", backup(tmp_path / f"{len(files)}.dump")))
    thread.join()
    own.close()
    use(monkeypatch, target)
    seen = []
    for file, written in files:
        restored = restore(file, replace=True)
        assert restored == written
        found = audit(target, studies.get(target, "toy"))
        assert not [one for one in found.findings if one.violated]
        assert found.trials == written.trials
        seen.append(found.reports)
    assert seen == sorted(seen)
    assert len(set(seen)) > 1, "nothing was written meanwhile"
    finished(Database(target.url))


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
def test_a_file_that_does_not_fit_changes_nothing(open_database, tmp_path, monkeypatch, change, complaint):
    target = open_database()
    begin(target, "kept")
    source = open_database()
    begin(source)
    change(source)
    backup(tmp_path / "b.dump")
    use(monkeypatch, target)
    before = content(target)
    with pytest.raises(InputError, match=complaint) as caught:
        restore(tmp_path / "b.dump", replace=True, force=True)
    assert "\n" not in str(caught.value)
    assert content(target) == before


def test_what_is_no_backup_is_refused(open_database, tmp_path):
    database = open_database()
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
    foreign = open_database(migrated=False)
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


def test_plain_optuna_studies_are_not_given_up_silently(open_database, pareto_study, monkeypatch, tmp_path):
    """They are in the same tables, whoever made them."""
    begin(open_database())
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


def test_an_older_backup_is_brought_forward(open_database, tmp_path, monkeypatch):
    current = schema.MIGRATIONS
    assert len(current) > 1
    with monkeypatch.context() as older:
        older.setattr(schema, "MIGRATIONS", current[:1])
        source = open_database()
        spec = make_spec(budget={"trials": 5, "epochs": 9, "rungs": [1, 3]})
        study_id = studies._create_in_optuna(source, spec)
        trial_id = source.storage.create_new_trial(study_id)
        with source.begin() as connection:
            connection.exec_driver_sql(
                "INSERT INTO headsearch.studies (study_id, name, spec, spec_hash, protocol, version) "
                "VALUES (%s, 'toy', %s, %s, 'holdout', '0.1.0')",
                (study_id, spec.model_dump_json(), spec.hash),
            )
            connection.exec_driver_sql(
                "INSERT INTO headsearch.trials (study_id, number, trial_id, point_key, seed, params, epoch, "
                "worker_id, lease_until) VALUES (%s, 0, %s, 'k', 0, %s, 1, 'w', clock_timestamp())",
                (study_id, trial_id, '{"head.kind": "linear", "head.projection_dim": 8}'),
            )
            connection.exec_driver_sql(
                "INSERT INTO headsearch.reports (study_id, number, epoch, loss, probe_accuracy, feature_rank, "
                "projection_rank, views_per_second, train_seconds, attempt) VALUES (%s,0,1,1,0.5,3,2,100,1,1)",
                (study_id,),
            )
        written = backup(tmp_path / "b.dump")
        assert written.schema == 1
    # Over a database of today's, with a study in it.
    target = open_database()
    begin(target, "newer")
    assert restore(tmp_path / "b.dump", replace=True, force=True).schema == 1
    versions = query(target.url, "SELECT version FROM headsearch.migrations ORDER BY version")
    assert versions == [(n,) for n in range(1, len(current) + 1)]
    fresh = open_database()
    columns = (
        "SELECT table_schema, table_name, column_name, data_type, column_default, is_nullable "
        "FROM information_schema.columns WHERE table_schema IN ('headsearch', 'public') ORDER BY 1, 2, 3"
    )
    indexes = "SELECT indexdef FROM pg_indexes WHERE schemaname IN ('headsearch', 'public') ORDER BY 1"
    constraints = (
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
        "WHERE connamespace IN ('headsearch'::regnamespace, 'public'::regnamespace) ORDER BY 1, 2"
    )
    for what in (columns, indexes, constraints):
        assert query(target.url, what) == query(fresh.url, what)
    again = Database(target.url)
    claims = finished(again)
    assert (claims[0].number, claims[0].epoch, claims[0].origin) == (0, 1, "adopted")
    again.close()


def test_what_others_keep_in_the_database_stays_theirs(database, tmp_path):
    begin(database)
    query(
        database.url,
        'CREATE TABLE "Theirs %" AS SELECT 7 AS i; CREATE SCHEMA private; CREATE TABLE private.t (i serial);'
        "CREATE SEQUENCE their_numbers; CREATE VIEW their_view AS SELECT count(*) AS n FROM public.trials",
    )
    backup(tmp_path / "b.dump")
    listed = pgclients._read(pgclients.programs("pg_restore")[0], tmp_path / "b.dump", "--list")
    assert "TABLE DATA headsearch trials" in listed
    assert "SEQUENCE public trials_trial_id_seq" in listed
    assert "heirs" not in listed
    assert "their" not in listed
    assert "private" not in listed
    restore(tmp_path / "b.dump", replace=True, force=True)
    assert query(database.url, 'SELECT i FROM "Theirs %"') == [(7,)]
    assert query(database.url, "SELECT n > 0 FROM their_view") == [(True,)]


def test_grants_of_a_database_elsewhere_are_kept(database, tmp_path):
    begin(database)
    backup(tmp_path / "b.dump")
    query(database.url, "GRANT SELECT ON headsearch.trials, public.trials TO pg_monitor")
    granted = (
        "SELECT count(*) FROM information_schema.role_table_grants "
        "WHERE grantee = 'pg_monitor' AND table_name = 'trials'"
    )
    assert query(database.url, granted) == [(2,)]
    restore(tmp_path / "b.dump", replace=True, force=True)
    assert query(database.url, granted) == [(2,)]


def test_postgresqls_own_program_restores_it_too(open_database, tmp_path):
    source = open_database()
    begin(source)
    backup(tmp_path / "b.dump")
    target = open_database(migrated=False)
    done = subprocess.run(
        [
            pgclients.programs("pg_restore")[0].path,
            "--no-owner",
            "--no-privileges",
            "--exit-on-error",
            "--single-transaction",
            f"--dbname={libpq_url(target.url)}",
            tmp_path / "b.dump",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert content(target) == content(source)


def test_all_tables_of_optuna_are_known(database):
    found = {
        name for (name,) in query(database.url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    }
    assert found == {*reloading.OPTUNA_TABLES, "version_info", "alembic_version"}


# Files.


def test_an_existing_file_is_replaced_only_by_force(database, tmp_path):
    begin(database)
    file = tmp_path / "b.dump"
    file.write_text("precious")
    file.chmod(0o644)
    with pytest.raises(InputError, match=r"b\.dump: exists already; .*--force"):
        backup(file)
    assert file.read_text() == "precious"
    link = tmp_path / "link"
    link.symlink_to(file)
    backup(link, force=True)
    assert link.is_symlink()
    assert file.read_bytes().startswith(b"PGDMP")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.dump", "link"]


def test_names_that_cannot_be_written_are_refused(database, tmp_path):
    begin(database)
    with pytest.raises(InputError, match=f"there is no folder {tmp_path / 'no'}"):
        backup(tmp_path / "no" / "b.dump")
    with pytest.raises(InputError, match="not a regular file"):
        backup(tmp_path, force=True)
    with pytest.raises(InputError, match="/dev/null: not a regular file"):
        backup(Path("/dev/null"), force=True)


def test_a_folder_that_is_not_ours_is_named(database, headsearch_home, open_folder_factory):
    begin(database)
    with open_folder_factory("headsearch-backups-") as folder:
        folder.chmod(0o555)
        headsearch_home.chmod(0o777)
        me = os.geteuid()
        if me == 0:
            os.seteuid(65534)  # root may write everywhere
        try:
            with pytest.raises(StorageError, match=f"cannot write {folder / 'b.dump'}: Permission denied"):
                backup(folder / "b.dump")
        finally:
            os.seteuid(me)
        assert list(folder.iterdir()) == []


# Programs.


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts scripts in the place of pg_dump: the embedded package's, and the one on PATH."""

    def put(place, script):
        folder = tmp_path / place
        folder.mkdir(exist_ok=True)
        for name in ("initdb", "pg_ctl", "postgres"):
            (folder / name).touch()
        (folder / "pg_dump").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "pg_dump").chmod(0o755)

    monkeypatch.setenv("HEADSEARCH_POSTGRES_BIN", str(tmp_path / "embedded"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}:/usr/bin:/bin")
    put("embedded", "exit 1")
    put("path", "exit 1")
    return put


def of_version(version, script="exit 0"):
    return f'[ "$1" = --version ] && echo "pg_dump (PostgreSQL) {version}" && exit 0\n{script}'


REAL = pgclients.programs("pg_dump")[0].path if shutil.which("sh") else None
SAYING = 'printf "%s\\n" "$@" > {0}/argv; printf %s "$PGPASSWORD" > {0}/password'


def test_the_password_is_on_no_command_line(database, tmp_path, programs, monkeypatch):
    begin(database)
    programs("embedded", of_version("18.4", SAYING.format(tmp_path) + f'\nexec {REAL} "$@"'))
    backup(tmp_path / "b.dump")
    password = database.engine.url.password
    assert (tmp_path / "password").read_text() == password
    argv = (tmp_path / "argv").read_text()
    assert "--dbname=" in argv
    assert password not in argv
    monkeypatch.delenv("HEADSEARCH_POSTGRES_BIN")
    restore(tmp_path / "b.dump", replace=True, force=True)


def test_a_password_is_given_as_it_is_and_never_repeated(tmp_path, programs):
    complaint = 'echo "pg_dump: error: connection with $PGPASSWORD failed" >&2; exit 1'
    programs("embedded", of_version("18.4", SAYING.format(tmp_path) + "\n" + complaint))
    url = "postgresql+psycopg2://me:p%40ss%20%2F%25'@h:5/d?application_name=x"
    with pytest.raises(DatabaseError) as caught:
        pgclients.dump(url, [], tmp_path / "b.dump", server=18, tls=False)
    assert str(caught.value) == "pg_dump: connection with *** failed"
    assert (tmp_path / "password").read_text() == "p@ss /%'"
    argv = (tmp_path / "argv").read_text()
    assert "host=h port=5" in argv.replace("'", "") or "port=5" in argv
    assert "p@ss" not in argv
    with pytest.raises(InputError, match="sslpassword: pg_dump would show it"):
        pgclients.dump(f"{url}&sslpassword=x", [], tmp_path / "b.dump", server=18, tls=False)


def test_a_server_newer_than_every_pg_dump_is_named(tmp_path, programs):
    programs("embedded", of_version("18.4"))
    programs("path", of_version("15.18 (Debian 15.18-0+deb12u1)"))
    url = "postgresql+psycopg2://me:secret@h/d"
    with pytest.raises(DatabaseError) as caught:
        pgclients.dump(url, [], tmp_path / "b.dump", server=19, tls=False)
    assert str(caught.value) == (
        "the server runs PostgreSQL 19, pg_dump here is of 18 and 15: "
        "put pg_dump of PostgreSQL 19 or newer on PATH"
    )
    assert not caught.value.transient
    programs("path", of_version("19beta1", f"echo used > {tmp_path}/b.dump"))
    pgclients.dump(url, [], tmp_path / "b.dump", server=19, tls=False)
    assert (tmp_path / "b.dump").read_text() == "used\n"


def test_an_encrypted_connection_stays_encrypted(tmp_path, programs, monkeypatch):
    programs("embedded", of_version("18.4"))
    programs("path", of_version("18.6", SAYING.format(tmp_path)))
    url = "postgresql+psycopg2://me:secret@h/d"
    for given, wanted in (
        ("", "require"),
        ("?sslmode=prefer", "require"),
        ("?sslmode=verify-full", "verify-full"),
    ):
        pgclients.dump(url + given, [], tmp_path / "b.dump", server=18, tls=True)
        assert f"sslmode={wanted}" in (tmp_path / "argv").read_text()
    monkeypatch.setenv("PGSSLMODE", "verify-ca")
    pgclients.dump(url, [], tmp_path / "b.dump", server=18, tls=True)
    assert "sslmode" not in (tmp_path / "argv").read_text()


def test_the_embedded_package_cannot_encrypt_and_says_so(database, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DatabaseError, match=r"the connection is encrypted, .* put pg_dump of PostgreSQL 18"):
        pgclients.dump(database.url, [], tmp_path / "b.dump", server=18, tls=True)


@pytest.mark.parametrize("existing", [False, True])
def test_a_dump_cut_short_leaves_no_file_and_the_old_one(database, tmp_path, programs, existing):
    begin(database)
    folder = tmp_path / "backups"
    folder.mkdir()
    if existing:
        (folder / "b.dump").write_text("old")
    full = (
        'for a in "$@"; do case $a in --file=*) printf half > "${a#--file=}";; esac; done\n'
        'echo "pg_dump: error: could not write to output file: No space left on device" >&2; exit 1'
    )
    programs("embedded", of_version("18.4", full))
    with pytest.raises(StorageError, match=r"the backup cannot be written: .*No space left"):
        backup(folder / "b.dump", force=True)
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("b.dump", "old")] * existing
    programs("embedded", of_version("18.4", "kill -9 $$"))
    with pytest.raises(DatabaseError, match="pg_dump: ended by signal 9"):
        backup(folder / "b.dump", force=True)
    assert [path.name for path in folder.iterdir()] == ["b.dump"] * existing
