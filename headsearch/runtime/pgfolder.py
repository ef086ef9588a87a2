"""The folder that holds one embedded server: its data and the small files around it."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from headsearch.errors import ServerError, StorageError
from headsearch.runtime.filelock import FileLock

Role = Literal["owner", "reader"]
LockName = Literal["users", "start", "server"]


@dataclass(frozen=True)
class StateFolder:
    """Paths below `path`, and what the files say."""

    path: Path

    @property
    def data_dir(self) -> Path:
        """PostgreSQL's own folder; it has this name only when it is complete."""
        return self.path / "pgdata"

    @property
    def log_file(self) -> Path:
        """What the server writes."""
        return self.path / "server.log"

    @property
    def keep_file(self) -> Path:
        """There while the server shall stay up without users."""
        return self.path / "keep"

    @property
    def port(self) -> int | None:
        """The port of the last start."""
        text = _read(self.path / "port")
        return int(text) if text.isdecimal() else None

    @property
    def version(self) -> str:
        """The major version of PostgreSQL that the data belongs to; empty before the first start."""
        return _read(self.data_dir / "PG_VERSION")

    def save_port(self, port: int) -> None:
        """Remember `port` for the next start."""
        write_private(self.path / "port", str(port))

    def password(self, role: Role) -> str:
        """Read the role's password; empty before the first start."""
        return _read(self.path / f"{role}.password")

    def make_password(self, role: Role) -> str:
        """Read the role's password, drawing it at the first call.

        Raises ServerError when the owner's is gone although there is data that asks for it.
        """
        password = self.password(role)
        if not password:
            path = self.path / f"{role}.password"
            if role == "owner" and self.data_dir.exists():
                raise ServerError(f"{path} is gone: put it back, or move {self.data_dir} away to start empty")
            password = secrets.token_urlsafe(24)
            write_private(path, password)
        return password

    def lock(self, name: LockName, *, shared: bool = False, timeout: float = 0.0) -> FileLock | None:
        """Take one of the folder's locks; None when others hold it for longer than `timeout` seconds."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {self.path}: {error.strerror}") from error
        return FileLock.acquire(self.path / f"{name}.lock", shared=shared, timeout=timeout)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error


def write_private(path: Path, text: str) -> None:
    """Write a small file for this user alone, so that a crash leaves the old one or the new one.

    Raises StorageError.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}") from error
