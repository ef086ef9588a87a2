"""Optuna's dashboard, served read-only unless asked otherwise.

optuna-dashboard has neither a login nor a read-only mode: whoever reaches it may delete a study. So it runs
behind a filter that lets only GET and HEAD through, and reads as a database role that may not write. Who may
come in is for `visitors` to say.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import signal
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any, Self, TextIO, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna_dashboard import wsgi
from sqlalchemy import make_url
from sqlalchemy.exc import SQLAlchemyError

from headsearch.errors import AccessError, DatabaseError, HeadsearchError, ServeError
from headsearch.runtime.database import DatabaseAddress, check, may_write
from headsearch.runtime.visitors import Visitors
from headsearch.search.database import with_password_of

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

_READ_METHODS = ("GET", "HEAD")
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_HEALTH_SECONDS = 3
_REQUEST_SECONDS = 60
_HEADERS = [
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "SAMEORIGIN"),
    ("Referrer-Policy", "same-origin"),
]
_ENGINE = {"pool_pre_ping": True, "pool_size": 4, "max_overflow": 8}
_CONNECTION = {"application_name": "headsearch dashboard", "connect_timeout": 10}
_EVERYBODY = Visitors()

_log = logging.getLogger(__name__)


class DashboardApp:
    """The WSGI application: optuna-dashboard behind login, method filter and health check."""

    def __init__(
        self, address: DatabaseAddress, *, writable: bool = False, visitors: Visitors = _EVERYBODY
    ) -> None:
        self._address = address
        self._url = address.url if writable else address.reader_url
        self._writable = writable
        self._visitors = visitors
        self._optuna_app: WSGIApplication | None = None
        self._building = threading.Lock()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            return start_response(status, headers + _HEADERS, *more)

        method = environ["REQUEST_METHOD"]
        if not self._writable and method not in _READ_METHODS:
            reason = "this dashboard is read-only: start it with --writable to change studies"
            return _answer(environ, start, "405 Method Not Allowed", reason, ("Allow", "GET, HEAD"))
        if environ.get("PATH_INFO", "").rstrip("/") == "/healthz":
            return self._health(environ, start)
        visitor = self._visitors.name(environ["headsearch.headers"], environ.get("REMOTE_ADDR", ""))
        if visitor is None:
            return self._challenge(environ, start)
        if method not in _READ_METHODS:
            _log.warning("%s %r by %r", method, environ.get("PATH_INFO", ""), visitor or "a visitor")
        try:
            app = self._dashboard()
        except DatabaseError as error:
            return _answer(environ, start, "503 Service Unavailable", str(error), ("Retry-After", "5"))
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        return app(environ, start)

    def _challenge(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if not self._visitors.logins:
            reason = f"come through the proxy that sets {self._visitors.header}"
            return _answer(environ, start, "401 Unauthorized", reason)
        challenge = ("WWW-Authenticate", 'Basic realm="headsearch", charset="UTF-8"')
        return _answer(environ, start, "401 Unauthorized", "user and password are needed", challenge)

    def _health(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        try:
            check(self._address.complete(self._url), timeout=_HEALTH_SECONDS)
        except HeadsearchError as error:
            _log.warning("%s", error)
            return _answer(environ, start, "503 Service Unavailable", "the database does not answer")
        return _answer(environ, start, "200 OK", "the database answers")

    def _dashboard(self) -> WSGIApplication:
        """Build optuna-dashboard at the first request that finds its tables.

        The dashboard may be up before the first study is.
        """
        with self._building:
            if self._optuna_app is None:
                try:
                    storage = RDBStorage(
                        self._url,
                        engine_kwargs=_ENGINE
                        | with_password_of(make_url(self._url), _CONNECTION, self._address.password_file),
                        skip_compatibility_check=True,
                        skip_table_creation=True,
                    )
                    self._optuna_app = wsgi(storage)
                except (SQLAlchemyError, StorageInternalError, AssertionError) as error:
                    check(self._address.complete(self._url))
                    _log.debug("no Optuna tables", exc_info=True)
                    raise _missing(error) from error
            return self._optuna_app


class DashboardServer(socketserver.ThreadingMixIn, WSGIServer):
    """A threaded HTTP server for a `DashboardApp`, listening from the moment it is made.

    Port 0 takes a free one. Raises ServeError when the address cannot be used.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, app: WSGIApplication, host: str, port: int) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self._host = host
        try:
            super().__init__((host, port), _QuietHandler)
        except OverflowError as error:
            raise ServeError(f"--port {port}: must be between 0 and 65535") from error
        except OSError as error:
            raise ServeError(_explain(error, host, port)) from error
        self.set_app(app)

    @property
    def url(self) -> str:
        """What to open in a browser on this machine."""
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self._host, self._host)  # noqa: S104
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{self.server_port}"

    def server_bind(self) -> None:
        """Bind without asking the name service who we are, which can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self._host, self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Browsers drop connections; that is not worth a traceback on the terminal."""
        _log.debug("request %r of %s failed", request, client_address, exc_info=True)

    def __enter__(self) -> Self:
        return self


class _LogStream(io.TextIOBase):
    """Where applications write their tracebacks."""

    def write(self, text: str) -> int:
        if text.strip():
            _log.debug("%s", text.rstrip())
        return len(text)


class _QuietHandler(WSGIRequestHandler):
    timeout = _REQUEST_SECONDS

    def get_environ(self) -> dict[str, Any]:
        return super().get_environ() | {"headsearch.headers": self.headers}

    def get_stderr(self) -> TextIO:
        return cast(TextIO, _LogStream())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        _log.debug(format, *args)


def serve(
    address: DatabaseAddress,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    writable: bool = False,
    visitors: Visitors = _EVERYBODY,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the dashboard until Ctrl-C or SIGTERM. `ready` is called with its URL once it listens.

    `writable` gives optuna-dashboard as it is: whoever reaches it may edit notes and delete studies.
    `visitors` says who may come in.
    Raises ServeError when the address cannot be used, AccessError when the database's role may not write
    what `writable` lets visitors write.
    """
    if writable and not may_write(address.full_url):
        raise AccessError(
            f"--writable: the role of {address.redacted} may not write: give the owner's URL, or that of "
            "headsearch_worker, who may write notes and delete nothing"
        )
    if host not in _LOOPBACK and visitors.open_to_all:
        _log.warning("the dashboard on %s has no login: whoever reaches it sees all studies", host)
    with DashboardServer(DashboardApp(address, writable=writable, visitors=visitors), host, port) as server:

        def stop(_signal: int, _frame: FrameType | None) -> None:
            # shutdown() waits for the loop that this handler interrupts.
            threading.Thread(target=server.shutdown).start()

        in_main = threading.current_thread() is threading.main_thread()
        before = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)} if in_main else {}
        try:
            if ready:
                ready(server.url)
            server.serve_forever(poll_interval=0.1)
        finally:
            for signal_number, handler in before.items():
                signal.signal(signal_number, handler)


def _missing(error: Exception) -> DatabaseError:
    """What Optuna's failure to open its tables means, in a database that answers."""
    said = getattr(error, "orig", None) or getattr(error.__cause__, "orig", None)
    if getattr(said, "pgcode", None) == "42501":
        return AccessError("this role may not read the tables: their owner must run headsearch db migrate")
    return DatabaseError("this database has no study yet: make one with headsearch study create, then reload")


def _answer(
    environ: WSGIEnvironment, start: StartResponse, status: str, reason: str, *headers: tuple[str, str]
) -> Iterable[bytes]:
    body = json.dumps({"reason": reason}).encode() + b"\n"
    start(
        status,
        [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            *headers,
        ],
    )
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]


def _explain(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use: choose another with --port"
    if error.errno == errno.EACCES:
        return f"port {port} on {host} needs more rights than yours: choose one above 1023 with --port"
    return f"cannot listen on {host}: {error.strerror or error}; --host must be an address of this machine"
