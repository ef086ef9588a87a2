"""Rows of an archive in the place of the database's, inside one transaction of the caller.

Tables are those that our migrations make of the version that wrote the archive; rows are copied in, and then
the rest of the migrations runs.
"""

from __future__ import annotations

from graphlib import TopologicalSorter

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import cursor as Cursor

from headsearch import __version__
from headsearch.errors import InputError
from headsearch.runtime.lines import first_line
from headsearch.runtime.pgclients import Archive, Table
from headsearch.search import schema
from headsearch.search.database import LOCK_CREATE, LOCK_SCHEMA
from headsearch.search.roles import GRANTS

OPTUNA_TABLES = (
    "studies",
    "study_directions",
    "study_user_attributes",
    "study_system_attributes",
    "trials",
    "trial_user_attributes",
    "trial_system_attributes",
    "trial_params",
    "trial_values",
    "trial_intermediate_values",
    "trial_heartbeats",
)
"""Optuna's tables with data of studies, in the schema `public`."""
ATTEMPTS_SINCE = 100
"""More than a trial is likely to have been claimed between a backup and its restore. A store without a list
is asked for each in turn, so no more than needed."""
_OPTUNA_VERSION = ("public", "alembic_version")
_MIGRATIONS = ("headsearch", "migrations")


def version_in(archive: Archive) -> int:
    """The version of headsearch's tables in the file. Raises InputError unless we can read it."""
    wanted = {_MIGRATIONS, _OPTUNA_VERSION, *(("public", name) for name in OPTUNA_TABLES)}
    if missing := sorted(wanted - archive.entries.keys()):
        raise InputError(f"{archive.file}: not a backup of headsearch: it has no {'.'.join(missing[0])}")
    version = max(map(int, archive.column(_MIGRATIONS, "version")), default=0)
    if not 1 <= version <= len(schema.MIGRATIONS):
        raise InputError(
            f"{archive.file}: has schema version {version}, headsearch {__version__} reads 1 to "
            f"{len(schema.MIGRATIONS)}; upgrade headsearch on this machine"
        )
    return version


def compare_optuna(cursor: Cursor, archive: Archive) -> None:
    """Raise InputError unless Optuna's tables in the file are like those here."""
    cursor.execute("SELECT version_num FROM public.alembic_version")
    here = [version for (version,) in cursor]
    there = archive.column(_OPTUNA_VERSION, "version_num")
    if there != here:
        raise InputError(
            f"{archive.file}: its Optuna tables are of version {', '.join(there) or 'none'}, those of this "
            f"machine's Optuna of {', '.join(here)}: restore it with the Optuna that made it"
        )


def _ours(cursor: Cursor) -> list[Table]:
    """All tables of headsearch, and Optuna's with data; those that others refer to come before them."""
    cursor.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'headsearch'")
    tables = {("headsearch", name) for (name,) in cursor} | {("public", name) for name in OPTUNA_TABLES}
    before: dict[Table, set[Table]] = {table: set() for table in sorted(tables)}
    cursor.execute(
        "SELECT f.relnamespace::regnamespace::text, f.relname, t.relnamespace::regnamespace::text, t.relname "
        "FROM pg_constraint c JOIN pg_class f ON f.oid = c.conrelid JOIN pg_class t ON t.oid = c.confrelid "
        "WHERE c.contype = 'f'"
    )
    for from_schema, from_name, to_schema, to_name in cursor:
        table, other = (from_schema, from_name), (to_schema, to_name)
        if table in tables and other in tables and table != other:
            before[table].add(other)
    return list(TopologicalSorter(before).static_order())


def _named(tables: list[Table]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(*table) for table in tables)


def lock(cursor: Cursor) -> None:
    """Keep everybody else out until the transaction ends."""
    for key in (LOCK_SCHEMA, LOCK_CREATE):
        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (key,))
    # Ours first: a claim holds ours while it waits for Optuna's over another connection.
    tables = sorted(_ours(cursor), key=lambda table: table[0])
    cursor.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(_named(tables)))


def empty(cursor: Cursor, version: int) -> None:
    """Tables without rows, ours as `version` had them.

    Tables of the same version are kept, and with them what people granted on them.
    """
    tables = _ours(cursor)
    if version < len(schema.MIGRATIONS):
        older = [table for table in tables if table[0] == "headsearch" and table != _MIGRATIONS]
        cursor.execute(sql.SQL("DROP TABLE {}").format(_named(older)))
        tables = [table for table in tables if table not in older]
    cursor.execute(sql.SQL("TRUNCATE {}").format(_named(tables)))
    if version < len(schema.MIGRATIONS):
        for statements in schema.MIGRATIONS[:version]:
            cursor.execute(statements)


def load(cursor: Cursor, archive: Archive) -> None:
    """Copy all rows in, and set the sequences behind them.

    Raises InputError when the file is damaged or its rows are not what our tables hold.
    """
    tables = _ours(cursor)
    if missing := [table for table in tables if table not in archive.entries]:
        raise archive.damaged(f"it has no {'.'.join(missing[0])}")
    for rows in archive.rows(tables):
        columns = sql.SQL(", ").join(sql.Identifier(name.strip('"')) for name in rows.columns.split(", "))
        copy = sql.SQL("COPY {} ({}) FROM stdin").format(sql.Identifier(*rows.table), columns)
        cursor.execute("SELECT set_config('client_encoding', %s, true)", (rows.encoding,))
        try:
            cursor.copy_expert(copy, rows)
        except psycopg2.Error as error:
            if rows.broken:
                continue  # and hear from pg_restore why
            if isinstance(error, psycopg2.OperationalError):
                raise
            raise InputError(
                f"{archive.file}: its rows do not fit {'.'.join(rows.table)} ({first_line(error)}); "
                "the database is as it was"
            ) from error
    cursor.execute(
        "SELECT table_schema, table_name, column_name, "
        "pg_get_serial_sequence(format('%%I.%%I', table_schema, table_name), column_name) AS sequence "
        "FROM information_schema.columns WHERE (table_schema, table_name) IN %s "
        "AND (column_default LIKE 'nextval(%%' OR is_identity = 'YES')",
        (tuple(tables),),
    )
    for space, name, column, sequence in cursor.fetchall():
        # Never back, so that a number that was given once is not given again.
        last = sql.SQL("SELECT setval({}, greatest((SELECT max({}) FROM {}), (SELECT last_value FROM {})))")
        own = sql.Identifier(*(part.strip('"') for part in sequence.split(".")))
        column_name, table = sql.Identifier(column), sql.Identifier(space, name)
        cursor.execute(last.format(sql.Literal(sequence), column_name, table, own))


def bring_forward(cursor: Cursor, version: int) -> None:
    """What `schema.migrate` does, in this transaction."""
    for number, statements in enumerate(schema.MIGRATIONS[version:], start=version + 1):
        cursor.execute(statements)
        cursor.execute(
            "INSERT INTO headsearch.migrations (version, applied_by) VALUES (%s, %s)", (number, __version__)
        )
    # Tables that were made anew are nobody's but the owner's.
    for grants in GRANTS:
        cursor.execute(grants)


def give_back(cursor: Cursor) -> None:
    """Take workers' names off running trials, and workers off the list: they were there at another time.

    It is nobody's loss that they stopped; one that lives is listed again with its next beat. Attempts go on
    above those that were counted after the backup, so that checkpoints written from here on are newer than
    those that lie there.
    """
    cursor.execute(
        "UPDATE headsearch.trials SET worker_id = NULL, attempt = attempt + %s, "
        "lease_until = CASE WHEN state = 'running' THEN clock_timestamp() END "
        "WHERE state IN ('running', 'paused')",
        (ATTEMPTS_SINCE,),
    )
    cursor.execute("UPDATE headsearch.workers SET ended_at = beat_at WHERE ended_at IS NULL")
