"""Making, starting and stopping a server with PostgreSQL's own programs.

Callers hold the locks that keep others from doing the same.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from headsearch.errors import ServerError
from headsearch.runtime import pgroles
from headsearch.runtime.filelock import FileLock
from headsearch.runtime.pgbinaries import (
    MAJOR,
    Binaries,
    ServerUser,
    one_line,
    server_user,
    usable_binaries,
)
from headsearch.runtime.pgfolder import StateFolder, write_private
from headsearch.runtime.pgprocess import read_postmaster, remove_stale_pid_file

RECOVERY_SECONDS = 900
"""Crash recovery on a busy disk takes minutes."""
_STOP_SECONDS = 120
_LOG_BYTES = 16 * 2**20
_PORTS = range(20_000, 32_000)
"""Below the ports that systems hand out to outgoing connections, so that ours is free again at restart."""
_PORT_ATTEMPTS = 5
_SETTINGS = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": "200"}

_log = logging.getLogger(__name__)


def launch(folder: StateFolder, lock: FileLock) -> None:
    """Start the server, making its data at the first start; `lock` is server.lock, for it to inherit.

    Raises ServerError with what PostgreSQL's log gives as the reason.
    """
    user = server_user(folder.data_dir)
    _check_reach(folder, user)
    binaries = usable_binaries(user, folder.path)
    _remove_leftovers(folder)
    if not folder.data_dir.exists():
        _make_cluster(folder, binaries, lock)
    if folder.version != str(MAJOR):
        raise ServerError(
            f"{folder.data_dir} was made by PostgreSQL {folder.version or '?'}, this is "
            f"{binaries.version()}: dump it with that version's pg_dump, move it away, then pg_restore"
        )
    remove_stale_pid_file(folder.data_dir)
    _open_log(folder, user)
    log = ""
    for _ in range(_PORT_ATTEMPTS):
        port = _free_port(folder.port)
        folder.save_port(port)
        started, log = _start(folder, binaries, port, lock)
        if started:
            return
        if "could not bind" not in log and "Address already in use" not in log:
            break
    raise ServerError(f"PostgreSQL did not start: {_reason(log)} (log: {folder.log_file})")


def shut_down(folder: StateFolder) -> bool:
    """Stop the server, cutting off its clients. True when one was running.

    Raises ServerError when it goes on.
    """
    if read_postmaster(folder.data_dir) is None:
        return False
    binaries = usable_binaries(server_user(folder.data_dir), folder.path)
    arguments = ["stop", "-s", "-w", "-m", "fast", "-t", str(_STOP_SECONDS), "-D", str(folder.data_dir)]
    done = binaries.run("pg_ctl", arguments, timeout=_STOP_SECONDS + 30)
    if done.returncode and read_postmaster(folder.data_dir):
        raise ServerError(f"PostgreSQL did not stop: {one_line(done.stdout)} (log: {folder.log_file})")
    return True


def _check_reach(folder: StateFolder, user: ServerUser) -> None:
    """Raise ServerError when PostgreSQL's user cannot enter the folder through all its parents."""
    if set('"$`\\\n') & set(str(folder.path)):
        raise ServerError(f"{folder.path}: PostgreSQL's folder must not have quotes, $ or \\ in its path")
    if user.is_me:
        return
    folder.path.chmod(folder.path.stat().st_mode | 0o011)
    enter = ["/bin/sh", "-c", 'cd "$0"', str(folder.path)]
    done = subprocess.run(
        enter, user=user.uid, group=user.gid, extra_groups=[], cwd="/", capture_output=True, check=False
    )
    if done.returncode:
        raise ServerError(
            f"user {user.name}, who runs PostgreSQL for root, cannot enter {folder.path}: "
            "set HEADSEARCH_HOME to a folder such as /var/lib/headsearch"
        )


def _remove_leftovers(folder: StateFolder) -> None:
    """Delete what killed first starts left behind; nothing writes there while we hold server.lock."""
    for leftover in folder.path.glob("pgdata.*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _make_cluster(folder: StateFolder, binaries: Binaries, lock: FileLock) -> None:
    """Make the data folder. initdb inherits server.lock, so that the next start waits for an orphaned one."""
    workspace = Path(tempfile.mkdtemp(prefix="pgdata.", dir=folder.path))
    try:
        password_file = workspace / "password"
        write_private(password_file, folder.make_password("owner"))
        for path in (workspace, password_file):
            os.chown(path, binaries.user.uid, binaries.user.gid)
        arguments = ["-D", str(workspace / "data"), "-U", pgroles.OWNER, f"--pwfile={password_file}"]
        arguments += ["-A", "scram-sha-256", "-E", "UTF8", "--locale=C", "--no-instructions"]
        done = binaries.run("initdb", arguments, pass_fds=[lock.fd], timeout=RECOVERY_SECONDS)
        if done.returncode:
            raise ServerError(f"PostgreSQL's initdb failed: {_reason(done.stdout)}")
        (workspace / "data").rename(folder.data_dir)
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def _open_log(folder: StateFolder, user: ServerUser) -> None:
    log_file = folder.log_file
    if log_file.exists() and log_file.stat().st_size > _LOG_BYTES:
        log_file.replace(log_file.with_suffix(".log.old"))
    log_file.touch(mode=0o600)
    if not user.is_me:
        os.chown(log_file, user.uid, user.gid)


def _start(folder: StateFolder, binaries: Binaries, port: int, lock: FileLock) -> tuple[bool, str]:
    """Start and wait; whether the server accepts connections now, and what it wrote to its log."""
    settings = _SETTINGS | {"port": str(port)}
    options = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
    arguments = ["start", "-s", "-w", "-t", str(RECOVERY_SECONDS), "-o", options]
    arguments += ["-D", str(folder.data_dir), "-l", str(folder.log_file)]
    before = folder.log_file.stat().st_size
    done = binaries.run("pg_ctl", arguments, pass_fds=[lock.fd], timeout=RECOVERY_SECONDS + 30)
    with folder.log_file.open("rb") as log:
        log.seek(before)
        return done.returncode == 0, log.read().decode(errors="replace") or done.stdout


def _free_port(saved: int | None) -> int:
    """Choose the port of last time, because workers elsewhere come back to it, else a free one."""
    if saved and _is_free(saved):
        return saved
    for _ in range(1000):
        port = _PORTS[secrets.randbelow(len(_PORTS))]
        if _is_free(port):
            if saved:
                _log.warning("port %d is taken by another program: PostgreSQL moves to %d", saved, port)
            return port
    raise ServerError(f"no free TCP port on 127.0.0.1 between {_PORTS.start} and {_PORTS.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _reason(log: str) -> str:
    """Find the line that says why a program ended."""
    telling = [line for line in log.splitlines() if "FATAL:" in line or "PANIC:" in line or "error:" in line]
    return one_line(telling[-1] if telling else log).split("FATAL:")[-1].strip()
