"""The owner makes roles; a worker does what workers do and nothing else; a reader reads."""

from __future__ import annotations

import multiprocessing
import os
import re
from pathlib import Path

import psycopg2
import pytest
import team
from psycopg2 import errors
from test_worker import TINY, wait_for

from headsearch.cli.app import run
from headsearch.errors import AccessError, DatabaseError, HeadsearchError, InputError
from headsearch.runtime import pgroles
from headsearch.runtime.dumps import backup, restore
from headsearch.runtime.migration import bring_up
from headsearch.runtime.session import open_session
from headsearch.search import schema, studies
from headsearch.search.roles import READER, WORKER, WORKER_MAY
from headsearch.spec import StudySpec

pytestmark = pytest.mark.postgres

FORBIDDEN = [
    # Tables and what else is made of SQL.
    "CREATE TABLE mine (i int)",
    "CREATE TABLE public.mine (i int)",
    "CREATE TABLE headsearch.mine (i int)",
    "CREATE TEMPORARY TABLE mine (i int)",
    "CREATE VIEW public.mine AS SELECT 1",
    "CREATE SCHEMA mine",
    "CREATE FUNCTION public.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE INDEX mine ON headsearch.trials (seed)",
    "ALTER TABLE headsearch.trials ADD COLUMN mine int",
    "ALTER TABLE public.trials DROP COLUMN state",
    "DROP TABLE headsearch.reports",
    "DROP TABLE public.trials CASCADE",
    "DROP SCHEMA headsearch CASCADE",
    "TRUNCATE headsearch.reports",
    "TRUNCATE public.trials CASCADE",
    "CREATE TRIGGER t AFTER INSERT ON headsearch.trials EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    "LOCK TABLE headsearch.studies IN ACCESS EXCLUSIVE MODE",
    # Studies, trials and reports.
    "INSERT INTO public.studies (study_name) VALUES ('mine')",
    "UPDATE public.studies SET study_name = 'mine'",
    "DELETE FROM public.studies",
    "DELETE FROM public.trials",
    "DELETE FROM public.trial_params",
    "DELETE FROM public.study_system_attributes",
    "UPDATE public.trials SET study_id = study_id",
    "UPDATE public.trial_params SET param_value = 1",
    "UPDATE public.trial_values SET value = 1",
    "UPDATE public.study_user_attributes SET value_json = '1'",
    "INSERT INTO public.study_directions (study_direction_id) VALUES (1)",
    "UPDATE public.alembic_version SET version_num = 'x'",
    "INSERT INTO headsearch.studies SELECT * FROM headsearch.studies",
    "DELETE FROM headsearch.studies",
    "UPDATE headsearch.studies SET spec = '{}'",
    "UPDATE headsearch.studies SET spec_hash = 'x'",
    "UPDATE headsearch.studies SET version = '9'",
    "UPDATE headsearch.studies SET name = 'mine'",
    "DELETE FROM headsearch.trials",
    "UPDATE headsearch.trials SET params = '{}'",
    "UPDATE headsearch.trials SET seed = 0",
    "UPDATE headsearch.trials SET number = 0",
    "UPDATE headsearch.trials SET requeued = true",
    "UPDATE headsearch.reports SET probe_accuracy = 1",
    "DELETE FROM headsearch.reports",
    "DELETE FROM headsearch.workers",
    "INSERT INTO headsearch.migrations (version, applied_by) VALUES (99, 'me')",
    "SELECT setval('public.trials_trial_id_seq', 1)",
    # Secrets, roles, other databases, files.
    "SELECT rolpassword FROM pg_authid",
    "SELECT passwd FROM pg_shadow",
    "SELECT * FROM pg_hba_file_rules",
    "SELECT pg_read_file('postgresql.conf')",
    "SELECT pg_ls_dir('.')",
    "COPY headsearch.trials TO '/tmp/mine'",
    "COPY headsearch.reports FROM PROGRAM 'true'",
    "CREATE ROLE mine",
    f"ALTER ROLE {WORKER} CREATEROLE",
    f"ALTER ROLE {team.LAB} PASSWORD 'x'",
    f"GRANT pg_monitor TO {WORKER}",
    f"SET ROLE {team.LAB}",
    "SET ROLE headsearch",
    "SET SESSION AUTHORIZATION headsearch",
    "CREATE DATABASE mine",
    "ALTER SYSTEM SET log_statement = 'all'",
    "SELECT pg_reload_conf()",
]
LARGE_OBJECTS = ["SELECT lo_create(0)", "SELECT lo_creat(-1)", "SELECT lo_from_bytea(0, 'x')"]
WRITES = [
    "INSERT INTO public.trials (number, study_id, state) SELECT 99, study_id, 'RUNNING' FROM public.studies",
    "INSERT INTO public.study_system_attributes (study_id, key, value_json) VALUES (1, 'x', '1')",
    "UPDATE public.study_system_attributes SET value_json = '1'",
    "UPDATE public.trials SET state = 'FAIL'",
    "SELECT * FROM public.studies FOR UPDATE",
    "UPDATE headsearch.studies SET state = 'paused'",
    "UPDATE headsearch.trials SET epoch = 1",
    "INSERT INTO headsearch.workers SELECT 'w', 1, 'h', 1, 'cpu', 1, '0'",
    "SELECT nextval('public.trials_trial_id_seq')",
]


both = pytest.mark.parametrize("new_team", [pgroles.OWNER, team.LAB], indirect=True)
"""Of a superuser, and of a role that may make roles."""


def make(members: team.Team, monkeypatch: pytest.MonkeyPatch, **changes) -> studies.Study:
    """A study, as the owner makes it."""
    with monkeypatch.context() as owner:
        members.become(owner, members.owner)
        with open_session() as session:
            return studies.create(session.database, StudySpec.model_validate(TINY | changes))[0]


def allowed(members: team.Team, role: str, statements: list[str]) -> list[str]:
    """Those that the database does not refuse for want of a right."""
    found = []
    with members.connected(role) as cursor:
        for statement in statements:
            # The reader is held by its rights, not by the default that its sessions only read.
            cursor.execute("SET default_transaction_read_only = off")
            # These two have no place in a transaction.
            cursor.execute("SELECT 1" if re.match("CREATE DATABASE|ALTER SYSTEM", statement) else "BEGIN")
            try:
                cursor.execute(statement)
                found.append(statement)
            except errors.InsufficientPrivilege:
                pass
            except psycopg2.Error as error:
                found.append(f"{statement}: {error}")
            finally:
                cursor.execute("ROLLBACK")
    return found


@both
def test_the_worker_role_cannot_do_what_workers_do_not(a_team, monkeypatch):
    make(a_team, monkeypatch)
    assert allowed(a_team, WORKER, FORBIDDEN) == []
    # Large objects are the superuser's to close; the command says so.
    left = LARGE_OBJECTS if a_team.owner == team.LAB else []
    assert allowed(a_team, WORKER, LARGE_OBJECTS) == left
    notes = a_team.bring_up(monkeypatch)
    assert any("may make large objects: REVOKE EXECUTE ON FUNCTION" in line for line in notes) == bool(left)
    assert (
        f"note: {WORKER} may connect to database postgres: REVOKE CONNECT ON DATABASE postgres FROM PUBLIC"
        in notes
    )
    # Granting what one may not grant is a warning, and no more.
    a_team.ask(WORKER, "GRANT ALL ON headsearch.trials TO PUBLIC")
    assert a_team.ask(READER, "SELECT has_table_privilege('headsearch.trials', 'INSERT')") == [(False,)]
    # The one column that it may write to lock a study's row is held by foreign keys.
    with a_team.connected(WORKER) as cursor, pytest.raises(errors.ForeignKeyViolation):
        cursor.execute("UPDATE public.studies SET study_id = 99")


def test_the_list_of_forbidden_statements_is_of_statements_that_work(a_team, monkeypatch):
    """A superuser may do all of it, so that none is refused for a mistake of ours."""
    make(a_team, monkeypatch)
    a_team.owner = pgroles.OWNER
    plain = [
        statement
        for statement in FORBIDDEN + LARGE_OBJECTS + WRITES
        if not re.search("DATABASE|SYSTEM|COPY", statement)
    ]
    refused = []
    with a_team.connected(pgroles.OWNER) as cursor:
        for statement in plain:
            cursor.execute("BEGIN")
            try:
                cursor.execute(statement)
            except (errors.IntegrityError, errors.ForeignKeyViolation):
                pass  # it would have been done
            except psycopg2.Error as error:
                refused.append((statement, str(error)))
            finally:
                cursor.execute("ROLLBACK")
    assert refused == []


def test_nobody_else_connects_and_workers_connect_nowhere_else(a_team, team_server):
    with pgroles.connected(team_server.url("owner")) as connection:
        connection.cursor().execute("CREATE ROLE stranger LOGIN PASSWORD 'x'")
        try:
            with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
                psycopg2.connect(
                    host="127.0.0.1", port=a_team.port, user="stranger", password="x", dbname=a_team.database
                )
        finally:
            connection.cursor().execute("DROP ROLE stranger")
    # The embedded server's own database is closed to the public, as ours is now.
    with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
        psycopg2.connect(
            host="127.0.0.1",
            port=a_team.port,
            user=WORKER,
            password=a_team.passwords[WORKER],
            dbname=pgroles.DATABASE,
        )


def test_the_reader_reads_and_writes_nothing(a_team, monkeypatch, tmp_path, capsys):
    make(a_team, monkeypatch)
    assert allowed(a_team, READER, [*FORBIDDEN, *WRITES]) == []
    with a_team.connected(READER) as cursor:
        with pytest.raises(errors.ReadOnlySqlTransaction):
            cursor.execute("CREATE TABLE mine (i int)")
        for table in WORKER_MAY:
            cursor.execute(f"SELECT * FROM {table}")
    a_team.become(monkeypatch, READER)
    with open_session() as session:
        assert [study.name for study in studies.all_studies(session.database)] == ["tiny"]
        with pytest.raises(DatabaseError, match=f"role {READER} only reads here .*read-only transaction"):
            studies.delete(session.database, "tiny")
    assert run(["study", "pause", "tiny"]) == 1
    assert f"role {READER} only reads here (cannot execute UPDATE" in capsys.readouterr().err
    written = backup(tmp_path / "b.dump")
    assert written.studies == 1


@both
def test_each_role_has_the_grants_of_the_table_and_no_other(a_team):
    with a_team.connected(a_team.owner) as cursor:
        cursor.execute(
            "SELECT grantee, table_schema || '.' || table_name, privilege_type "
            "FROM information_schema.role_table_grants WHERE grantee IN (%s, %s)",
            (WORKER, READER),
        )
        tables = set(cursor.fetchall())
        cursor.execute(
            "SELECT grantee, table_schema || '.' || table_name, column_name FROM information_schema.column_privileges "
            "WHERE grantee = %s AND privilege_type = 'UPDATE'",
            (WORKER,),
        )
        columns = set(cursor.fetchall())
    wanted_columns = set()
    for table, rights in WORKER_MAY.items():
        plain = {right for right in rights if "(" not in right}
        assert {right for role, name, right in tables if (role, name) == (WORKER, table)} == plain, table
        for right in set(rights) - plain:
            assert right.startswith("UPDATE (")
            names = right.removeprefix("UPDATE (").removesuffix(")").split(", ")
            wanted_columns |= {(WORKER, table, name) for name in names}
    assert columns == wanted_columns
    assert {(name, right) for role, name, right in tables if role == READER} == {
        (name, "SELECT") for name in WORKER_MAY
    }


def test_migrating_twice_or_with_stray_grants_ends_the_same(a_team, monkeypatch):
    def rights():
        return a_team.ask(
            a_team.owner,
            "SELECT relname, relacl::text FROM pg_class WHERE relnamespace IN ('public'::regnamespace, "
            "'headsearch'::regnamespace) AND relkind IN ('r', 'S') ORDER BY 1, 2",
        )

    before = rights()
    a_team.ask(a_team.owner, f"GRANT ALL ON ALL TABLES IN SCHEMA headsearch TO {WORKER}, {READER}")
    a_team.ask(a_team.owner, f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {READER}")
    assert rights() != before
    lines = a_team.bring_up(monkeypatch)
    assert f"role {WORKER}: password set" in lines
    assert [(name, sorted(acl.strip("{}").split(","))) for name, acl in rights()] == [
        (name, sorted(acl.strip("{}").split(","))) for name, acl in before
    ]


def _bring_up(environment: dict[str, str], worker: Path, reader: Path, said) -> None:
    os.environ.update(environment)
    try:
        said.put(bring_up(worker=worker, reader=reader)[0])
    except HeadsearchError as error:
        said.put(f"failed: {error}")


@both
@pytest.mark.slow
def test_several_at_once_on_two_databases_of_one_server(new_team, team_server, monkeypatch, tmp_path):
    other = team.make_team(team_server, new_team.owner, f"{new_team.database}_2", tmp_path)
    try:
        context = multiprocessing.get_context("spawn")
        said = context.Queue()
        started = []
        for members in [new_team, other] * 3:
            with monkeypatch.context() as owner:
                members.become(owner, members.owner)
                environment = {
                    name: os.environ[name] for name in os.environ if name.startswith("HEADSEARCH_")
                }
            process = context.Process(
                target=_bring_up, args=(environment, members.file(WORKER), members.file(READER), said)
            )
            process.start()
            started.append(process)
        lines = [said.get(timeout=200) for _ in started]
        for process in started:
            process.join(60)
        assert all("tables of version" in line for line in lines), lines
        for members in (new_team, other):
            assert members.ask(WORKER, "SELECT count(*) FROM headsearch.studies") == [(0,)]
            assert members.ask(READER, "SELECT count(*) FROM public.studies") == [(0,)]
    finally:
        with pgroles.connected(team_server.url("owner")) as connection:
            connection.cursor().execute(f"DROP DATABASE {other.database} WITH (FORCE)")


def test_no_password_is_in_the_servers_log(new_team, team_server, monkeypatch):
    with pgroles.connected(team_server.url("owner")) as connection:
        connection.cursor().execute("ALTER SYSTEM SET log_statement = 'all'")
        connection.cursor().execute("ALTER SYSTEM SET log_min_error_statement = 'debug5'")
        connection.cursor().execute("SELECT pg_reload_conf()")
        try:
            log = team_server.folder.log_file
            wait_for(lambda: "log_statement" in log.read_text(errors="replace"))
            new_team.give(WORKER, "an-easily-found-password")
            new_team.give(READER, "another-easily-found-one")
            new_team.bring_up(monkeypatch)
            new_team.ask(WORKER, "SELECT 1")
            wait_for(lambda: f"ALTER ROLE {READER} LOGIN" in log.read_text(errors="replace"))
        finally:
            connection.cursor().execute("ALTER SYSTEM RESET ALL")
            connection.cursor().execute("SELECT pg_reload_conf()")
    said = log.read_text(errors="replace")
    assert f"ALTER ROLE {WORKER} LOGIN PASSWORD 'SCRAM-SHA-256$" in said
    assert "easily-found" not in said


def test_whoever_may_not_migrate_is_told_who_must(new_team, monkeypatch, capsys):
    with pgroles.connected(new_team.url(pgroles.OWNER, password=True)) as connection:
        for role in (WORKER, READER):
            connection.cursor().execute(f"CREATE ROLE {role} LOGIN")
            connection.cursor().execute(f"ALTER ROLE {role} PASSWORD %s", (new_team.passwords[role],))
    for role in (WORKER, READER):
        new_team.become(monkeypatch, role)
        with (
            pytest.raises(
                AccessError, match=f"has no tables yet, and role {role} may not make them: its owner must run"
            ),
            open_session(),
        ):
            pass
        with open_session(tables=False) as session, pytest.raises(DatabaseError):
            studies.all_studies(session.database)
    new_team.become(monkeypatch, pgroles.OWNER)
    with open_session() as session:
        session.database.engine.dispose()
    new_team.ask(pgroles.OWNER, f"REVOKE ALL ON SCHEMA headsearch FROM {WORKER}")
    new_team.become(monkeypatch, WORKER)
    with (
        pytest.raises(
            AccessError, match=f"role {WORKER} may not read headsearch's tables: their owner must run"
        ),
        open_session(),
    ):
        pass
    # Without password files: rights for the roles that an administrator made.
    new_team.become(monkeypatch, pgroles.OWNER)
    assert f"role {WORKER}: may do what it should" in bring_up()
    new_team.become(monkeypatch, WORKER)
    with open_session():
        pass
    with pytest.raises(
        AccessError, match=f"role {WORKER} may not do this: it is for the tables' owner, headsearch"
    ):
        bring_up()
    newest = len(schema.MIGRATIONS)
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "SELECT 1"))
    said = f"has tables of version {newest} and not {newest + 1}, and role headsearch_worker"
    with (
        pytest.raises(AccessError, match=said),
        open_session(),
    ):
        pass
    assert run(["study", "list"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith("its owner must run headsearch db migrate\n")


def test_a_worker_cannot_make_or_delete_a_study(a_team, monkeypatch, capsys, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'name = "mine"\n[budget]\ntrials = 2\nepochs = 2\n[base.data]\nname = "digits"\nlimit = 100\n[space]\n"head.projection_dim" = [2, 4]\n'
    )
    a_team.become(monkeypatch, WORKER)
    assert run(["study", "create", str(file), "--no-check"]) == 2
    said = capsys.readouterr().err
    assert (
        f"role {WORKER} may not do this (permission denied for table studies): the database's owner may"
        in said
    )
    assert said.count("\n") == 1
    assert a_team.ask(
        a_team.owner,
        "SELECT (SELECT count(*) FROM public.studies), (SELECT count(*) FROM headsearch.studies)",
    ) == [(0, 0)]
    make(a_team, monkeypatch)
    assert run(["study", "delete", "tiny", "--yes"]) == 2
    assert "may not do this" in capsys.readouterr().err
    assert run(["study", "list"]) == 0


@both
def test_roles_that_may_more_are_refused(new_team, monkeypatch):
    with pgroles.connected(new_team.url(pgroles.OWNER, password=True)) as connection:
        connection.cursor().execute(f"CREATE ROLE {WORKER} LOGIN CREATEDB")
        with pytest.raises(InputError, match=f"role {WORKER} is there and is allowed more than to log in"):
            new_team.bring_up(monkeypatch)
        connection.cursor().execute(f"ALTER ROLE {WORKER} NOCREATEDB")
        connection.cursor().execute(f"GRANT {team.LAB} TO {WORKER}")
        with pytest.raises(InputError, match=f"role {WORKER} is there and is a member of lab"):
            new_team.bring_up(monkeypatch)
        connection.cursor().execute(f"REVOKE {team.LAB} FROM {WORKER}")
    if new_team.owner == team.LAB:
        with pytest.raises(
            AccessError, match=f"role lab may not make or alter {WORKER}: have an administrator"
        ):
            new_team.bring_up(monkeypatch)
    else:
        assert f"role {WORKER}: password set" in new_team.bring_up(monkeypatch)


def test_password_files_that_hold_none_change_nothing(new_team, monkeypatch, tmp_path):
    new_team.become(monkeypatch, new_team.owner)
    file = tmp_path / "file"
    for content, reason in (
        ("", "is empty"),
        ("\n", "is empty"),
        ("a\nb\n", "in one line"),
        ("a\0b", "in one line"),
    ):
        file.write_text(content)
        with pytest.raises(InputError, match=f"--worker-password-file: {file} .*{reason}"):
            bring_up(worker=file)
    with pytest.raises(InputError, match=r"--reader-password-file: cannot read .*No such file"):
        bring_up(worker=new_team.file(WORKER), reader=tmp_path / "none")
    assert new_team.ask(new_team.owner, "SELECT to_regclass('headsearch.migrations')::text") == [(None,)]
    monkeypatch.delenv("HEADSEARCH_DATABASE_URL")
    monkeypatch.delenv("HEADSEARCH_DATABASE_PASSWORD_FILE")
    with pytest.raises(InputError, match="the embedded server has roles of its own"):
        bring_up(worker=new_team.file(WORKER))
    assert f"tables of version {len(schema.MIGRATIONS)}" in bring_up()[0]


def test_a_restored_database_has_its_grants(a_team, monkeypatch, tmp_path):
    make(a_team, monkeypatch)
    a_team.become(monkeypatch, a_team.owner)
    backup(tmp_path / "b.dump")
    with monkeypatch.context() as older:
        # As if the file were of an older version: its tables are dropped and made anew.
        older.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, "SELECT 1"))
        bring_up()
        restore(tmp_path / "b.dump", replace=True)
    assert a_team.ask(WORKER, "SELECT name FROM headsearch.studies") == [("tiny",)]
    assert a_team.ask(READER, "SELECT name FROM headsearch.studies") == [("tiny",)]
    assert allowed(a_team, WORKER, FORBIDDEN) == []
