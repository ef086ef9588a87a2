"""Which database is used, and that no message about it shows a password."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import psycopg2
import pytest

from headsearch.errors import DatabaseError, HeadsearchError, InputError
from headsearch.runtime import database
from headsearch.runtime.database import (
    DatabaseAddress,
    check,
    embedded_server,
    given_address,
    given_url,
    libpq_url,
    normalize,
    open_database,
    read_only,
    redact,
)

SECRET = "s3cret%40word"


def test_url_comes_from_variable_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert given_url() is None
    file = tmp_path / "url"
    file.write_text("\n postgresql+psycopg2://u:p@h/one \n")
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL_FILE", str(file))
    assert given_url() == "postgresql+psycopg2://u:p@h/one"
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", "postgresql://u:p@h:5433/two?sslmode=require")
    with pytest.raises(InputError, match="both set"):
        given_url()
    monkeypatch.delenv("HEADSEARCH_DATABASE_URL_FILE")
    assert given_url() == "postgresql+psycopg2://u:p@h:5433/two?sslmode=require"


def test_unreadable_url_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none", tmp_path):
        monkeypatch.setenv("HEADSEARCH_DATABASE_URL_FILE", str(path))
        with pytest.raises(InputError, match=f"HEADSEARCH_DATABASE_URL_FILE: cannot read {path}"):
            given_url()
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL_FILE", str(tmp_path / "bytes"))
    with pytest.raises(InputError, match=r"HEADSEARCH_DATABASE_URL_FILE: .*not text"):
        given_url()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (f"sqlite:///{SECRET}.db", "row locks"),
        (f"mysql://u:{SECRET}@h/d", "PostgreSQL URL"),
        (f"postgres://u:{SECRET}@h/d", "PostgreSQL URL"),
        (f"postgresql+asyncpg://u:{SECRET}@h/d", "PostgreSQL URL"),
        (f"host=h password={SECRET}", "PostgreSQL URL"),
        (f"postgresql:u:{SECRET}@h/d", "PostgreSQL URL"),
        (f"postgresql://u:{SECRET}@h/d x", "PostgreSQL URL"),
        (f"postgresql://u:{SECRET}@h", "names no database"),
        (f"postgresql://u:{SECRET}@h:port/d", "not a URL"),
        (f"postgresql://u:{SECRET}@[h/d", "not a URL"),
    ],
)
def test_bad_url_is_refused_without_showing_it(url: str, reason: str) -> None:
    with pytest.raises(InputError, match=rf"^HEADSEARCH_DATABASE_URL: .*{reason}") as caught:
        normalize(url)
    message = str(caught.value)
    assert "postgresql://user:password@host:5432/database" in message
    assert SECRET not in message
    assert "\n" not in message


def test_redacted() -> None:
    url = f"postgresql+psycopg2://u:{SECRET}@h:5433/d?password={SECRET}&sslmode=require"
    assert redact(url) == "postgresql+psycopg2://u:***@h:5433/d?password=***&sslmode=require"
    assert redact("postgresql://h/d") == "postgresql://h/d"
    assert redact("postgresql://u@h/d") == "postgresql://u@h/d"
    address = DatabaseAddress(url, url, embedded=False)
    assert address.redacted == redact(url)
    assert SECRET not in repr(address)
    assert SECRET not in f"{address}"


@pytest.mark.parametrize("options", ["", "?options=-c%20statement_timeout%3D5000&sslmode=disable"])
@pytest.mark.postgres
def test_read_only_url(database_url: str, options: str) -> None:
    connection = psycopg2.connect(libpq_url(read_only(database_url + options)))
    try:
        with connection.cursor() as cursor:
            cursor.execute("SHOW statement_timeout")
            assert cursor.fetchall() == [("5s" if options else "0",)]
            with pytest.raises(psycopg2.errors.ReadOnlySqlTransaction):
                cursor.execute("CREATE TABLE t ()")
    finally:
        connection.close()


@pytest.mark.postgres
def test_given_database_is_used_and_checked(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", libpq_url(database_url))
    monkeypatch.setenv("HEADSEARCH_HOME", "/proc/headsearch")  # no home is needed
    with open_database() as address:
        assert address == DatabaseAddress(database_url, read_only(database_url), embedded=False)
    with pytest.raises(InputError, match="HEADSEARCH_DATABASE_URL names a database elsewhere"):
        embedded_server()
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", libpq_url(database_url) + "_gone")
    with pytest.raises(DatabaseError, match="create it first"), open_database():
        pass


@pytest.mark.postgres
def test_embedded_server_lives_as_long_as_the_block(headsearch_home: Path) -> None:
    with open_database() as address:
        assert address.embedded
        check(address.url)
        check(address.reader_url)
        assert embedded_server().status().running
        assert embedded_server().status().data_dir == headsearch_home / "postgres" / "pgdata"
    assert not embedded_server().status().running
    with pytest.raises(DatabaseError, match=r"no PostgreSQL answers at 127.0.0.1:"):
        check(address.url)


@pytest.mark.postgres
def test_refusals_say_what_to_do(database_url: str) -> None:
    user, _, rest = libpq_url(database_url).removeprefix("postgresql://").partition(":")
    password, _, place = rest.partition("@")
    server = place.partition("/")[0]
    cases = {
        f"postgresql://{user}:{SECRET}@{place}": f"{server} refuses user {user}: check user and password",
        f"postgresql://someone:{SECRET}@{place}": f"{server} refuses user someone",
        f"postgresql://{user}@{place}": f"{server} refuses user {user}",
        f"postgresql://{user}:{password}@{server}/absent": f'{server} has no database "absent"',
        f"postgresql://{user}:{password}@nowhere.invalid/d": "there is no host nowhere.invalid",
        f"postgresql://{user}:{password}@{place}?sslmode=require": f"{server} does not encrypt, which sslmode asks for",
        f"postgresql://{user}:{password}@{place}?bad_option={password}": "cannot be parsed",
        f"postgresql://{user}:pass%zz{password}@{place}": "cannot be parsed",
    }
    for url, expected in cases.items():
        with pytest.raises(HeadsearchError) as caught:
            check(url)
        message = str(caught.value)
        assert expected in message
        assert "\n" not in message
        assert password not in message
        assert SECRET not in message
        assert caught.value.__cause__ is None  # a chained error would show libpq's own text


def test_server_that_is_not_there() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(
            DatabaseError, match=rf"no PostgreSQL answers at 127.0.0.1:{port}: is the server running"
        ):
            check(f"postgresql://u:{SECRET}@127.0.0.1:{port}/d")


@pytest.mark.postgres
def test_old_server_is_refused(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(database_url)
    monkeypatch.setattr(database, "OLDEST_MAJOR", 99)
    with pytest.raises(DatabaseError, match=r"127\.0\.0\.1 runs PostgreSQL 18: 99 or newer"):
        check(database_url)


def test_tests_never_see_the_developers_database() -> None:
    assert not {name for name in os.environ if name.startswith("HEADSEARCH_DATABASE_")}


def test_password_comes_from_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "password"
    monkeypatch.setenv("HEADSEARCH_DATABASE_PASSWORD_FILE", str(file))
    with pytest.raises(
        InputError, match="HEADSEARCH_DATABASE_PASSWORD_FILE is set and HEADSEARCH_DATABASE_URL"
    ):
        given_url()
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", "postgresql://u@h:5/d?sslmode=require")
    with pytest.raises(
        InputError, match=f"HEADSEARCH_DATABASE_PASSWORD_FILE: cannot read {file}: No such file"
    ):
        given_url()
    for content, password in (
        ("s3cret@word\n", SECRET),
        (" a:/?#é ", "%20a%3A%2F%3F%23%C3%A9%20"),
        ("x\r\n", "x"),
    ):
        file.write_bytes(content.encode())
        assert given_url() == f"postgresql+psycopg2://u:{password}@h:5/d?sslmode=require"
    address = given_address()
    assert address is not None
    assert address.url == "postgresql+psycopg2://u@h:5/d?sslmode=require"
    assert "default_transaction_read_only" in address.complete(address.reader_url)
    for content, reason in ((b"", "is empty"), (b"\xff\xfe", "not text"), (b"one\ntwo\n", "in one line")):
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"HEADSEARCH_DATABASE_PASSWORD_FILE: .*{reason}"):
            given_url()
    file.write_text("x")
    for url in (
        f"postgresql://u:{SECRET}@h/d",
        f"postgresql://u@h/d?password={SECRET}",
        "postgresql://u:@h/d",
    ):
        monkeypatch.setenv("HEADSEARCH_DATABASE_URL", url)
        with pytest.raises(InputError, match="keep one") as caught:
            given_url()
        assert SECRET not in str(caught.value)
    monkeypatch.setenv("HEADSEARCH_DATABASE_URL", "postgresql://h/d")
    with pytest.raises(InputError, match="names no user"):
        given_url()
