"""The embedded PostgreSQL server: one for each home folder, shared by all commands that use that home.

Three lock files order what commands do, taken in this order:

    start.lock    exclusive around looking, starting and stopping
    users.lock    shared by every command that uses the server; the last one out stops it
    server.lock   inherited by the server and all its processes: it tells, after any kind of crash and also
                  from another container on the same volume, whether something of it still lives

TCP on 127.0.0.1 with passwords, no Unix socket: no limit on the length of paths, and the same kind of URL
as in production.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from headsearch.errors import ServerError
from headsearch.runtime import pgroles
from headsearch.runtime.filelock import FileLock
from headsearch.runtime.pgfolder import Role, StateFolder
from headsearch.runtime.pglaunch import RECOVERY_SECONDS, launch, shut_down
from headsearch.runtime.pgprocess import Postmaster, read_postmaster

_ORPHAN_SECONDS = 60.0
_REFUSAL_SECONDS = 20.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class ServerStatus:
    """What `EmbeddedServer.status` found, without waiting for anybody."""

    running: bool
    """A postmaster lives; it may still be recovering."""
    ready: bool
    """It accepts connections."""
    pid: int | None
    """Of the postmaster."""
    port: int | None
    """The port it listens on, or will ask for first."""
    version: str
    """PostgreSQL's major version that the data belongs to; empty before the first start."""
    kept: bool
    """It stays up until `EmbeddedServer.stop`, also when nobody uses it."""
    data_dir: Path
    """PostgreSQL's own folder."""
    log_file: Path
    """What the server writes."""


class ServerHandle:
    """The right to a running server. The last one closed stops it, unless it is kept."""

    def __init__(self, server: EmbeddedServer, users: FileLock) -> None:
        self._server = server
        self._users = users
        self._pid = os.getpid()

    def url(self, role: Role = "owner", database: str = pgroles.DATABASE) -> str:
        """Compose the URL for SQLAlchemy, password included."""
        return self._server.url(role, database)

    def close(self) -> None:
        """Give the server up. A second call, or one in a forked child, stops nothing."""
        held = self._users.fd >= 0
        self._users.release()
        if held and self._pid == os.getpid():
            self._server.stop_if_unused()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EmbeddedServer:
    """The server whose state is in the folder `state_dir`. Making one of these starts nothing."""

    def __init__(self, state_dir: Path) -> None:
        # One name for the folder whatever links lead to it: the server is known by its data folder's path.
        self.folder = StateFolder(state_dir.resolve())

    def attach(self) -> ServerHandle:
        """Use the server, starting it if need be: made at the first start, recovered after a crash.

        Raises ServerError when it cannot be started, StorageError when the state folder cannot be written.
        """
        with self._locked():
            users = self.folder.lock("users", shared=True, timeout=10)
            if users is None:
                raise ServerError(f"another program holds {self.folder.path / 'users.lock'}")
            try:
                self._ensure_running()
            except BaseException:
                users.release()
                raise
            return ServerHandle(self, users)

    def start(self) -> ServerStatus:
        """Start the server if need be and keep it running until `stop`. Raises what `attach` raises."""
        with self._locked():
            self._ensure_running()
            self.folder.keep_file.touch()
        return self.status()

    def stop(self, *, force: bool = False) -> bool:
        """Stop the server and end `start`'s keeping. True when one was running.

        Raises ServerError when other commands use it, unless `force` cuts them off, and when it won't stop.
        """
        with self._locked():
            users = self.folder.lock("users")
            if users is None and not force:
                raise ServerError("other headsearch commands use the server: end them first, or use --force")
            try:
                self.folder.keep_file.unlink(missing_ok=True)
                return shut_down(self.folder)
            finally:
                if users:
                    users.release()

    def stop_if_unused(self) -> None:
        """Stop the server unless it is kept or somebody else uses it."""
        with self._locked():
            users = self.folder.lock("users")
            if users is None:
                return
            with users:
                if not self.folder.keep_file.exists():
                    shut_down(self.folder)

    def status(self) -> ServerStatus:
        """Tell how the server is. Changes nothing and works without a server."""
        postmaster = read_postmaster(self.folder.data_dir)
        return ServerStatus(
            running=postmaster is not None,
            ready=postmaster is not None and postmaster.ready,
            pid=postmaster.pid if postmaster else None,
            port=postmaster.port if postmaster else self.folder.port,
            version=self.folder.version,
            kept=self.folder.keep_file.exists(),
            data_dir=self.folder.data_dir,
            log_file=self.folder.log_file,
        )

    def url(self, role: Role = "owner", database: str = pgroles.DATABASE) -> str:
        """Compose the URL for SQLAlchemy, password included. Raises ServerError before the first start."""
        port, password = self.folder.port, self.folder.password(role)
        if not port or not password:
            raise ServerError(f"no server in {self.folder.path} yet: start one with headsearch db start")
        name = pgroles.OWNER if role == "owner" else pgroles.READER
        return pgroles.server_url(port, name, password, database)

    def _locked(self) -> FileLock:
        lock = self.folder.lock("start", timeout=RECOVERY_SECONDS + 60)
        if lock is None:
            raise ServerError(f"another command holds {self.folder.path / 'start.lock'} and does not end")
        return lock

    def _ensure_running(self) -> None:
        """Return with a server that accepts connections and has its database and roles."""
        began = time.monotonic()
        while True:
            waited = time.monotonic() - began
            postmaster = read_postmaster(self.folder.data_dir)
            if postmaster is None:
                lock = self.folder.lock("server")
                if lock:
                    with lock:
                        launch(self.folder, lock)
                    began = time.monotonic()
                    continue
                # Processes of a killed server are on their way out, or a start whose starter was killed
                # has not written its pid file yet. Both pass.
                if waited > _ORPHAN_SECONDS:
                    raise ServerError(
                        f"processes that cannot be seen from here use {self.folder.data_dir} "
                        "(another container?): end them, or set HEADSEARCH_DATABASE_URL"
                    )
            elif postmaster.ready:
                try:
                    self._finish_start(postmaster)
                except pgroles.ConnectError as refused:
                    # It may have been killed a moment ago and not be gone from the process table.
                    if refused.final or waited > _REFUSAL_SECONDS:
                        raise
                else:
                    return
            elif waited > RECOVERY_SECONDS:
                raise ServerError(f"PostgreSQL is still recovering: wait, and see {self.folder.log_file}")
            time.sleep(_POLL_SECONDS)

    def _finish_start(self, postmaster: Postmaster) -> None:
        if self.folder.port != postmaster.port:
            self.folder.save_port(postmaster.port)
        owner, reader = self.folder.make_password("owner"), self.folder.make_password("reader")
        pgroles.prepare(postmaster.port, owner, reader)
