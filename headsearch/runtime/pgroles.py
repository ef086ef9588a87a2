"""The two roles of an embedded server and what the second may see.

``headsearch`` owns everything. ``headsearch_reader`` may read the tables of every database made here, also
tables that come later, and may write nothing: the dashboard connects as it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection as Connection

from headsearch.errors import ServerError

OWNER = "headsearch"
READER = "headsearch_reader"
DATABASE = "headsearch"
_MAINTENANCE_DATABASE = "postgres"

# Large objects are the one thing that PostgreSQL lets every role create.
_CREATE_LARGE_OBJECTS = ("lo_creat(integer)", "lo_create(oid)", "lo_from_bytea(oid, bytea)")


def server_url(port: int, role: str, password: str, database: str = DATABASE) -> str:
    """URL of SQLAlchemy for one role of the embedded server. Passwords are URL-safe by construction."""
    return f"postgresql+psycopg2://{role}:{password}@127.0.0.1:{port}/{database}"


class ConnectError(ServerError):
    """The embedded server did not let us in. `final`: it won't later either."""

    def __init__(self, message: str) -> None:
        reason = message.strip().splitlines()[0]
        super().__init__(f"the embedded PostgreSQL refuses a connection: {reason}")
        self.final = "authentication failed" in reason


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """Connect with autocommit. Raises ConnectError."""
    dsn = url.replace("postgresql+psycopg2://", "postgresql://", 1)
    try:
        connection = psycopg2.connect(dsn, connect_timeout=30, application_name="headsearch")
    except psycopg2.OperationalError as error:
        raise ConnectError(str(error)) from error
    try:
        connection.autocommit = True
        yield connection
    finally:
        connection.close()


def prepare(port: int, owner_password: str, reader_password: str) -> None:
    """Make the reader role and the database ``headsearch``, unless the database is there.

    The database gets its name last, so that a start killed in between is finished by the next one.
    """
    with connected(server_url(port, OWNER, owner_password, _MAINTENANCE_DATABASE)) as connection:
        cursor = connection.cursor()
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))
        if cursor.fetchone():
            return
        cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (READER,))
        verb = "ALTER" if cursor.fetchone() else "CREATE"
        cursor.execute(
            sql.SQL(verb + " ROLE {} LOGIN PASSWORD %s CONNECTION LIMIT 50").format(sql.Identifier(READER)),
            (reader_password,),
        )
        cursor.execute(
            sql.SQL("ALTER ROLE {} SET default_transaction_read_only = on").format(sql.Identifier(READER))
        )
        partial = f"{DATABASE}_partial"
        cursor.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(partial)))
        create_database(port, owner_password, partial)
        rename = sql.SQL("ALTER DATABASE {} RENAME TO {}")
        cursor.execute(rename.format(sql.Identifier(partial), sql.Identifier(DATABASE)))


def create_database(port: int, owner_password: str, name: str) -> None:
    """Make the empty database `name`, whose tables the reader may read."""
    database, owner, reader = sql.Identifier(name), sql.Identifier(OWNER), sql.Identifier(READER)
    with connected(server_url(port, OWNER, owner_password, _MAINTENANCE_DATABASE)) as connection:
        cursor = connection.cursor()
        cursor.execute(sql.SQL("CREATE DATABASE {}").format(database))
        cursor.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))
        cursor.execute(sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(database, reader))
    with connected(server_url(port, OWNER, owner_password, name)) as connection:
        cursor = connection.cursor()
        cursor.execute(sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(reader))
        for function in _CREATE_LARGE_OBJECTS:
            cursor.execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
        # Without IN SCHEMA these cover every schema that the owner ever makes here.
        for grant in ("USAGE ON SCHEMAS", "SELECT ON TABLES", "SELECT ON SEQUENCES"):
            privileges = sql.SQL("ALTER DEFAULT PRIVILEGES FOR ROLE {} GRANT " + grant + " TO {}")
            cursor.execute(privileges.format(owner, reader))


def drop_database(port: int, owner_password: str, name: str) -> None:
    """Drop the database `name` and cut its connections. Does nothing when there is none."""
    with connected(server_url(port, OWNER, owner_password, _MAINTENANCE_DATABASE)) as connection:
        drop = sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
        connection.cursor().execute(drop.format(sql.Identifier(name)))
