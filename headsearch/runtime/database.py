"""Which database: the one that HEADSEARCH_DATABASE_URL names, else the embedded server of the home folder.

The URL's password may stand in a file of its own, HEADSEARCH_DATABASE_PASSWORD_FILE, which is read again for
every connection: it can be replaced while workers run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

import psycopg2

from headsearch.errors import DatabaseError, InputError, ServerError
from headsearch.home import home_folder, postgres_folder
from headsearch.passwords import PASSWORD_VARIABLE, read_password

if TYPE_CHECKING:
    from headsearch.runtime.postgres import EmbeddedServer

URL_VARIABLE = "HEADSEARCH_DATABASE_URL"
FILE_VARIABLE = "HEADSEARCH_DATABASE_URL_FILE"
OLDEST_MAJOR = 14
_DRIVER = "postgresql+psycopg2"
_SCHEMES = frozenset({"postgresql", _DRIVER})
_VALID = "postgresql://user:password@host:5432/database"
_CONNECT_SECONDS = 10
_READ_ONLY = "-c default_transaction_read_only=on"


@dataclass(frozen=True)
class DatabaseAddress:
    """Where the database is. `url` and `reader_url` may hold passwords: show `redacted`."""

    url: str
    """For SQLAlchemy with psycopg2; without its password where that is in `password_file`."""
    reader_url: str
    """Of a role that may only read; elsewhere than on the embedded server, of the same role with
    transactions that only read."""
    embedded: bool
    """On the embedded server of this machine's home folder."""
    password_file: Path | None = None
    """Holds the password of both, which may change."""

    @property
    def full_url(self) -> str:
        """`url` with its password, as the file has it now. Raises InputError for a file that has none."""
        return self.complete(self.url)

    def complete(self, url: str) -> str:
        """`url` with the password of the file, where there is one. Raises InputError as `full_url` does."""
        if self.password_file is None:
            return url
        password = quote(read_password(self.password_file, PASSWORD_VARIABLE), safe="")
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user}:{password}@{host}"))

    @property
    def redacted(self) -> str:
        """`url` without its password."""
        return redact(self.url)

    def __repr__(self) -> str:
        return f"DatabaseAddress({self.redacted!r}, embedded={self.embedded})"


def given_url() -> str | None:
    """Read the URL from HEADSEARCH_DATABASE_URL, else from the file HEADSEARCH_DATABASE_URL_FILE names.

    With its password, from HEADSEARCH_DATABASE_PASSWORD_FILE where that is set. None when there is no URL.
    Raises InputError naming the variable when the value cannot be used.
    """
    found = given_address()
    return found.full_url if found else None


def given_address() -> DatabaseAddress | None:
    """The database that the environment names, or None. Raises InputError as `given_url` does."""
    url = _given_url()
    file = os.environ.get(PASSWORD_VARIABLE, "").strip()
    if not file:
        return DatabaseAddress(url, read_only(url), embedded=False) if url else None
    if url is None:
        raise InputError(f"{PASSWORD_VARIABLE} is set and {URL_VARIABLE} is not: set both or none")
    parts = urlsplit(url)
    if not parts.username:
        raise InputError(f"{URL_VARIABLE}: names no user for the password of {PASSWORD_VARIABLE}")
    if parts.password is not None or "password" in dict(parse_qsl(parts.query, keep_blank_values=True)):
        raise InputError(f"{URL_VARIABLE} has a password and {PASSWORD_VARIABLE} is set: keep one")
    address = DatabaseAddress(url, read_only(url), embedded=False, password_file=Path(file).absolute())
    _ = address.full_url
    return address


def _given_url() -> str | None:
    url, file = os.environ.get(URL_VARIABLE, "").strip(), os.environ.get(FILE_VARIABLE, "").strip()
    if url and file:
        raise InputError(f"{URL_VARIABLE} and {FILE_VARIABLE} are both set: keep one")
    if url:
        return normalize(url, URL_VARIABLE)
    if not file:
        return None
    try:
        text = Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise InputError(f"{FILE_VARIABLE}: cannot read {file}: {reason}") from error
    return normalize(text, FILE_VARIABLE)


def normalize(url: str, name: str = URL_VARIABLE) -> str:
    """Check `url` and give it SQLAlchemy's name of the driver.

    Raises InputError that names `name` and what would be valid, never the URL itself: it may hold a password.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise InputError(f"{name}: not a URL like {_VALID}") from error
    if parts.scheme.startswith("sqlite"):
        raise InputError(
            f"{name}: SQLite has no row locks, which workers need to share a study; it must be like {_VALID}"
        )
    if parts.scheme not in _SCHEMES or "://" not in url or any(c.isspace() for c in url):
        raise InputError(f"{name}: must be a PostgreSQL URL like {_VALID}")
    if not parts.path.strip("/"):
        raise InputError(f"{name}: names no database; it must be like {_VALID}")
    return _DRIVER + url[len(parts.scheme) :]


def redact(url: str) -> str:
    """`url` with asterisks for its password, wherever it stands."""
    parts = urlsplit(url)
    user_info, at, host = parts.netloc.rpartition("@")
    user, colon, _ = user_info.partition(":")
    query = "&".join(
        "password=***" if field.partition("=")[0] == "password" else field for field in parts.query.split("&")
    )
    return urlunsplit(parts._replace(netloc=f"{user}{':***' if colon else ''}{at}{host}", query=query))


def read_only(url: str) -> str:
    """`url` whose transactions only read, unless a session asks otherwise."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    query["options"] = f"{query.get('options', '')} {_READ_ONLY}".strip()
    return urlunsplit(parts._replace(query=urlencode(query, quote_via=quote)))


def libpq_url(url: str) -> str:
    """`url` as psycopg2 itself takes it, without SQLAlchemy's driver."""
    return url.replace(f"{_DRIVER}://", "postgresql://", 1)


@contextmanager
def open_database(home: Path | None = None) -> Iterator[DatabaseAddress]:
    """Resolve the database and keep the embedded server, where it is the one, alive inside the block.

    Raises InputError for a URL that cannot be used, DatabaseError when the database does not answer, and
    ServerError when the embedded server cannot be started.
    """
    given = given_address()
    if given:
        check(given.full_url)
        yield given
        return
    with embedded_server(home).attach() as handle:
        yield DatabaseAddress(handle.url("owner"), handle.url("reader"), embedded=True)


def embedded_server(home: Path | None = None) -> EmbeddedServer:
    """Name the embedded server of the home folder, for the commands that start and stop it.

    Raises InputError when a URL names a database elsewhere, ServerError where there is no embedded server.
    """
    if given_address():
        raise InputError(f"{URL_VARIABLE} names a database elsewhere: unset it to use the embedded server")
    if sys.platform == "win32":
        raise ServerError(f"there is no embedded PostgreSQL on Windows: set {URL_VARIABLE} to {_VALID}")
    from headsearch.runtime.postgres import EmbeddedServer  # needs a POSIX system

    # libpq's variables are of other servers, and would change every connection to this one.
    for variable in [name for name in os.environ if name.startswith("PG") and name.isupper()]:
        del os.environ[variable]
    return EmbeddedServer(postgres_folder(home or home_folder()))


def check(url: str, *, timeout: int = _CONNECT_SECONDS) -> None:
    """Connect once. Raises DatabaseError in one line that holds no password, InputError for a bad URL."""
    parts = urlsplit(url)
    try:
        connection = psycopg2.connect(libpq_url(url), connect_timeout=timeout)
    except psycopg2.OperationalError as error:
        raise DatabaseError(_explain(str(error), url)) from None
    except psycopg2.Error:
        # libpq quotes the part that it could not parse, which may be the password.
        raise InputError(f"{URL_VARIABLE}: cannot be parsed; it must be like {_VALID}") from None
    try:
        version = connection.server_version
    finally:
        connection.close()
    if version < OLDEST_MAJOR * 10_000:
        raise DatabaseError(
            f"{parts.hostname or 'the local server'} runs PostgreSQL {version // 10_000}: "
            f"{OLDEST_MAJOR} or newer is needed"
        )


def may_write(url: str) -> bool:
    """Whether the role of `url` may write what optuna-dashboard does; before there are tables, make them.

    Raises DatabaseError when the database does not answer.
    """
    try:
        connection = psycopg2.connect(libpq_url(url), connect_timeout=_CONNECT_SECONDS)
    except psycopg2.OperationalError as error:
        raise DatabaseError(_explain(str(error), url)) from None
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT current_setting('transaction_read_only') = 'off' AND "
                "CASE WHEN to_regclass('public.study_system_attributes') IS NULL "
                "THEN has_schema_privilege('public', 'CREATE') ELSE has_table_privilege("
                "to_regclass('public.study_system_attributes'), 'INSERT') END"
            )
            return bool(cursor.fetchone()[0])
    finally:
        connection.close()


def _explain(message: str, url: str) -> str:
    """Put psycopg2's message about `url` in one line that says what to do."""
    parts = urlsplit(url)
    where = f"{parts.hostname or 'the local server'}:{parts.port or 5432}"
    user = unquote(parts.username or "") or "(none given)"
    reason = message.strip().splitlines()[0] if message.strip() else "no reason given"
    reason = reason.split("FATAL:")[-1].strip()
    if parts.password:
        reason = reason.replace(unquote(parts.password), "***").replace(parts.password, "***")
    if "authentication failed" in reason or "no password supplied" in reason:
        source = PASSWORD_VARIABLE if os.environ.get(PASSWORD_VARIABLE) else URL_VARIABLE
        return f"the database at {where} refuses user {user}: check user and password in {source}"
    if tls := _explain_tls(reason, parts.hostname or ""):
        return f"the database at {where} {tls}"
    if reason.startswith("database ") and reason.endswith("does not exist"):
        return f"the server at {where} has no {reason.removesuffix(' does not exist')}: create it first"
    if any(sign in reason for sign in ("refused", "timeout", "timed out", "No such file", "unreachable")):
        return f"no PostgreSQL answers at {where}: is the server running, and is {URL_VARIABLE} right?"
    if "could not translate host name" in reason:
        return f"there is no host {parts.hostname}: check {URL_VARIABLE}"
    return f"the database at {where} refuses the connection: {reason}"


def _explain_tls(reason: str, host: str) -> str | None:
    """What to do where libpq's `reason` is about encryption; None where it is not."""
    if "certificate verify failed" in reason:
        return "shows a certificate of another authority than that in sslrootcert: it may not be the server"
    if "does not match host name" in reason:
        return f"shows a certificate of another host than {host}: it may not be the server"
    if "root certificate file" in reason:
        return f"cannot be verified ({reason}): name the certificate of its authority by sslrootcert"
    if "server does not support SSL" in reason:
        return "does not encrypt, which sslmode asks for: turn ssl on there"
    if "no pg_hba.conf entry" in reason and ("no encryption" in reason or "SSL off" in reason):
        return (
            "wants an encrypted connection, or does not let this host, user and database in: "
            f"add ?sslmode=verify-full&sslrootcert=FILE to {URL_VARIABLE}"
        )
    return None
