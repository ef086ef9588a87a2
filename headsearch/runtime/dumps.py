"""The whole database as one file, and back: `headsearch db backup` and `restore`.

The file is pg_dump's custom format, which PostgreSQL's own programs restore too. Here only rows are taken out
of it, into tables that our migrations make: those of the version that wrote it, brought forward afterwards.
All of that is one transaction, so a database has either what it had before or what is in the file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
from psycopg2 import errors
from psycopg2.extensions import cursor as Cursor

from headsearch.errors import DatabaseError, InputError, StorageError, StudyBusyError
from headsearch.home import home_folder
from headsearch.runtime import reloading
from headsearch.runtime.database import libpq_url, open_database
from headsearch.runtime.lines import first_line
from headsearch.runtime.pgclients import dump, open_archive
from headsearch.runtime.session import open_session

LOCK_SECONDS = 15
"""That a restore waits for others to end what they do with the tables, and a backup for a restore."""


@dataclass(frozen=True)
class Dumped:
    """A database that was written to a file, or read from one."""

    file: Path
    bytes: int
    studies: int
    trials: int
    """Of headsearch's studies."""
    schema: int
    """Version of headsearch's tables in the file."""

    def line(self) -> str:
        """The file and what is in it."""
        size = f"{self.bytes / 1e6:,.1f} MB" if self.bytes >= 1e6 else f"{self.bytes / 1e3:.0f} kB"
        studies = f"{self.studies} {'study' if self.studies == 1 else 'studies'}"
        return f"{self.file}: {size}, {studies}, {self.trials} {'trial' if self.trials == 1 else 'trials'}"

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return vars(self) | {"file": str(self.file)}


def backup(file: Path, *, force: bool = False) -> Dumped:
    """Write the database to `file`, which appears complete or not at all; workers may go on meanwhile.

    In a database that others use too, their schemas and their tables in `public` are left out.

    Raises:
        InputError: `file` is there and `force` is false, its folder is not, or there is nothing to back up.
        WorldError: The folder cannot be written, the database does not answer or is newer than any pg_dump.
    """
    target = _target(file, force=force)
    with open_database(home_folder()) as address, _connected(address.full_url) as connection:
        connection.set_session(isolation_level="REPEATABLE READ", readonly=True)
        with connection.cursor() as cursor:
            if _one(cursor, "SELECT to_regclass('headsearch.migrations')") is None:
                raise InputError("the database has no headsearch studies yet: there is nothing to back up")
            cursor.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            options = [
                "--format=custom",
                "--encoding=UTF8",
                "-B",  # no large objects
                f"--lock-wait-timeout={LOCK_SECONDS * 1000}",
                # The same moment for pg_dump and for what we count.
                f"--snapshot={_one(cursor, 'SELECT pg_export_snapshot()')}",
                *_not_ours(cursor),
            ]
            with _appearing(target) as partial:
                server = connection.info.server_version // 10_000
                dump(address.full_url, options, partial, server=server, tls=connection.info.ssl_in_use)
                size = partial.stat().st_size
            return Dumped(file, size, *_counts(cursor), _version(cursor))


def restore(file: Path, *, replace: bool = False, force: bool = False) -> Dumped:
    """Put what a backup holds in the place of the database's studies, all of it or nothing.

    Trials that were running then are given back: the next free worker takes them up.

    Raises:
        InputError: `file` is not a whole backup that this version can read, or the database holds studies and
            `replace` is false.
        StudyBusyError: Workers are on these studies and `force` is false.
        WorldError: The database does not answer, or others keep its tables.
    """
    archive = open_archive(file)
    size = file.stat().st_size
    version = reloading.version_in(archive)
    with open_session() as session, _connected(session.address.full_url) as connection:
        with connection.cursor() as cursor:
            cursor.execute(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'")
            cursor.execute("SET LOCAL statement_timeout = 0")
            cursor.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
            _refuse(cursor, replace=replace, force=force)
            reloading.lock(cursor)
            # Again, now that nobody can come in between.
            _refuse(cursor, replace=replace, force=force)
            reloading.compare_optuna(cursor, archive)
            reloading.empty(cursor, version)
            reloading.load(cursor, archive)
            reloading.bring_forward(cursor, version)
            reloading.give_back(cursor)
            counts = _counts(cursor)
        connection.commit()
    return Dumped(file, size, *counts, version)


def _target(file: Path, *, force: bool) -> Path:
    """The file's full name, links followed, if it may be written."""
    try:
        target = file.resolve()
        if not target.parent.is_dir():
            raise InputError(f"{file}: there is no folder {target.parent}")
        if target.exists() and not target.is_file():
            raise InputError(f"{file}: not a regular file")
        if target.exists() and not force:
            raise InputError(f"{file}: exists already; name another file, or add --force to replace it")
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error.strerror}") from error
    return target


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A file for this user alone, which gets its name when it is complete and on the disk."""
    try:
        with tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=".headsearch-", suffix=".partial", delete=False
        ) as output:
            partial = Path(output.name)
            try:
                yield partial
                os.fsync(output.fileno())
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
        with contextlib.suppress(PermissionError):  # where folders cannot be opened
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}") from error


@contextlib.contextmanager
def _connected(url: str) -> Iterator[Any]:
    """A connection whose transaction ends with it. Raises DatabaseError for what the database refuses."""
    connection = None
    try:
        connection = psycopg2.connect(libpq_url(url), connect_timeout=10, application_name="headsearch")
        yield connection
    except (errors.LockNotAvailable, errors.DeadlockDetected):
        raise DatabaseError(
            "others use the tables, such as workers, a dashboard or a backup; nothing was changed: "
            "end them or try again"
        ) from None
    except psycopg2.Error as error:
        raise DatabaseError(f"the database refused: {first_line(error)}", transient=False) from error
    finally:
        if connection is not None:
            connection.close()


def _one(cursor: Cursor, statement: str) -> Any:
    cursor.execute(statement)
    return cursor.fetchone()[0]


def _counts(cursor: Cursor) -> tuple[int, int]:
    cursor.execute(
        "SELECT (SELECT count(*) FROM headsearch.studies), (SELECT count(*) FROM headsearch.trials)"
    )
    studies, trials = cursor.fetchone()
    return studies, trials


def _version(cursor: Cursor) -> int:
    return int(_one(cursor, "SELECT coalesce(max(version), 0) FROM headsearch.migrations"))


def _not_ours(cursor: Cursor) -> list[str]:
    """Options that leave out what is neither ours nor Optuna's."""
    cursor.execute(
        "SELECT quote_ident(nspname) FROM pg_namespace WHERE nspname NOT IN ('headsearch', 'public', "
        r"'information_schema') AND nspname NOT LIKE 'pg\_%' ORDER BY nspname"
    )
    schemas = [f"--exclude-schema={name}" for (name,) in cursor]
    cursor.execute(
        """
        SELECT quote_ident(c.relname) FROM pg_class c
        WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
        AND NOT c.relname = ANY(%(ours)s) AND NOT EXISTS (
            SELECT 1 FROM pg_depend d JOIN pg_class t ON t.oid = d.refobjid
            WHERE d.objid = c.oid AND d.deptype IN ('a', 'i') AND t.relnamespace = c.relnamespace
            AND t.relname = ANY(%(ours)s))
        ORDER BY c.relname
        """,
        {"ours": [*reloading.OPTUNA_TABLES, "version_info", "alembic_version"]},
    )
    return [*schemas, *(f"--exclude-table=public.{name}" for (name,) in cursor)]


def _refuse(cursor: Cursor, *, replace: bool, force: bool) -> None:
    """Stop where a restore would destroy what nobody gave up."""
    cursor.execute("SELECT study_name FROM public.studies ORDER BY study_id")
    names = [name for (name,) in cursor]
    if names and not replace:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(
            f"the database holds study {', '.join(names[:3])}{more}: add --replace to give up what it holds "
            "for what is in the file"
        )
    if force:
        return
    cursor.execute(
        "SELECT s.name, t.number FROM headsearch.trials t JOIN headsearch.studies s USING (study_id) "
        "WHERE t.state = 'running' AND t.worker_id IS NOT NULL AND t.lease_until > clock_timestamp() "
        "ORDER BY s.name, t.number LIMIT 1"
    )
    if busy := cursor.fetchone():
        raise StudyBusyError(
            f"study {busy[0]!r}: workers are training trial {busy[1]}; stop them first, or add --force"
        )
    # Idle ones would take trials of the restored studies for those that they know.
    cursor.execute(
        "SELECT s.name, w.worker_id, extract(epoch FROM clock_timestamp() - w.beat_at)::int "
        "FROM headsearch.workers w JOIN headsearch.studies s USING (study_id) "
        "WHERE w.ended_at IS NULL AND w.beat_at > clock_timestamp() "
        "- make_interval(secs => coalesce((s.spec->'lease'->>'seconds')::float, 60)) ORDER BY 1, 2 LIMIT 1"
    )
    if waiting := cursor.fetchone():
        raise StudyBusyError(
            f"study {waiting[0]!r}: worker {waiting[1]} answered {waiting[2]} s ago; "
            "stop it first, or add --force"
        )
