"""Whether a postmaster lives, from the file it leaves behind and the process table."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from headsearch.errors import StorageError

_FILE = "postmaster.pid"


@dataclass(frozen=True)
class Postmaster:
    """A living server process."""

    pid: int
    port: int
    ready: bool
    """It accepts connections; false while it starts or recovers."""


def read_postmaster(data_dir: Path) -> Postmaster | None:
    """Find the postmaster of `data_dir`; None when none lives that can be seen from here.

    A pid alone proves nothing: it may belong to a zombie, or to a program that came later.
    Raises StorageError when the data belongs to another user.
    """
    lines = _lines(data_dir)
    if len(lines) < 4 or not lines[0].isdecimal() or not lines[3].isdecimal():
        return None
    pid = int(lines[0])
    try:
        if str(data_dir) not in psutil.Process(pid).cmdline():
            return None
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # a zombie counts as no such process
        return None
    return Postmaster(pid, int(lines[3]), ready=len(lines) > 7 and lines[7] == "ready")


def remove_stale_pid_file(data_dir: Path) -> None:
    """Delete a pid file that would stop PostgreSQL from starting. Only for who knows that no server lives.

    One that names no process at all stays: PostgreSQL deals with it, and checks its shared memory first.
    """
    lines = _lines(data_dir)
    try:
        gone = bool(lines) and lines[0].isdecimal() and not psutil.pid_exists(int(lines[0]))
        if not gone:
            (data_dir / _FILE).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot delete {data_dir / _FILE}: {os.strerror(error.errno or 0)}") from error


def _lines(data_dir: Path) -> list[str]:
    try:
        return [line.strip() for line in (data_dir / _FILE).read_text().splitlines()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {data_dir / _FILE}: {error.strerror}") from error
