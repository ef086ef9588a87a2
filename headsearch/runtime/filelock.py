"""Advisory locks on local files. The kernel drops them when their holder dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Self

from headsearch.errors import StorageError

_POLL_SECONDS = 0.02


class FileLock:
    """A lock held from `acquire` to `release`, on an open file of its own.

    The lock belongs to the open file: other `FileLock` objects conflict with it even within one process,
    and a process that inherits `fd` holds it too, until it closes the file or ends.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def acquire(cls, path: Path, *, shared: bool = False, timeout: float = 0.0) -> Self | None:
        """Take the lock; None when others still hold it after `timeout` seconds.

        Raises StorageError when the file cannot be opened or its file system has no locks.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StorageError(f"cannot open {path}: {error.strerror}") from error
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in {errno.EAGAIN, errno.EACCES, errno.EINTR}:
                    os.close(fd)
                    raise StorageError(f"cannot lock {path}: {error.strerror}") from error
            except BaseException:
                os.close(fd)
                raise
            else:
                return cls(path, fd)
            if time.monotonic() >= deadline:
                os.close(fd)
                return None
            time.sleep(_POLL_SECONDS)

    def release(self) -> None:
        """Close the file. No explicit unlock: that would take the lock from a process that inherited it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
