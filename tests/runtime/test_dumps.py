"""Backups of a database in the middle of its work, and what comes back out of them."""

from __future__ import annotations

import json
import stat
import subprocess
import threading

import pytest
from dumped import begin, content, finished, use
from embedded import query
from search.toy import make_spec, work_off

from headsearch.cli.app import run
from headsearch.errors import InputError
from headsearch.runtime import pgclients, reloading
from headsearch.runtime.database import libpq_url
from headsearch.runtime.dumps import backup, restore
from headsearch.runtime.session import open_session
from headsearch.search import schema, snapshot, studies
from headsearch.search.audit import audit
from headsearch.search.database import Database

pytestmark = pytest.mark.postgres


def test_a_study_comes_back_as_it_was_and_is_worked_off_to_its_exact_budget(
    make_database, tmp_path, monkeypatch
):
    source = make_database()
    _, running = begin(source)
    states = dict(query(source.url, "SELECT number, state FROM headsearch.trials"))
    assert {"complete", "paused", "running"} <= set(states.values())
    file = tmp_path / "b.dump"
    written = backup(file)
    assert (written.studies, written.trials, written.bytes) == (1, len(states), file.stat().st_size)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["b.dump"]
    before = content(source)

    target = make_database(migrated=False)
    assert restore(file) == written
    after = content(target)
    given_back, left = "headsearch.trials", "headsearch.workers"
    assert {k: v for k, v in after.items() if k not in (given_back, left)} == {
        k: v for k, v in before.items() if k not in (given_back, left)
    }
    assert set(before[given_back]) - set(after[given_back]) == set(
        query(source.url, f"SELECT t::text FROM {given_back} t WHERE state IN ('running', 'paused')")
    )
    assert query(source.url, f"SELECT ended_at FROM {left}") == [(None,)]
    assert query(target.url, f"SELECT ended_at = beat_at FROM {left}") == [(True,)]
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


def test_the_dashboards_reader_reads_what_was_restored(make_database, tmp_path, postgres_server):
    begin(make_database())
    backup(tmp_path / "b.dump")
    target = make_database()
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


def test_several_studies_and_odd_texts_survive(make_database, tmp_path):
    source = make_database()
    begin(source)
    odd = "tab\there, back\\slash \\. and \u00fc\u4e2d\U0001f600 'quoted' \"twice\"\nnext line"
    made = studies.create(source, make_spec(name="second", question=odd))[0]
    backup(tmp_path / "b.dump")
    before = content(source, ["public.study_user_attributes", "headsearch.studies", "headsearch.migrations"])
    target = make_database()
    restore(tmp_path / "b.dump")
    assert content(target, list(before)) == before
    assert studies.get(target, "second").spec == made.spec
    assert studies.get(target, "second").uid == made.uid


def test_backups_while_workers_write_are_of_one_moment(make_database, tmp_path, monkeypatch):
    source, target = make_database(), make_database()
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


def test_an_older_backup_is_brought_forward(make_database, tmp_path, monkeypatch):
    current = schema.MIGRATIONS
    assert len(current) > 1
    with monkeypatch.context() as older:
        older.setattr(schema, "MIGRATIONS", current[:1])
        older.setattr(schema, "GRANTS", ())  # they name tables of later versions
        source = make_database()
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
    target = make_database()
    begin(target, "newer")
    assert restore(tmp_path / "b.dump", replace=True, force=True).schema == 1
    versions = query(target.url, "SELECT version FROM headsearch.migrations ORDER BY version")
    assert versions == [(n,) for n in range(1, len(current) + 1)]
    fresh = make_database()
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


def test_postgresqls_own_program_restores_it_too(make_database, tmp_path):
    source = make_database()
    begin(source)
    backup(tmp_path / "b.dump")
    target = make_database(migrated=False)
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


def test_the_commands_start_the_embedded_server_and_move_its_studies(
    headsearch_home, open_folder_factory, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "b.dump"

    def said(*words, code=0):
        assert run(["db", *words]) == code
        heard = capsys.readouterr()
        assert (heard.err == "") == (code == 0)
        return heard.out if code == 0 else heard.err

    assert "nothing to back up" in said("backup", str(file), code=2)
    with open_session() as session:
        begin(session.database)
        trials = len(snapshot.read(session.database, "toy").trials)
    size = f"1 study, {trials} trials"
    assert said("backup", str(file)).endswith(f" kB, {size}\n")
    assert "exists already" in said("backup", str(file), code=2)
    written = json.loads(said("backup", str(file), "--force", "--json"))
    assert written == {
        "file": str(file),
        "bytes": file.stat().st_size,
        "studies": 1,
        "trials": trials,
        "schema": len(schema.MIGRATIONS),
    }
    assert "workers are training" in said("restore", str(file), "--replace", code=2)
    with open_folder_factory("headsearch-other-") as other:
        monkeypatch.setenv("HEADSEARCH_HOME", str(other))
        assert said("restore", str(file)).startswith(f"restored {file}: ")
        assert "add --replace" in said("restore", str(file), code=2)
        assert json.loads(said("restore", str(file), "--replace", "--json")) == written
        with open_session() as session:
            assert query(session.address.reader_url, "SELECT count(*) FROM headsearch.trials") == [(trials,)]
            finished(session.database)
        assert not list(other.glob("postgres/pgdata/postmaster.pid"))
