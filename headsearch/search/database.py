"""One database, seen from one process: an engine for our SQL, a storage for Optuna."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import psycopg2
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, RDBStorage, get_storage
from sqlalchemy import URL, Connection, Engine, create_engine, make_url, text
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.pool import NullPool

from headsearch.errors import AccessError, DatabaseError, InputError
from headsearch.passwords import PASSWORD_VARIABLE, read_password
from headsearch.search.history import History

LOCK_SCHEMA = 0x6865_6164
LOCK_CREATE = 0x6865_6165
LOCK_CLAIM = 0x6865
"""Advisory lock keys: one for the schema, one for creating studies, and a class whose second key is
the study, for claims."""

# A worker keeps one connection, which Optuna's storage shares; two are rare (a sampler that notes something
# on the study inside a claim). The lease thread opens one for each thing that it says (`brief`), or every
# worker that waits in line for a claim would keep a second. So N workers take N connections, and not twice as
# many, of the hundred that a server has by default.
ENGINE_OPTIONS: dict[str, Any] = {
    "pool_size": 1,
    "max_overflow": 3,
    "pool_pre_ping": True,
    # Claims decide by what others committed while they waited for the lock.
    "isolation_level": "READ COMMITTED",
    "connect_args": {
        "connect_timeout": 10,
        "application_name": "headsearch",
        # A cut that is mended costs about its length again before TCP asks once more: give up sooner, and ask
        # over a new connection. Not much sooner: machines with too much to do, and virtual ones, stand still
        # for seconds.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 2,
        "tcp_user_timeout": 20_000,
    },
}
SERVER_OPTIONS = (
    "-c idle_in_transaction_session_timeout=300000 -c tcp_user_timeout=20000 "
    "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=2 -c headsearch.direct=on"
)
"""What the server does with a worker that stopped, or whose cable was cut, in the middle of a claim: its
transaction, and with it the study's lock, ends. A sampler that thinks leaves the transaction idle, so that
limit is minutes; a cut cable is noticed within about 20 s, by keepalives, or by `tcp_user_timeout` while an
answer is on its way, when there are no keepalives. A pooler drops these options; `headsearch.direct` is there
to see whether they arrived."""


def engine_options(url: URL, password_file: Path | None = None) -> dict[str, Any]:
    """Options of an engine on `url`, which keeps the server options that it names itself."""
    given = url.query.get("options", "")
    options = f"{SERVER_OPTIONS} {given if isinstance(given, str) else ' '.join(given)}".strip()
    arguments = ENGINE_OPTIONS["connect_args"] | {"options": options}
    return ENGINE_OPTIONS | with_password_of(url, arguments, password_file)


def with_password_of(url: URL, arguments: dict[str, Any], password_file: Path | None) -> dict[str, Any]:
    """Options of an engine that connects to `url` with psycopg2's `arguments`, and a file's password.

    The file is read for each connection, so that a password that changes stops nobody.
    """
    if password_file is None:
        return {"connect_args": arguments}
    file = password_file
    named: dict[str, Any] = url.translate_connect_args(database="dbname", username="user")
    named |= {key: text if isinstance(text, str) else ",".join(text) for key, text in url.query.items()}

    def connect() -> Any:
        try:
            password = read_password(file, PASSWORD_VARIABLE)
        except InputError as error:
            # Perhaps it is being replaced: to our callers the database is away.
            raise psycopg2.OperationalError(str(error)) from None
        return psycopg2.connect(**{**named, **arguments, "password": password})

    creator: Callable[[], Any] = connect
    return {"creator": creator}


_NO_RIGHT, _READ_ONLY = "42501", "25006"
"""PostgreSQL's codes of two refusals."""


class _Quiet:
    """Keeps Optuna's notes out while any thread is inside.

    What is said of warnings is the whole process's, and each `catch_warnings` sets back what it found: where
    those of two threads overlap, one hears what it asked not to, and the other's end leaves the filter there.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._filters: warnings.catch_warnings[None]

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore", ExperimentalWarning)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


_quiet = _Quiet()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without Optuna's notes on features it calls experimental; we chose them (DESIGN: group, liar)."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _quiet:
        yield


_PASSING = (OperationalError, InterfaceError, InternalError)
"""What comes of a database that is away, and passes."""


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn what drivers and Optuna raise into a DatabaseError of one line, without the password.

    Raises AccessError for what the role may not do.
    """
    try:
        yield
    except _PASSING as error:
        _refused(error)
        raise DatabaseError(f"the database does not answer: {_first_line(error.orig)}") from error
    except DBAPIError as error:
        _refused(error)
        line = f"the database refused a statement: {_first_line(error.orig)}"
        raise DatabaseError(line, transient=False) from error
    except optuna.exceptions.StorageInternalError as error:
        cause = error.__cause__
        _refused(cause)
        transient = not isinstance(cause, DBAPIError) or isinstance(cause, _PASSING)
        raise DatabaseError(f"Optuna's storage failed: {_first_line(cause)}", transient=transient) from error


def _refused(error: BaseException | None) -> None:
    """Raise AccessError if that is what the database's refusal means."""
    said = getattr(error, "orig", None)
    code = getattr(said, "pgcode", None)
    if code not in (_NO_RIGHT, _READ_ONLY):
        return
    connection = getattr(getattr(said, "cursor", None), "connection", None)
    role = f"role {connection.info.user}" if connection is not None else "the URL's role"
    if code == _NO_RIGHT:
        line = f"{role} may not do this ({_first_line(said)}): the database's owner may"
        raise AccessError(line) from error
    # Of a role that reads, or of a standby that takes over soon.
    raise DatabaseError(f"{role} only reads here ({_first_line(said)})") from error


def _first_line(error: BaseException | None) -> str:
    return str(error).strip().splitlines()[0] if error and str(error).strip() else "no reason given"


def lock_claims(connection: Connection, study_id: int, *, wait: bool = True) -> bool:
    """Wait until no claim of the study is under way; while the transaction lasts, none begins.

    Without `wait` it is false, at once, where one is under way or somebody waits.
    """
    kind = "pg_advisory_xact_lock" if wait else "pg_try_advisory_xact_lock"
    found = connection.scalar(
        text(f"SELECT {kind}(:kind, :study_id)"), {"kind": LOCK_CLAIM, "study_id": study_id}
    )
    return wait or bool(found)


class Database:
    """Connections of one process. Make it after a fork, not before."""

    def __init__(self, url: str, password_file: Path | None = None, *, brief: bool = False) -> None:
        """`url` is a SQLAlchemy URL of a PostgreSQL database; `password_file` holds its password.

        With `brief`, connections are closed after each use.
        """
        address = make_url(url).set(drivername="postgresql+psycopg2")
        self.url = address.render_as_string(hide_password=False)
        self.options = engine_options(address, password_file)
        if brief:
            pool = {name: value for name, value in self.options.items() if not name.startswith("pool_")}
            del pool["max_overflow"]
            self.options = pool | {"poolclass": NullPool}
        self._password_file = password_file
        self.engine: Engine = create_engine(self.url, **self.options)
        self._memories: dict[int, History] = {}
        self._plain: RDBStorage | None = None

    @contextlib.contextmanager
    def begin(self) -> Iterator[Connection]:
        """A connection in one transaction.

        Raises:
            DatabaseError: Not reachable, or a statement was refused.
        """
        with translated(), self.engine.begin() as connection:
            yield connection

    @functools.cached_property
    def storage(self) -> BaseStorage:
        """Optuna's storage with its cache of finished trials; the tables must be there (`migrate`).

        Raises:
            DatabaseError: Optuna's tables are of a version that the Optuna here does not know.
        """
        with quietly(), translated():
            plain = RDBStorage(
                self.url,
                engine_kwargs={"pool": self.engine.pool},
                skip_compatibility_check=True,
                skip_table_creation=True,
            )
            self._plain = plain
            there, known = plain.get_current_version(), plain.get_head_version()
            if there != known:
                raise DatabaseError(
                    f"Optuna's tables are of version {there}, Optuna {optuna.__version__} here knows "
                    f"{known}: install the Optuna that made them, or run optuna storage upgrade",
                    transient=False,
                )
            return get_storage(plain)

    def optuna_study(self, name: str) -> optuna.Study:
        """Optuna's view of a study; the sampler is set by whoever proposes."""
        with quietly(), translated():
            return optuna.load_study(study_name=name, storage=self.storage, sampler=_NO_SAMPLER)

    @functools.cached_property
    def direct(self) -> bool:
        """No pooler stands between us and the server."""
        with self.begin() as connection:
            found = connection.scalar(text("SELECT current_setting('headsearch.direct', true)"))
        return bool(found == "on")

    def brief(self) -> Database:
        """The same database, connected to only while something is said."""
        return Database(self.url, self._password_file, brief=True)

    def memory(self, study_id: int) -> History:
        """What this process remembers of a study's trials."""
        return self._memories.setdefault(study_id, History(study_id))

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()
        if self._plain is not None:
            self._plain.remove_session()
            self._plain.engine.dispose()


_NO_SAMPLER = optuna.samplers.RandomSampler()
