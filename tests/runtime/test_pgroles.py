"""Who may connect to the embedded server, and what the reader may do."""

from __future__ import annotations

import psycopg2
import pytest
from embedded import query

pytestmark = pytest.mark.postgres


def test_only_passwords_on_loopback_let_in(postgres_server) -> None:
    url = postgres_server.server.url()
    settings = (
        "SELECT name, setting FROM pg_settings WHERE name IN ('listen_addresses', 'max_connections', %s)"
    )
    assert dict(query(url, settings % "'unix_socket_directories'")) == {
        "listen_addresses": "127.0.0.1", "max_connections": "200", "unix_socket_directories": "",
    }  # fmt: skip
    assert query(url, "SELECT DISTINCT auth_method FROM pg_hba_file_rules") == [("scram-sha-256",)]
    for role in ("owner", "reader"):
        wrong = postgres_server.server.url(role).replace(
            postgres_server.server.folder.password(role), "wrong"
        )
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            query(wrong, "SELECT 1")


def test_reader_reads_what_comes_later(database_address) -> None:
    owner, reader = database_address.url, database_address.reader_url
    query(owner, "CREATE TABLE plain AS SELECT 7 AS i")
    query(owner, "CREATE SCHEMA headsearch")
    query(owner, "CREATE TABLE headsearch.leases AS SELECT 8 AS i")
    assert query(reader, "SELECT i FROM plain") == [(7,)]
    assert query(reader, "SELECT i FROM headsearch.leases") == [(8,)]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO plain VALUES (1)",
        "UPDATE plain SET i = 1",
        "DELETE FROM plain",
        "TRUNCATE plain",
        "DROP TABLE plain",
        "CREATE TABLE mine (i int)",
        "CREATE TEMPORARY TABLE mine (i int)",
        "CREATE SCHEMA mine",
        "CREATE TABLE headsearch.mine (i int)",
        "SELECT lo_create(0)",
        "SELECT nextval('serial')",
        "SELECT rolpassword FROM pg_authid",
        "CREATE ROLE mine",
        "COPY plain TO PROGRAM 'cat'",
    ],
)
def test_reader_cannot_write(database_address, statement: str) -> None:
    """Neither as the role is set up nor after it switches read-only transactions off."""
    query(
        database_address.url,
        "CREATE TABLE plain AS SELECT 7 AS i; CREATE SEQUENCE serial; CREATE SCHEMA headsearch",
    )
    for prefix in ("", "SET default_transaction_read_only = off; COMMIT; "):
        with pytest.raises(
            (psycopg2.errors.InsufficientPrivilege, psycopg2.errors.ReadOnlySqlTransaction)
        ) as caught:
            query(database_address.reader_url, prefix + statement)
    assert isinstance(caught.value, psycopg2.errors.InsufficientPrivilege)
    assert query(database_address.url, "SELECT i FROM plain") == [(7,)]
